"""The unlearning loss for a trainer that already holds the logits: one read forward, one read and one write backward.

    loss as in `linear_unlearn_loss`;  dlogits[n] = coefs[n] (onehot(targets[n]) - softmax(logits[n])), or the mix of an
    objective of whole rows (`mixed_gradient`)

Dimension key, here and in the test:
    B  sequences      N  tokens that count      V  vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from simnpo.kernels.autograd import first_derivative_only
from simnpo.kernels.backend import Impl, uncompiled
from simnpo.kernels.batch_kl import fold_in_kl
from simnpo.kernels.checks import (
    check_exact,
    check_rows,
    check_sequences,
    check_targets,
    check_tokens,
    read_layout,
    sequence_bounds,
)
from simnpo.kernels.head import LogitTransform, RowReductions, RowStats, float_dtype
from simnpo.kernels.linear_unlearn_loss import UnlearnLoss, reduce_losses
from simnpo.kernels.objective_terms import TokenTerms, gradient_of_terms, is_local, sum_terms
from simnpo.kernels.passes import Passes, passes_for
from simnpo.kernels.plan import Extras, SequencePlan, make_plan
from simnpo.kernels.sequence_pass import SequenceResults
from simnpo.objectives import KTO, Objective, RowObjective
from simnpo.objectives.rows import Mix

# the logits come with bias, scale and soft-cap applied
NO_TRANSFORM = LogitTransform()


def _unlearn_loss_fwd(
    logits: Tensor, targets: Tensor, plan: SequencePlan, passes: Passes
) -> tuple[SequenceResults, RowStats, RowReductions | None, TokenTerms]:
    """The results of every sequence; stats, reductions and terms of the tokens (slopes of 1 where they have none)."""
    tokens = targets[plan.rows]
    target_logits = logits[plan.rows, tokens].to(plan.coefs.dtype)
    whole_row = isinstance(plan.objective, RowObjective)
    reductions = RowReductions.empty(len(tokens), target_logits) if whole_row else None
    row_pass = passes.row_pass(
        logits, tokens, target_logits, NO_TRANSFORM, write_gradient=False, rows=plan.rows, reductions=reductions
    )
    stats = RowStats(target_logits, *row_pass)
    results = SequenceResults.zeros(len(plan.num_tokens), plan.coefs)
    if is_local(plan.objective):
        terms = plan.terms(slice(None), stats, reductions)
        sum_terms(plan, stats.logps, terms, results)
        return results, stats, reductions, terms
    for span in plan.spans:
        plan.reduce(span, stats.logps, results, passes)
    return results, stats, None, TokenTerms(stats.logps, torch.ones_like(stats.logps), None)


def _unlearn_loss_bwd(
    logits: Tensor, targets: Tensor, rows: Tensor, stats: RowStats, reductions: RowReductions | None,
    terms: TokenTerms, coefs: Tensor, out: Tensor, passes: Passes,
) -> None:  # fmt: skip
    """dlogits, written to `out`, which may be `logits`; 0 in the rows that do not count."""
    ignored = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    out[ignored.index_fill_(0, rows, False)] = 0
    gradient_of_terms(
        logits, targets[rows], stats, reductions, terms, NO_TRANSFORM, out, passes, rows=rows, coefs=coefs
    )  # fmt: skip


class _UnlearnLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, plan, passes, forget_coef, retain_coef, inplace):
        results, stats, reductions, terms = _unlearn_loss_fwd(logits, targets, plan, passes)
        ctx.save_for_backward(
            logits, targets, plan.rows, plan.coefs, terms.losses, terms.slopes, *stats,
            *(reductions or ()), *(terms.mix or ()),
        )  # fmt: skip
        ctx.passes, ctx.inplace = passes, inplace
        outputs = reduce_losses(plan, results, forget_coef, retain_coef)
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss, *_):
        logits, targets, rows, coefs, losses, slopes, *rest = ctx.saved_tensors
        # 4 stats, and of an objective of whole rows 3 reductions and the mix
        stats, whole_row = RowStats(*rest[:4]), rest[4:]
        reductions = RowReductions(*whole_row[:3]) if whole_row else None
        terms = TokenTerms(losses, slopes, Mix(*whole_row[3:]) if whole_row else None)
        dlogits = logits if ctx.inplace else torch.empty_like(logits)
        _unlearn_loss_bwd(logits, targets, rows, stats, reductions, terms, coefs * dloss, dlogits, ctx.passes)
        if ctx.inplace:
            # whoever else saved these logits for backward must hear of it from autograd's version check
            torch.autograd.graph.increment_version(logits)
            dlogits = dlogits.detach()
        return dlogits, *[None] * 6


@uncompiled
def unlearn_loss(
    logits: Tensor, targets: Tensor, objective: Objective, *, cu_seqlens: Tensor | None = None,
    retain_mask: Tensor | None = None, ref_logps: Tensor | None = None, exact_logps: Tensor | None = None,
    ref_token_logps: Tensor | None = None, token_weights: Tensor | None = None, alternates: Tensor | None = None,
    forget_coef: float = 1.0, retain_coef: float = 1.0, num_forget: int | None = None,
    num_retain_tokens: int | None = None, inplace: bool = False, impl: Impl = "auto",
) -> UnlearnLoss:  # fmt: skip
    """An unlearning loss of logits that exist already. `linear_unlearn_loss` needs none and a fraction of the memory.

    Args:
        logits: (B, T, V), or packed (N, V) with cu_seqlens; float.
        targets: (B, T) or (N,) int64 in [0, V), already shifted, -100 where ignored.
        inplace: let the backward write the gradient over the logits. Allowed when nothing else needs them: autograd
            raises when another operation saved them, or on a second backward.
        objective, cu_seqlens, retain_mask, ref_logps, exact_logps, ref_token_logps, token_weights, alternates,
            forget_coef, retain_coef, num_forget, num_retain_tokens, impl: see `linear_unlearn_loss`.

    Returns:
        UnlearnLoss.

    Raises:
        ValueError: an argument does not fit the others, a target is outside [0, V), one that the objective needs is
            missing, or inplace was asked for logits whose rows are not contiguous.
    """
    if logits.dim() not in (2, 3) or not logits.is_floating_point():
        raise ValueError(f"logits must be (B, T, V) or packed (N, V) floats, got {tuple(logits.shape)} {logits.dtype}")
    check_targets(logits, targets)
    bounds = sequence_bounds(targets, cu_seqlens)
    check_sequences(len(bounds) - 1, retain_mask, ref_logps, objective, num_forget, num_retain_tokens, alternates)
    check_tokens(targets, objective, token_weights, ref_token_logps)
    check_exact(len(bounds) - 1, exact_logps, objective, token_weights)
    check_rows(objective, logits.shape[-1], shared=False)
    if inplace and not logits.is_contiguous():
        raise ValueError("inplace needs contiguous logits: pass logits.contiguous() or inplace=False")
    flat, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    passes, dtype, V = passes_for(impl, logits), float_dtype(logits), logits.shape[-1]
    layout = read_layout(flat_targets, bounds, retain_mask, V, alternates)
    if isinstance(objective, KTO) and ref_logps is not None and alternates is not None:

        def token_logps(of: Tensor) -> Tensor:
            rows = read_layout(of, bounds, None, V).rows
            exact = flat.detach()[rows, of[rows]].to(dtype)
            logps, *_ = passes.row_pass(flat.detach(), of[rows], exact, NO_TRANSFORM, write_gradient=False, rows=rows)
            return exact.new_zeros(len(of)).index_copy_(0, rows, logps)

        ref_logps, flat_targets = fold_in_kl(
            objective, token_logps, flat_targets, bounds, ref_logps, exact_logps, alternates, retain_mask
        )  # fmt: skip
        layout = read_layout(flat_targets, bounds, retain_mask, V, alternates)
    per_token = (None if x is None else x.reshape(-1) for x in (token_weights, ref_token_logps))
    plan = make_plan(
        layout, objective, Extras(ref_logps, exact_logps, *per_token), forget_coef, retain_coef, dtype,
        max(len(flat), 1), aligned=False, num_forget=num_forget, num_retain_tokens=num_retain_tokens,
    )  # fmt: skip
    return UnlearnLoss(*_UnlearnLoss.apply(flat, flat_targets, plan, passes, forget_coef, retain_coef, inplace))
