"""Sums over the tokens of each sequence, in the same order every run.

The library adds one token after another: in float32 the sum of 32 768 of them is off by up to two nats. So it adds in
float64, of which there are only N numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """(N,) values of S segments, one after another, to their (S,) sums, each rounded once.

    Args:
        values: (N,) float.
        lengths: (S,) int64 that add up to N.
    """
    if not len(values):
        return values.new_zeros(len(lengths))
    # an index_add_ has no fixed order on a GPU; Apple's have no float64
    wide = values if values.device.type == "mps" else values.double()
    return torch.segment_reduce(wide, "sum", lengths=lengths, initial=0.0).to(values.dtype)
