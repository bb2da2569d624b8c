"""The small kernels around the matrix products, once in Triton and once in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from simnpo.kernels.backend import resolve_impl
from simnpo.kernels.column_pass import column_pass, column_pass_torch
from simnpo.kernels.indexed_dot import indexed_dot, indexed_dot_torch
from simnpo.kernels.kl_pass import kl_pass, kl_pass_torch
from simnpo.kernels.mixed_gradient import mixed_gradient, mixed_gradient_torch
from simnpo.kernels.row_pass import row_gradient, row_gradient_torch, row_pass, row_pass_torch
from simnpo.kernels.scale_rows import scale_rows, scale_rows_torch
from simnpo.kernels.sequence_pass import sequence_pass, sequence_pass_torch


class Passes(NamedTuple):
    """One implementation of every pass; see the file of each."""

    indexed_dot: Callable
    row_pass: Callable
    row_gradient: Callable
    mixed_gradient: Callable
    kl_pass: Callable
    column_pass: Callable
    sequence_pass: Callable
    scale_rows: Callable


TRITON = Passes(indexed_dot, row_pass, row_gradient, mixed_gradient, kl_pass, column_pass, sequence_pass, scale_rows)
TORCH = Passes(
    indexed_dot_torch, row_pass_torch, row_gradient_torch, mixed_gradient_torch, kl_pass_torch, column_pass_torch,
    sequence_pass_torch, scale_rows_torch,
)  # fmt: skip


def passes_for(impl: str, tensor: Tensor) -> Passes:
    """The passes that `impl` ("auto", "triton", "torch") means for tensors like this one."""
    return TRITON if resolve_impl(impl, tensor) == "triton" else TORCH
