"""Gradients that cannot be differentiated again must say so, and not pass for constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class _RefuseSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "simnpo's losses have first derivatives only: for a second one (create_graph=True) use linear_logps_torch, "
            "which keeps all the logits"
        )


def first_derivative_only(backward: Callable) -> Callable:
    """Wrap a Function's backward so that a backward through its result raises.

    torch's once_differentiable lets a second derivative pass silently as zero when the upstream gradient is a constant,
    which for a loss it always is.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Any) -> tuple:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(g if g is None else _RefuseSecondDerivative.apply(g.detach().requires_grad_()) for g in gradients)

    return wrapper
