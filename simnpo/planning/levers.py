"""Memory options on a model that has no weights: the memory and the arithmetic they have, without their data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simnpo.memory.tiles import TiledForward, tileable
from simnpo.model import causal_lm
from simnpo.planning.model_shape import layers_of

# NF4 with its block scales, one float32 to 64 weights, themselves in 8 bits with a float32 to 256 of them
BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
# more tiles than that only make the simulation slow: smaller ones are taken to be this large
MOST_TILES = 8


class _Dequantised(torch.autograd.Function):
    """x W^T with W in 4 bits: both products make W in the arithmetic's dtype for themselves."""

    @staticmethod
    def forward(ctx, x, shape, dtype):
        ctx.shape, ctx.dtypes = shape, (x.dtype, dtype)
        return F.linear(x.to(dtype), x.new_empty(shape, dtype=dtype))

    @staticmethod
    def backward(ctx, *grad_outputs):
        gradient, (x_dtype, dtype) = grad_outputs[0], ctx.dtypes
        weight = gradient.new_empty(ctx.shape, dtype=dtype)
        return torch.matmul(gradient.to(dtype), weight).to(x_dtype), None, None


def quantise_body(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every frozen linear layer of the body a weight in 4 bits; adapters beside them stay.

    Args:
        dtype: of the arithmetic.
    """
    for layer in layers_of(causal_lm(model)):
        for module in layer.modules():
            base = getattr(module, "base_layer", None)
            if isinstance(base, nn.Linear):
                _quantise(base, dtype)


def _quantise(linear: Any, dtype: torch.dtype) -> None:
    shape, bias = linear.weight.shape, linear.bias
    packed = torch.empty(int(shape.numel() * BYTES_4BIT), dtype=torch.uint8)
    linear.weight = nn.Parameter(packed, requires_grad=False)

    def forward(x: Tensor) -> Tensor:
        # without autocast it is a pass in float32
        out: Any = _Dequantised.apply(x, shape, dtype if torch.is_autocast_enabled("cpu") else x.dtype)
        # PEFT's layer over bitsandbytes' works on a copy
        return (out if bias is None else out + bias).clone()

    linear.forward = forward


def tile_layers(model: nn.Module, tile_tokens: int) -> None:
    """`simnpo.memory.tiles.tile_layers` without the measurement, for which there are no weights."""
    mlps, norms = tileable(causal_lm(model))
    for module in (mlps | norms).values():
        module.forward = _tiled(module.forward, tile_tokens)


def _tiled(whole: Callable[[Tensor], Tensor], tile_tokens: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        tokens = x.numel() // x.shape[-1]
        return TiledForward(whole, max(tile_tokens, -(-tokens // MOST_TILES)))(x)

    return forward
