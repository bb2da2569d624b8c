"""The loss of a step as other people's loops compute it, on one batch of forget and retain sequences.

    published         the paper's TOFU code: every row padded to 500, forget and retain in a forward each, all the
                      logits in float32, a reference model in memory whatever the objective
    open-unlearning   rows padded to the longest of their kind, forget and retain in a forward each, all the logits
    TRL               rows padded to the longest, one forward, TRL's fused head on the targets, SimNPO in a few lines

All three minimise what ours does, the formulas of the paper's table:

    forget_coef * mean over forget sequences + retain_coef * mean over retain tokens of -log p

Work that those loops do and throw away (transformers' own loss of the forget rows, the norm for a log) is left out, and
TRL's head gets the rows that count on every device, not on a GPU only: each is timed at its best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simnpo.benchmarks.rivals import TRL_CHUNK_SIZE
from simnpo.benchmarks.throughput.workload import MAX_LENGTH
from simnpo.data import IGNORE_INDEX, Example
from simnpo.model import body_of, causal_lm, output_layer
from simnpo.objectives import NPO, SimNPO


class Terms(NamedTuple):
    """What a loop is told to minimise, and how it may pad.

    ref_logps: the reference's log-probability of each forget example, nats, by id: for loops that keep it (NPO).
    """

    objective: SimNPO | NPO
    forget_coef: float
    retain_coef: float
    pad_token_id: int
    pad_to: int
    ref_logps: dict[str, float] | None = None


class Theirs(NamedTuple):
    """How the others' loops lay out a batch; ours needs neither.

    pad_to: least width of the published loop's rows.
    micro_batch: forget, and as many retain, sequences of a forward and backward; a divisor of the batch, None: all.
    """

    pad_to: int = MAX_LENGTH
    micro_batch: int | None = None


AS_PUBLISHED = Theirs()
LossOf = Callable[[nn.Module, nn.Module | None, Sequence[Example], Sequence[Example], Terms], Tensor]


class Loop(NamedTuple):
    """Somebody's loop: its name, (model, reference, forget, retain, terms) -> loss, and what it holds or needs.

    keeps_reference: a reference model is in memory with SimNPO and with NPO.
    npo_reference: with NPO its forward runs in every step.
    package: what it takes beside torch and transformers.
    """

    name: str
    loss: LossOf
    keeps_reference: bool = False
    npo_reference: bool = False
    package: str = "torch"

    def holds_reference(self, objective: SimNPO | NPO) -> bool:
        return self.keeps_reference or (self.npo_reference and isinstance(objective, NPO))


class Rows(NamedTuple):
    """Sequences padded on the right, (B, T) each; `targets` are the labels shifted once."""

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor


def padded(examples: Sequence[Example], T: int, pad_token_id: int, device: torch.device) -> Rows:
    columns = ([], [], [])
    for example in examples:
        n = len(example.input_ids)
        columns[0].append(example.input_ids + [pad_token_id] * (T - n))
        columns[1].append([1] * n + [0] * (T - n))
        columns[2].append(example.labels[1:] + [IGNORE_INDEX] * (T - n + 1))
    return Rows(*(torch.tensor(column, device=device) for column in columns))


def longest(*sets: Sequence[Example]) -> int:
    return max(len(example.input_ids) for examples in sets for example in examples)


def logits_of(model: nn.Module, rows: Rows) -> Tensor:
    """(B, T, V) float32."""
    return model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits.float()


def sequence_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) as both loops do it: the last position cut off, the vocabulary moved to where cross entropy wants it."""
    # a copy of all the logits, theirs
    kept, targets = logits[:, :-1].contiguous(), targets[:, :-1].contiguous()
    return -F.cross_entropy(kept.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none").sum(1)


def forget_term(logps: Tensor, targets: Tensor, ref_logps: Tensor | None, objective: SimNPO | NPO) -> Tensor:
    """Mean over the sequences; all (B,) but `targets`."""
    if isinstance(objective, NPO):
        assert ref_logps is not None, "every loop computes or keeps them"
        return -2 / objective.beta * F.logsigmoid(-objective.beta * (logps - ref_logps)).mean()
    num_tokens = (targets != IGNORE_INDEX).sum(1)
    return -2 / objective.beta * F.logsigmoid(-objective.beta * logps / num_tokens - objective.gamma).mean()


def two_forwards(model: nn.Module, reference: nn.Module | None, forget: Rows, retain: Rows, terms: Terms) -> Tensor:
    """Forget rows, then retain rows, with the logits of every position."""
    ref_logps = None
    if isinstance(terms.objective, NPO):
        assert reference is not None, "a loop with npo_reference is given one"
        with torch.no_grad():
            ref_logps = sequence_logps(logits_of(reference, forget), forget.targets)
    logps = sequence_logps(logits_of(model, forget), forget.targets)
    forget_loss = forget_term(logps, forget.targets, ref_logps, terms.objective)
    logits, targets = logits_of(model, retain).flatten(0, 1), retain.targets.flatten()
    retain_loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)
    return terms.forget_coef * forget_loss + terms.retain_coef * retain_loss


def published(
    model: nn.Module, reference: nn.Module | None, forget: Sequence[Example], retain: Sequence[Example], terms: Terms
) -> Tensor:
    device = next(model.parameters()).device
    width = max(terms.pad_to, longest(forget, retain))
    rows = [padded(examples, width, terms.pad_token_id, device) for examples in (forget, retain)]
    return two_forwards(model, reference, rows[0], rows[1], terms)


def open_unlearning(
    model: nn.Module, reference: nn.Module | None, forget: Sequence[Example], retain: Sequence[Example], terms: Terms
) -> Tensor:
    device = next(model.parameters()).device
    rows = [padded(examples, longest(examples), terms.pad_token_id, device) for examples in (forget, retain)]
    return two_forwards(model, reference, rows[0], rows[1], terms)


def trl(
    model: nn.Module, reference: nn.Module | None, forget: Sequence[Example], retain: Sequence[Example], terms: Terms
) -> Tensor:
    fused = import_module("trl.kernels").ChunkedLogProbFunction
    lm = causal_lm(model)
    body, head = body_of(lm), output_layer(lm)
    assert body is not None, "attach has refused a model without a body"
    rows = padded([*forget, *retain], longest(forget, retain), terms.pad_token_id, next(model.parameters()).device)
    hidden = body(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).last_hidden_state
    counts, B = rows.targets != IGNORE_INDEX, len(forget)
    h, y = hidden[counts], rows.targets[counts]
    logps = fused.apply(h, head.weight, head.bias, y, 1.0, TRL_CHUNK_SIZE, None, 1.0, ())[0]  # (N,)
    per_token = logps.new_zeros(counts.shape).masked_scatter(counts, logps)  # (B, T)
    kept = terms.ref_logps
    ref_logps = None if kept is None else logps.new_tensor([kept[example.id] for example in forget])
    forget_loss = forget_term(per_token[:B].sum(1), rows.targets[:B], ref_logps, terms.objective)
    retain_loss = -per_token[B:].sum() / counts[B:].sum()
    return terms.forget_coef * forget_loss + terms.retain_coef * retain_loss


PUBLISHED = Loop("published TOFU loop", published, keeps_reference=True, npo_reference=True)
OPEN_UNLEARNING = Loop("open-unlearning's loop", open_unlearning, npo_reference=True)
TRL = Loop("TRL's fused head", trl, package="trl")
LOOPS = (PUBLISHED, OPEN_UNLEARNING, TRL)
