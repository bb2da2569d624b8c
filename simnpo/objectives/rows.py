"""Objectives of a token's whole row of logits, through a few sums over it.

    loss of a sequence = (1/n) sum_t f(row_t)

Their gradient in the logits z of a row is a mix of three directions, whatever the objective:

    df/dz = target (onehot(y) - p) + uniform (1/V - p) + other (onehot(m) - p)

y is the target, m the most likely token but y, p the softmax. `Mix` holds the three numbers of each row; those of a
log-probability would be (1, 0, 0).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from simnpo.objectives.base import ForgetObjective


class Row(NamedTuple):
    """What is known of each row, all (N,): log-probability and logit of the target, log-sum-exp and mean of the logits,
    logit of the most likely token but the target."""

    logps: Tensor
    target_logits: Tensor
    lse: Tensor
    mean_logits: Tensor
    other_logits: Tensor


class Mix(NamedTuple):
    """The gradient of each row, (N,) each: see above."""

    target: Tensor
    uniform: Tensor
    other: Tensor


class RowObjective(ForgetObjective):
    """A mean over tokens of a loss of the token's row of logits."""

    def loss_and_mix(self, row: Row) -> tuple[Tensor, Mix]:
        """f (N,) and its gradient in the logits."""
        raise NotImplementedError


@dataclass(frozen=True)
class MaxEntropy(RowObjective):
    """Cross-entropy to the uniform distribution: KL(uniform || p) + ln V."""

    formula: ClassVar[str] = "mean_t lse(z_t) - mean_v z_tv"
    weight: ClassVar[str] = "dz = p - 1/V"
    source: ClassVar[str] = "arXiv 2410.08109 (ME)"

    def loss_and_mix(self, row: Row) -> tuple[Tensor, Mix]:
        zero = torch.zeros_like(row.lse)
        return row.lse - row.mean_logits, Mix(zero, zero - 1, zero)


@dataclass(frozen=True)
class SmoothedGradAscent(RowObjective):
    """Gradient ascent on smoothed labels: the target's share 1 - smoothing, the rest over the whole vocabulary.

    Args:
        smoothing: share of the uniform distribution, in [0, 1].
    """

    smoothing: float = 0.1
    formula: ClassVar[str] = "mean_t (1 - smoothing) l_t + smoothing mean_v log p_tv"
    weight: ClassVar[str] = "dz = (1 - smoothing) (onehot(y) - p) + smoothing (1/V - p)"
    source: ClassVar[str] = "arXiv 2510.22376 (SGA)"

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be between 0 and 1, got {self.smoothing}")

    def loss_and_mix(self, row: Row) -> tuple[Tensor, Mix]:
        one = torch.ones_like(row.lse)
        loss = (1 - self.smoothing) * row.logps + self.smoothing * (row.mean_logits - row.lse)
        return loss, Mix((1 - self.smoothing) * one, self.smoothing * one, 0 * one)


@dataclass(frozen=True)
class InvertedHinge(RowObjective):
    """The target's probability falls, and goes to the next most likely token."""

    formula: ClassVar[str] = "mean_t 1 + p_t - max_{v != y} p_tv"
    weight: ClassVar[str] = "dz = p_y (onehot(y) - p) - p_m (onehot(m) - p), m the largest other"
    source: ClassVar[str] = "arXiv 2408.06621 (IHL of LoKU)"

    def loss_and_mix(self, row: Row) -> tuple[Tensor, Mix]:
        p, p_other = torch.exp(row.logps), torch.exp(row.other_logits - row.lse)
        return 1 + p - p_other, Mix(p, torch.zeros_like(p), -p_other)


@dataclass(frozen=True)
class PDU(RowObjective):
    """Flat logits: the largest comes down to the mean. The dual update of the retain multiplier is the loop's."""

    formula: ClassVar[str] = "mean_t (max_v z_tv - mean_v z_tv)^2"
    weight: ClassVar[str] = "dz = 2 (max z - mean z) (onehot(max) - 1/V)"
    source: ClassVar[str] = "arXiv 2506.05314 (PDU's forget term)"

    def loss_and_mix(self, row: Row) -> tuple[Tensor, Mix]:
        gap = torch.maximum(row.target_logits, row.other_logits) - row.mean_logits
        at_target = row.target_logits >= row.other_logits
        zero = torch.zeros_like(gap)
        return gap.square(), Mix(torch.where(at_target, 2 * gap, zero), -2 * gap, torch.where(at_target, zero, 2 * gap))
