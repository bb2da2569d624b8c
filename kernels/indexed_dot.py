"""The product of each hidden state with the head's row of its target, exact in float32.

    products[n] = sum_d hidden_states[n, d] weight[targets[n], d]

The chunk's matrix product rounds this number to bf16; near p = 1 that rounding is the whole gradient.

Dimension key, here and in the test:
    N  tokens      D  hidden size      V  vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from simnpo.kernels.backend import LAUNCH_OPTIONS, tl, triton
from simnpo.kernels.head import float_dtype
from simnpo.kernels.launch import INDEXED_DOT

# gathered rows of the head alive at once on the torch path, bytes
TORCH_BLOCK_BYTES = 16 << 20


@triton.jit
def _indexed_dot_kernel(
    # data
    hidden_states_ptr, weight_ptr, targets_ptr, products_ptr,
    # shapes and strides
    D, hidden_stride_n, weight_stride_v,
    # constants
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + n).to(tl.int64)
    sums = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        h = tl.load(hidden_states_ptr + n * hidden_stride_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + target * weight_stride_v + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        sums += h * w
    tl.store(products_ptr + n, tl.sum(sums, axis=0))


def indexed_dot(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`hidden_states` (N, D) and `weight` (V, D), rows contiguous, `targets` (N,) -> products (N,) float32."""
    N, D = hidden_states.shape
    products = torch.empty(N, dtype=torch.float32, device=hidden_states.device)
    if N:
        block, num_warps = INDEXED_DOT.fit(D)
        _indexed_dot_kernel[(N,)](
            hidden_states, weight, targets, products,
            D, hidden_states.stride(0), weight.stride(0),
            BLOCK_D=block, num_warps=num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return products


def indexed_dot_torch(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`indexed_dot` in plain PyTorch, float64 for float64."""
    N, D = hidden_states.shape
    dtype = float_dtype(hidden_states)
    products = torch.empty(N, dtype=dtype, device=hidden_states.device)
    step = max(1, TORCH_BLOCK_BYTES // (8 * D))
    for start in range(0, N, step):
        rows = slice(start, start + step)
        products[rows] = (hidden_states[rows].to(dtype) * weight[targets[rows]].to(dtype)).sum(-1)
    return products
