"""The few vocabulary columns that carry the gradient of a chunk of logits, and a rank-one stand-in for the rest.

    M[n, v] = coefs[n] dz[n, v]                              the chunk's part of dlogits
    keep the columns of largest norm until the dropped part D of M has |D| <= gradient_error |M| (Frobenius)
    D[n, v] ~ coefs[n] row_tail[n] profile[v]                row_tail: mass the row lost; profile: where, sums to 1

so M W and M^T H become products over the K kept columns and a vector. The choice costs one read of the logits; the
gradient itself is computed for the kept columns only. When more than half the columns would be kept it does not pay,
and the chunk is multiplied whole.

Dimension key, here and in the test:
    N  tokens of a chunk      V  vocabulary, or a slab of it      K  kept columns      D  hidden size
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simnpo.kernels.head import HeadOptions, RowStats

# beyond this share of the columns gathering them costs more than the two products save
DENSE_SHARE = 0.5


class Budget(NamedTuple):
    """Energy of the gradient of the logits, |M|^2, and of what was left out of it, |D|^2; both ()."""

    total: Tensor
    dropped: Tensor

    def __add__(self, other: Budget) -> Budget:  # type: ignore[override]
        return Budget(self.total + other.total, self.dropped + other.dropped)

    def scaled(self, coef: Tensor) -> Budget:
        """The budget of coef * M."""
        return Budget(self.total * coef.square(), self.dropped * coef.square())

    def relative_error(self) -> Tensor:
        """|D| / |M|, (); 0 of nothing."""
        return (self.dropped / self.total.clamp(min=torch.finfo(self.total.dtype).tiny)).sqrt()


class KeptColumns(NamedTuple):
    """A chunk's gradient as K columns and a rank-one tail, without the coefficients.

    columns: (K,) int64, ascending.   dz: (N, K).   row_tail: (N,).   profile: (V,), 0 at the kept columns.
    """

    columns: Tensor
    dz: Tensor
    row_tail: Tensor
    profile: Tensor

    def times(self, weight: Tensor) -> Tensor:
        """dz @ weight: (V, D) -> (N, D)."""
        tail = torch.mm(self.profile[None].to(weight.dtype), weight)[0]
        products = torch.mm(self.dz, weight[self.columns])
        return products.addcmul_(self.row_tail[:, None].to(products.dtype), tail)

    def tail_times(self, x: Tensor, coefs: Tensor | None) -> Tensor:
        """sum_n coefs[n] row_tail[n] x[n]: (N, D) -> (D,), what the profile multiplies in dz^T (coefs x)."""
        weights = self.row_tail if coefs is None else self.row_tail * coefs
        return weights @ x.to(weights.dtype)


def choose_columns(energy: Tensor, gradient_error: float) -> tuple[Tensor, Budget]:
    """The columns to keep: those of largest energy, as few as the budget allows.

    Args:
        energy: (V,) squared norm of each column.

    Returns:
        columns: (K,) int64, ascending; one wait for the device, which K costs.
    """
    ascending, order = energy.double().sort()
    left_out = ascending.cumsum(0)
    total = left_out[-1]
    num_dropped = int((left_out <= gradient_error**2 * total).sum())
    dropped = left_out[num_dropped - 1] if num_dropped else torch.zeros_like(total)
    return order[num_dropped:].sort().values, Budget(total, dropped)


def keep_columns(
    logits: Tensor, targets: Tensor, stats: RowStats, coefs: Tensor | None, options: HeadOptions
) -> tuple[KeptColumns | None, Budget]:
    """Choose the columns of a chunk and compute their gradient; None where the chunk had better be multiplied whole.

    Args:
        logits: (N, V) the head's plain products, rows contiguous; not modified.
        targets: (N,) int64, counted from the first column.   stats: the tokens', from `head_chunk`.
        coefs: (N,) d loss / d logp; None where they are one unknown number.
    """
    transform, passes = options.transform, options.passes
    energy, mass, row_mass = passes.column_pass(logits, targets, *stats, transform, coefs)
    columns, budget = choose_columns(energy, options.gradient_error)
    if len(columns) > DENSE_SHARE * logits.shape[1]:
        return None, Budget(budget.total, torch.zeros_like(budget.dropped))
    dz = logits.new_empty(len(logits), len(columns), dtype=options.dtype)
    passes.row_gradient(logits, targets, *stats, transform, dz, columns=columns)
    row_tail = row_mass - dz.sum(1, dtype=row_mass.dtype)
    profile = mass.index_fill(0, columns, 0)
    # columns whose mass cancels to nothing leave nothing to spread
    lost = profile.sum()
    profile = torch.where(lost == 0, 0, profile / lost.where(lost != 0, 1))
    return KeptColumns(columns, dz, row_tail, profile), budget
