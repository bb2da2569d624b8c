"""Scores of the shorter and of the longer half of the forget answers (the SimNPO paper's figure 2).

A method that pushes long answers hardest forgets the short ones late; a mean over the set does not show it.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from simnpo import metrics
from simnpo.evaluation.measures import Measures

HALVES = ("shorter", "longer")


def by_length(forget: Measures, retrained_truth_ratio: ArrayLike | None = None) -> dict[str, dict[str, Any]] | None:
    """Scores of both halves, in number of tokens; of an odd number of answers the longer half has one more.

    Args:
        forget: of the forget set.
        retrained_truth_ratio: (n,) of the retrained model on the same questions, for the forget quality.

    Returns:
        For each of HALVES its questions, the fewest and the most tokens of an answer, and its scores, None where they
        could not be measured; None altogether where there are fewer than two answers.
    """
    order = np.argsort(forget.num_tokens, kind="stable")
    if len(order) < 2:
        return None
    halves = dict(zip(HALVES, np.split(order, [len(order) // 2])))
    return {name: _scores(forget, indices, retrained_truth_ratio) for name, indices in halves.items()}


def _scores(forget: Measures, indices: Any, retrained_truth_ratio: ArrayLike | None) -> dict[str, Any]:
    tokens, recall, ratios = forget.num_tokens[indices], forget.rouge_l_recall, forget.truth_ratio
    quality = None
    if ratios is not None and retrained_truth_ratio is not None:
        quality = metrics.forget_quality(ratios[indices], np.asarray(retrained_truth_ratio)[indices])
    return {
        "questions": len(indices),
        "tokens": [int(tokens.min()), int(tokens.max())],
        "forget_quality": quality,
        "probability": float(forget.probability[indices].mean()),
        "rouge_l_recall": None if recall is None else float(recall[indices].mean()),
        "truth_ratio": None if ratios is None else metrics.truth_ratio_similarity(ratios[indices]),
    }
