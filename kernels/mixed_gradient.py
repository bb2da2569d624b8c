"""The gradient of an objective of the whole row, written over the row of logits.

    dz[n, v]    = target[n] (1[v = y] - p[n, v]) + uniform[n] (1/V - p[n, v]) + other[n] (1[v = m] - p[n, v])
    dlogits[n]  = dz[n] dz/dlogits

with y = targets[n], m = others[n], p the softmax of z: see `simnpo/objectives/rows.py`. Three numbers a row are made of
the mix beforehand, so that an entry costs an exp and a product, as in `row_gradient`.

Dimension key, here and in the test:
    N  tokens      V  vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simnpo.kernels.backend import LAUNCH_OPTIONS, tl, triton
from simnpo.kernels.head import LogitTransform, RowReductions, RowStats
from simnpo.kernels.launch import ROW_GRADIENT
from simnpo.kernels.row_pass import exp, row_blocks, transformed_tile
from simnpo.objectives.rows import Mix


class RowNumbers(NamedTuple):
    """dz[n, v] = slope exp(z - largest) + base, but at the target and at the other; all (N,)."""

    slope: Tensor
    base: Tensor
    at_target: Tensor
    at_other: Tensor


def row_numbers(stats: RowStats, reductions: RowReductions, mix: Mix, V: int) -> RowNumbers:
    """The mix as what an entry of the row needs; 1 - p of the target from expm1, as in `row_pass`."""
    p, p_other = torch.exp(stats.logps), torch.exp(reductions.other_logits - stats.largest) / stats.total
    base = mix.uniform / V
    return RowNumbers(
        slope=-(mix.target + mix.uniform + mix.other) / stats.total,
        base=base,
        at_target=base - mix.target * torch.expm1(stats.logps) - (mix.uniform + mix.other) * p,
        at_other=base + mix.other * (1 - p_other) - (mix.target + mix.uniform) * p_other,
    )


@triton.jit
def _mixed_gradient_kernel(
    # data
    logits_ptr, out_ptr, rows_ptr, targets_ptr, target_logits_ptr, others_ptr, bias_ptr, largest_ptr,
    slope_ptr, base_ptr, at_target_ptr, at_other_ptr,
    # shapes and strides
    V, logits_stride_n, out_stride_n, scale, softcap,
    # constants
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # int64: n * V passes 2**31 at 16 744 tokens of Llama 3's 128 256-word vocabulary
    n = tl.program_id(0).to(tl.int64)
    row = n
    if HAS_ROWS:
        row = tl.load(rows_ptr + n)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    z = tl.load(logits_ptr + row * logits_stride_n + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    z = transformed_tile(z, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    is_target = offs_v == tl.load(targets_ptr + n).to(tl.int32)
    is_other = offs_v == tl.load(others_ptr + n).to(tl.int32)
    dz = exp(z - tl.load(largest_ptr + n)) * tl.load(slope_ptr + n) + tl.load(base_ptr + n)
    dz = tl.where(is_other, tl.load(at_other_ptr + n), dz)
    dz = tl.where(is_target, tl.load(at_target_ptr + n), dz)
    if HAS_SOFTCAP:
        t = tl.where(is_target, tl.load(target_logits_ptr + n), z) * (1.0 / softcap)
        dz *= 1.0 - t * t
    tl.store(out_ptr + row * out_stride_n + offs_v, dz * scale, mask=mask_v)


def mixed_gradient(
    logits: Tensor, targets: Tensor, stats: RowStats, reductions: RowReductions, mix: Mix, transform: LogitTransform,
    out: Tensor, *, rows: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the gradient of the rows to `out`, which may be `logits`.

    Args:
        logits, out: (M, V) rows contiguous; V at least 2.
        targets: (N,) int64 in [0, V).
        stats, reductions: of the rows, from `row_pass`.
        mix: (N,) float32 each.
        rows: (N,) int64, which rows of logits and out they are; None: all, in order.
    """
    N, V = len(targets), logits.shape[1]
    if N:
        block, num_warps = ROW_GRADIENT.fit(V)
        _mixed_gradient_kernel[(N, triton.cdiv(V, block))](
            logits, out, rows, targets, stats.target_logits, reductions.others, transform.bias, stats.largest,
            *row_numbers(stats, reductions, mix, V),
            V, logits.stride(0), out.stride(0), transform.scale, transform.softcap or 1.0,
            HAS_ROWS=rows is not None, HAS_BIAS=transform.bias is not None, HAS_SOFTCAP=transform.softcap is not None,
            BLOCK_V=block, num_warps=num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip


def mixed_gradient_torch(
    logits: Tensor, targets: Tensor, stats: RowStats, reductions: RowReductions, mix: Mix, transform: LogitTransform,
    out: Tensor, *, rows: Tensor | None = None,
) -> None:  # fmt: skip
    """`mixed_gradient` in plain PyTorch, float64 for float64 logits."""
    numbers = row_numbers(stats, reductions, mix, logits.shape[1])
    for block in row_blocks(logits, len(targets)):
        source = block if rows is None else rows[block]
        slope, base, at_target, at_other = (x[block, None] for x in numbers)
        target, other = targets[block, None], reductions.others[block, None]
        z = transform(logits[source].to(slope.dtype, copy=True)).scatter_(1, target, stats.target_logits[block, None])
        through = None if transform.softcap is None else 1 - (z / transform.softcap) ** 2
        dz = z.sub_(stats.largest[block, None]).exp_().mul_(slope).add_(base)
        dz.scatter_(1, other, at_other).scatter_(1, target, at_target)
        if through is not None:
            dz *= through
        out[source] = dz.mul_(transform.scale).to(out.dtype)
