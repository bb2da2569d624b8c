"""Functions of one number that the hardware's exp and log get wrong close to 0 and 1; float32, inside kernels only."""

from __future__ import annotations

from simnpo.kernels.backend import tl, triton


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact to float32 on the whole line."""
    # log1p(u) = 2 atanh(u / (2 + u)) for u in [0, 1], by its series
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15)))
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * series))))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, without the cancellation close to 0."""
    series = 1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040))))
    return tl.where(x > -0.4, x * (1.0 + x * (0.5 + x * series)), tl.exp(x) - 1.0)
