"""Prefilling: the first tokens of the answer are given, and the model goes on.

What comes back after a few of them was not forgotten, only made hard to begin.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from simnpo.attacks.curves import Curves, Row
from simnpo.data import Example, num_own_targets
from simnpo.errors import UserError
from simnpo.evaluation.subject import Subject, TargetScores
from simnpo.metrics import rouge_l_recall

SCORES = {
    "probability": "probability of the rest",
    "rouge_l_recall": "ROUGE-L recall of the rest",
    "exact": "rest written word for word",
}


class Answer(NamedTuple):
    """Where the last answer of a sequence starts, its targets, and how many of them spell it."""

    example: Example
    start: int
    targets: int
    tokens: int


def _answer(example: Example, tokenizer: Any) -> Answer:
    start = len(example.prompt_ids)
    targets = len(example.input_ids) - start
    return Answer(example, start, targets, targets - (example.num_targets - num_own_targets(example, tokenizer)))


def prefix_rows(
    subject: Subject, answers: Sequence[Example], *, name: str, given: Sequence[int], max_new_tokens: int | None = None
) -> list[Row]:
    """Rows of one model, one for each number of given tokens.

    Only answers longer than the longest prefix count, in every row: the rows are about the same answers.

    Args:
        answers: questions with their answers.
        name: of the model in the rows.
        given: numbers of tokens, from 0.
        max_new_tokens: of a continuation; None: as many as the longest rest.

    Raises:
        UserError: no answer is longer than the longest prefix.
    """
    tokenizer = subject.tokenizer
    long = [answer for answer in (_answer(example, tokenizer) for example in answers) if answer.tokens > max(given)]
    if not long:
        longest = max(_answer(example, tokenizer).tokens for example in answers)
        raise UserError(f"prefix_tokens: no answer is longer than {max(given)} tokens, the longest has {longest}")
    # of several assistant turns, the last
    scores = [
        TargetScores(score.logps[-one.targets :], score.is_greedy[-one.targets :])
        for one, score in zip(long, subject.score([one.example for one in long]))
    ]
    rows: list[Row] = []
    for k in given:
        prompts = [one.example.input_ids[: one.start + k] for one in long]
        rests = [tokenizer.decode(one.example.input_ids[one.start + k :], skip_special_tokens=True) for one in long]
        room = max_new_tokens or max(one.tokens for one in long) - k
        written = subject.answer(prompts, room, f"{k} tokens given")
        # a rest that is only a full stop has no words to recall
        worded = [(rest, text) for rest, text in zip(rests, written) if any(map(str.isalnum, rest))]
        rows.append(
            {
                "model": name,
                "given": k,
                "answers": len(long),
                "probability": fmean(math.exp(score.logps[k:].mean()) for score in scores),
                "rouge_l_recall": fmean(rouge_l_recall(*zip(*worded))) if worded else None,
                # the tokens that end the answer are not part of it
                "exact": fmean(float(score.is_greedy[k : one.tokens].all()) for score, one in zip(scores, long)),
            }
        )
    return rows


def prefix_curves(rows: Sequence[Row]) -> Curves:
    return Curves("Prefilling the first tokens of the answer", ("given", "tokens given"), SCORES, (), rows)


def check_has_prompts(answers: Sequence[Example]) -> None:
    """Raises `UserError` at a row that asks nothing."""
    for example in answers:
        if not example.prompt_ids:
            raise UserError(f"{example.id}: prefilling needs a prompt and a response, got a text")
