"""Before anything is timed: every loop has the same loss and the same gradient as ours on the first batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simnpo.benchmarks.throughput.loops import Loop, Theirs
from simnpo.benchmarks.throughput.subject import Subject, our_gradient, prepare, their_gradient, with_reference
from simnpo.benchmarks.throughput.workload import shortened
from simnpo.errors import RunError

# relative, of the loss and of the L2 norm of all gradients together. A body frozen by LoRA is bf16 whatever the
# arithmetic, and there the loops differ by what bf16 rounds
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 1e-1)}
# at the run's own beta the forget term of a model that does not know the answers is 1e-6 of the loss, and nobody would
# see one that is wrong
SEEN = {"beta": 0.1}
# the first sequences of a step, and their last tokens: float32 logits of more may not fit
MAX_SEQUENCES, MAX_TOKENS = 4, 512


class Difference(NamedTuple):
    """Distance from our loss and our gradient, relative."""

    loss: float
    gradient: float


def require_agreement(subject: Subject, loops: Sequence[Loop]) -> dict[str, Difference]:
    """Compares the loops with ours in float32, with weights at which both terms count; leaves the model as it was.

    Returns:
        How far each is from ours.

    Raises:
        RunError: one of them is further away than the tolerance; names it and both distances.
    """
    subject, kind = _small(subject)
    ours_loss, ours = _evaluate(subject, lambda: our_gradient(subject, 0))
    norm = _norm(ours)
    differences, wrong = {}, []
    for loop in loops:
        prepare(loop, subject)
        loss, gradients = _evaluate(subject, lambda loop=loop: their_gradient(loop, subject, 0))
        distance = _norm([a - b for a, b in zip(gradients, ours, strict=True)])
        difference = Difference(abs(loss - ours_loss) / max(abs(ours_loss), 1e-30), distance / max(norm, 1e-30))
        differences[loop.name] = difference
        # not "any above": a NaN is above nothing
        if not all(value <= limit for value, limit in zip(difference, TOLERANCE[kind], strict=True)):
            wrong.append(f"{loop.name}: loss {difference.loss:.1e}, gradient {difference.gradient:.1e}")
    prepare(None, subject)
    if wrong:
        limits = " and ".join(f"{limit:.0e}" for limit in TOLERANCE[kind])
        raise RunError(
            f"nothing was timed, for these loops do not compute what ours does ({'; '.join(wrong)}; relative, at most "
            f"{limits})"
        )
    return differences


def _small(subject: Subject) -> tuple[Subject, str]:
    """The first batch, cut to what float32 logits leave room for, and the dtype that decides the tolerance."""
    frozen_in_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in subject.model.parameters())
    forget, retain = subject.sampler.step(0, 0)
    forget, retain = (shortened(examples[:MAX_SEQUENCES], MAX_TOKENS) for examples in (forget, retain))
    changes: dict[str, Any] = {"batch_size": len(forget), "retain_batch_size": len(retain), **SEEN}
    if not frozen_in_bf16:
        changes["precision"] = "fp32"
    small = subject.on(subject.workload._replace(forget=forget, retain=retain), **changes)
    small = replace(small, theirs=Theirs(pad_to=min(small.theirs.pad_to, MAX_TOKENS)), reference=None)
    if subject.config.method == "npo":
        small = with_reference(small)
    return small, "bfloat16" if frozen_in_bf16 else "float32"


def _evaluate(subject: Subject, gradient: Callable[[], float | Tensor]) -> tuple[float, list[Tensor]]:
    """The loss, and the gradient of every parameter that trains."""
    loss = float(gradient())
    missing = [p for p in subject.parameters if p.grad is None]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in subject.parameters]
    assert len(missing) < len(gradients), "a backward reaches some parameter"
    subject.optimizer.zero_grad()
    return loss, gradients


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(x.double().square().sum().item() for x in tensors)) ** 0.5
