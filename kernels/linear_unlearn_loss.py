"""An unlearning objective with its retain term, from hidden states, in one pass without the logits.

    loss = forget_coef mean_i f(logps of forget sequence i) + retain_coef (mean over retain tokens of -logp)

The derivative of the loss with respect to the logits of token t is coefs[t] (onehot - p), with one coefficient a
sequence (or a pair of them), known as soon as its last token is. So with G = 2 N D V flop, one product with the head:

    nothing differentiable      1G
    frozen head                 2G    all of J = (onehot - p) W first, then dH = coefs J
    trained head                3G    chunks end where sequences end: dH = coefs (dZ W), dW += dZ^T (coefs H)

The coefficients always scale the (n, D) side. A forget sequence longer than a chunk adds its unscaled dZ^T H to a
float32 (V, D) sum of its own, which becomes dW while that is empty, and is scaled once.

Objectives of single tokens or rows know more and earlier: coefs[t] is forget_coef / (B_f n_i) from the start, and what
depends on the token is written into dZ with it. Their chunks end anywhere, at the same number of products.

Dimension key, here and in the test:
    B  sequences      N  tokens that count, in the order of the plan      D  hidden size      V  vocabulary
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from simnpo.kernels.autograd import first_derivative_only
from simnpo.kernels.backend import Impl, uncompiled
from simnpo.kernels.batch_kl import fold_in_kl
from simnpo.kernels.checks import (
    check_budget,
    check_exact,
    check_head,
    check_rows,
    check_sequences,
    check_tokens,
    read_layout,
    sequence_bounds,
)
from simnpo.kernels.head import HeadOptions, RowReductions
from simnpo.kernels.head_gradients import HeadGradients, keep_for_backward, scaled_gradients
from simnpo.kernels.linear_logps import head_chunk, head_options, linear_logps, needs_gradient
from simnpo.kernels.objective_terms import TokenTerms, is_local, sum_terms, write_terms_gradient
from simnpo.kernels.parallel import PartialSums, local_head, share_vocab, split_sequences
from simnpo.kernels.plan import Extras, SequencePlan, make_plan
from simnpo.kernels.sequence_pass import SequenceResults
from simnpo.objectives import KTO, Objective, RowObjective

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
    weights: (B,) derivative of a forget sequence's own loss in each of its token log-probabilities; 0 for retain. An
        alternate's is that of its pair's loss. Where tokens differ in it, their mean; of an objective of whole rows,
        the mean of its part along onehot - p.
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

    if is_local(plan.objective):
        _local_fwd(hidden_states, weight, targets, plan, options, needs, gradients, partial_dx, buffer, results)
        partial_dx.wait()
        return results, gradients
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
                known = plan.factors if span.weight_known_late else plan.coefs
                sums.add(rows, x, tokens, chunk, stats, None if known is None else known[rows])
                partial_dx.add(None if dx is None else dx[rows])
        if not span.pieces and span.sequences[0] < span.sequences[1]:
            # of sequences spread over ranks none of the tokens are here: the other ranks wait for this one's nothing
            plan.reduce(span, token_logps, results, options.passes)
        if span.weight_known_late and any(needs) and span.pieces:
            partial_dx.wait()
            rows = slice(span.pieces[0][0], span.pieces[-1][1])
            gradients.absorb(sums, rows, plan.late_coefs(span, rows, results))
    partial_dx.wait()
    return results, gradients


def _local_fwd(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, plan: SequencePlan, options: HeadOptions,
    needs: tuple[bool, bool, bool], gradients: HeadGradients, partial_dx: PartialSums, buffer: Tensor,
    results: SequenceResults,
) -> None:  # fmt: skip
    """`_linear_unlearn_loss_fwd` of an objective of single tokens or rows: every chunk is finished by itself."""
    token_logps = torch.empty_like(plan.coefs)
    whole_row = isinstance(plan.objective, RowObjective)
    terms = TokenTerms.empty(len(plan.rows), token_logps, mixed=whole_row)
    for start, stop in plan.spans[0].pieces:
        rows = slice(start, stop)
        tokens = targets[plan.rows[rows]]
        x = hidden_states[plan.rows[rows]].to(options.dtype)
        reductions = RowReductions.empty(len(x), token_logps) if whole_row else None
        chunk, stats = head_chunk(x, weight, tokens, buffer, options, write_gradient=False, reductions=reductions)
        token_logps[rows] = stats.logps
        some = plan.terms(rows, stats, reductions)
        terms.put(rows, some)
        coefs = plan.coefs[rows]
        if any(needs) and options.gradient_error:
            # the budget chooses columns by the whole coefficient, and scales the (n, D) side by it
            gradients.add(rows, x, tokens, chunk, stats, coefs * some.slopes)
        elif any(needs):
            chunk = write_terms_gradient(chunk, tokens, stats, reductions, some, options)
            gradients.add(rows, x, tokens, chunk, stats, coefs)
        if gradients.dx is not None:
            partial_dx.add(gradients.dx[rows])
    sum_terms(plan, token_logps, terms, results)


class _LinearUnlearnLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, plan, options, needs, forget_coef, retain_coef):
        results, gradients = _linear_unlearn_loss_fwd(
            hidden_states, weight.to(options.dtype), targets, plan, options, needs
        )  # fmt: skip
        outputs = reduce_losses(plan, results, forget_coef, retain_coef)
        if gradients.budget is not None:
            outputs = outputs._replace(gradient_error=gradients.budget.relative_error())
        keep_for_backward(ctx, gradients, plan.rows, hidden_states, weight, bias)
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss, *_):
        return (*scaled_gradients(ctx, dloss), *[None] * 6)


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
    exact_logps: Tensor | None = None, ref_token_logps: Tensor | None = None, token_weights: Tensor | None = None,
    alternates: Tensor | None = None, forget_coef: float = 1.0, retain_coef: float = 1.0,
    num_forget: int | None = None, num_retain_tokens: int | None = None, bias: Tensor | None = None,
    logit_scale: float = 1.0, logit_softcap: float | None = None, gradient_error: float = 0.0,
    logits_dtype: torch.dtype | None = None, chunk_tokens: int | None = None, impl: Impl = "auto",
    vocab_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None,
) -> UnlearnLoss:  # fmt: skip
    """An unlearning loss of a batch of forget and retain sequences, without materialising the logits.

    Args:
        hidden_states: (B, T, D), one sequence a row; or packed (N, D) with cu_seqlens.
        lm_head_weight: (V, D), same dtype; under torch.autocast both are cast as `F.linear` would. A DTensor may be
            replicated, or sharded over its vocabulary.
        targets: (B, T) or (N,) int64 in [0, V), already shifted, -100 where ignored.
        objective: `SimNPO`, `NPO` or any other of `simnpo.objectives`.
        cu_seqlens: (B + 1,) integers, bounds of the packed sequences.
        retain_mask: (B,) bool, True for a retain sequence; None: all forget.
        ref_logps: (B,) log-probabilities under the reference policy, nats, for NPO, NNPO, DPO and KTO; ignored at
            retain sequences.
        exact_logps: (B,) log-probabilities of the sequences under the policy, nats, from arithmetic more exact than
            that of hidden_states, whose rounding adds up over a long sequence: the loss and the weights are those of
            these sums, the gradient stays that of hidden_states. Ignored at retain sequences; not for objectives of
            single tokens or rows. None: they are summed here.
        ref_token_logps: like targets, those of each target, for TNPO and WTNPO.
        token_weights: like targets, factors of the forget tokens' terms: s becomes sum_t w_t l_t, a mean over tokens
            (1/n) sum_t w_t f_t, and n stays the number of tokens that count. Not for KTO.
        alternates: (B,) int64, for objectives of pairs: each forget sequence's alternate answer, by its place in the
            batch; -1 for retain sequences and for the alternates themselves, which are neither forget nor retain.
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
        vocab_group: the ranks that share the head (tensor parallel): see `linear_logps`. Not for objectives of whole
            rows.
        sequence_group: the ranks that share every sequence (context parallel), each with a slice of its tokens:
            the same B sequences in the same order, some of them perhaps without a token here. All get the same losses
            and the logps and num_tokens of whole sequences; the gradient of hidden_states is of the rank's own tokens,
            and those of weight and bias are to be added up over the ranks.

    Returns:
        UnlearnLoss. A sequence without tokens has loss and gradient 0 and still counts in the mean; so has a pair one
        of whose sides is empty.

    Raises:
        ValueError: an argument does not fit the others, a target is outside [0, V), one that the objective needs is
            missing, or gradient_error was asked for an objective whose gradient is not a few columns.
    """
    lm_head_weight, bias, vocab_group = local_head(lm_head_weight, bias, vocab_group, sequence_group)
    check_head(hidden_states, lm_head_weight, targets, bias, logit_scale, logit_softcap)
    bounds = sequence_bounds(targets, cu_seqlens)
    check_sequences(len(bounds) - 1, retain_mask, ref_logps, objective, num_forget, num_retain_tokens, alternates)
    check_tokens(targets, objective, token_weights, ref_token_logps)
    check_exact(len(bounds) - 1, exact_logps, objective, token_weights)
    check_budget(gradient_error, objective, hidden_states.dtype)
    flat, flat_targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    needs = needs_gradient(hidden_states, lm_head_weight, bias)
    # a budget wants the weights too, so that sequences without weight claim no columns
    aligned = needs[1] or needs[2] or gradient_error > 0
    options = head_options(
        hidden_states, lm_head_weight, bias, logit_scale, logit_softcap, gradient_error,
        logits_dtype, chunk_tokens, impl, head_is_trained=needs[1] or needs[2],
    )  # fmt: skip
    options, V, first = share_vocab(vocab_group, options, lm_head_weight, flat_targets, needs)
    check_rows(objective, V, vocab_group is not None)
    layout = read_layout(flat_targets, bounds, retain_mask, V, alternates)
    if isinstance(objective, KTO) and ref_logps is not None and alternates is not None:

        def token_logps(of: Tensor) -> Tensor:
            return linear_logps(
                flat, lm_head_weight, of, bias=bias, logit_scale=logit_scale, logit_softcap=logit_softcap,
                logits_dtype=logits_dtype, chunk_tokens=chunk_tokens, impl=impl, vocab_group=vocab_group,
            )  # fmt: skip

        ref_logps, flat_targets = fold_in_kl(
            objective, token_logps, flat_targets, bounds, ref_logps, exact_logps, alternates, retain_mask,
            sequence_group,
        )  # fmt: skip
        layout = read_layout(flat_targets, bounds, retain_mask, V, alternates)
    options, split = split_sequences(sequence_group, options, layout, needs)
    if first:
        flat_targets = flat_targets - first
    dtype = torch.float64 if options.dtype == torch.float64 else torch.float32
    per_token = (None if x is None else x.reshape(-1) for x in (token_weights, ref_token_logps))
    with torch.autocast(hidden_states.device.type, enabled=False):
        plan = make_plan(
            layout, objective, Extras(ref_logps, exact_logps, *per_token), forget_coef, retain_coef, dtype,
            options.chunk_tokens, aligned=aligned, num_forget=num_forget, num_retain_tokens=num_retain_tokens,
            split=split,
        )  # fmt: skip
        return UnlearnLoss(
            *_LinearUnlearnLoss.apply(
                flat, lm_head_weight, bias, flat_targets, plan, options, needs, forget_coef, retain_coef
            )
        )
