"""SimNPO, NPO and gradient ascent with their retain term, from hidden states, in one pass without the logits.

    loss = forget_coef mean_i f(logps of forget sequence i) + retain_coef (mean over retain tokens of -logp)

The derivative of the loss with respect to the logits of token t is coefs[t] (onehot - p), with one coefficient a
sequence, known as soon as its last token is. So with G = 2 N D V flop, one product with the head:

    nothing differentiable      1G
    frozen head                 2G    all of J = (onehot - p) W first, then dH = coefs J
    trained head                3G    chunks end where sequences end: dH = coefs (dZ W), dW += dZ^T (coefs H)

The coefficients always scale the (n, D) side. A forget sequence longer than a chunk adds its unscaled dZ^T H to a
float32 (V, D) sum of its own, which becomes dW while that is empty, and is scaled once.

Dimension key, here and in the test:
    B  sequences      N  tokens that count, in the order of the plan      D  hidden size      V  vocabulary
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from simnpo.kernels.autograd import first_derivative_only
from simnpo.kernels.backend import Impl, uncompiled
from simnpo.kernels.checks import Layout, check_head, check_sequences, read_layout, sequence_bounds
from simnpo.kernels.chunks import Span, aligned_spans, even_chunks
from simnpo.kernels.head import HeadOptions
from simnpo.kernels.head_gradients import HeadGradients
from simnpo.kernels.linear_logps import head_chunk, head_options, needs_gradient
from simnpo.kernels.parallel import PartialSums, SplitSequences, local_head, share_vocab, split_sequences
from simnpo.kernels.passes import Passes
from simnpo.kernels.sequence_pass import SequenceResults, sequence_pass_torch
from simnpo.objectives import Objective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class UnlearnLoss(NamedTuple):
    """What an unlearning loss returns; only `loss` is differentiable.

    loss: () the objective to minimise.
    forget_loss: () mean over the forget sequences, 0 without any.
    retain_loss: () negative log-likelihood per retain token, nats, 0 without any.
        With num_forget or num_retain_tokens these two are the batch's share of a mean over more than the batch.
    logps: (B,) log-probability of each sequence, nats.
    num_tokens: (B,) int64, tokens that count.
    weights: (B,) derivative of a forget sequence's own loss in each of its token log-probabilities; 0 for retain.
    gradient_error: () with a gradient budget, the share of the norm of dlogits that was left out before the rank-one
        tail stood in for it: measured, at most the budget. None without one.
    """

    loss: Tensor
    forget_loss: Tensor
    retain_loss: Tensor
    logps: Tensor
    num_tokens: Tensor
    weights: Tensor
    gradient_error: Tensor | None = None


class SequencePlan(NamedTuple):
    """The sequences of a batch in the order they go through the head, and the coefficients they start with.

    rows: (N,) positions of the tokens in the flattened batch.
    offsets: (S + 1,) bounds of the S sequences that have tokens.   sequences: (S,) their places in the batch.
    num_tokens: (B,) int64.   is_retain: (B,) bool.   ref_logps: (B,) or None.
    coefs: (N,) d loss / d logp: of retain tokens from the start, of forget tokens from the sequence pass on.
    num_forget, num_retain_tokens: what the two means divide by.
    forget_scale: forget_coef over num_forget.
    sequence_group: the ranks that the tokens of every sequence are spread over; num_tokens counts on all of them.
    """

    rows: Tensor
    offsets: Tensor
    sequences: Tensor
    num_tokens: Tensor
    is_retain: Tensor
    ref_logps: Tensor | None
    coefs: Tensor
    num_forget: int
    num_retain_tokens: int
    forget_scale: float
    spans: list[Span]
    objective: Objective
    sequence_group: ProcessGroup | None = None

    def reduce(self, span: Span, token_logps: Tensor, results: SequenceResults, passes: Passes) -> None:
        """Run the sequence pass over the sequences that end with this span."""
        first, last = span.sequences
        arguments = (
            token_logps, self.coefs, self.offsets[first : last + 1], self.sequences[first:last], self.is_retain,
            results, self.objective, self.ref_logps, self.forget_scale,
        )  # fmt: skip
        if self.sequence_group is None:
            passes.sequence_pass(*arguments)
        else:
            sequence_pass_torch(*arguments, group=self.sequence_group, num_tokens=self.num_tokens)


def make_plan(
    layout: Layout, objective: Objective, ref_logps: Tensor | None, forget_coef: float, retain_coef: float,
    dtype: torch.dtype, chunk_tokens: int, *, aligned: bool, num_forget: int | None, num_retain_tokens: int | None,
    split: SplitSequences | None = None,
) -> SequencePlan:  # fmt: skip
    """Order the sequences for the schedule: aligned to chunks, or as they come in one span cut anywhere."""
    rows, lengths, is_retain = layout
    device, B = rows.device, len(lengths)
    counts, longest = (lengths, lengths) if split is None else (split.num_tokens, split.longest)
    if aligned:
        order, spans = aligned_spans(longest, is_retain, chunk_tokens, lengths)
    else:
        order = [b for b in range(B) if counts[b]]
        spans = [Span(even_chunks(len(rows), chunk_tokens), (0, len(order)), weight_known_late=True)]

    def on_device(values: list) -> Tensor:
        return torch.tensor(values, device=device)

    own_tokens, num_tokens, retain = on_device(lengths), on_device(counts), on_device(is_retain)
    sequences = torch.tensor(order, dtype=torch.int64, device=device)
    offsets = torch.nn.functional.pad(own_tokens[sequences].cumsum(0), (1, 0))
    if order != sorted(order):
        starts = own_tokens.cumsum(0) - own_tokens
        shift = starts[sequences] - offsets[:-1]
        shift = shift.repeat_interleave(own_tokens[sequences], output_size=len(rows))
        rows = rows[shift + torch.arange(len(rows), device=device)]
    if num_retain_tokens is None:
        num_retain_tokens = max(sum(n for n, known in zip(counts, is_retain, strict=True) if known), 1)
    if num_forget is None:
        num_forget = max(B - sum(is_retain), 1)
    coefs = torch.zeros(B, dtype=dtype, device=device).masked_fill_(retain, -retain_coef / num_retain_tokens)
    coefs = coefs[sequences].repeat_interleave(own_tokens[sequences], output_size=len(rows))
    ref_logps = None if ref_logps is None else ref_logps.to(device, dtype)
    return SequencePlan(
        rows, offsets, sequences, num_tokens, retain, ref_logps, coefs, num_forget, num_retain_tokens,
        forget_coef / num_forget, spans, objective, None if split is None else split.group,
    )  # fmt: skip


def _linear_unlearn_loss_fwd(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, plan: SequencePlan, options: HeadOptions,
    needs: tuple[bool, bool, bool],
) -> tuple[SequenceResults, HeadGradients]:  # fmt: skip
    """The results of every sequence and the gradients of the loss, in as many products as the schedule promises."""
    token_logps = torch.empty_like(plan.coefs)
    results = SequenceResults.zeros(len(plan.num_tokens), token_logps)
    pieces = [piece for span in plan.spans for piece in span.pieces]
    dx_dtype = torch.float32 if options.dtype == torch.float16 else options.dtype
    dx = weight.new_empty(len(plan.rows), weight.shape[1], dtype=dx_dtype) if needs[0] else None
    gradients = HeadGradients(dx, weight, needs, len(pieces), options)
    most_rows = max((stop - start for start, stop in pieces), default=0)
    buffer = weight.new_empty(most_rows, weight.shape[0], dtype=options.logits_dtype)
    partial_dx = PartialSums(options.vocab_group)

    for span in plan.spans:
        # while the weight is not known, sums of its own
        sums = HeadGradients(dx, weight, needs, len(pieces), options) if span.weight_known_late else gradients
        for piece in span.pieces:
            rows = slice(*piece)
            tokens = targets[plan.rows[rows]]
            x = hidden_states[plan.rows[rows]].to(options.dtype)
            write_gradient = any(needs) and not options.gradient_error
            chunk, stats = head_chunk(x, weight, tokens, buffer, options, write_gradient=write_gradient)
            token_logps[rows] = stats.logps
            if piece == span.pieces[-1]:
                plan.reduce(span, token_logps, results, options.passes)
            if any(needs):
                sums.add(rows, x, tokens, chunk, stats, None if span.weight_known_late else plan.coefs[rows])
                partial_dx.add(None if dx is None else dx[rows])
        if not span.pieces and span.sequences[0] < span.sequences[1]:
            # of sequences spread over ranks none of the tokens are here: the other ranks wait for this one's nothing
            plan.reduce(span, token_logps, results, options.passes)
        if span.weight_known_late and any(needs) and span.pieces:
            partial_dx.wait()
            rows = slice(span.pieces[0][0], span.pieces[-1][1])
            gradients.absorb(sums, rows, plan.coefs[rows])
    partial_dx.wait()
    return results, gradients


class _LinearUnlearnLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, plan, options, needs, forget_coef, retain_coef):
        results, gradients = _linear_unlearn_loss_fwd(
            hidden_states, weight.to(options.dtype), targets, plan, options, needs
        )  # fmt: skip
        outputs = reduce_losses(plan, results, forget_coef, retain_coef)
        if gradients.budget is not None:
            outputs = outputs._replace(gradient_error=gradients.budget.relative_error())
        dweight, dbias = gradients.dweight(weight.dtype), gradients.dbias(plan.coefs.dtype)
        ctx.save_for_backward(gradients.dx, dweight, dbias, plan.rows)
        ctx.shape, ctx.dtype, ctx.scale_rows = hidden_states.shape, hidden_states.dtype, options.passes.scale_rows
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss, *_):
        dx, dweight, dbias, rows = ctx.saved_tensors
        dhidden = None
        if dx is not None:
            dhidden = torch.zeros(ctx.shape, dtype=ctx.dtype, device=dloss.device)
            ctx.scale_rows(dx, dloss.expand(len(rows)).contiguous(), dhidden, rows)
        return (
            dhidden,
            None if dweight is None else dweight * dloss.to(dweight.dtype),
            None if dbias is None else (dbias * dloss).to(ctx.bias_dtype),
            *[None] * 6,
        )


def reduce_losses(plan: SequencePlan, results: SequenceResults, forget_coef: float, retain_coef: float) -> UnlearnLoss:
    """The batch's losses from those of its sequences, in float32."""
    forget_loss = results.losses.where(~plan.is_retain, 0).sum() / plan.num_forget
    retain_loss = results.losses.where(plan.is_retain, 0).sum() / plan.num_retain_tokens
    loss = forget_coef * forget_loss + retain_coef * retain_loss
    return UnlearnLoss(loss, forget_loss, retain_loss, results.logps, plan.num_tokens, results.weights)


@uncompiled
def linear_unlearn_loss(
    hidden_states: Tensor, lm_head_weight: Tensor, targets: Tensor, objective: Objective, *,
    cu_seqlens: Tensor | None = None, retain_mask: Tensor | None = None, ref_logps: Tensor | None = None,
    forget_coef: float = 1.0, retain_coef: float = 1.0, num_forget: int | None = None,
    num_retain_tokens: int | None = None, bias: Tensor | None = None, logit_scale: float = 1.0,
    logit_softcap: float | None = None, gradient_error: float = 0.0,
    logits_dtype: torch.dtype | None = None, chunk_tokens: int | None = None, impl: Impl = "auto",
    vocab_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None,
) -> UnlearnLoss:  # fmt: skip
    """An unlearning loss of a batch of forget and retain sequences, without materialising the logits.

    Args:
        hidden_states: (B, T, D), one sequence a row; or packed (N, D) with cu_seqlens.
        lm_head_weight: (V, D), same dtype; under torch.autocast both are cast as `F.linear` would. A DTensor may be
            replicated, or sharded over its vocabulary.
        targets: (B, T) or (N,) int64 in [0, V), already shifted, -100 where ignored.
        objective: `SimNPO`, `NPO` or `GradAscent`.
        cu_seqlens: (B + 1,) integers, bounds of the packed sequences.
        retain_mask: (B,) bool, True for a retain sequence; None: all forget.
        ref_logps: (B,) log-probabilities under the reference policy, nats, for NPO; ignored at retain sequences.
        forget_coef, retain_coef: weights of the two terms. The paper's published lambda of TOFU is our forget_coef.
        num_forget, num_retain_tokens: what the two means divide by where the batch is one of several micro-batches or
            ranks of a step: the forget sequences and retain tokens of them all. None: of this batch.
        bias, logit_scale, logit_softcap: logits = c tanh(scale * (h W^T + bias) / c).
        gradient_error: relative L2 error allowed in the gradient of the logits, in [0, 1); 0 is exact. With 0.004 the
            backward products run over the few per cent of the vocabulary that carry the gradient, at an error the size
            of bf16's own. Loss and log-probabilities stay exact.
        logits_dtype: torch.float32 keeps the logits of a chunk unrounded between half-precision products, at three
            times their memory; None: the dtype of the products.
        chunk_tokens: rows of logits alive at once; None chooses by memory (`chunks.default_chunk_tokens`).
        impl: "auto", "triton" or "torch".
        vocab_group: the ranks that share the head (tensor parallel): see `linear_logps`.
        sequence_group: the ranks that share every sequence (context parallel), each with a slice of its tokens:
            the same B sequences in the same order, some of them perhaps without a token here. All get the same losses
            and the logps and num_tokens of whole sequences; the gradient of hidden_states is of the rank's own tokens,
            and those of weight and bias are to be added up over the ranks.

    Returns:
        UnlearnLoss. A sequence without tokens has loss and gradient 0 and still counts in the mean.

    Raises:
        ValueError: an argument does not fit the others, a target is outside [0, V), ref_logps is missing for NPO.
    """
    lm_head_weight, bias, vocab_group = local_head(lm_head_weight, bias, vocab_group, sequence_group)
    check_head(hidden_states, lm_head_weight, targets, bias, logit_scale, logit_softcap)
    bounds = sequence_bounds(targets, cu_seqlens)
    check_sequences(len(bounds) - 1, retain_mask, ref_logps, objective, num_forget, num_retain_tokens)
    flat, flat_targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    needs = needs_gradient(hidden_states, lm_head_weight, bias)
    # a budget wants the weights too, so that sequences without weight claim no columns
    aligned = needs[1] or needs[2] or gradient_error > 0
    options = head_options(
        hidden_states, lm_head_weight, bias, logit_scale, logit_softcap, gradient_error,
        logits_dtype, chunk_tokens, impl, head_is_trained=needs[1] or needs[2],
    )  # fmt: skip
    options, V, first = share_vocab(vocab_group, options, lm_head_weight, flat_targets, needs)
    layout = read_layout(flat_targets, bounds, retain_mask, V)
    options, split = split_sequences(sequence_group, options, layout, needs)
    if first:
        flat_targets = flat_targets - first
    dtype = torch.float64 if options.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden_states.device.type, enabled=False):
        plan = make_plan(
            layout, objective, ref_logps, forget_coef, retain_coef, dtype, options.chunk_tokens, aligned=aligned,
            num_forget=num_forget, num_retain_tokens=num_retain_tokens, split=split,
        )  # fmt: skip
        return UnlearnLoss(
            *_LinearUnlearnLoss.apply(
                flat, lm_head_weight, bias, flat_targets, plan, options, needs, forget_coef, retain_coef
            )
        )
