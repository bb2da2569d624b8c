"""The unlearning loss for a trainer that already holds the logits: one read forward, one read and one write backward.

    loss as in `linear_unlearn_loss`;  dlogits[n] = coefs[n] (onehot(targets[n]) - softmax(logits[n]))

Dimension key, here and in the test:
    B  sequences      N  tokens that count      V  vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from simnpo.kernels.autograd import first_derivative_only
from simnpo.kernels.backend import Impl, uncompiled
from simnpo.kernels.checks import check_sequences, check_targets, read_layout, sequence_bounds
from simnpo.kernels.head import LogitTransform, float_dtype
from simnpo.kernels.linear_logps import RowStats
from simnpo.kernels.linear_unlearn_loss import SequencePlan, UnlearnLoss, make_plan, reduce_losses
from simnpo.kernels.passes import Passes, passes_for
from simnpo.kernels.sequence_pass import SequenceResults
from simnpo.objectives import Objective

# the logits come with bias, scale and soft-cap applied
NO_TRANSFORM = LogitTransform()


def _unlearn_loss_fwd(
    logits: Tensor, targets: Tensor, plan: SequencePlan, passes: Passes
) -> tuple[SequenceResults, RowStats]:
    """The results of every sequence, and the stats of the tokens."""
    tokens = targets[plan.rows]
    target_logits = logits[plan.rows, tokens].to(plan.coefs.dtype)
    stats = RowStats(
        target_logits,
        *passes.row_pass(logits, tokens, target_logits, NO_TRANSFORM, write_gradient=False, rows=plan.rows),
    )
    results = SequenceResults.zeros(len(plan.num_tokens), plan.coefs)
    for span in plan.spans:
        plan.reduce(span, stats.logps, results, passes)
    return results, stats


def _unlearn_loss_bwd(
    logits: Tensor, targets: Tensor, rows: Tensor, stats: RowStats, coefs: Tensor, out: Tensor,
    passes: Passes,
) -> None:  # fmt: skip
    """dlogits, written to `out`, which may be `logits`; 0 in the rows that do not count."""
    ignored = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    out[ignored.index_fill_(0, rows, False)] = 0
    passes.row_gradient(logits, targets[rows], *stats, NO_TRANSFORM, out, rows=rows, coefs=coefs)


class _UnlearnLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, plan, passes, forget_coef, retain_coef, inplace):
        results, stats = _unlearn_loss_fwd(logits, targets, plan, passes)
        ctx.save_for_backward(logits, targets, plan.rows, plan.coefs, *stats)
        ctx.passes, ctx.inplace = passes, inplace
        outputs = reduce_losses(plan, results, forget_coef, retain_coef)
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss, *_):
        logits, targets, rows, coefs, *stats = ctx.saved_tensors
        dlogits = logits if ctx.inplace else torch.empty_like(logits)
        _unlearn_loss_bwd(logits, targets, rows, RowStats(*stats), coefs * dloss, dlogits, ctx.passes)
        if ctx.inplace:
            # whoever else saved these logits for backward must hear of it from autograd's version check
            torch.autograd.graph.increment_version(logits)
            dlogits = dlogits.detach()
        return dlogits, *[None] * 6


@uncompiled
def unlearn_loss(
    logits: Tensor, targets: Tensor, objective: Objective, *, cu_seqlens: Tensor | None = None,
    retain_mask: Tensor | None = None, ref_logps: Tensor | None = None, forget_coef: float = 1.0,
    retain_coef: float = 1.0, num_forget: int | None = None, num_retain_tokens: int | None = None,
    inplace: bool = False, impl: Impl = "auto",
) -> UnlearnLoss:  # fmt: skip
    """An unlearning loss of logits that exist already. `linear_unlearn_loss` needs none and a fraction of the memory.

    Args:
        logits: (B, T, V), or packed (N, V) with cu_seqlens; float.
        targets: (B, T) or (N,) int64 in [0, V), already shifted, -100 where ignored.
        inplace: let the backward write the gradient over the logits. Allowed when nothing else needs them: autograd
            raises when another operation saved them, or on a second backward.
        objective, cu_seqlens, retain_mask, ref_logps, forget_coef, retain_coef, num_forget, num_retain_tokens, impl:
            see `linear_unlearn_loss`.

    Returns:
        UnlearnLoss.

    Raises:
        ValueError: an argument does not fit the others, a target is outside [0, V), ref_logps is missing for NPO,
            or inplace was asked for logits whose rows are not contiguous.
    """
    if logits.dim() not in (2, 3) or not logits.is_floating_point():
        raise ValueError(f"logits must be (B, T, V) or packed (N, V) floats, got {tuple(logits.shape)} {logits.dtype}")
    check_targets(logits, targets)
    bounds = sequence_bounds(targets, cu_seqlens)
    check_sequences(len(bounds) - 1, retain_mask, ref_logps, objective, num_forget, num_retain_tokens)
    if inplace and not logits.is_contiguous():
        raise ValueError("inplace needs contiguous logits: pass logits.contiguous() or inplace=False")
    flat, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    layout = read_layout(flat_targets, bounds, retain_mask, logits.shape[-1])
    dtype = float_dtype(logits)
    plan = make_plan(
        layout, objective, ref_logps, forget_coef, retain_coef, dtype, max(len(flat), 1), aligned=False,
        num_forget=num_forget, num_retain_tokens=num_retain_tokens,
    )  # fmt: skip
    return UnlearnLoss(
        *_UnlearnLoss.apply(flat, flat_targets, plan, passes_for(impl, logits), forget_coef, retain_coef, inplace)
    )
