"""Log-probability of each target under its row of logits, and the gradient written over the logits.

    z[n, v]    = softcap(scale * (logits[n, v] + bias[v]))                softcap(x) = c tanh(x / c)
    rest[n]    = logsumexp of z[n, v] over v != targets[n]
    logps[n]   = -softplus(rest[n] - target_logits[n])                    never above 0
    p[n, v]    = exp(z[n, v] - largest[n]) / total[n]                     the softmax
    dlogits[n] = (onehot(targets[n]) - p[n]) dz/dlogits                   d logps[n] / d logits[n], in place

and, for objectives of the whole row, the mean of z[n] and its largest entry but the target's, from the same read.
`row_gradient` is the last line alone, for logits whose logps, largest and total are known: a recomputed slab of the
vocabulary, or logits that somebody else owns.

The target's own logit comes in exact (`indexed_dot`), and its gradient 1 - p is -expm1(logps): with a logits chunk in
bf16 the plain formula is 3-6 % wrong once the model has memorised the token, this one 0.3 %.

Dimension key, here and in the test:
    N  tokens of a chunk      V  vocabulary, or a slab of it
"""

from __future__ import annotations

import torch
from torch import Tensor

from simnpo.kernels.backend import LAUNCH_OPTIONS, tl, triton
from simnpo.kernels.head import LogitTransform, RowReductions
from simnpo.kernels.launch import ROW_GRADIENT, ROW_PASS
from simnpo.kernels.special import expm1, softplus

# the torch path works on blocks of rows whose float32 copy stays in the cache: 2 MiB on a CPU, 64 MiB on a GPU
TORCH_BLOCK_BYTES = {"cpu": 2 << 20}
TORCH_BLOCK_BYTES_DEFAULT = 64 << 20


LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x by the hardware's exp2 alone: tl.exp spends as many instructions again on results below 1e-38."""
    return tl.exp2(x * LOG2E)


@triton.jit
def transformed_tile(z, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    z *= scale
    if HAS_SOFTCAP:
        z = softcap - (2.0 * softcap) / (exp(z * (2.0 / softcap)) + 1.0)
    return z


@triton.jit
def dlogits_tile(z, is_target, target_logit, logp, largest, total, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    # one number a row each: only exp2 and two products are left for every element
    at_target = -expm1(logp) * scale
    slope = -scale / total
    dz = tl.where(is_target, at_target, exp(z - largest) * slope)
    if HAS_SOFTCAP:
        t = tl.where(is_target, target_logit, z) * (1.0 / softcap)
        dz *= 1.0 - t * t
    return dz


@triton.jit
def _row_pass_kernel(
    # data
    logits_ptr, rows_ptr, targets_ptr, target_logits_ptr, bias_ptr, logps_ptr, largest_ptr, total_ptr,
    mean_ptr, other_logits_ptr, others_ptr,
    # shapes and strides
    V, logits_stride_n, scale, softcap,
    # constants
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WRITE_GRADIENT: tl.constexpr,
    REDUCE: tl.constexpr, BLOCK_V: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    # int64: n * V passes 2**31 at 16 744 tokens of Llama 3's 128 256-word vocabulary
    n = tl.program_id(0).to(tl.int64)
    row = n
    if HAS_ROWS:
        row = tl.load(rows_ptr + n)
    row_ptr = logits_ptr + row * logits_stride_n
    # int32: comparing every lane with a 64-bit number costs 3 instructions an element
    target = tl.load(targets_ptr + n).to(tl.int32)
    target_logit = tl.load(target_logits_ptr + n)

    # a running maximum and sum for every LANE neighbours, the 16 bytes of one load, which one thread holds: no two
    # threads talk before the loop is over
    offs = tl.arange(0, BLOCK_V // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    # finite, so that a lane which only sees the target or the end of the row gives exp(-inf) = 0 and not NaN
    largest = tl.full([BLOCK_V // LANE], -1e38, dtype=tl.float32)
    total = tl.zeros([BLOCK_V // LANE], dtype=tl.float32)
    # of the other logits: their sum, and where the largest is
    z_sum = tl.zeros([BLOCK_V // LANE], dtype=tl.float32)
    other = tl.full([BLOCK_V // LANE], V, dtype=tl.int32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + offs
        mask_v = offs_v < V
        z = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        z = transformed_tile(z, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        is_other = mask_v & (offs != target - start)
        if REDUCE:
            z_sum += tl.sum(tl.where(is_other, z, 0.0), axis=1)
        z = tl.where(is_other, z, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(z, axis=1))
        if REDUCE:
            # the first of several that are as large
            found = tl.min(tl.where(is_other & (z == new_largest[:, None]), offs_v, V), axis=1)
            other = tl.where(new_largest > largest, found, other)
        total = total * exp(largest - new_largest) + tl.sum(exp(z - new_largest[:, None]), axis=1)
        largest = new_largest
    rest_largest = tl.max(largest, axis=0)
    rest_total = tl.sum(total * exp(largest - rest_largest), axis=0)

    logp = -softplus((rest_largest - target_logit) + tl.log(rest_total))
    # the target joins the sum
    row_largest = tl.maximum(rest_largest, target_logit)
    row_total = rest_total * exp(rest_largest - row_largest) + exp(target_logit - row_largest)
    tl.store(logps_ptr + n, logp)
    tl.store(largest_ptr + n, row_largest)
    tl.store(total_ptr + n, row_total)
    if REDUCE:
        tl.store(mean_ptr + n, (tl.sum(z_sum, axis=0) + target_logit) / V)
        tl.store(other_logits_ptr + n, rest_largest)
        tl.store(others_ptr + n, tl.min(tl.where(largest == rest_largest, other, V), axis=0).to(tl.int64))

    if WRITE_GRADIENT:
        for start in range(0, V, BLOCK_V):
            offs_v = start + offs
            mask_v = offs_v < V
            z = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
            z = transformed_tile(z, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            is_target = offs == target - start
            dlogits = dlogits_tile(
                z, is_target, target_logit, logp, row_largest, row_total, scale, softcap, HAS_SOFTCAP
            )  # fmt: skip
            tl.store(row_ptr + offs_v, dlogits, mask=mask_v)


@triton.jit
def _row_gradient_kernel(
    # data
    logits_ptr, out_ptr, rows_ptr, columns_ptr, targets_ptr, target_logits_ptr, bias_ptr, logps_ptr, largest_ptr,
    total_ptr, coefs_ptr,
    # shapes and strides
    V, logits_stride_n, out_stride_n, scale, softcap,
    # constants
    HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_COEFS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = n
    if HAS_ROWS:
        row = tl.load(rows_ptr + n)
    offs_out = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_out < V
    offs_v = offs_out
    if HAS_COLUMNS:
        offs_v = tl.load(columns_ptr + offs_out, mask=mask_v, other=0).to(tl.int32)
    z = tl.load(logits_ptr + row * logits_stride_n + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    z = transformed_tile(z, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    is_target = offs_v == tl.load(targets_ptr + n).to(tl.int32)
    target_logit = tl.load(target_logits_ptr + n)
    logp = tl.load(logps_ptr + n)
    largest = tl.load(largest_ptr + n)
    total = tl.load(total_ptr + n)
    dlogits = dlogits_tile(z, is_target, target_logit, logp, largest, total, scale, softcap, HAS_SOFTCAP)
    if HAS_COEFS:
        dlogits *= tl.load(coefs_ptr + n)
    tl.store(out_ptr + row * out_stride_n + offs_out, dlogits, mask=mask_v)


def row_pass(
    logits: Tensor, targets: Tensor, target_logits: Tensor, transform: LogitTransform, *, write_gradient: bool,
    rows: Tensor | None = None, reductions: RowReductions | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probability and softmax statistics of each row; the rows become d logps / d logits where asked.

    Args:
        logits: (M, V) float, rows contiguous: the head's plain products. Overwritten when write_gradient.
        targets: (N,) int64 in [0, V).
        target_logits: (N,) float32, the transformed logit of the target, exact.
        transform: bias, scale and soft-cap still to be applied to `logits`.
        rows: (N,) int64, which rows of `logits` they are; None: all, in order.
        reductions: written where given; V must be at least 2.

    Returns:
        logps, largest, total: (N,) float32; nats, the largest logit, the sum of exp(logit - largest).
    """
    N, V = len(targets), logits.shape[1]
    logps, largest, total = (torch.empty_like(target_logits) for _ in range(3))
    if N:
        # a block is made of 16-byte lanes
        lane = 16 // logits.element_size()
        block, num_warps = ROW_PASS.fit(V, at_least=lane)
        _row_pass_kernel[(N,)](
            logits, rows, targets, target_logits, transform.bias, logps, largest, total,
            *((None,) * 3 if reductions is None else reductions),
            V, logits.stride(0), transform.scale, transform.softcap or 1.0,
            HAS_ROWS=rows is not None, HAS_BIAS=transform.bias is not None, HAS_SOFTCAP=transform.softcap is not None,
            WRITE_GRADIENT=write_gradient, REDUCE=reductions is not None, BLOCK_V=block, LANE=lane,
            num_warps=num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return logps, largest, total


def row_gradient(
    logits: Tensor, targets: Tensor, target_logits: Tensor, logps: Tensor, largest: Tensor, total: Tensor,
    transform: LogitTransform, out: Tensor, *, rows: Tensor | None = None, columns: Tensor | None = None,
    coefs: Tensor | None = None,
) -> None:  # fmt: skip
    """Write coefs * d logps / d logits of the rows to `out`, which may be `logits`.

    Args:
        logits, out: (M, V) rows contiguous, all of the vocabulary or a slab of it; out (M, K) with `columns`.
        targets: (N,) int64, counted from the slab's first column; those outside [0, V) are in some other slab.
        target_logits, logps, largest, total: (N,) float32, from `row_pass`.
        rows: (N,) int64, which rows of logits and out they are; None: all, in order.
        columns: (K,) int64, which columns of logits make the K of out; None: all V.
        coefs: (N,) float32, or None for ones.
    """
    N, V = len(targets), out.shape[1]
    if N and V:
        block, num_warps = ROW_GRADIENT.fit(V)
        _row_gradient_kernel[(N, triton.cdiv(V, block))](
            logits, out, rows, columns, targets, target_logits, transform.bias, logps, largest, total, coefs,
            V, logits.stride(0), out.stride(0), transform.scale, transform.softcap or 1.0,
            HAS_ROWS=rows is not None, HAS_COLUMNS=columns is not None, HAS_BIAS=transform.bias is not None,
            HAS_SOFTCAP=transform.softcap is not None, HAS_COEFS=coefs is not None, BLOCK_V=block,
            num_warps=num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip


def row_pass_torch(
    logits: Tensor, targets: Tensor, target_logits: Tensor, transform: LogitTransform, *, write_gradient: bool,
    rows: Tensor | None = None, reductions: RowReductions | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`row_pass` in plain PyTorch, float64 for float64 logits."""
    logps, largest, total = (torch.empty_like(target_logits) for _ in range(3))
    for block in row_blocks(logits, len(targets)):
        source = block if rows is None else rows[block]
        z = transform(logits[source].to(target_logits.dtype, copy=True))
        target, target_logit = targets[block, None], target_logits[block, None]
        slope = _softcap_slope(z, target, target_logit, transform) if write_gradient else None
        if reductions is not None:
            reductions.mean_logits[block] = z.scatter_(1, target, target_logit).mean(1)
        p = z.scatter_(1, target, -torch.inf)
        if reductions is not None:
            reductions.other_logits[block], reductions.others[block] = p.max(1)
        # a row whose only entry is the target has no largest other: keep exp(-inf - largest) = 0 and not NaN
        rest_largest = p.amax(1, keepdim=True).nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=0.0)
        rest_total = p.sub_(rest_largest).exp_().sum(1, keepdim=True)
        logp, row_largest, row_total = join_target(rest_largest, rest_total, target_logit)
        logps[block], largest[block], total[block] = logp[:, 0], row_largest[:, 0], row_total[:, 0]
        if write_gradient:
            rest_scale = torch.exp(rest_largest - row_largest)
            dlogits = p.mul_(-rest_scale / row_total).scatter_(1, target, -torch.expm1(logp))
            logits[source] = _through_transform(dlogits, slope, transform).to(logits.dtype)
    return logps, largest, total


def join_target(rest_largest: Tensor, rest_total: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logps, largest and total of rows, from the largest and the total of the others and the target's own logit."""
    logp = -torch.logaddexp((rest_largest - target_logit) + rest_total.log(), torch.zeros_like(target_logit))
    largest = torch.maximum(rest_largest, target_logit)
    total = rest_total * torch.exp(rest_largest - largest) + torch.exp(target_logit - largest)
    return logp, largest, total


def row_gradient_torch(
    logits: Tensor, targets: Tensor, target_logits: Tensor, logps: Tensor, largest: Tensor, total: Tensor,
    transform: LogitTransform, out: Tensor, *, rows: Tensor | None = None, columns: Tensor | None = None,
    coefs: Tensor | None = None,
) -> None:  # fmt: skip
    """`row_gradient` in plain PyTorch."""
    for block in row_blocks(logits, len(targets)):
        source = block if rows is None else rows[block]
        stats = (x[block] for x in (targets, target_logits, logps, largest, total))
        dlogits = row_dlogits_torch(logits[source], *stats, transform, columns)
        if coefs is not None:
            dlogits *= coefs[block, None]
        out[source] = dlogits.to(out.dtype)


def row_dlogits_torch(
    logits: Tensor, targets: Tensor, target_logits: Tensor, logps: Tensor, largest: Tensor, total: Tensor,
    transform: LogitTransform, columns: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """d logps / d logits of a block of rows, or of some columns of it, in the dtype of the stats."""
    if columns is None:
        inside, target = (targets >= 0) & (targets < logits.shape[1]), targets.clamp(0, logits.shape[1] - 1)
    else:
        logits, transform = logits[:, columns], transform.columns(columns)
        is_target = columns == targets[:, None]
        inside, target = is_target.any(1), is_target.int().argmax(1)
    inside, target = inside[:, None], target[:, None]
    z = transform(logits.to(target_logits.dtype, copy=True))
    # a target of another slab keeps the value its clamped column has anyway
    target_logit = torch.where(inside, target_logits[:, None], z.gather(1, target))
    slope = _softcap_slope(z, target, target_logit, transform)
    dlogits = z.sub_(largest[:, None]).exp_().mul_(-1 / total[:, None])
    at_target = torch.where(inside, -torch.expm1(logps[:, None]), dlogits.gather(1, target))
    return _through_transform(dlogits.scatter_(1, target, at_target), slope, transform)


def row_blocks(logits: Tensor, N: int) -> list[slice]:
    bytes_per_row = 4 * logits.shape[1]
    step = max(1, TORCH_BLOCK_BYTES.get(logits.device.type, TORCH_BLOCK_BYTES_DEFAULT) // bytes_per_row)
    return [slice(start, min(start + step, N)) for start in range(0, N, step)]


def _softcap_slope(z: Tensor, target: Tensor, target_logit: Tensor, transform: LogitTransform) -> Tensor | None:
    if transform.softcap is None:
        return None
    return 1 - (z.scatter(1, target, target_logit) / transform.softcap) ** 2


def _through_transform(dlogits: Tensor, slope: Tensor | None, transform: LogitTransform) -> Tensor:
    """From d logps / dz to d logps / d (h W^T), in place."""
    if slope is not None:
        dlogits *= slope
    return dlogits.mul_(transform.scale) if transform.scale != 1.0 else dlogits
