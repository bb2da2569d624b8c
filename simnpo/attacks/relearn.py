"""Relearning: fine-tune on a part of the forget set and see whether the rest comes back (SimNPO paper, figure 6).

A model that forgot is not helped by a few examples; one that only hides what it knows is.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from simnpo.attacks.curves import Curves, Row, forget_scores, measure_sets
from simnpo.batch import collate, random_stream
from simnpo.data import Example
from simnpo.errors import RunError
from simnpo.evaluation.measures import Measures
from simnpo.evaluation.questions import QuestionSet
from simnpo.evaluation.subject import Subject
from simnpo.kernels.linear_logps import linear_logps
from simnpo.model import hidden_states, output_head
from simnpo.training.optimizer import clip_gradients, make_optimizer, set_learning_rate

Which = Literal["shortest", "random"]
WHICH: tuple[Which, ...] = ("shortest", "random")
WEIGHT_DECAY, MAX_GRAD_NORM = 0.01, 1.0
SCORES = {
    "probability": "probability of the answers",
    "probability_others": "probability of those not relearned",
    "rouge_l_recall": "ROUGE-L recall",
    "rouge_l_recall_others": "ROUGE-L recall of those not relearned",
    "extraction_strength": "extraction strength",
    "forget_quality": "forget quality (p-value)",
}


class Relearning(NamedTuple):
    """How the attacker trains; the learning rate is constant."""

    share: float = 0.2
    epochs: int = 3
    learning_rate: float = 1e-5
    batch_size: int = 4


def picked(answers: Sequence[Example], which: Which, share: float, repeat: int) -> list[int]:
    """Which answers are relearned: the shortest, or as many at random."""
    count = max(1, round(share * len(answers)))
    if which == "shortest":
        return sorted(range(len(answers)), key=lambda i: (answers[i].num_targets, i))[:count]
    return sorted(random_stream(repeat).choice(len(answers), size=count, replace=False).tolist())


def relearn(
    subject: Subject,
    examples: Sequence[Example],
    relearning: Relearning,
    *,
    seed: int,
    autocast: AbstractContextManager[Any],
) -> Iterator[int]:
    """Trains the subject's model, whose weights must be float32, in place; yields each epoch when it is over.

    Raises:
        RunError: the loss is not finite.
    """
    optimizer = make_optimizer(subject.model.parameters(), WEIGHT_DECAY)
    set_learning_rate(optimizer, relearning.learning_rate)
    for epoch in range(1, relearning.epochs + 1):
        subject.model.train()
        order = random_stream(seed, epoch).permutation(len(examples))
        for indices in np.array_split(order, -(-len(order) // relearning.batch_size)):
            with autocast:
                loss = nll(subject, [examples[i] for i in indices])
            if not torch.isfinite(loss):
                raise RunError(f"relearning, epoch {epoch}: the loss is {loss.item()}; try a lower learning rate")
            loss.backward()
            clip_gradients(subject.model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
        subject.model.eval()
        yield epoch


def nll(subject: Subject, examples: Sequence[Example]) -> torch.Tensor:
    """Mean over the targets of a batch, nats."""
    device = next(subject.model.parameters()).device
    batch = collate(examples, packed=False, pad_token_id=subject.tokenizer.pad_token_id).to(device)
    head = output_head(subject.model)
    logps = linear_logps(hidden_states(subject.model, batch), head.weight, batch.targets, **head.options())
    return -logps.sum() / sum(batch.num_targets)


def relearn_rows(
    subject: Subject,
    questions: QuestionSet,
    relearning: Relearning,
    *,
    name: str,
    repeats: int,
    max_new_tokens: int,
    autocast: AbstractContextManager[Any],
    retrained_truth_ratio: Any = None,
) -> tuple[list[Row], Any]:
    """Rows of one model for both subsets, `repeats` random ones; each starts from the same weights.

    Args:
        name: of the model in the rows.
        retrained_truth_ratio: (n,) of the retrained model before any attack, for the forget quality.

    Returns:
        The rows, and the (n,) truth ratios before the attack or None.
    """

    def scored() -> Measures:
        with autocast:
            return measure_sets(subject, {"forget": questions}, max_new_tokens)["forget"]

    start = {key: value.cpu().clone() for key, value in subject.model.state_dict().items()}
    before = scored()
    rows: list[Row] = []
    for which in WHICH:
        for repeat in range(repeats if which == "random" else 1):
            chosen = picked(questions.answers, which, relearning.share, repeat)
            row = {"model": name, "relearned": which, "repeat": repeat, "relearned_answers": len(chosen)}

            def add(epoch: int, measures: Measures, row: Row = row, chosen: list[int] = chosen) -> None:
                scores = forget_scores(measures, retrained_truth_ratio)
                rows.append(row | {"epoch": epoch} | scores | _others(measures, chosen))

            add(0, before)
            examples = [questions.answers[i] for i in chosen]
            for epoch in relearn(subject, examples, relearning, seed=repeat, autocast=autocast):
                add(epoch, scored())
            subject.model.load_state_dict(start)
    return rows, before.truth_ratio


def _others(measures: Measures, chosen: list[int]) -> Row:
    """Means over the answers that were not relearned."""
    others = np.setdiff1d(np.arange(len(measures.probability)), chosen)
    row: Row = {}
    for key in ("probability", "rouge_l_recall"):
        values = getattr(measures, key)
        row[f"{key}_others"] = None if values is None or not len(others) else float(values[others].mean())
    return row


def relearn_curves(rows: Sequence[Row], relearning: Relearning) -> Curves:
    title = f"Relearning {relearning.share:.0%} of the forget set at learning rate {relearning.learning_rate:g}"
    return Curves(title, ("epoch", "epoch"), SCORES, ("relearned",), rows)
