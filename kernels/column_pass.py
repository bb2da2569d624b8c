"""How much of the gradient each vocabulary column carries, without writing the gradient.

    dz[n, v]    = d logps[n] / d logits[n, v], as in `row_pass`
    energy[v]   = sum_n (coefs[n] dz[n, v])^2
    mass[v]     = sum_n |coefs[n]| dz[n, v]
    row_mass[n] = sum_v dz[n, v]

Dimension key, here and in the test:
    N  tokens of a chunk      V  vocabulary, or a slab of it      G  groups of rows, summed by one program each
"""

from __future__ import annotations

import torch
from torch import Tensor

from simnpo.kernels.backend import LAUNCH_OPTIONS, tl, triton
from simnpo.kernels.head import LogitTransform
from simnpo.kernels.launch import COLUMN_PASS
from simnpo.kernels.row_pass import dlogits_tile, row_blocks, row_dlogits_torch, transformed_tile

ROWS_PER_GROUP = 64


@triton.jit
def _column_pass_kernel(
    # data
    logits_ptr, targets_ptr, target_logits_ptr, bias_ptr, logps_ptr, largest_ptr, total_ptr, coefs_ptr,
    energy_ptr, mass_ptr, row_mass_ptr,
    # shapes and strides
    N, V, logits_stride_n, scale, softcap,
    # constants
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_COEFS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    energy = tl.zeros([BLOCK_V], dtype=tl.float32)
    mass = tl.zeros([BLOCK_V], dtype=tl.float32)
    for n in range(group * ROWS, tl.minimum(group * ROWS + ROWS, N)):
        z = tl.load(logits_ptr + n * logits_stride_n + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        z = transformed_tile(z, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        dz = dlogits_tile(
            z, offs_v == tl.load(targets_ptr + n).to(tl.int32), tl.load(target_logits_ptr + n), tl.load(logps_ptr + n),
            tl.load(largest_ptr + n), tl.load(total_ptr + n), scale, softcap, HAS_SOFTCAP,
        )  # fmt: skip
        dz = tl.where(mask_v, dz, 0.0)
        # each row of row_mass has one entry a block: they are added up in a fixed order afterwards
        tl.store(row_mass_ptr + n * tl.num_programs(1) + block, tl.sum(dz, axis=0))
        if HAS_COEFS:
            coef = tl.abs(tl.load(coefs_ptr + n))
            dz *= coef
        energy += dz * dz
        mass += dz
    tl.store(energy_ptr + group * V + offs_v, energy, mask=mask_v)
    tl.store(mass_ptr + group * V + offs_v, mass, mask=mask_v)


def column_pass(
    logits: Tensor, targets: Tensor, target_logits: Tensor, logps: Tensor, largest: Tensor, total: Tensor,
    transform: LogitTransform, coefs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Energy and mass of each column, mass of each row.

    Args:
        logits: (N, V) rows contiguous, all of the vocabulary or a slab of it. Read once.
        targets: (N,) int64, counted from the slab's first column; those outside [0, V) are in some other slab.
        target_logits, logps, largest, total: (N,) float32, from `row_pass`.
        coefs: (N,) float32, or None for ones.

    Returns:
        energy, mass: (V,) float32.   row_mass: (N,) float32, without the coefficients.
    """
    N, V = logits.shape
    groups, blocks = triton.cdiv(N, ROWS_PER_GROUP), triton.cdiv(V, COLUMN_PASS.block)
    sums = torch.empty(2, groups, V, dtype=torch.float32, device=logits.device)
    row_mass = torch.empty(N, blocks, dtype=torch.float32, device=logits.device)
    if N:
        _column_pass_kernel[(groups, blocks)](
            logits, targets, target_logits, transform.bias, logps, largest, total, coefs,
            sums[0], sums[1], row_mass,
            N, V, logits.stride(0), transform.scale, transform.softcap or 1.0,
            HAS_BIAS=transform.bias is not None, HAS_SOFTCAP=transform.softcap is not None,
            HAS_COEFS=coefs is not None, ROWS=ROWS_PER_GROUP, BLOCK_V=COLUMN_PASS.block,
            num_warps=COLUMN_PASS.num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip
    energy, mass = sums.sum(1)
    return energy, mass, row_mass.sum(1)


def column_pass_torch(
    logits: Tensor, targets: Tensor, target_logits: Tensor, logps: Tensor, largest: Tensor, total: Tensor,
    transform: LogitTransform, coefs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`column_pass` in plain PyTorch, float64 for float64 logits."""
    N, V = logits.shape
    energy, mass = target_logits.new_zeros(2, V)
    row_mass = torch.empty_like(target_logits)
    weights = torch.ones_like(target_logits) if coefs is None else coefs.abs()
    for block in row_blocks(logits, N):
        stats = (x[block] for x in (targets, target_logits, logps, largest, total))
        dz = row_dlogits_torch(logits[block], *stats, transform)
        row_mass[block] = dz.sum(1)
        mass += weights[block] @ dz
        energy += weights[block].square() @ dz.square_()
    return energy, mass, row_mass
