"""Objectives that set a forget sequence against an alternate answer to the same prompt.

s and n are the forget sequence's log-probability and length, s_alt and n_alt the alternate's. The weight is the
derivative in each forget token's log-probability; that of an alternate token is the weight times a ratio known
beforehand. So a pair is one unit of the schedule, like a sequence: its scalar is known when its last token is.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from simnpo.objectives.base import ForgetObjective
from simnpo.objectives.sequence import check_beta, softplus


class PairSums(NamedTuple):
    """What an objective knows of the pairs, all (P,): of the forget sequences, and of their alternates.

    logps, alt_logps: nats.   num_tokens, alt_num_tokens: tokens that count.   ref_logps, alt_ref_logps: or None.
    """

    logps: Tensor
    num_tokens: Tensor
    ref_logps: Tensor | None
    alt_logps: Tensor
    alt_num_tokens: Tensor
    alt_ref_logps: Tensor | None

    @property
    def present(self) -> Tensor:
        """Pairs of which neither side is empty."""
        return (self.num_tokens > 0) & (self.alt_num_tokens > 0)


class PairObjective(ForgetObjective):
    """A loss of a forget sequence and its alternate answer."""

    needs_alternates: ClassVar[bool] = True

    def loss_and_weight(self, pairs: PairSums) -> tuple[Tensor, Tensor]:
        """Loss of each pair and derivative in each forget token's log-probability, both (P,); 0 with an empty side."""
        raise NotImplementedError

    def alternate_ratio(self, num_tokens: Tensor, alt_num_tokens: Tensor) -> Tensor:
        """(P,) derivative in an alternate token's log-probability over that in a forget token's."""
        raise NotImplementedError


@dataclass(frozen=True)
class DPO(PairObjective):
    """Direct preference optimisation of the alternate over the forget answer.

    IdkDPO is this with a refusal as the alternate, AltPO (arXiv 2409.13474) with answers the model itself made up.

    Args:
        beta: inverse temperature of the log-ratios to the reference, summed over tokens.
    """

    beta: float = 0.1
    needs_ref_logps: ClassVar[bool] = True
    sums_ratio: ClassVar[bool] = True
    formula: ClassVar[str] = "-(2/beta) log sigmoid(beta ((s_alt - s_alt_ref) - (s - s_ref)))"
    weight: ClassVar[str] = "2 sigmoid(beta ((s - s_ref) - (s_alt - s_alt_ref))); an alternate token's is its negative"
    source: ClassVar[str] = "arXiv 2305.18290 times 2/beta: IdkDPO of arXiv 2404.05868, AltPO of arXiv 2409.13474"

    def __post_init__(self) -> None:
        check_beta(self.beta, "GradAscent beside the alternate's likelihood")

    def loss_and_weight(self, pairs: PairSums) -> tuple[Tensor, Tensor]:
        if pairs.ref_logps is None or pairs.alt_ref_logps is None:
            raise ValueError(
                "DPO needs ref_logps, the (B,) log-probabilities under the reference policy; SimPO needs none"
            )
        ratio = (pairs.logps - pairs.ref_logps) - (pairs.alt_logps - pairs.alt_ref_logps)
        loss = 2 / self.beta * softplus(self.beta * ratio)
        weight = 2 * torch.sigmoid(self.beta * ratio)
        return torch.where(pairs.present, loss, 0), torch.where(pairs.present, weight, 0)

    def alternate_ratio(self, num_tokens: Tensor, alt_num_tokens: Tensor) -> Tensor:
        return torch.full_like(num_tokens, -1)


@dataclass(frozen=True)
class SimPO(PairObjective):
    """Reference-free, length-normalised preference of the alternate over the forget answer.

    Args:
        beta: inverse temperature of the per-token rewards.
        gamma: margin by which the alternate's reward shall exceed the forget answer's, outside beta.
    """

    beta: float = 2.5
    gamma: float = 0.0
    formula: ClassVar[str] = "-log sigmoid((beta/n_alt) s_alt - (beta/n) s - gamma)"
    weight: ClassVar[str] = (
        "(beta/n) sigmoid((beta/n) s - (beta/n_alt) s_alt + gamma); an alternate token's is that times -n/n_alt"
    )
    source: ClassVar[str] = "arXiv 2405.14734, equation 6, the forget answer as the losing one"

    def __post_init__(self) -> None:
        check_beta(self.beta, "constant")

    def loss_and_weight(self, pairs: PairSums) -> tuple[Tensor, Tensor]:
        slope = self.beta / pairs.num_tokens.clamp(min=1).to(pairs.logps.dtype)
        alt_slope = self.beta / pairs.alt_num_tokens.clamp(min=1).to(pairs.logps.dtype)
        x = slope * pairs.logps - alt_slope * pairs.alt_logps + self.gamma
        loss, weight = softplus(x), slope * torch.sigmoid(x)
        return torch.where(pairs.present, loss, 0), torch.where(pairs.present, weight, 0)

    def alternate_ratio(self, num_tokens: Tensor, alt_num_tokens: Tensor) -> Tensor:
        return -num_tokens / alt_num_tokens.clamp(min=1)
