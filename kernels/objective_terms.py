"""From log-probabilities to losses and coefficients for every objective, in plain PyTorch on (N,) and (B,) numbers.

SimNPO, NPO and GradAscent have a kernel of their own for this (`sequence_pass`). The others come here:

    sequence, pair    `reduce_span`: the sums of whole sequences -> losses, weights, coefficients of their tokens
    token, row        `token_terms`: a token's own log-probability or row -> its loss and gradient, at once;
                      `sum_terms` adds up what is reported of its sequence

Nothing here waits for the device.

Dimension key, here and in the test:
    N  tokens      B  sequences of the batch      S  sequences of a span
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from simnpo.kernels.head import HeadOptions, LogitTransform, RowReductions, RowStats, gradient_buffer
from simnpo.kernels.passes import Passes
from simnpo.kernels.segment_sums import segment_sums
from simnpo.kernels.sequence_pass import SequenceResults
from simnpo.objectives import PairObjective, RowObjective, SequenceObjective, TokenObjective
from simnpo.objectives.pairs import PairSums
from simnpo.objectives.rows import Mix, Row

if TYPE_CHECKING:
    from simnpo.kernels.chunks import Span
    from simnpo.kernels.plan import SequencePlan


class TokenTerms(NamedTuple):
    """What a token or row objective says of each token, all (N,): its loss, and the derivative of it.

    slopes: in the token's log-probability; of a row objective, the part along onehot - p.
    mix: of a row objective, the whole gradient. Both are those of the log-probability itself at retain tokens.
    """

    losses: Tensor
    slopes: Tensor
    mix: Mix | None

    @staticmethod
    def empty(N: int, like: Tensor, *, mixed: bool) -> TokenTerms:
        """Room for the terms of N tokens."""
        losses, slopes, *mix = (like.new_empty(N) for _ in range(5 if mixed else 2))
        return TokenTerms(losses, slopes, Mix(*mix) if mixed else None)

    def put(self, rows: slice, terms: TokenTerms) -> None:
        """Write the terms of some tokens."""
        self.losses[rows], self.slopes[rows] = terms.losses, terms.slopes
        for mine, new in zip(self.mix or (), terms.mix or (), strict=True):
            mine[rows] = new


def is_local(objective: object) -> bool:
    """Whether the gradient of a token depends on nothing but the token."""
    return isinstance(objective, (TokenObjective, RowObjective))


def token_terms(
    objective: TokenObjective | RowObjective, stats: RowStats, reductions: RowReductions | None, is_retain: Tensor,
    ref_token_logps: Tensor | None,
) -> TokenTerms:  # fmt: skip
    """The terms of N tokens from the stats of their rows; `is_retain` (N,) bool tells whose they are."""
    logps = stats.logps
    one, zero = torch.ones_like(logps), torch.zeros_like(logps)
    if isinstance(objective, TokenObjective):
        losses, slopes = objective.loss_and_slope(logps, ref_token_logps)
        return TokenTerms(torch.where(is_retain, -logps, losses), torch.where(is_retain, one, slopes), None)
    assert reductions is not None
    lse = stats.largest + stats.total.log()
    row = Row(logps, stats.target_logits, lse, reductions.mean_logits, reductions.other_logits)
    losses, mix = objective.loss_and_mix(row)
    mix = Mix(*(torch.where(is_retain, r, x) for r, x in zip((one, zero, zero), mix, strict=True)))
    return TokenTerms(torch.where(is_retain, -logps, losses), mix.target, mix)


def write_terms_gradient(
    chunk: Tensor, targets: Tensor, stats: RowStats, reductions: RowReductions | None, terms: TokenTerms,
    options: HeadOptions,
) -> Tensor:  # fmt: skip
    """The gradient of each token's term in the head's products, (N, V), over `chunk` where the dtypes allow.

    The slope is inside it: it may be as large as 1/(1 - p), where only their product with 1 - p is of order 1.
    """
    out = gradient_buffer(chunk, options)
    gradient_of_terms(chunk, targets, stats, reductions, terms, options.transform, out, options.passes)
    return out


def gradient_of_terms(
    logits: Tensor, targets: Tensor, stats: RowStats, reductions: RowReductions | None, terms: TokenTerms,
    transform: LogitTransform, out: Tensor, passes: Passes, rows: Tensor | None = None, coefs: Tensor | None = None,
) -> None:  # fmt: skip
    """coefs * the gradient of each term, written to `out`; see `row_gradient` for the arguments."""
    if terms.mix is None:
        slopes = terms.slopes if coefs is None else terms.slopes * coefs
        passes.row_gradient(logits, targets, *stats, transform, out, rows=rows, coefs=slopes)
        return
    assert reductions is not None
    mix = terms.mix if coefs is None else Mix(*(x * coefs for x in terms.mix))
    passes.mixed_gradient(logits, targets, stats, reductions, mix, transform, out, rows=rows)


def sum_terms(plan: SequencePlan, token_logps: Tensor, terms: TokenTerms, results: SequenceResults) -> None:
    """Write the results of every sequence: its loss is the mean of its tokens' terms, its weight of their slopes."""
    lengths, is_retain = plan.own_tokens[plan.sequences], plan.is_retain[plan.sequences]
    n = plan.num_tokens[plan.sequences].to(token_logps.dtype)
    weights = 1 if plan.extras.token_weights is None else plan.extras.token_weights
    values = (token_logps, terms.losses * weights, terms.slopes * weights)
    logps, losses, slopes = _over_ranks(plan, torch.stack([segment_sums(x, lengths) for x in values]))
    results.logps[plan.sequences] = logps
    results.losses[plan.sequences] = torch.where(is_retain, losses, losses / n)
    results.weights[plan.sequences] = torch.where(is_retain, 0, slopes / n / n)


def reduce_span(plan: SequencePlan, span: Span, token_logps: Tensor, results: SequenceResults) -> None:
    """`sequence_pass` for what has no kernel: other objectives, weighted tokens, sums that are known better than these
    tokens give them, sequences spread over ranks.
    """
    sequences = plan.sequences[slice(*span.sequences)]
    rows = slice(span.pieces[0][0], span.pieces[-1][1]) if span.pieces else slice(0, 0)
    lengths, token_weights = plan.own_tokens[sequences], plan.extras.token_weights
    values = [token_logps[rows]] + ([] if token_weights is None else [token_logps[rows] * token_weights[rows]])
    span_sums = _over_ranks(plan, torch.stack([segment_sums(x, lengths) for x in values]))
    if plan.extras.exact_logps is not None:
        span_sums = torch.where(plan.is_retain[sequences], span_sums, plan.extras.exact_logps[sequences])
    results.logps[sequences] = span_sums[0]
    sums = torch.zeros_like(results.logps).index_copy(0, sequences, span_sums[-1])

    losses, weights = _sequence_terms(plan, sums)
    results.losses[sequences] = torch.where(plan.is_retain, -results.logps, losses)[sequences]
    results.weights[sequences] = weights[sequences]
    coefs = (weights[sequences] * plan.forget_scale).repeat_interleave(lengths, output_size=rows.stop - rows.start)
    if token_weights is not None:
        coefs = coefs * token_weights[rows]
    plan.coefs[rows] = torch.where(plan.is_retain_token[rows], plan.coefs[rows], coefs)


def _over_ranks(plan: SequencePlan, sums: Tensor) -> Tensor:
    """The sums over the ranks that every sequence is spread over."""
    if plan.sequence_group is not None:
        dist.all_reduce(sums, group=plan.sequence_group)
    return sums


def _sequence_terms(plan: SequencePlan, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and weight of each sequence, (B,); those whose sums are not known yet get numbers without use."""
    objective, num_tokens, ref = plan.objective, plan.num_tokens, plan.extras.ref_logps
    if isinstance(objective, PairObjective):
        other = plan.partner
        alt_ref = None if ref is None else ref[other]
        losses, weights = objective.loss_and_weight(
            PairSums(sums, num_tokens, ref, sums[other], num_tokens[other], alt_ref)
        )
        of_alternate = weights[other] * objective.alternate_ratio(num_tokens[other].to(sums), num_tokens.to(sums))
        losses = torch.where(plan.is_alternate, 0, losses)
        weights = torch.where(plan.is_alternate, of_alternate, weights)
    else:
        assert isinstance(objective, SequenceObjective)
        losses, weights = objective.loss_and_weight(sums, num_tokens, ref)
    return losses, torch.where(plan.is_retain, 0, weights)
