"""Scale each row by its own coefficient, and put it where it belongs.

    out[index[n], d] = coefs[n] x[n, d]                     index[n] = n without an index

Dimension key, here and in the test:
    N  rows      D  hidden size
"""

from __future__ import annotations

from torch import Tensor

from simnpo.kernels.backend import LAUNCH_OPTIONS, tl, triton
from simnpo.kernels.head import float_dtype
from simnpo.kernels.launch import SCALE_ROWS


@triton.jit
def _scale_rows_kernel(
    # data
    x_ptr, coefs_ptr, index_ptr, out_ptr,
    # shapes and strides
    D, x_stride_n, out_stride_n,
    # constants
    HAS_INDEX: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = n
    if HAS_INDEX:
        row = tl.load(index_ptr + n).to(tl.int64)
    coef = tl.load(coefs_ptr + n).to(tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = tl.load(x_ptr + n * x_stride_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * out_stride_n + offs_d, x * coef, mask=mask_d)


def scale_rows(x: Tensor, coefs: Tensor, out: Tensor, index: Tensor | None = None) -> Tensor:
    """`x` (N, D) times `coefs` (N,), written to `out` (rows `index` (N,) of it, all different); `out` may be `x`."""
    N, D = x.shape
    if N:
        block, num_warps = SCALE_ROWS.fit(D)
        _scale_rows_kernel[(N,)](
            x, coefs, index, out,
            D, x.stride(0), out.stride(0),
            HAS_INDEX=index is not None, BLOCK_D=block, num_warps=num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return out


def scale_rows_torch(x: Tensor, coefs: Tensor, out: Tensor, index: Tensor | None = None) -> Tensor:
    """`scale_rows` in plain PyTorch."""
    scaled = x.to(float_dtype(x)) * coefs[:, None].to(float_dtype(x))
    if index is None:
        return out.copy_(scaled)
    return out.index_copy_(0, index, scaled.to(out.dtype))
