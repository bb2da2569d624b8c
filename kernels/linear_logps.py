"""Per-token log-probabilities from hidden states, without the logits: never more than a chunk of them at a time.

    logps[n] = z[n, targets[n]] - logsumexp(z[n, :])            z = softcap(scale * (h W^T + bias)); 0 where ignored

Differentiable for any loss on top. With G = 2 N D V flop, one product with the head:

    nothing differentiable      1G    log-probabilities only
    frozen head                 2G    the forward keeps J = (onehot - p) W, (N, D); the backward scales its rows
    trained head                4G    the backward recomputes the logits in slabs of the vocabulary

Dimension key, here and in the test:
    N  tokens that count      D  hidden size      V  vocabulary      n  tokens of a chunk
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simnpo.kernels.autograd import first_derivative_only
from simnpo.kernels.backend import IGNORE_INDEX, Impl, uncompiled
from simnpo.kernels.checks import check_head, read_layout
from simnpo.kernels.chunks import default_chunk_tokens, even_chunks
from simnpo.kernels.gemm import logits_into, mm_float32
from simnpo.kernels.head import (
    HeadOptions,
    LogitTransform,
    RowReductions,
    RowStats,
    float_dtype,
    gradient_buffer,
    product_dtype,
)
from simnpo.kernels.head_gradients import HeadGradients
from simnpo.kernels.parallel import PartialSums, local_head, share_vocab, shared_row_stats
from simnpo.kernels.passes import passes_for

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def head_chunk(
    x: Tensor, weight: Tensor, targets: Tensor, buffer: Tensor, options: HeadOptions, *, write_gradient: bool,
    reductions: RowReductions | None = None,
) -> tuple[Tensor, RowStats]:  # fmt: skip
    """One chunk through the head: x (n, D), targets (n,) -> (n, V) and the tokens' stats.

    The (n, V) tensor is h W^T, a view of `buffer` (in options.logits_dtype); with write_gradient it is
    d logps / d (h W^T), written over it where the dtypes allow. With a vocab_group it has this rank's columns; the
    stats are of all columns, and there are no reductions. These are filled where given.
    """
    chunk = logits_into(x, weight, buffer[: len(x)])
    passes, transform = options.passes, options.transform
    in_place = write_gradient and chunk.dtype == options.dtype and options.vocab_group is None
    if options.vocab_group is None:
        target_logits = transform.at(targets, passes.indexed_dot(x, weight, targets))
        row_pass = passes.row_pass(
            chunk, targets, target_logits, transform, write_gradient=in_place, reductions=reductions
        )  # fmt: skip
        stats = RowStats(target_logits, *row_pass)
    else:
        stats = shared_row_stats(x, weight, chunk, targets, options)
    if write_gradient and not in_place:
        logits, chunk = chunk, gradient_buffer(chunk, options)
        passes.row_gradient(logits, targets, *stats, transform, chunk)
    return chunk, stats


def _linear_logps_fwd(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, options: HeadOptions, keep_jacobian: bool
) -> tuple[RowStats, Tensor]:
    """The stats of the N tokens and J (N, D), or (0, D) where it is not kept."""
    N = len(rows)
    stats = RowStats(*torch.empty(4, N, dtype=float_dtype(weight), device=weight.device))
    # fp16 cannot hold the gradient of a memorised token, 1e-6; bf16 has float32's range
    jacobian_dtype = torch.float32 if options.dtype == torch.float16 else options.dtype
    jacobian = weight.new_empty(N if keep_jacobian else 0, weight.shape[1], dtype=jacobian_dtype)
    buffer = weight.new_empty(min(N, options.chunk_tokens), weight.shape[0], dtype=options.logits_dtype)
    partial_sums = PartialSums(options.vocab_group)
    for start, stop in even_chunks(N, options.chunk_tokens):
        chunk_rows = rows[start:stop]
        x = hidden_states[chunk_rows].to(options.dtype)
        chunk, chunk_stats = head_chunk(x, weight, targets[chunk_rows], buffer, options, write_gradient=keep_jacobian)
        for out, values in zip(stats, chunk_stats, strict=True):
            out[start:stop] = values
        if keep_jacobian:
            jacobian[start:stop] = (
                mm_float32(chunk, weight) if jacobian_dtype != options.dtype else torch.mm(chunk, weight)
            )
            partial_sums.add(jacobian[start:stop])
    partial_sums.wait()
    return stats, jacobian


def _linear_logps_bwd(
    x: Tensor, weight: Tensor, targets: Tensor, stats: RowStats, dlogps: Tensor, options: HeadOptions,
    needs: tuple[bool, bool, bool], weight_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx (N, D), dweight (V, D), dbias (V,) of the trained head: the logits again, in slabs of the vocabulary."""
    (N, D), V = x.shape, weight.shape[0]
    dx = x.new_zeros(N, D, dtype=float_dtype(weight)) if needs[0] else None
    slab_dx = torch.empty_like(x) if needs[0] else None
    dweight = weight.new_empty(V, D, dtype=weight_dtype) if needs[1] else None
    dbias = weight.new_empty(V, dtype=float_dtype(weight)) if needs[2] else None

    # N x slab logits take the memory of chunk_tokens x V; a multiple of 128 keeps their rows aligned for wide loads
    slab = max(1, min(V, options.chunk_tokens * V // max(N, 1)))
    slab = slab // 128 * 128 or slab
    buffer = weight.new_empty(N, slab, dtype=options.logits_dtype)
    for start in range(0, V, slab):
        columns = slice(start, min(start + slab, V))
        chunk = logits_into(x, weight[columns], buffer[:, : columns.stop - start])
        slab_options = options._replace(transform=options.transform.columns(columns))
        if not options.gradient_error:
            logits, chunk = chunk, gradient_buffer(chunk, options)
            options.passes.row_gradient(logits, targets - start, *stats, slab_options.transform, chunk)
        gradients = HeadGradients(slab_dx, weight[columns], needs, 1, slab_options)
        gradients.add(slice(0, N), x, targets - start, chunk, stats, dlogps)
        if dx is not None and slab_dx is not None:
            dx += slab_dx
        if dweight is not None:
            dweight[columns] = gradients.dweight(weight_dtype)
        if dbias is not None:
            dbias[columns] = gradients.dbias(dbias.dtype)
    partial_sums = PartialSums(options.vocab_group)
    partial_sums.add(dx)
    partial_sums.wait()
    return dx, dweight, dbias


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, rows, options, needs):
        N, D = hidden_states.shape
        product_weight = weight.to(options.dtype)
        needs_x, needs_weight, needs_bias = needs
        frozen = not (needs_weight or needs_bias)
        stats, jacobian = _linear_logps_fwd(
            hidden_states, product_weight, targets, rows, options, keep_jacobian=needs_x and frozen
        )
        ctx.options, ctx.needs, ctx.shape, ctx.dtype = options, needs, (N, D), hidden_states.dtype
        if frozen:
            ctx.save_for_backward(jacobian, rows)
        else:
            ctx.save_for_backward(hidden_states, weight, bias, targets, rows, *stats)
        return stats.logps.new_zeros(N).index_copy_(0, rows, stats.logps)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dlogps):
        dhidden = torch.zeros(ctx.shape, dtype=ctx.dtype, device=dlogps.device) if ctx.needs[0] else None
        scale_rows = ctx.options.passes.scale_rows
        if not any(ctx.needs[1:]):
            jacobian, rows = ctx.saved_tensors
            return scale_rows(jacobian, dlogps[rows], dhidden, rows), *[None] * 6
        hidden_states, weight, bias, targets, rows, *stats = ctx.saved_tensors
        dlogps = dlogps[rows]
        dtype = ctx.options.dtype
        with torch.autocast(dlogps.device.type, enabled=False):
            dx, dweight, dbias = _linear_logps_bwd(
                hidden_states[rows].to(dtype), weight.to(dtype), targets[rows], RowStats(*stats), dlogps,
                ctx.options, ctx.needs, weight.dtype,
            )  # fmt: skip
        if dhidden is not None:
            dhidden.index_copy_(0, rows, dx.to(dhidden.dtype))
        dbias = None if dbias is None else dbias.to(bias.dtype)
        return dhidden, dweight, dbias, *[None] * 4


@uncompiled
def linear_logps(
    hidden_states: Tensor, lm_head_weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, logit_softcap: float | None = None, gradient_error: float = 0.0,
    logits_dtype: torch.dtype | None = None, chunk_tokens: int | None = None, impl: Impl = "auto",
    vocab_group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """Log-probability of each target, without materialising the logits.

    Differentiable in hidden_states, lm_head_weight and bias, for any loss on top. Where they ask for no gradient none
    is computed: a frozen head costs half a trained one.

    Args:
        hidden_states: (B, T, D), or packed (N, D); float16, bfloat16, float32 or float64.
        lm_head_weight: (V, D), same dtype; under torch.autocast both are cast as `F.linear` would. A DTensor may be
            replicated, or sharded over its vocabulary.
        targets: (B, T) or (N,) int64 in [0, V), already shifted, -100 where ignored.
        bias: (V,) or None.
        logit_scale, logit_softcap: logits = c tanh(scale * (h W^T + bias) / c), without the tanh for None.
        gradient_error: relative L2 error allowed in the gradient of the logits of a trained head, in [0, 1); see
            `linear_unlearn_loss`.
        logits_dtype: torch.float32 keeps the logits of a chunk unrounded between half-precision products, at three
            times their memory; None: the dtype of the products.
        chunk_tokens: rows of logits alive at once; None chooses by memory.
        impl: "auto", "triton" or "torch".
        vocab_group: the ranks that share the head, each with some of its rows (any number of them, in the order
            of the ranks), the same rows of the bias, and the same hidden_states and targets. All get the
            log-probabilities and the gradient of hidden_states over the whole vocabulary; the gradients of weight and
            bias are of the rank's own rows.

    Returns:
        per_token_logps: (B, T) or (N,) float32 (float64 for float64 input), nats; 0 where the target is ignored.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a target is outside [0, V), or impl cannot run here.
    """
    lm_head_weight, bias, vocab_group = local_head(lm_head_weight, bias, vocab_group)
    check_head(hidden_states, lm_head_weight, targets, bias, logit_scale, logit_softcap)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    flat_targets = targets.reshape(-1)
    needs = needs_gradient(hidden_states, lm_head_weight, bias)
    trained = any(needs[1:])
    if gradient_error and needs[0] and not trained:
        raise ValueError(
            "gradient_error needs the weights of the tokens, which linear_logps with a frozen head does not know when "
            "it computes their gradient: use linear_unlearn_loss, or gradient_error=0"
        )
    options = head_options(
        hidden_states, lm_head_weight, bias, logit_scale, logit_softcap, gradient_error,
        logits_dtype, chunk_tokens, impl, head_is_trained=trained,
    )  # fmt: skip
    options, V, first = share_vocab(vocab_group, options, lm_head_weight, flat_targets, needs)
    bounds = torch.tensor([0, len(flat_targets)], device=targets.device)
    layout = read_layout(flat_targets, bounds, None, V)
    if first:
        flat_targets = flat_targets - first
    with torch.autocast(hidden_states.device.type, enabled=False):
        logps = _LinearLogps.apply(flat, lm_head_weight, bias, flat_targets, layout.rows, options, needs)
    return logps.view(targets.shape)


def needs_gradient(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Who takes a gradient; nobody does under torch.no_grad."""
    on = torch.is_grad_enabled()
    return (
        on and hidden_states.requires_grad,
        on and weight.requires_grad,
        on and bias is not None and bias.requires_grad,
    )


def head_options(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None,
    gradient_error: float, logits_dtype: torch.dtype | None, chunk_tokens: int | None, impl: str, *,
    head_is_trained: bool,
) -> HeadOptions:  # fmt: skip
    """Resolve dtypes, chunk size and implementation; check the numbers."""
    if not 0 <= gradient_error < 1:
        raise ValueError(f"gradient_error must be in [0, 1), 0 for exact gradients, got {gradient_error}")
    dtype = product_dtype(hidden_states, weight)
    widest = torch.promote_types(dtype, torch.float32)
    if logits_dtype not in (None, dtype, widest):
        raise ValueError(f"logits_dtype must be None, {dtype} or {widest}, got {logits_dtype}")
    logits_dtype = dtype if logits_dtype is None else logits_dtype
    if chunk_tokens is None:
        # logits wider than the products need their gradient beside them
        itemsize = dtype.itemsize if logits_dtype == dtype else logits_dtype.itemsize + dtype.itemsize
        chunk_tokens = default_chunk_tokens(weight.shape[0], itemsize, weight.device, head_is_trained=head_is_trained)
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    transform = LogitTransform(None if bias is None else bias.detach(), float(scale), softcap)
    return HeadOptions(
        transform, dtype, logits_dtype, chunk_tokens, float(gradient_error), passes_for(impl, hidden_states)
    )  # fmt: skip


def linear_logps_torch(
    hidden_states: Tensor, lm_head_weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, logit_softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """`linear_logps` with all the logits, by autograd: the definition the tests hold it to."""
    logits = logit_scale * torch.nn.functional.linear(hidden_states, lm_head_weight, bias)
    logits = logits.to(float_dtype(logits))
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    counted = targets != IGNORE_INDEX
    logps = logits.log_softmax(-1).gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return logps.where(counted, 0)
