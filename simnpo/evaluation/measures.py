"""What a model knows of sets of questions: every log-probability in one pass, then its own answers."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simnpo import metrics
from simnpo.data import IGNORE_INDEX, Example, num_own_targets
from simnpo.evaluation.questions import QuestionSet
from simnpo.evaluation.subject import Subject, TargetScores

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Measures:
    """One number for each question of a set; see `simnpo.metrics`. None where the set lacks what it needs.

    Attributes:
        num_tokens: that spell the answer.
        probability: of the answer, length-normalised.
        extraction_strength, exact_memorization: of the answer without the tokens that end it.
        min_k: Min-40% of the answer, nats.
        truth_ratio: (n,) P(perturbed) / P(paraphrased).
        probability_among_options: (n,) of the answer next to the perturbed ones.
        written: what the model answers by itself, greedily.
        rouge_l_recall: of `written` against the answer.
    """

    num_tokens: NDArray[np.int64]
    probability: Numbers
    extraction_strength: Numbers
    exact_memorization: Numbers
    min_k: Numbers
    truth_ratio: Numbers | None
    probability_among_options: Numbers | None
    written: list[str] | None
    rouge_l_recall: Numbers | None

    def means(self) -> dict[str, float | None]:
        """Means of the per-question numbers, but for the truth ratio, whose mean depends on the set."""
        names = ("probability", "rouge_l_recall", "extraction_strength", "exact_memorization")
        values = {name: getattr(self, name) for name in names}
        return {name: None if value is None else float(value.mean()) for name, value in values.items()}


def measure(
    subject: Subject, sets: Mapping[str, QuestionSet], *, write: Collection[str], max_new_tokens: int
) -> dict[str, Measures]:
    """Measures of every set.

    Args:
        sets: by name.
        write: names of the sets whose questions the model answers by itself.
        max_new_tokens: of such an answer.
    """
    sequences = [example for questions in sets.values() for example in questions.sequences()]
    scores = subject.score(sequences)
    scored, start = {}, 0
    for name, questions in sets.items():
        stop = start + len(questions.sequences())
        scored[name] = scores[start:stop]
        start = stop
    written = _written(subject, {name: sets[name] for name in sets if name in write}, scored, max_new_tokens)
    return {
        name: _measures(questions, scored[name], written.get(name), subject.tokenizer)
        for name, questions in sets.items()
    }


def _written(
    subject: Subject, sets: Mapping[str, QuestionSet], scored: Mapping[str, list[TargetScores]], max_new_tokens: int
) -> dict[str, list[str]]:
    """What the model answers; where scoring has shown that it begins with the right answer, from there on."""
    prompts, begun = [], []
    for name, questions in sets.items():
        for example, score in zip(questions.answers, questions.split(scored[name])[0]):
            prompt = example.prompt_ids
            prompts.append(prompt)
            begun.append(_known(example, prompt, score))
    texts = iter(subject.answer(prompts, max_new_tokens, begun=begun))
    return {name: [next(texts).strip() for _ in questions.answers] for name, questions in sets.items()}


def _known(example: Example, prompt: list[int], score: TargetScores) -> list[int]:
    """The tokens of the answer up to the first that greedy decoding would not write."""
    if not prompt:
        return []
    answer = list(takewhile(lambda label: label != IGNORE_INDEX, example.labels[len(prompt) :]))
    # a chat of several turns has targets before those of the last one
    hits = score.is_greedy[-len(answer) :]
    return answer[: len(hits) if hits.all() else int(hits.argmin())]


def _measures(
    questions: QuestionSet, scores: list[TargetScores], written: list[str] | None, tokenizer: Any
) -> Measures:
    answers, paraphrased, perturbed = questions.split(scores)
    own = [num_own_targets(example, tokenizer) for example in questions.answers]
    greedy = [score.is_greedy[:n] for score, n in zip(answers, own)]
    nll = np.array([score.nll for score in answers])
    truth_ratio = among = recall = None
    if perturbed is not None:
        wrong_nll = np.array([[score.nll for score in wrong] for wrong in perturbed])
        truth_ratio = metrics.truth_ratio([score.nll for score in paraphrased], wrong_nll)
        among = metrics.probability_among_options(nll, wrong_nll)
    if written is not None:
        recall = np.array(metrics.rouge_l_recall([example.response for example in questions.answers], written))
    return Measures(
        num_tokens=np.array(own),
        probability=np.exp(-nll),
        extraction_strength=np.array([metrics.extraction_strength(hits) for hits in greedy]),
        exact_memorization=np.array([metrics.exact_memorization(hits) for hits in greedy]),
        min_k=np.array([metrics.min_k(score.logps) for score in answers]),
        truth_ratio=truth_ratio,
        probability_among_options=among,
        written=written,
        rouge_l_recall=recall,
    )
