"""Which implementation runs: Triton where there is a GPU, the same maths in PyTorch everywhere else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]

Fn = TypeVar("Fn", bound=Callable)

IGNORE_INDEX = -100

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # Windows, macOS, a CPU build of torch: the kernels are defined and never launched
    HAS_TRITON = False

    class _NoTriton:
        """Lets the kernel files be imported: `@triton.jit` hands the function back unchanged."""

        def __getattr__(self, name: str) -> Any:
            return lambda fn: fn

    triton = tl = _NoTriton()  # type: ignore[assignment]

# Triton 3.9 warns when this is left open and 3.10 turns fusion off; the interpreter ignores it
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


def uncompiled(fn: Fn) -> Fn:
    """A compiled caller breaks its graph here: chunks are planned on the host, from numbers only the device knows."""
    return torch.compiler.disable(fn)


def resolve_impl(impl: str, tensor: Tensor) -> Literal["triton", "torch"]:
    """The implementation that `impl` means for tensors like this one.

    Raises:
        ValueError: impl is not one of "auto", "triton", "torch"; or "triton" was asked for where it cannot run.
    """
    if impl == "auto":
        usable = tensor.is_cuda and HAS_TRITON and tensor.dtype != torch.float64
        return "triton" if usable else "torch"
    if impl == "torch":
        return "torch"
    if impl != "triton":
        raise ValueError(f'impl must be "auto", "triton" or "torch", got {impl!r}')
    if not HAS_TRITON:
        raise ValueError('impl="triton" needs the triton package: pip install triton, or use impl="torch"')
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not tensor.is_cuda and not interpreted:
        raise ValueError(
            f'impl="triton" needs CUDA tensors, got {tensor.device.type}: use impl="torch" (or "auto"), '
            "or set TRITON_INTERPRET=1 before importing simnpo to debug the kernels on the CPU"
        )
    if tensor.dtype == torch.float64:
        raise ValueError('impl="triton" computes in float32: use impl="torch" for float64 tensors')
    return "triton"
