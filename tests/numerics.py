"""Operands in the four regimes an unlearned model passes through, and the error budget the kernels are held to."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REGIMES = ("flat", "text", "memorised", "forgotten")


def regime_operands(regime: str, N: int, D: int, V: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states (N, D), weight (V, D) float64 and targets (N,), with mean negative log-likelihoods of about

    flat: log V; text: 2-6; memorised: under 1e-3; forgotten: 10, another token has p close to 1.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) / D**0.5
    targets = torch.randint(0, V, (N,), generator=g)
    other = (targets + 1 + torch.randint(0, V - 1, (N,), generator=g)) % V
    hidden_states = torch.randn(N, D, generator=g, dtype=torch.float64) * (0.3 if regime == "flat" else 1.0)
    boosted = {"flat": [], "text": [(targets, 4.0)], "memorised": [(targets, 20.0)]}
    for tokens, logit in boosted.get(regime, [(other, 22.0), (targets, 12.0)]):
        rows = weight[tokens]
        hidden_states += logit * rows / rows.square().sum(-1, keepdim=True)
    return hidden_states, weight, targets


def value_and_grad(fn: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """fn(*inputs) and its gradient in each float input, for a given (not all-ones) upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    value = fn(*leaves)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    grads = torch.autograd.grad(value, [x for x in leaves if x.requires_grad], upstream)
    return [value.detach(), *grads]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """L2 distance over the L2 norm of the exact value."""
    distance = (actual.double() - exact.double()).norm()
    return (distance / exact.double().norm().clamp(min=1e-300)).item()


def assert_no_worse_than_eager(ours: Tensor, eager: Tensor, exact: Tensor, name: str, ulp: float) -> None:
    """The budget is measured: the error eager PyTorch makes at this dtype, plus one rounding to it."""
    assert torch.isfinite(ours).all(), name
    error, budget = relative_error(ours, exact), relative_error(eager, exact) + ulp
    assert error <= budget, f"{name}: relative error {error:.2e}, eager's plus an ulp {budget:.2e}"
