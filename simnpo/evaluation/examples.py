"""Scores of a set of examples for a run's report: the probability of the reference answers, and the answers given."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simnpo.batch import collate
from simnpo.data import Example
from simnpo.evaluation.generation import greedy_answers
from simnpo.kernels.linear_logps import linear_logps
from simnpo.metrics import rouge_l_recall
from simnpo.model import hidden_states, output_head
from simnpo.pieces import pieces


@dataclass(frozen=True)
class ExampleScores:
    """One example under one model.

    Attributes:
        id, prompt, response: the example's; `response` is the reference answer.
        answer: what the model answers, greedily; None for a `text` row, and for a document that was split or a piece of
            one, which ask nothing.
        probability: of the reference, length-normalised: exp(-nll), as TOFU (arXiv 2401.06121) defines it.
        nll: of the reference per token, its end-of-turn token included, nats.
        rouge_l_recall: of `answer` against the reference, in [0, 1]; None where there is no answer.
    """

    id: str
    prompt: str
    response: str
    answer: str | None
    probability: float
    nll: float
    rouge_l_recall: float | None


@dataclass(frozen=True)
class SetScores:
    """A set of examples under one model; the first three are means over `examples`."""

    probability: float
    nll: float
    rouge_l_recall: float | None
    examples: list[ExampleScores]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Example]],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[str, SetScores]:
    """Scores every example of every set.

    Args:
        model: causal language model of transformers, with or without LoRA adapters. Its arithmetic is the caller's
            choice: wrap the call in autocast for bf16 on fp32 weights.
        tokenizer: its tokenizer, with a pad token.
        sets: examples by name.
        batch_size: sequences of one forward.
        max_new_tokens: of an answer; None: twice the longest reference of the set that has a prompt.
        rank, num_ranks: with several, all must call: each runs its share of the examples, and all get all scores.

    Raises:
        ValueError: a set is empty.
    """
    for name, examples in sets.items():
        if not examples:
            raise ValueError(f"sets[{name!r}] has no examples")
    was_training = model.training
    model.eval()
    try:
        scores = {}
        for name, examples in sets.items():
            # of all ranks' examples: what is dealt to a rank must not change its answers
            asked = [example.num_targets for example in examples if example.prompt_ids]
            limit = max_new_tokens or 2 * max(asked, default=1)
            scores[name] = _score(model, tokenizer, examples[rank::num_ranks], batch_size, limit)
    finally:
        model.train(was_training)
    shares = [scores]
    if num_ranks > 1:
        shares = [{} for _ in range(num_ranks)]
        dist.all_gather_object(shares, scores)
    dealt = {name: zip_longest(*(share[name] for share in shares)) for name in sets}
    return {
        name: _summary([one for round_ in rounds for one in round_ if one is not None])
        for name, rounds in dealt.items()
    }


def _score(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], batch_size: int, max_new_tokens: int
) -> list[ExampleScores]:
    nlls = _nlls(model, tokenizer, examples, batch_size)
    asked = [example for example in examples if example.prompt_ids]
    answers = [
        answer
        for batch in _batches(asked, batch_size)
        for answer in greedy_answers(model, tokenizer, batch, max_new_tokens)
    ]
    recalls = rouge_l_recall([example.response for example in asked], answers)
    answered = zip(answers, recalls)
    scores = []
    for example, nll in zip(examples, nlls):
        answer, recall = next(answered) if example.prompt_ids else (None, None)
        scores.append(ExampleScores(example.id, example.prompt, example.response, answer, math.exp(-nll), nll, recall))
    return scores


def _summary(scores: list[ExampleScores]) -> SetScores:
    recalls = [score.rouge_l_recall for score in scores if score.rouge_l_recall is not None]
    return SetScores(
        probability=fmean(score.probability for score in scores),
        nll=fmean(score.nll for score in scores),
        rouge_l_recall=fmean(recalls) if recalls else None,
        examples=scores,
    )


def _nlls(model: nn.Module, tokenizer: Any, examples: Sequence[Example], batch_size: int) -> list[float]:
    """NLL per target of each example, nats; of a document over the targets of all its pieces."""
    parts = [pieces(example) for example in examples]
    sums = iter(
        [
            logp
            for batch in _batches([piece for some in parts for piece in some], batch_size)
            for logp in _logps(model, tokenizer, batch).tolist()
        ]
    )
    return [-math.fsum(next(sums) for _ in some) / example.num_targets for example, some in zip(examples, parts)]


def _logps(model: nn.Module, tokenizer: Any, examples: Sequence[Example]) -> Tensor:
    """(B,) log-probability of each example's targets, nats."""
    batch = collate(examples, packed=False, pad_token_id=tokenizer.pad_token_id).to(_device(model))
    head = output_head(model)
    return linear_logps(hidden_states(model, batch), head.weight, batch.targets, **head.options()).sum(-1)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    return (examples[i : i + size] for i in range(0, len(examples), size))
