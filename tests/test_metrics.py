"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from simnpo.metrics import forget_quality, model_utility, rouge_l_recall, truth_ratio


def test_truth_ratio_is_geometric_and_not_upside_down():
    # right answers at probability 0.5 and 0.1, wrong ones at (0.25, 0.01) and (0.4, 0.4):
    # geometric means 0.05 and 0.4, so R = 0.05 / 0.5 and 0.4 / 0.1
    right = -np.log([0.5, 0.1])
    wrong = -np.log([[0.25, 0.01], [0.4, 0.4]])
    assert truth_ratio(right, wrong) == pytest.approx([0.1, 4.0], rel=1e-12)


def test_truth_ratio_takes_lists():
    assert truth_ratio([0.0], [[math.log(2.0), math.log(8.0)]]) == pytest.approx([0.25])


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ([[1.0]], [[1.0]], r"paraphrased_nll must be \(n,\), got \(1, 1\)"),
        ([1.0, 2.0], [1.0, 2.0], r"perturbed_nll must be \(2, k\) with k at least 1, got \(2,\)"),
        ([1.0, 2.0], [[1.0]], r"perturbed_nll must be \(2, k\) with k at least 1, got \(1, 1\)"),
        ([1.0], [[]], r"got \(1, 0\)"),
        ([math.nan], [[1.0]], "paraphrased_nll holds 1 NaN"),
    ],
)
def test_truth_ratio_says_what_is_wrong(right, wrong, message):
    with pytest.raises(ValueError, match=message):
        truth_ratio(right, wrong)


def test_forget_quality_of_disjoint_samples():
    # the two empirical distributions are 1 apart; of the C(8, 4) = 70 ways to deal eight values out, two look like that
    assert forget_quality([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert forget_quality([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0


@pytest.mark.parametrize(("r", "message"), [([], "at least 1"), ([[1.0]], r"\(1, 1\)"), ([math.nan, 1.0], "NaN")])
def test_forget_quality_says_what_is_wrong(r, message):
    with pytest.raises(ValueError, match=message):
        forget_quality(r, [1.0])
    with pytest.raises(ValueError, match=f"r_retrained.*{message}"):
        forget_quality([1.0], r)


def test_model_utility_is_the_harmonic_mean():
    # 9 / (3 / 0.5 + 6 / 1) = 0.75
    assert model_utility([0.5, 1, 1, 0.5, 1, 1, 0.5, 1, 1]) == pytest.approx(0.75)
    assert model_utility([0.0] + [1.0] * 8) == 0.0


def test_model_utility_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"values must be \(9,\), got \(3,\)"):
        model_utility([1, 1, 1])
    with pytest.raises(ValueError, match="must not be negative"):
        model_utility([-0.1] + [1.0] * 8)


def test_rouge_l_recall():
    reference = "The capital of France is Paris."
    answers = ["Paris", "the CAPITALS of France is paris, and much more", "Paris is the capital of France.", ""]
    # 1 of 6 words; all six ("capitals" has the same stem); "the capital of france" is the longest run in order
    assert rouge_l_recall([reference] * 4, answers) == pytest.approx([1 / 6, 1, 4 / 6, 0])


def test_rouge_l_recall_counts():
    with pytest.raises(ValueError, match="as many as references, 1, got 2"):
        rouge_l_recall(["a"], ["a", "b"])
