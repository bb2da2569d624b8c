"""The loss of a simulated step: its own schedule on tensors without data, or the published loops' whole logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simnpo.kernels.checks import Layout
from simnpo.kernels.chunks import Span
from simnpo.kernels.head import LogitTransform
from simnpo.kernels.linear_logps import head_options, needs_gradient
from simnpo.kernels.linear_unlearn_loss import _LinearUnlearnLoss
from simnpo.kernels.passes import TORCH, Passes
from simnpo.kernels.plan import Extras, make_plan
from simnpo.kernels.row_pass import row_blocks
from simnpo.model import OutputHead
from simnpo.objectives import SimNPO

# spans, and products of one, that are run: more would only make the simulation slow
MOST_PRODUCTS = 6


class Sequences(NamedTuple):
    """Sequences of one batch.

    tokens, targets: of each.
    is_retain: whether its coefficient is known beforehand, as that of every sequence is with an objective of single
        tokens.
    pieces: tokens of each sequence that attend to each other: all, or those of each piece of a long document.
    """

    tokens: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    is_retain: tuple[bool, ...] = ()
    pieces: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def equal(count: int, tokens: int, *, is_retain: bool) -> Sequences:
        """`count` sequences of `tokens`, all but the first of them targets."""
        return Sequences((tokens,) * count, (tokens - 1,) * count, (is_retain,) * count, ((tokens,),) * count)

    def __add__(self, other: Any) -> Sequences:
        return Sequences(*(a + b for a, b in zip(self, other)))

    def some(self, indices: Sequence[int]) -> Sequences:
        columns: Any = (tuple(column[i] for i in indices) for column in self)
        return Sequences(*columns)

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens)

    def __bool__(self) -> bool:
        return bool(self.tokens)


def simulated_loss(
    hidden_states: Tensor, head: OutputHead, sequences: Sequences, chunk_tokens: int, *, on_gpu: bool
) -> tuple[Tensor, float]:
    """`linear_unlearn_loss` on fake tensors: the schedule is its own, the small kernels only allocate.

    Args:
        hidden_states: (B, T, D) or (N, D).
        chunk_tokens: rows of logits alive at once.
        on_gpu: whether the small kernels are Triton's, which need no memory, or PyTorch's.

    Returns:
        The loss, and what the work of its forward is to be multiplied by: of many chunks only some are run.
    """
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    N, device = sum(sequences.targets), flat.device
    rows = torch.empty(N, dtype=torch.int64, device=device)
    targets = torch.empty(len(flat), dtype=torch.int64, device=device)
    needs = needs_gradient(flat, head.weight, head.bias)
    options = head_options(
        flat, head.weight, head.bias, head.logit_scale, head.logit_softcap, 0.0, None, chunk_tokens, "torch",
        head_is_trained=needs[1] or needs[2],
    )._replace(passes=GPU_PASSES if on_gpu else CPU_PASSES)  # fmt: skip
    B = len(sequences.tokens)
    with torch.autocast(device.type, enabled=False):
        plan = make_plan(
            Layout(rows, list(sequences.targets), list(sequences.is_retain), [-1] * B), SimNPO(), Extras(), 1.0, 1.0,
            torch.float32, chunk_tokens, aligned=needs[1] or needs[2], num_forget=None, num_retain_tokens=None,
        )  # fmt: skip
        few = _few(plan.spans)
        rows_run, all_rows = (
            sum(stop - start for span in of for start, stop in span.pieces) for of in (few, plan.spans)
        )
        plan = plan._replace(spans=few)
        outputs: Any = _LinearUnlearnLoss.apply(flat, head.weight, head.bias, targets, plan, options, needs, 1.0, 1.0)
    return outputs[0], all_rows / max(rows_run, 1)


def _few(spans: list[Span]) -> list[Span]:
    """The first spans, and of each the first and the last products: every further one finds the same memory."""
    return [
        span
        if len(span.pieces) <= MOST_PRODUCTS
        else span._replace(pieces=[*span.pieces[: MOST_PRODUCTS - 1], span.pieces[-1]])
        for span in spans[:MOST_PRODUCTS]
    ]


def eager_loss(hidden_states: Tensor, head: OutputHead, sequences: Sequences) -> Tensor:
    """As in the published TOFU loops: all logits, in float32, cross entropy on them transposed to (B, V, T)."""
    weight, bias, scale, softcap = head
    logits = LogitTransform(None, scale, softcap)(F.linear(hidden_states, weight, bias))
    targets = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    token_logps = -F.cross_entropy(logits.float().transpose(-1, -2), targets, reduction="none")
    return token_logps.sum(1).mean()


def _row_pass(
    logits: Tensor, targets: Tensor, target_logits: Tensor, transform: LogitTransform, *, write_gradient: bool,
    rows: Tensor | None = None, reductions: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `row_pass` allocates, and one read and write of the logits."""
    logits.mul_(1)
    return tuple(torch.empty_like(target_logits) for _ in range(3))


def _row_pass_in_blocks(
    logits: Tensor, targets: Tensor, target_logits: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, ...]:
    """What `row_pass_torch` allocates beside: float32 blocks of rows, each made while the one before is still there."""
    for block in row_blocks(logits, len(targets))[:2]:
        z = logits[block].to(target_logits.dtype, copy=True)
        z.to(logits.dtype)
    return _row_pass(logits, targets, target_logits, *args, **options)


def _indexed_dot(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return hidden_states.new_empty(len(hidden_states), dtype=torch.float32)


def _scale_rows(x: Tensor, coefs: Tensor, out: Tensor, index: Tensor | None = None) -> Tensor:
    # into as many rows of `out`: the same traffic, whichever rows they are
    return torch.mul(x, 1, out=out[: len(x)])


def _sequence_pass(*args: Any) -> None:
    """Writes a few numbers a token into what is there."""


CPU_PASSES: Passes = TORCH._replace(row_pass=_row_pass_in_blocks, sequence_pass=_sequence_pass)
GPU_PASSES: Passes = CPU_PASSES._replace(row_pass=_row_pass, indexed_dot=_indexed_dot, scale_rows=_scale_rows)
