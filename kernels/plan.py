"""A batch in the order it goes through the head, and what of its gradient is known beforehand.

    aligned        whole sequences (or pairs) share a chunk, so that their weight is known when the chunk is multiplied
    not aligned    chunks end anywhere: the head is frozen, or the objective knows each token's gradient at once

Dimension key, here and in the test:
    B  sequences of the batch      S  those that have tokens      N  tokens that count, in the order of the plan
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from simnpo.kernels.checks import Layout
from simnpo.kernels.chunks import Span, aligned_spans, even_chunks
from simnpo.kernels.head import RowReductions, RowStats
from simnpo.kernels.objective_terms import TokenTerms, is_local, reduce_span, token_terms
from simnpo.kernels.parallel import SplitSequences
from simnpo.kernels.passes import Passes
from simnpo.kernels.sequence_pass import SequenceResults
from simnpo.objectives import NPO, GradAscent, Objective, PairObjective, RowObjective, SimNPO, TokenObjective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Extras(NamedTuple):
    """Arguments that some objectives take beside the log-probabilities; None where there are none.

    ref_logps, exact_logps: (B,).   token_weights, ref_token_logps: (flattened batch,).
    """

    ref_logps: Tensor | None = None
    exact_logps: Tensor | None = None
    token_weights: Tensor | None = None
    ref_token_logps: Tensor | None = None


class SequencePlan(NamedTuple):
    """The sequences of a batch in the order they go through the head, and the coefficients they start with.

    rows: (N,) positions of the tokens in the flattened batch.
    offsets: (S + 1,) bounds of the S sequences that have tokens.   sequences: (S,) their places in the batch.
    num_tokens: (B,) int64.   own_tokens: (B,) int64, those that are here of sequences spread over ranks.
    is_retain: (B,) bool.
    is_alternate: (B,) bool.   partner: (B,) int64, the other side of a pair, and for the rest themselves.
    is_retain_token: (N,) bool.
    extras: ref_logps and exact_logps (B,); the others (N,), token_weights 1 at retain tokens.
    coefs: (N,) d loss / d logp: of retain tokens from the start, of forget tokens from the sequence pass on. Of an
        objective of single tokens or rows, without the token's own slope and known from the start.
    factors: (N,) the coefficients of a unit over its scalar, or None where they are 1.
    num_forget, num_retain_tokens: what the two means divide by.   forget_scale: forget_coef over num_forget.
    sequence_group: the ranks that the tokens of every sequence are spread over; num_tokens counts on all of them.
    """

    rows: Tensor
    offsets: Tensor
    sequences: Tensor
    num_tokens: Tensor
    own_tokens: Tensor
    is_retain: Tensor
    is_alternate: Tensor
    partner: Tensor
    is_retain_token: Tensor
    extras: Extras
    coefs: Tensor
    factors: Tensor | None
    num_forget: int
    num_retain_tokens: int
    forget_scale: float
    spans: list[Span]
    objective: Objective
    sequence_group: ProcessGroup | None

    def reduce(self, span: Span, token_logps: Tensor, results: SequenceResults, passes: Passes) -> None:
        """Run the sequence pass over the sequences that end with this span."""
        extras = self.extras
        plain = extras.token_weights is None and extras.exact_logps is None and self.sequence_group is None
        if not (plain and isinstance(self.objective, (SimNPO, NPO, GradAscent))):
            reduce_span(self, span, token_logps, results)
            return
        first, last = span.sequences
        passes.sequence_pass(
            token_logps, self.coefs, self.offsets[first : last + 1], self.sequences[first:last], self.is_retain,
            results, self.objective, self.extras.ref_logps, self.forget_scale,
        )  # fmt: skip

    def late_coefs(self, span: Span, rows: slice, results: SequenceResults) -> Tensor:
        """What scales the rows of a span whose weight came late, and whose gradient was summed with `factors`."""
        if self.factors is None:
            return self.coefs[rows]
        scalar = results.weights[self.sequences[span.sequences[0]]] * self.forget_scale
        return scalar.expand(rows.stop - rows.start).contiguous()

    def terms(self, rows: slice, stats: RowStats, reductions: RowReductions | None) -> TokenTerms:
        """What an objective of single tokens or rows says of these tokens."""
        assert isinstance(self.objective, (TokenObjective, RowObjective))
        ref = None if self.extras.ref_token_logps is None else self.extras.ref_token_logps[rows]
        return token_terms(self.objective, stats, reductions, self.is_retain_token[rows], ref)


def make_plan(
    layout: Layout, objective: Objective, extras: Extras, forget_coef: float, retain_coef: float,
    dtype: torch.dtype, chunk_tokens: int, *, aligned: bool, num_forget: int | None, num_retain_tokens: int | None,
    split: SplitSequences | None = None,
) -> SequencePlan:  # fmt: skip
    """Order the sequences for the schedule: aligned to chunks, or as they come in one span cut anywhere."""
    rows, lengths, is_retain, alternates = layout
    device, B = rows.device, len(lengths)
    counts, longest = (lengths, lengths) if split is None else (split.num_tokens, split.longest)
    local = is_local(objective)
    partner = list(range(B))
    for b, place in enumerate(alternates):
        if place != -1:
            partner[b], partner[place] = place, b
    alternate = [partner[b] != b and alternates[b] == -1 for b in range(B)]
    aligned = aligned and not local
    if aligned:
        units = [[b] if partner[b] == b else [b, partner[b]] for b in range(B) if not alternate[b]]
        order, spans = _aligned_units(units, longest, lengths, is_retain, chunk_tokens)
    else:
        order = [b for b in range(B) if counts[b]]
        spans = [Span(even_chunks(len(rows), chunk_tokens), (0, len(order)), weight_known_late=not local)]

    def on_device(values: list) -> Tensor:
        return torch.tensor(values, device=device)

    own_tokens, num_tokens, retain = on_device(lengths), on_device(counts), on_device(is_retain)
    sequences = torch.tensor(order, dtype=torch.int64, device=device)
    lengths_in_order = own_tokens[sequences]
    offsets = torch.nn.functional.pad(lengths_in_order.cumsum(0), (1, 0))

    def per_token(values: Tensor) -> Tensor:
        return values.repeat_interleave(lengths_in_order, output_size=len(rows))

    if order != sorted(order):
        starts = own_tokens.cumsum(0) - own_tokens
        rows = rows[per_token(starts[sequences] - offsets[:-1]) + torch.arange(len(rows), device=device)]
    if num_retain_tokens is None:
        num_retain_tokens = max(sum(n for n, known in zip(counts, is_retain, strict=True) if known), 1)
    if num_forget is None:
        num_forget = max(B - sum(is_retain) - sum(alternate), 1)
    forget_scale = forget_coef / num_forget
    coefs = torch.zeros(B, dtype=dtype, device=device)
    if local:
        coefs += forget_scale / num_tokens.clamp(min=1).to(dtype)
    coefs = per_token(coefs.masked_fill_(retain, -retain_coef / num_retain_tokens)[sequences])
    is_retain_token = per_token(retain[sequences])
    ref_logps, exact_logps, token_weights, ref_token_logps = (
        None if x is None else x.to(device, dtype) for x in extras
    )
    if token_weights is not None:
        token_weights = token_weights[rows].masked_fill(is_retain_token, 1)
        coefs = coefs * token_weights if local else coefs
    factors = token_weights if aligned else None
    partners, is_alternate = on_device(partner), on_device(alternate)
    if aligned and isinstance(objective, PairObjective):
        ratio = objective.alternate_ratio(num_tokens[partners].to(dtype), num_tokens.to(dtype))
        ratio = per_token(ratio.where(is_alternate, 1)[sequences])
        factors = ratio if factors is None else ratio * factors
    return SequencePlan(
        rows, offsets, sequences, num_tokens, own_tokens, retain, is_alternate, partners, is_retain_token,
        Extras(ref_logps, exact_logps, token_weights, None if ref_token_logps is None else ref_token_logps[rows]),
        coefs, factors, num_forget, num_retain_tokens, forget_scale, spans, objective,
        None if split is None else split.group,
    )  # fmt: skip


def _aligned_units(
    units: list[list[int]], lengths: list[int], own_lengths: list[int], is_retain: list[bool], chunk_tokens: int
) -> tuple[list[int], list[Span]]:
    """`aligned_spans` of units of one sequence or of a pair; the order and the spans count sequences."""
    longest, own = ([sum(of[b] for b in unit) for unit in units] for of in (lengths, own_lengths))
    unit_order, spans = aligned_spans(longest, [is_retain[unit[0]] for unit in units], chunk_tokens, own)
    order: list[int] = []
    ends = [0]
    for u in unit_order:
        order += [b for b in units[u] if lengths[b]]
        ends.append(len(order))
    return order, [span._replace(sequences=(ends[span.sequences[0]], ends[span.sequences[1]])) for span in spans]
