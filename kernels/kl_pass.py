"""KL divergence of each row from a reference's row, and its gradient in place.

    p, q      softmax of z[n] and of ref_z[n]            z = softcap(scale * (logits + bias)), ref_z likewise
    d[v]      = log p[v] - log q[v]
    kl[n]     = sum_v q (e^d - 1 - d)                     = sum_v q log(q / p), for p and q both sum to 1
    dlogits   = (p - q) dz/dlogits                        written over the rows of logits

No term of the sum is negative, and close to p = q, where a fine-tuned model starts, each is d^2/2 to all its digits.

Dimension key, here and in the test:
    N  tokens of a chunk      V  vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from simnpo.kernels.backend import LAUNCH_OPTIONS, tl, triton
from simnpo.kernels.head import LogitTransform
from simnpo.kernels.launch import KL_PASS
from simnpo.kernels.row_pass import exp, row_blocks, transformed_tile

# where e^d - 1 - d is summed as a series
SMALL: tl.constexpr = tl.constexpr(0.25)


@triton.jit
def excess(d):
    """e^d - 1 - d for |d| < SMALL, to float32."""
    series = 1.0 / 24 + d * (1.0 / 120 + d * (1.0 / 720 + d * (1.0 / 5040)))
    return d * d * (0.5 + d * (1.0 / 6 + d * series))


@triton.jit
def _kl_pass_kernel(
    # data
    logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, kl_ptr,
    # shapes and strides
    V, logits_stride_n, ref_stride_n, scale, softcap,
    # constants
    HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WRITE_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    # int64: n * V passes 2**31 at 16 744 tokens of Llama 3's 128 256-word vocabulary
    n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + n * logits_stride_n
    ref_ptr = ref_logits_ptr + n * ref_stride_n

    # a running maximum and sum for every LANE neighbours, as in the row pass
    offs = tl.arange(0, BLOCK_V // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    largest = tl.full([BLOCK_V // LANE], -1e38, dtype=tl.float32)
    ref_largest = tl.full([BLOCK_V // LANE], -1e38, dtype=tl.float32)
    total = tl.zeros([BLOCK_V // LANE], dtype=tl.float32)
    ref_total = tl.zeros([BLOCK_V // LANE], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + offs
        mask_v = offs_v < V
        z = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        z = transformed_tile(z, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        z = tl.where(mask_v, z, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(z, axis=1))
        total = total * exp(largest - new_largest) + tl.sum(exp(z - new_largest[:, None]), axis=1)
        largest = new_largest
        r = tl.load(ref_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        r = transformed_tile(r, ref_bias_ptr, offs_v, mask_v, scale, softcap, HAS_REF_BIAS, HAS_SOFTCAP)
        r = tl.where(mask_v, r, -float("inf"))
        new_largest = tl.maximum(ref_largest, tl.max(r, axis=1))
        ref_total = ref_total * exp(ref_largest - new_largest) + tl.sum(exp(r - new_largest[:, None]), axis=1)
        ref_largest = new_largest
    row_largest = tl.max(largest, axis=0)
    log_total = tl.log(tl.sum(total * exp(largest - row_largest), axis=0))
    ref_row_largest = tl.max(ref_largest, axis=0)
    ref_log_total = tl.log(tl.sum(ref_total * exp(ref_largest - ref_row_largest), axis=0))

    kl = tl.zeros([BLOCK_V // LANE], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + offs
        mask_v = offs_v < V
        z = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        z = transformed_tile(z, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        r = tl.load(ref_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        r = transformed_tile(r, ref_bias_ptr, offs_v, mask_v, scale, softcap, HAS_REF_BIAS, HAS_SOFTCAP)
        # from the largest first: the sum of a large logit and a small log would round the log away
        log_p = (z - row_largest) - log_total
        log_q = (r - ref_row_largest) - ref_log_total
        d = log_p - log_q
        q = exp(log_q)
        is_small = tl.abs(d) < SMALL
        dz = exp(log_p) - q
        kl += tl.sum(tl.where(mask_v, tl.where(is_small, q * excess(d), dz - q * d), 0.0), axis=1)
        if WRITE_GRADIENT:
            if HAS_SOFTCAP:
                t = z * (1.0 / softcap)
                dz *= 1.0 - t * t
            tl.store(row_ptr + offs_v, dz * scale, mask=mask_v)
    tl.store(kl_ptr + n, tl.sum(kl, axis=0))


def kl_pass(
    logits: Tensor, ref_logits: Tensor, transform: LogitTransform, ref_transform: LogitTransform, *,
    write_gradient: bool,
) -> Tensor:  # fmt: skip
    """KL(reference || row) of each row; the rows become d kl / d logits where asked.

    Args:
        logits: (N, V) float, rows contiguous: the head's plain products. Overwritten when write_gradient.
        ref_logits: (N, V) float, rows contiguous: the reference's.
        transform, ref_transform: still to be applied to them; they differ in the bias only.

    Returns:
        kl: (N,) float32, nats, at least 0.
    """
    N, V = logits.shape
    kl = torch.empty(N, dtype=torch.float32, device=logits.device)
    if N:
        lane = 16 // logits.element_size()
        block, num_warps = KL_PASS.fit(V, at_least=lane)
        _kl_pass_kernel[(N,)](
            logits, ref_logits, transform.bias, ref_transform.bias, kl,
            V, logits.stride(0), ref_logits.stride(0), transform.scale, transform.softcap or 1.0,
            HAS_BIAS=transform.bias is not None, HAS_REF_BIAS=ref_transform.bias is not None,
            HAS_SOFTCAP=transform.softcap is not None, WRITE_GRADIENT=write_gradient, BLOCK_V=block, LANE=lane,
            num_warps=num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return kl


def kl_pass_torch(
    logits: Tensor, ref_logits: Tensor, transform: LogitTransform, ref_transform: LogitTransform, *,
    write_gradient: bool,
) -> Tensor:  # fmt: skip
    """`kl_pass` in plain PyTorch, float64 for float64 logits."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    kl = torch.empty(len(logits), dtype=dtype, device=logits.device)
    for block in row_blocks(logits, len(logits)):
        z = transform(logits[block].to(dtype, copy=True))
        slope = None if transform.softcap is None else 1 - (z / transform.softcap) ** 2
        log_p, log_q = z.log_softmax(1), ref_transform(ref_logits[block].to(dtype, copy=True)).log_softmax(1)
        d, q = log_p - log_q, log_q.exp()
        is_small = d.abs() < 0.25
        dz = log_p.exp() - q
        # e^d - 1 - d by its series, to float64
        excess = torch.zeros_like(d)
        for k in range(12, 1, -1):
            excess = (1 + excess) * d / k
        kl[block] = torch.where(is_small, q * excess * d, dz - q * d).sum(1)
        if write_gradient:
            dz = dz if slope is None else dz * slope
            logits[block] = dz.mul_(transform.scale).to(logits.dtype)
    return kl
