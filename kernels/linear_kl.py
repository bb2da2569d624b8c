"""KL divergence to a reference model, from the hidden states of both, without the logits of either.

    kl = mean over the tokens that count of KL(softmax(ref_z[n]) || softmax(z[n]))
    z = softcap(scale * (h W^T + bias)), ref_z = softcap(scale * (h_ref W_ref^T + bias_ref))

Each token's gradient in the logits is p - q over the number of tokens, known at once: with G = 2 N D V flop

    nothing differentiable      2G    one product with each head
    frozen head                 3G    dH = dZ W
    trained head                4G    and dW = dZ^T H

The reference takes no gradient. Never more than chunk_tokens x V logits of each.

Dimension key, here and in the test:
    N  tokens that count      D  hidden size      V  vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from simnpo.kernels.autograd import first_derivative_only
from simnpo.kernels.backend import Impl, uncompiled
from simnpo.kernels.checks import check_head, read_layout
from simnpo.kernels.chunks import even_chunks
from simnpo.kernels.gemm import logits_into
from simnpo.kernels.head import HeadOptions, LogitTransform, float_dtype
from simnpo.kernels.head_gradients import HeadGradients, keep_for_backward, scaled_gradients
from simnpo.kernels.linear_logps import head_options, needs_gradient


def _linear_kl_fwd(
    hidden_states: Tensor, weight: Tensor, ref_hidden_states: Tensor, ref_weight: Tensor, ref_transform: LogitTransform,
    rows: Tensor, num_tokens: int, options: HeadOptions, needs: tuple[bool, bool, bool],
) -> tuple[Tensor, HeadGradients]:  # fmt: skip
    """The divergence and the gradients of it."""
    N = len(rows)
    chunks = even_chunks(N, options.chunk_tokens)
    dx_dtype = torch.float32 if options.dtype == torch.float16 else options.dtype
    dx = weight.new_empty(N, weight.shape[1], dtype=dx_dtype) if needs[0] else None
    gradients = HeadGradients(dx, weight, needs, len(chunks), options)
    most_rows = max((stop - start for start, stop in chunks), default=0)
    buffer, ref_buffer = (weight.new_empty(most_rows, weight.shape[0]) for _ in range(2))
    total = weight.new_zeros((), dtype=float_dtype(weight))
    for start, stop in chunks:
        chunk_rows = rows[start:stop]
        x = hidden_states[chunk_rows].to(options.dtype)
        chunk = logits_into(x, weight, buffer[: len(x)])
        ref_chunk = logits_into(
            ref_hidden_states[chunk_rows].to(options.dtype), ref_weight, ref_buffer[: len(x)]
        )  # fmt: skip
        kl = options.passes.kl_pass(chunk, ref_chunk, options.transform, ref_transform, write_gradient=any(needs))
        total += kl.sum() / num_tokens
        if any(needs):
            gradients.add_products(slice(start, stop), x, chunk, torch.full_like(kl, 1 / num_tokens))
    return total, gradients


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_states, weight, bias, ref_hidden_states, ref_weight, ref_transform, rows, num_tokens, options, needs
    ):
        kl, gradients = _linear_kl_fwd(
            hidden_states, weight.to(options.dtype), ref_hidden_states, ref_weight.to(options.dtype), ref_transform,
            rows, num_tokens, options, needs,
        )  # fmt: skip
        keep_for_backward(ctx, gradients, rows, hidden_states, weight, bias)
        return kl

    @staticmethod
    @first_derivative_only
    def backward(ctx, dkl):
        return (*scaled_gradients(ctx, dkl), *[None] * 7)


@uncompiled
def linear_kl(
    hidden_states: Tensor, lm_head_weight: Tensor, ref_hidden_states: Tensor, ref_lm_head_weight: Tensor,
    targets: Tensor, *, num_tokens: int | None = None, bias: Tensor | None = None, ref_bias: Tensor | None = None,
    logit_scale: float = 1.0, logit_softcap: float | None = None, chunk_tokens: int | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """KL(reference || model) per token, without materialising the logits of either.

    What a retain term wants (TOFU's KL, arXiv 2401.06121), divided by the tokens that count and not by padding.
    Differentiable in hidden_states, lm_head_weight and bias; the reference is a constant.

    Args:
        hidden_states: (B, T, D), or packed (N, D); float16, bfloat16, float32 or float64.
        lm_head_weight: (V, D), same dtype; under torch.autocast both are cast as `F.linear` would.
        ref_hidden_states, ref_lm_head_weight: the reference's, of the same leading shape and vocabulary; its hidden
            size may be another. With adapters on a frozen head the two weights are one tensor.
        targets: (B, T) or (N,) int64; positions at -100 do not count. Their values are not used.
        num_tokens: what to divide by where the batch is one of several micro-batches or ranks; None: this batch's.
        bias, ref_bias: (V,) or None.
        logit_scale, logit_softcap: logits = c tanh(scale * (h W^T + bias) / c), of both models.
        chunk_tokens: rows of each model's logits alive at once; None chooses by memory.
        impl: "auto", "triton" or "torch".

    Returns:
        () float32 (float64 for float64 input), nats; 0 without a token.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or impl cannot run here.
    """
    check_head(hidden_states, lm_head_weight, targets, bias, logit_scale, logit_softcap)
    check_head(ref_hidden_states, ref_lm_head_weight, targets, ref_bias, logit_scale, logit_softcap)
    if len(ref_lm_head_weight) != len(lm_head_weight):
        raise ValueError(
            f"ref_lm_head_weight must have the {len(lm_head_weight)} rows of lm_head_weight, got "
            f"{len(ref_lm_head_weight)}: the two models must share a vocabulary"
        )
    if num_tokens is not None and num_tokens < 1:
        raise ValueError(f"num_tokens must be a positive integer, or None for this batch's own, got {num_tokens}")
    flat, ref_flat = (x.reshape(-1, x.shape[-1]) for x in (hidden_states, ref_hidden_states.detach()))
    flat_targets = targets.reshape(-1)
    bounds = torch.tensor([0, len(flat_targets)], device=targets.device)
    layout = read_layout(flat_targets, bounds, None, len(lm_head_weight))
    needs = needs_gradient(hidden_states, lm_head_weight, bias)
    options = head_options(
        hidden_states, lm_head_weight, bias, logit_scale, logit_softcap, 0.0, None, chunk_tokens, impl,
        head_is_trained=any(needs[1:]),
    )  # fmt: skip
    ref_transform = options.transform._replace(bias=None if ref_bias is None else ref_bias.detach())
    num_tokens = max(layout.lengths[0], 1) if num_tokens is None else num_tokens
    with torch.autocast(hidden_states.device.type, enabled=False):
        return _LinearKL.apply(
            flat, lm_head_weight, bias, ref_flat, ref_lm_head_weight.detach(), ref_transform, layout.rows, num_tokens,
            options, needs,
        )  # fmt: skip
