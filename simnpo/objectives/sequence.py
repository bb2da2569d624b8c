"""Objectives that see a sequence through the sum of its log-probabilities.

With s = sum_t log p(y_t | y_<t) over the n tokens of a sequence, the weight of the sequence is the derivative of its
loss with respect to each of its token log-probabilities. It is one number per sequence, known once its last token is:
that is what lets the kernels backpropagate through the head without computing the logits twice.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simnpo.objectives.base import ForgetObjective


def check_beta(beta: float, limit: str) -> None:
    """`limit` says what the objective becomes as beta goes to 0."""
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}; as beta goes to 0 the objective becomes {limit}")


class SequenceObjective(ForgetObjective):
    """A loss of the sum of a sequence's log-probabilities."""

    def loss_and_weight(
        self, logps: Tensor, num_tokens: Tensor, ref_logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and weight of each sequence, both (B,); 0 where num_tokens is 0."""
        raise NotImplementedError

    def _ref(self, ref_logps: Tensor | None) -> Tensor:
        if ref_logps is None:
            raise ValueError(
                f"{type(self).__name__} needs ref_logps, the (B,) log-probabilities under the reference policy; "
                "SimNPO needs none"
            )
        return ref_logps


@dataclass(frozen=True)
class SimNPO(SequenceObjective):
    """Length-normalised, reference-free negative preference optimisation (arXiv 2410.07163, equation 4).

    Args:
        beta: inverse temperature of the per-token reward.
        gamma: the paper's margin, outside beta. The authors' TOFU code and open-unlearning's `delta` put it inside:
            gamma = beta * delta.
    """

    beta: float = 2.5
    gamma: float = 0.0
    formula: ClassVar[str] = "-(2/beta) log sigmoid(-(beta/n) s - gamma)"
    weight: ClassVar[str] = "(2/n) sigmoid((beta/n) s + gamma)"
    source: ClassVar[str] = "arXiv 2410.07163, equation 4"

    def __post_init__(self) -> None:
        check_beta(self.beta, "GradAscent: use that")

    def loss_and_weight(
        self, logps: Tensor, num_tokens: Tensor, ref_logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        length = num_tokens.clamp(min=1).to(logps.dtype)
        return _sigmoid_family(self.beta, self.beta / length, self.beta / length * logps + self.gamma, num_tokens)


@dataclass(frozen=True)
class NPO(SequenceObjective):
    """Negative preference optimisation against a reference policy (arXiv 2404.05868, equation 3).

    Args:
        beta: inverse temperature of the log-ratio to the reference, summed over tokens.
    """

    beta: float = 0.1
    needs_ref_logps: ClassVar[bool] = True
    sums_ratio: ClassVar[bool] = True
    formula: ClassVar[str] = "-(2/beta) log sigmoid(-beta (s - s_ref))"
    weight: ClassVar[str] = "2 sigmoid(beta (s - s_ref))"
    source: ClassVar[str] = "arXiv 2404.05868, equation 3"

    def __post_init__(self) -> None:
        check_beta(self.beta, "GradAscent: use that")

    def loss_and_weight(
        self, logps: Tensor, num_tokens: Tensor, ref_logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        slope = torch.full_like(logps, self.beta)
        return _sigmoid_family(self.beta, slope, self.beta * (logps - self._ref(ref_logps)), num_tokens)


@dataclass(frozen=True)
class GradAscent(SequenceObjective):
    """Gradient ascent on the sequence's log-likelihood.

    Args:
        normalize: divide by the number of tokens (the limit of SimNPO as beta goes to 0, up to a constant): with a
            retain term this is W-GradDiff.
    """

    normalize: bool = False
    formula: ClassVar[str] = "s, or s/n"
    weight: ClassVar[str] = "1, or 1/n"
    source: ClassVar[str] = "GradDiff; W-GradDiff with normalize, arXiv 2410.07163, figure A3"

    def loss_and_weight(
        self, logps: Tensor, num_tokens: Tensor, ref_logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weight = (num_tokens > 0).to(logps.dtype)
        if self.normalize:
            weight = weight / num_tokens.clamp(min=1).to(logps.dtype)
        return weight * logps, weight


@dataclass(frozen=True)
class NNPO(SequenceObjective):
    """NPO of the log-ratio per token: what the SimNPO authors' WMDP code calls NPO.

    Args:
        beta: inverse temperature of the mean log-ratio. It is not NPO's: that one multiplies a sum.
    """

    beta: float = 2.5
    needs_ref_logps: ClassVar[bool] = True
    formula: ClassVar[str] = "-(2/beta) log sigmoid(-(beta/n) (s - s_ref))"
    weight: ClassVar[str] = "(2/n) sigmoid((beta/n) (s - s_ref))"
    source: ClassVar[str] = "NPO of arXiv 2404.05868 with SimNPO's length, as in OPTML-Group/Unlearn-Simple, WMDP"

    def __post_init__(self) -> None:
        check_beta(self.beta, "GradAscent(normalize=True): use that")

    def loss_and_weight(
        self, logps: Tensor, num_tokens: Tensor, ref_logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        slope = self.beta / num_tokens.clamp(min=1).to(logps.dtype)
        return _sigmoid_family(self.beta, slope, slope * (logps - self._ref(ref_logps)), num_tokens)


@dataclass(frozen=True)
class KTO(SequenceObjective):
    """Kahneman-Tversky optimisation with forget answers as the undesirable ones.

    kl is the mean over the batch of s - s_ref of the alternate answers, without a gradient.

    Args:
        beta: inverse temperature of the log-ratio. As in the published code it does not multiply kl.
    """

    beta: float = 0.1
    needs_ref_logps: ClassVar[bool] = True
    sums_ratio: ClassVar[bool] = True
    needs_alternates: ClassVar[bool] = True
    formula: ClassVar[str] = "1 - (2/beta) sigmoid(kl - beta (s - s_ref))"
    weight: ClassVar[str] = "2 sigmoid(x) sigmoid(-x), x = kl - beta (s - s_ref)"
    source: ClassVar[str] = "arXiv 2402.01306; for unlearning OPTML-Group/Unlearn-Simple, TOFU (kto_sigmoid)"

    def __post_init__(self) -> None:
        check_beta(self.beta, "half of GradAscent: use that")

    def shifted_reference(self, ref_logps: Tensor, kl: Tensor) -> Tensor:
        """The reference with which `loss_and_weight` sees kl: kl - beta (s - s_ref) = -beta (s - shifted)."""
        return ref_logps + kl / self.beta

    def loss_and_weight(
        self, logps: Tensor, num_tokens: Tensor, ref_logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = -self.beta * (logps - self._ref(ref_logps))
        present = num_tokens > 0
        loss = 1 - 2 / self.beta * torch.sigmoid(x)
        return torch.where(present, loss, 0), torch.where(present, 2 * torch.sigmoid(x) * torch.sigmoid(-x), 0)


def _sigmoid_family(beta: float, slope: Tensor, log_odds: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(2/beta) softplus(x) and its derivative in the log-probability, for x = log_odds with derivative slope."""
    present = num_tokens > 0
    loss = 2 / beta * softplus(log_odds)
    weight = 2 / beta * slope * torch.sigmoid(log_odds)
    return torch.where(present, loss, 0), torch.where(present, weight, 0)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's own turns linear at 20, an error of 2e-9 that float64 shows."""
    return torch.logaddexp(x, torch.zeros_like(x))


def simnpo_loss(logps: Tensor, num_tokens: Tensor, *, beta: float = 2.5, gamma: float = 0.0) -> Tensor:
    """SimNPO's loss of each sequence, in plain differentiable PyTorch.

    Args:
        logps: (B,) log-probability of each sequence, nats, summed over its tokens.
        num_tokens: (B,) tokens that count.
        beta, gamma: see `SimNPO`.

    Returns:
        (B,) loss of each sequence, 0 where num_tokens is 0. Its mean is the paper's equation 4.
    """
    _check_same_shape(logps, num_tokens=num_tokens)
    return SimNPO(beta, gamma).loss_and_weight(logps, num_tokens)[0]


def npo_loss(logps: Tensor, num_tokens: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Tensor:
    """NPO's loss of each sequence, in plain differentiable PyTorch.

    Args:
        logps, ref_logps: (B,) log-probability of each sequence under the policy and the reference policy, nats.
        num_tokens: (B,) tokens that count; NPO uses it only to give 0 to a sequence without any.
        beta: see `NPO`.

    Returns:
        (B,) loss of each sequence.
    """
    _check_same_shape(logps, num_tokens=num_tokens, ref_logps=ref_logps)
    return NPO(beta).loss_and_weight(logps, num_tokens, ref_logps)[0]


def _check_same_shape(logps: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.shape != logps.shape:
            raise ValueError(f"{name} must have the shape of logps {tuple(logps.shape)}, got {tuple(tensor.shape)}")
