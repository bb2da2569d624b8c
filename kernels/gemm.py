"""The head's matrix products: the library's, with float32 accumulation where chunks add up."""

from __future__ import annotations

import torch
from torch import Tensor

# rows of the product alive at once where the library cannot accumulate bf16 products in float32 by itself
SLAB_ROWS = 4096


def _accumulates_in_float32(a: Tensor) -> bool:
    return a.is_cuda and torch.version.hip is None


def logits_into(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x (n, D) @ weight (V, D)^T into `out` (n, V): in the operands' dtype, or in float32, never rounded."""
    if out.dtype == x.dtype:
        return torch.mm(x, weight.t(), out=out)
    if _accumulates_in_float32(x):
        return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    for rows in _slabs(weight):
        out[:, rows] = torch.mm(x.float(), weight[rows].float().t())
    return out


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N) in float32 (float64 for float64) whatever the dtype of the operands."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if _accumulates_in_float32(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    for rows in _slabs(a):
        out[rows] = torch.mm(a[rows], b)
    return out


def add_mm_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total (M, N) float32 += a (M, K) @ b (K, N); only the product of this call is ever rounded to a's dtype."""
    if total.dtype == a.dtype:
        return torch.addmm(total, a, b, out=total)
    if _accumulates_in_float32(a):
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    for rows in _slabs(a):
        total[rows] += torch.mm(a[rows], b)
    return total


def _slabs(a: Tensor) -> list[slice]:
    return [slice(start, start + SLAB_ROWS) for start in range(0, a.shape[0], SLAB_ROWS)]
