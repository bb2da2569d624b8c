"""The gradients of the head's operands, added up over chunks whose logits are about to be overwritten.

    dx[n] = coefs[n] dz[n] W        dweight = sum_n dz[n]^T (coefs[n] x[n])        dbias = sum_n coefs[n] dz[n]

The coefficients scale the (N, D) side, never the logits. With a gradient budget each product runs over the columns
that carry the gradient (`gradient_budget`), and the rank-one tails of all chunks reach dweight in one product.

Dimension key, here and in the test:
    N  tokens      D  hidden size      V  vocabulary      n  tokens of a chunk
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simnpo.kernels.gemm import add_mm_, mm_float32
from simnpo.kernels.gradient_budget import Budget, KeptColumns, keep_columns
from simnpo.kernels.head import HeadOptions, RowStats, float_dtype, gradient_buffer


class HeadGradients:
    """Sums of the gradients that are needed.

    Attributes:
        dx: (N, D) or None, rows in the order of the plan.
        budget: what the gradient budget was and what was left out; None without one.
    """

    def __init__(
        self, dx: Tensor | None, weight: Tensor, needs: tuple[bool, bool, bool], num_products: int, options: HeadOptions
    ):
        self.dx, self.weight, self.needs, self.options = dx, weight, needs, options
        # one product for the whole batch is its own sum: no float32 (V, D) beside it
        self.single = num_products == 1
        self._dweight: Tensor | None = None
        self._dbias: Tensor | None = None
        self._tails: list[tuple[Tensor, Tensor]] = []  # (V,) and (D,) whose outer product belongs to dweight
        self.budget: Budget | None = None

    def add(
        self, rows: slice, x: Tensor, targets: Tensor, chunk: Tensor, stats: RowStats, coefs: Tensor | None
    ) -> None:
        """A chunk of the batch.

        Args:
            rows: its place in dx.   x: (n, D).   targets: (n,).
            chunk: (n, V) the head's products; with a budget of 0, d logps / d products already.
            coefs: (n,) d loss / d logp; None where it is one unknown number: see `absorb`.
        """
        kept = None
        if self.options.gradient_error:
            transform, passes = self.options.transform, self.options.passes
            kept, budget = keep_columns(chunk, targets, stats, coefs, self.options)
            self.budget = budget if self.budget is None else self.budget + budget
            if kept is None:
                logits, chunk = chunk, gradient_buffer(chunk, self.options)
                passes.row_gradient(logits, targets, *stats, transform, chunk)
        self.add_products(rows, x, chunk, coefs, kept)

    def add_products(
        self, rows: slice, x: Tensor, chunk: Tensor, coefs: Tensor | None, kept: KeptColumns | None = None
    ) -> None:
        """The products of a chunk whose gradient is there: `chunk`, or the `kept` columns of it and a tail."""
        self._add_dx(rows, chunk, kept, coefs)
        if self.needs[1]:
            self._add_dweight(x, chunk, kept, coefs)
        if self.needs[2]:
            self._dbias = _sum(self._dbias, column_sums(chunk, kept, coefs))

    def absorb(self, late: HeadGradients, rows: slice, coefs: Tensor) -> None:
        """Take over sums made without coefficients, now that these are known.

        Args:
            late: shares dx; its other sums are scaled by one coefficient, so all its rows must have the same.
            rows: of dx.   coefs: theirs.
        """
        if self.dx is not None:
            self.options.passes.scale_rows(self.dx[rows], coefs, self.dx[rows])
        coef = coefs[0]
        if late._dweight is not None:
            scaled = late._dweight.mul_(coef)
            self._dweight = scaled if self._dweight is None else self._dweight.add_(scaled)
        if late._dbias is not None:
            self._dbias = _sum(self._dbias, late._dbias * coef)
        self._tails += [(profile, tail * coef) for profile, tail in late._tails]
        if late.budget is not None:
            budget = late.budget.scaled(coef)
            self.budget = budget if self.budget is None else self.budget + budget

    def dweight(self, dtype: torch.dtype) -> Tensor | None:
        """(V, D) in the parameter's dtype, or None where it is not needed."""
        if not self.needs[1]:
            return None
        total = torch.zeros_like(self.weight) if self._dweight is None else self._dweight
        if self._tails:
            profiles, tails = (torch.stack(vectors).to(total.dtype) for vectors in zip(*self._tails, strict=True))
            total.addmm_(profiles.t(), tails)
        return total.to(dtype)

    def dbias(self, dtype: torch.dtype) -> Tensor | None:
        """(V,) in the parameter's dtype, or None where it is not needed."""
        if not self.needs[2]:
            return None
        return self.weight.new_zeros(len(self.weight), dtype=dtype) if self._dbias is None else self._dbias.to(dtype)

    def _add_dx(self, rows: slice, chunk: Tensor, kept: KeptColumns | None, coefs: Tensor | None) -> None:
        if self.dx is None:
            return
        dx = self.dx[rows]
        if kept is not None:
            dx.copy_(kept.times(self.weight))
        elif dx.dtype == chunk.dtype:
            torch.mm(chunk, self.weight, out=dx)
        else:
            dx.copy_(mm_float32(chunk, self.weight))
        if coefs is not None:
            self.options.passes.scale_rows(dx, coefs, dx)

    def _add_dweight(self, x: Tensor, chunk: Tensor, kept: KeptColumns | None, coefs: Tensor | None) -> None:
        scaled_x = x if coefs is None else self.options.passes.scale_rows(x, coefs, torch.empty_like(x))
        if kept is None:
            if self._dweight is not None:
                add_mm_(self._dweight, chunk.t(), scaled_x)
            else:
                self._dweight = torch.mm(chunk.t(), scaled_x) if self.single else mm_float32(chunk.t(), scaled_x)
            return
        if self._dweight is None:
            dtype = self.weight.dtype if self.single else float_dtype(self.weight)
            self._dweight = torch.zeros_like(self.weight, dtype=dtype)
        # the kept columns are all different: every row of dweight is added to at most once, in any order
        self._dweight.index_add_(0, kept.columns, mm_float32(kept.dz.t(), scaled_x).to(self._dweight.dtype))
        self._tails.append((kept.profile, kept.tail_times(x, coefs)))


def keep_for_backward(
    ctx: Any, gradients: HeadGradients, rows: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """Save finished gradients in the forward of an autograd function; `rows` are those of hidden_states in dx."""
    dweight, dbias = gradients.dweight(weight.dtype), gradients.dbias(float_dtype(weight))
    ctx.save_for_backward(gradients.dx, dweight, dbias, rows)
    ctx.shape, ctx.dtype = hidden_states.shape, hidden_states.dtype
    ctx.scale_rows = gradients.options.passes.scale_rows
    ctx.bias_dtype = None if bias is None else bias.dtype


def scaled_gradients(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `keep_for_backward` saved, times the upstream gradient: of hidden_states, weight and bias."""
    dx, dweight, dbias, rows = ctx.saved_tensors
    dhidden = None
    if dx is not None:
        dhidden = torch.zeros(ctx.shape, dtype=ctx.dtype, device=dloss.device)
        ctx.scale_rows(dx, dloss.expand(len(rows)).contiguous(), dhidden, rows)
    # on a CPU a look costs nothing, and a product with one the time and the memory of another (V, D)
    is_one = type(dloss) is Tensor and dloss.device.type == "cpu" and dloss.item() == 1
    return (
        dhidden,
        dweight if dweight is None or is_one else dweight * dloss.to(dweight.dtype),
        None if dbias is None else (dbias * dloss).to(ctx.bias_dtype),
    )


def column_sums(chunk: Tensor, kept: KeptColumns | None, coefs: Tensor | None) -> Tensor:
    """sum_n coefs[n] dz[n, :], (V,) float32, over blocks of rows so that no float32 copy of the chunk exists."""
    dz = chunk if kept is None else kept.dz
    total = torch.zeros(dz.shape[1], dtype=float_dtype(dz), device=dz.device)
    for start in range(0, len(dz), 64):
        rows = slice(start, start + 64)
        block = dz[rows].to(total.dtype)
        total += block.sum(0) if coefs is None else coefs[rows] @ block
    if kept is None:
        return total
    tail = kept.row_tail if coefs is None else kept.row_tail * coefs
    return (kept.profile * tail.sum()).index_copy(0, kept.columns, total)


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
