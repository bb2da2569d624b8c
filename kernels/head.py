"""The head as the kernels see it: the dtype it multiplies in, and what stands between its products and the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from simnpo.kernels.passes import Passes


class LogitTransform(NamedTuple):
    """logits = softcap(scale * (h W^T + bias)), in that order: Cohere and Granite scale, Gemma caps, Phi has a bias.

    bias: (V,) or None.   scale: factor.   softcap: the c of c tanh(x / c), or None.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """The logits of (..., V) products; overwrites them."""
        if self.bias is not None:
            products.add_(self.bias)
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def columns(self, columns: slice | Tensor) -> LogitTransform:
        """The transform of some columns of the vocabulary."""
        return self._replace(bias=None if self.bias is None else self.bias[columns])

    def at(self, targets: Tensor, products: Tensor) -> Tensor:
        """The logits of one column per row: (N,) products at (N,) targets; overwrites the products."""
        bias = None if self.bias is None else self.bias[targets]
        return LogitTransform(bias, self.scale, self.softcap)(products)


class RowStats(NamedTuple):
    """What `row_pass` knows of each token, all (N,): see there."""

    target_logits: Tensor
    logps: Tensor
    largest: Tensor
    total: Tensor


class RowReductions(NamedTuple):
    """What `row_pass` adds for objectives of the whole row, all (N,).

    mean_logits: over the vocabulary.   other_logits, others: the largest logit but the target's, and its column, int64.
    """

    mean_logits: Tensor
    other_logits: Tensor
    others: Tensor

    @staticmethod
    def empty(N: int, like: Tensor) -> RowReductions:
        """Room for the reductions of N rows."""
        return RowReductions(like.new_empty(N), like.new_empty(N), like.new_empty(N, dtype=torch.int64))


class HeadOptions(NamedTuple):
    """What does not change from chunk to chunk; dtype is that of the products' operands.

    vocab_group: the ranks that hold the rest of the vocabulary; None: it is all here.
    """

    transform: LogitTransform
    dtype: torch.dtype
    logits_dtype: torch.dtype
    chunk_tokens: int
    gradient_error: float
    passes: Passes
    vocab_group: ProcessGroup | None = None


def gradient_buffer(chunk: Tensor, options: HeadOptions) -> Tensor:
    """Where the gradient of a chunk of logits goes: over them, or beside them where it is of another dtype."""
    return chunk if chunk.dtype == options.dtype else torch.empty_like(chunk, dtype=options.dtype)


def float_dtype(tensor: Tensor) -> torch.dtype:
    """What a reduction over `tensor` is computed in: float32, and float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def product_dtype(hidden_states: Tensor, lm_head_weight: Tensor) -> torch.dtype:
    """The dtype the head multiplies in: the operands', or autocast's where it is on, as in `F.linear`."""
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type) and hidden_states.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return lm_head_weight.dtype
