"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from simnpo.metrics import (
    exact_memorization,
    extraction_strength,
    forget_quality,
    membership_auc,
    min_k,
    model_utility,
    privacy_leak,
    probability_among_options,
    rouge_l_f1,
    rouge_l_recall,
    truth_ratio,
    truth_ratio_correctness,
    truth_ratio_similarity,
)


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


@pytest.mark.parametrize(
    ("scores", "published"),
    [  # SimNPO's table 1 (forget05): real authors, world facts, retain; each ROUGE-L, probability, truth ratio
        ([0.93, 0.44, 0.58, 0.91, 0.43, 0.55, 0.98, 0.99, 0.48], 0.62),  # the original model
        ([0.92, 0.44, 0.57, 0.90, 0.43, 0.54, 0.97, 0.99, 0.48], 0.62),  # retrained
        ([0.59, 0.59, 0.81, 0.88, 0.46, 0.59, 0.42, 0.49, 0.48], 0.56),  # GradDiff
        ([0.91, 0.50, 0.62, 0.90, 0.50, 0.61, 0.47, 0.51, 0.44], 0.57),  # NPO
        ([0.90, 0.50, 0.64, 0.90, 0.48, 0.60, 0.54, 0.56, 0.44], 0.58),  # SimNPO
    ],
)
def test_model_utility_of_the_published_table(scores, published):
    assert round(model_utility(scores), 2) == published


@pytest.mark.parametrize(("questions", "published"), [(200, 1.94e-119), (400, 1.06e-239)])
def test_forget_quality_of_models_that_are_told_apart_everywhere(questions, published):
    """The lowest values of open-unlearning's published tables, for forget05 and forget10."""
    apart = forget_quality(np.arange(questions), np.arange(questions) + questions)
    assert apart == pytest.approx(published, rel=0.005)


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


def test_rouge_l_f1_has_no_stemming():
    # "capitals" is not "capital": 5 of 6 words, and of 7 in the answer
    f1 = rouge_l_f1(["The capital of France is Paris."], ["The capitals of France is just Paris"])
    assert f1 == pytest.approx([2 * (5 / 6) * (5 / 7) / (5 / 6 + 5 / 7)])


def test_truth_ratios_of_a_set():
    assert truth_ratio_similarity([0.5, 2.0, 1.0, 0.0]) == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)
    assert truth_ratio_correctness([0.5, 2.0, 1.0, 0.0]) == pytest.approx((0.5 + 0 + 0 + 1) / 4)


def test_probability_among_options():
    # 0.5 / (0.5 + 0.25 + 0.25), and one right answer so improbable that its probability is 0 as a float
    among = probability_among_options([math.log(2), 2000.0], [[math.log(4), math.log(4)], [2000.0, 2001.0]])
    assert among == pytest.approx([0.5, 1 / (2 + math.exp(-1))])
    assert probability_among_options([2000.0], [[1.0]]) == pytest.approx([0.0])
    with pytest.raises(ValueError, match=r"got \(1,\) and \(1,\)"):
        probability_among_options([1.0], [1.0])


@pytest.mark.parametrize(
    ("hits", "strength", "memorised"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 0, 0, 0], 0.0, 0.0),
        ([1, 0, 1, 1], 0.5, 0.75),
        ([1, 1, 1, 0], 0.0, 0.75),
        ([0, 1, 1, 1], 0.75, 0.75),
    ],
)
def test_what_greedy_decoding_gets_back(hits, strength, memorised):
    assert extraction_strength(hits) == strength
    assert exact_memorization(hits) == memorised


def test_nothing_to_get_back():
    for metric in (extraction_strength, exact_memorization):
        with pytest.raises(ValueError, match=r"is_greedy must be \(n,\) with n at least 1, got \(0,\)"):
            metric([])


def test_min_k():
    logps = [-1.0, -5.0, -3.0, -2.0, -4.0]
    assert min_k(logps) == -4.5  # two of five
    assert min_k(logps, share=0.1) == -5.0  # at least one
    assert min_k(logps, share=1.0) == -3.0
    with pytest.raises(ValueError, match="at least 1"):
        min_k([])


def test_membership_and_leakage():
    assert membership_auc([-1, -2], [-3, -4]) == 0.0  # all of the forget set looks familiar
    assert membership_auc([-3, -4], [-1, -2]) == 1.0
    assert membership_auc([-1, -3], [-2, -3]) == pytest.approx((0 + 1 + 0 + 0.5) / 4)
    # MUSE News: AUC .4772 of the retrained model; fully memorised, and no better than guessing
    assert privacy_leak(0.0, 0.4772) == -100
    assert privacy_leak(0.5, 0.4772) == pytest.approx(4.778, abs=1e-3)
    with pytest.raises(ValueError, match="auc_retrained is 0"):
        privacy_leak(0.5, 0.0)
    with pytest.raises(ValueError, match=r"holdout must be \(n,\) with n at least 1, got \(0,\)"):
        membership_auc([1.0], [])
