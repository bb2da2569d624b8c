"""The forget objectives: one scalar loss per sequence from the log-probability of its tokens.

With s = sum_t log p(y_t | y_<t) over the n tokens of a sequence, minimise

    SimNPO      -(2/beta) log sigmoid(-(beta/n) s - gamma)      arXiv 2410.07163, equation 4
    NPO         -(2/beta) log sigmoid(-beta (s - s_ref))        arXiv 2404.05868, equation 3
    GradAscent  s, or s/n

The weight of a sequence is the derivative of its loss with respect to each of its token log-probabilities. All three
see the sequence only through s, so the weight is one number per sequence: that is what lets the
kernels backpropagate through the head without computing the logits twice.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(
            f"beta must be positive, got {beta}; as beta goes to 0 the objective becomes GradAscent: use that"
        )


@dataclass(frozen=True)
class SimNPO:
    """Length-normalised, reference-free negative preference optimisation (arXiv 2410.07163, equation 4).

    Args:
        beta: inverse temperature of the per-token reward.
        gamma: the paper's margin, outside beta. The authors' TOFU code and open-unlearning's `delta` put it inside:
            gamma = beta * delta.
    """

    beta: float = 2.5
    gamma: float = 0.0
    needs_ref_logps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def loss_and_weight(
        self, logps: Tensor, num_tokens: Tensor, ref_logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and weight of each sequence, both (B,); 0 where num_tokens is 0."""
        length = num_tokens.clamp(min=1).to(logps.dtype)
        return _sigmoid_family(self.beta, self.beta / length, self.beta / length * logps + self.gamma, num_tokens)


@dataclass(frozen=True)
class NPO:
    """Negative preference optimisation against a reference policy (arXiv 2404.05868, equation 3).

    Args:
        beta: inverse temperature of the log-ratio to the reference, summed over tokens.
    """

    beta: float = 0.1
    needs_ref_logps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def loss_and_weight(
        self, logps: Tensor, num_tokens: Tensor, ref_logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and weight of each sequence, both (B,); 0 where num_tokens is 0."""
        if ref_logps is None:
            raise ValueError(
                "NPO needs ref_logps, the (B,) log-probabilities under the reference policy; SimNPO needs none"
            )
        slope = torch.full_like(logps, self.beta)
        return _sigmoid_family(self.beta, slope, self.beta * (logps - ref_logps), num_tokens)


@dataclass(frozen=True)
class GradAscent:
    """Gradient ascent on the sequence's log-likelihood.

    Args:
        normalize: divide by the number of tokens (the limit of SimNPO as beta goes to 0, up to a constant).
    """

    normalize: bool = False
    needs_ref_logps: ClassVar[bool] = False

    def loss_and_weight(
        self, logps: Tensor, num_tokens: Tensor, ref_logps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and weight of each sequence, both (B,); 0 where num_tokens is 0."""
        weight = (num_tokens > 0).to(logps.dtype)
        if self.normalize:
            weight = weight / num_tokens.clamp(min=1).to(logps.dtype)
        return weight * logps, weight


Objective = SimNPO | NPO | GradAscent


def _sigmoid_family(beta: float, slope: Tensor, log_odds: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(2/beta) softplus(x) and its derivative in the log-probability, for x = log_odds with derivative slope."""
    present = num_tokens > 0
    # logaddexp and not softplus: torch's softplus turns linear at 20, an error of 2e-9 that float64 shows
    loss = 2 / beta * torch.logaddexp(log_odds, torch.zeros_like(log_odds))
    weight = 2 / beta * slope * torch.sigmoid(log_odds)
    return torch.where(present, loss, 0), torch.where(present, weight, 0)


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
