"""Attention in a simulated forward: what it keeps for the backward and which mask goes with it, without the data.

linear   one fused kernel over packed or single sequences: keeps q, k, v, its result and a float32 a token and head
sdpa     transformers' own, with an (N, N) mask where sequences are packed and (B, 1, T, T) where they are padded
varlen   `simnpo.attention` on a CPU: groups of sequences through scaled_dot_product_attention
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simnpo.errors import UserError

AttentionKind = Literal["linear", "sdpa", "varlen"]
NAME = "simnpo_simulated"


class _Fused(torch.autograd.Function):
    """(B, H, T, d) -> (B, T, H, d), empty: the memory of a fused kernel. Heads of k and v may be fewer."""

    @staticmethod
    def forward(ctx, query, key, value, mask, products, count):
        B, H, T, _ = query.shape
        out = value.new_empty(B, T, H, value.shape[-1])
        lse = query.new_empty(B, H, T, dtype=torch.float32)
        # a kernel that takes a mask wants it added to the scores, in their dtype, and again in the backward
        bias = None if mask is None else mask.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, bias)
        ctx.flops, ctx.count = 2 * 2 * H * products * query.shape[-1], count
        count(ctx.flops)
        return out

    @staticmethod
    def backward(ctx, *grad_outputs):
        query, key, value, *_ = ctx.saved_tensors
        # the scores again, and four products with them
        ctx.count(2.5 * ctx.flops)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), *[None] * 3


@contextmanager
def simulated_attention(
    kind: AttentionKind, lengths: list[int], *, packed: bool, on_gpu: bool, count: Callable[[float], None]
) -> Iterator[None]:
    """Models built with attention NAME attend in this way meanwhile.

    Args:
        lengths: tokens of each sequence of the batch.
        packed: whether they stand in one row.
        on_gpu: sdpa is a fused kernel there, whatever this machine is.
        count: told the flop of a fused kernel, which no operation shows.

    Raises:
        UserError: this transformers has no registry of masks.
    """
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise UserError("simnpo plan needs transformers 4.53 or later: pip install --upgrade transformers") from error
    bounds = _varlen_bounds(lengths) if kind == "varlen" else None
    no_mask = len(lengths) == 1 or (not packed and len(set(lengths)) == 1)
    products = sum(length * length for length in lengths) / 2
    if kind == "sdpa" and not no_mask:
        products = float(sum(lengths) ** 2 if packed else len(lengths) * max(lengths) ** 2)

    def mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **options: Any) -> Any:
        if kind == "linear":
            return None
        if bounds is not None:
            return bounds
        options["allow_is_causal_skip"], options["attention_mask"] = no_mask, None
        return sdpa_mask(batch_size, q_length, kv_length, *args, **options)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        if bounds is not None:
            from simnpo.attention import varlen_attention

            return varlen_attention(module, query, key, value, bounds, **options)
        if kind == "sdpa" and not on_gpu:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        q, k = query.to(value.dtype), key.to(value.dtype)
        return _Fused.apply(q, k, value, attention_mask, products, count), None  # type: ignore[return-value]

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    yield


def _varlen_bounds(lengths: list[int]) -> Any:
    """Made of real tensors, outside of any mode: which rows go together is read off the lengths."""
    from torch.utils._python_dispatch import _disable_current_modes

    from simnpo.attention import PackedBounds

    with _disable_current_modes():
        return PackedBounds(lengths, torch.device("cpu"))
