"""Scores of an unlearned model, from numbers that were measured elsewhere.

Definitions are those of TOFU (arXiv 2401.06121, appendix C). Where its paper and its code part, and where the code has
changed, the one used by the published tables is taken and named. Array arguments are anything numpy can read.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import ks_2samp

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

UTILITY_TERMS = 9  # probability, ROUGE-L recall and truth ratio, each on retain, real authors and world facts


def truth_ratio(paraphrased_nll: ArrayLike, perturbed_nll: ArrayLike) -> NDArray[np.float64]:
    """How probable wrong answers are next to the right one: R = P(perturbed) / P(paraphrased).

    P is the length-normalised probability of an answer, exp(-NLL per token); over the k wrong answers it is their
    geometric mean, as in the evaluation code behind the published tables (the paper's text has the arithmetic one).
    R is below 1 where the model knows better.

    Args:
        paraphrased_nll: (n,) NLL per token of the right answer in other words, nats.
        perturbed_nll: (n, k) the same of k wrong answers.

    Returns:
        (n,) R.

    Raises:
        ValueError: the shapes do not fit each other, or a value is NaN.
    """
    right, wrong = _numbers("paraphrased_nll", paraphrased_nll), _numbers("perturbed_nll", perturbed_nll)
    if right.ndim != 1:
        raise ValueError(f"paraphrased_nll must be (n,), got {right.shape}")
    if wrong.ndim != 2 or wrong.shape[0] != right.shape[0] or wrong.shape[1] == 0:
        raise ValueError(f"perturbed_nll must be ({right.shape[0]}, k) with k at least 1, got {wrong.shape}")
    return np.exp(right - wrong.mean(axis=1))


def forget_quality(r_unlearned: ArrayLike, r_retrained: ArrayLike) -> float:
    """How well the unlearned model passes for one that never saw the forget set.

    The p-value of a two-sample Kolmogorov-Smirnov test on the truth ratios of the forget set (TOFU, section 2.2.2):
    above 0.05 the two models cannot be told apart. It depends on the number of examples: compare like with like.

    Args:
        r_unlearned: (n,) truth ratios under the unlearned model.
        r_retrained: (m,) truth ratios under the model trained on the retain set alone.

    Returns:
        The p-value, in [0, 1].

    Raises:
        ValueError: one of the two is not a non-empty vector, or holds a NaN.
    """
    samples = {
        "r_unlearned": _numbers("r_unlearned", r_unlearned),
        "r_retrained": _numbers("r_retrained", r_retrained),
    }
    for name, sample in samples.items():
        if sample.ndim != 1 or sample.size == 0:
            raise ValueError(f"{name} must be (n,) with n at least 1, got {sample.shape}")
    result: Any = ks_2samp(samples["r_unlearned"], samples["r_retrained"])
    return float(result.pvalue)


def model_utility(values: ArrayLike) -> float:
    """What the model is still worth: the harmonic mean of nine scores (TOFU, section 2.2.1).

    Args:
        values: (9,) probability, ROUGE-L recall and max(0, 1 - truth ratio), each averaged over the retain set, the
            real authors and the world facts; none below 0, and a single 0 makes the utility 0.

    Raises:
        ValueError: there are not nine, or one is negative or NaN.
    """
    scores = _numbers("values", values)
    if scores.shape != (UTILITY_TERMS,):
        raise ValueError(f"values must be ({UTILITY_TERMS},), got {scores.shape}")
    if (scores < 0).any():
        raise ValueError(f"values must not be negative, got {scores.tolist()}")
    if (scores == 0).any():
        return 0.0
    return float(UTILITY_TERMS / (1 / scores).sum())


def rouge_l_recall(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """ROUGE-L recall with stemming: the share of a reference's words that the answer has, in the same order.

    As in TOFU's evaluation: rouge-score with use_stemmer=True, case and punctuation ignored.

    Raises:
        ValueError: there are not as many answers as references.
    """
    if len(references) != len(answers):
        raise ValueError(f"answers must be as many as references, {len(references)}, got {len(answers)}")
    return [_rouge().score(reference, answer)["rougeL"].recall for reference, answer in zip(references, answers)]


@cache
def _rouge() -> "RougeScorer":
    # brings nltk, which takes a second to import
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if np.isnan(array).any():
        raise ValueError(f"{name} holds {np.isnan(array).sum()} NaN")
    return array
