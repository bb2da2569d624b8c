"""KTO's KL term: how much more likely than under the reference the alternate answers of a batch have become.

    kl = mean over the alternates of s - s_ref, 0 without any, and without a gradient

It has to be known before the first coefficient, so the alternates go through the head alone and first, at 1G of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from simnpo.kernels.backend import IGNORE_INDEX
from simnpo.kernels.segment_sums import segment_sums
from simnpo.objectives import KTO

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def fold_in_kl(
    objective: KTO, token_logps: Callable[[Tensor], Tensor], targets: Tensor, bounds: Tensor, ref_logps: Tensor,
    exact_logps: Tensor | None, alternates: Tensor, retain_mask: Tensor | None,
    sequence_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference with which KTO sees the KL, and the targets without those of the alternates.

    Args:
        token_logps: from targets (N,) to their log-probabilities (N,), 0 where ignored.
        targets: (N,) flattened.   bounds: (B + 1,) of the sequences.   ref_logps, alternates, retain_mask: (B,).
        exact_logps: (B,) log-probabilities that need not be computed; or None.
        sequence_group: the ranks that every sequence is spread over.
    """
    is_alternate = alternates == -1
    if retain_mask is not None:
        is_alternate &= ~retain_mask
    lengths = bounds.diff()
    of_alternate = is_alternate.repeat_interleave(lengths, output_size=len(targets))
    with torch.no_grad():
        logps = exact_logps
        if logps is None:
            logps = segment_sums(token_logps(targets.where(of_alternate, IGNORE_INDEX)), lengths)
            if sequence_group is not None:
                dist.all_reduce(logps, group=sequence_group)
        ratios = (logps - ref_logps.to(logps)).where(is_alternate, 0)
        kl = ratios.sum() / is_alternate.sum().clamp(min=1)
    return objective.shifted_reference(ref_logps.to(kl), kl), targets.where(~of_alternate, IGNORE_INDEX)
