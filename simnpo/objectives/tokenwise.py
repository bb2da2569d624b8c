"""Objectives that are a mean over tokens of a function of the token's own log-probability.

    loss of a sequence = (1/n) sum_t f(l_t)          l_t = log p(y_t | y_<t), p_t = e^{l_t}

The slope f' of a token is known as soon as its row of logits has been read, whatever becomes of the rest of its
sequence. sg(x) is x without a gradient: the formulas with it name a weight, and their derivative is that weight.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simnpo.objectives.base import ForgetObjective
from simnpo.objectives.sequence import softplus

# a token that float32 cannot tell from certain: 1 - p is taken to be this, so that log(1 - p) and 1/(1 - p) stay finite
CERTAIN_LOGP = -1e-20


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact at both ends (Machler 2012); finite at 0: see CERTAIN_LOGP."""
    x = x.clamp(max=CERTAIN_LOGP)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


class TokenObjective(ForgetObjective):
    """A mean over tokens of a loss of the token's log-probability."""

    def loss_and_slope(self, token_logps: Tensor, ref_token_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """f(l_t) and f'(l_t), both of the shape of token_logps; finite for every l_t <= 0."""
        raise NotImplementedError

    def _ref(self, ref_token_logps: Tensor | None) -> Tensor:
        if ref_token_logps is None:
            raise ValueError(
                f"{type(self).__name__} needs ref_token_logps, the log-probability of each target under the reference "
                "policy; WGA needs none"
            )
        return ref_token_logps


@dataclass(frozen=True)
class WGA(TokenObjective):
    """Weighted gradient ascent: tokens the model is unsure of are left alone.

    Args:
        beta: power of the probability; 0 is gradient ascent.
    """

    beta: float = 1.0
    formula: ClassVar[str] = "mean_t sg(p_t^beta) l_t"
    weight: ClassVar[str] = "p_t^beta / n"
    source: ClassVar[str] = "arXiv 2502.19301"

    def __post_init__(self) -> None:
        _check_powers(beta=self.beta)

    def loss_and_slope(self, token_logps: Tensor, ref_token_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _weighted(torch.exp(self.beta * token_logps), token_logps)


@dataclass(frozen=True)
class TNPO(TokenObjective):
    """Token-wise NPO.

    Args:
        beta: inverse temperature of a token's log-ratio to the reference; q_t is the reference's probability.
    """

    beta: float = 4.0
    needs_ref_token_logps: ClassVar[bool] = True
    formula: ClassVar[str] = "mean_t sg(2 p_t^beta / (p_t^beta + q_t^beta)) l_t"
    weight: ClassVar[str] = "2 sigmoid(beta (l_t - log q_t)) / n"
    source: ClassVar[str] = "arXiv 2502.19301"

    def __post_init__(self) -> None:
        _check_powers(beta=self.beta)

    def loss_and_slope(self, token_logps: Tensor, ref_token_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _weighted(2 * torch.sigmoid(self.beta * (token_logps - self._ref(ref_token_logps))), token_logps)


@dataclass(frozen=True)
class WTNPO(TokenObjective):
    """Weighted token-wise NPO: TNPO times a power of the probability.

    Args:
        beta: as in TNPO.
        alpha: power of the probability.
    """

    beta: float = 4.0
    alpha: float = 1.5
    needs_ref_token_logps: ClassVar[bool] = True
    formula: ClassVar[str] = "mean_t sg(2 p_t^(beta+alpha) / (p_t^beta + q_t^beta)) l_t"
    weight: ClassVar[str] = "2 p_t^alpha sigmoid(beta (l_t - log q_t)) / n"
    source: ClassVar[str] = "arXiv 2502.19301, and its authors' code"

    def __post_init__(self) -> None:
        _check_powers(beta=self.beta, alpha=self.alpha)

    def loss_and_slope(self, token_logps: Tensor, ref_token_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ratio = torch.sigmoid(self.beta * (token_logps - self._ref(ref_token_logps)))
        return _weighted(2 * torch.exp(self.alpha * token_logps) * ratio, token_logps)


@dataclass(frozen=True)
class SatImp(TokenObjective):
    """Saturation times importance: neither forgotten tokens nor those the sequence hardly depends on.

    Args:
        beta1, beta2: powers of p_t and of 1 - p_t.
    """

    beta1: float = 5.0
    beta2: float = 1.0
    formula: ClassVar[str] = "mean_t sg(p_t^beta1 (1 - p_t)^beta2) l_t"
    weight: ClassVar[str] = "p_t^beta1 (1 - p_t)^beta2 / n"
    source: ClassVar[str] = "arXiv 2505.11953"

    def __post_init__(self) -> None:
        _check_powers(beta1=self.beta1, beta2=self.beta2)

    def loss_and_slope(self, token_logps: Tensor, ref_token_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _weighted(torch.exp(self.beta1 * token_logps + self.beta2 * log1mexp(token_logps)), token_logps)


@dataclass(frozen=True)
class Unlikelihood(TokenObjective):
    """Likelihood of not writing the token. CE-U, another loss, has the same gradient."""

    formula: ClassVar[str] = "mean_t -log(1 - p_t)"
    weight: ClassVar[str] = "p_t / (1 - p_t) / n"
    source: ClassVar[str] = "arXiv 1908.04319; CE-U, another loss of the same gradient: arXiv 2503.01224"

    def loss_and_slope(self, token_logps: Tensor, ref_token_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return -log1mexp(token_logps), torch.exp(token_logps - log1mexp(token_logps))


@dataclass(frozen=True)
class CATNIP(TokenObjective):
    """Token-wise NPO against everything else the token could be: the reference is 1 - p_t.

    Args:
        beta: inverse temperature of the token's log-odds; at 1 it is twice the unlikelihood.
    """

    beta: float = 1.0
    formula: ClassVar[str] = "mean_t (2/beta) log(1 + (p_t / (1 - p_t))^beta)"
    weight: ClassVar[str] = "2 sigmoid(beta log(p_t / (1 - p_t))) / (1 - p_t) / n"
    source: ClassVar[str] = "arXiv 2602.02824, the reference differentiated too"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")

    def loss_and_slope(self, token_logps: Tensor, ref_token_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_rest = log1mexp(token_logps)
        x = self.beta * (token_logps - log_rest)
        return 2 / self.beta * softplus(x), 2 * torch.sigmoid(x) * torch.exp(-log_rest)


@dataclass(frozen=True)
class JensUn(TokenObjective):
    """Jensen-Shannon divergence between the model and a refusal.

    The targets are the refusal's tokens, and their probability rises: the slope is negative.
    """

    targets_alternate: ClassVar[bool] = True
    formula: ClassVar[str] = (
        "mean_t ((1 - p_t) ln 2 + p_t ln(2 p_t / (1 + p_t)) + ln(2 / (1 + p_t))) / 2, y the refusal"
    )
    weight: ClassVar[str] = "(p_t / 2) ln(p_t / (1 + p_t)) / n"
    source: ClassVar[str] = "arXiv 2509.02820, the forget term, in closed form for a one-hot target"

    def loss_and_slope(self, token_logps: Tensor, ref_token_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p = torch.exp(token_logps)
        # p ln p is 0 at p = 0, where the log-probability may be -inf
        p_log_p = torch.where(p > 0, p * token_logps, 0)
        loss = (2 * math.log(2) + p_log_p - (1 + p) * torch.log1p(p)) / 2
        return loss.clamp(min=0), (p_log_p - p * torch.log1p(p)) / 2


def _weighted(weight: Tensor, token_logps: Tensor) -> tuple[Tensor, Tensor]:
    """sg(weight) l_t and its slope."""
    return torch.where(weight > 0, weight * token_logps, 0), weight


def _check_powers(**powers: float) -> None:
    for name, power in powers.items():
        if not power >= 0:
            raise ValueError(f"{name} must be 0 or more, got {power}")
