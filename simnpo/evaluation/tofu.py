"""TOFU (arXiv 2401.06121): forget quality, model utility and what they are made of, and privacy leakage.

    forget        probability, ROUGE-L, truth ratio min(R, 1/R), extraction strength, exact memorisation
    retain        the same with truth ratio max(0, 1 - R)
    real authors, world facts    the same with the probability of the answer among its options

R = P(perturbed) / P(paraphrased) as in `simnpo.metrics.truth_ratio`. Real authors and world facts have no paraphrase:
their answer stands for it. Answers are greedy (the published code samples), a set is never cut to 300 questions, and
privacy leakage is MUSE's, as open-unlearning applies it to TOFU.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from simnpo import metrics
from simnpo.errors import UserError
from simnpo.evaluation.lengths import HALVES, by_length
from simnpo.evaluation.measures import Measures
from simnpo.evaluation.questions import QuestionSet, encode_questions
from simnpo.evaluation.results import facts, markdown_table
from simnpo.evaluation.source import named_rows
from simnpo.shapes import read_json

UTILITY_SETS = ("retain", "real_authors", "world_facts")
OPTION_SETS = ("real_authors", "world_facts")
UTILITY_MEASURES = ("probability", "rouge_l_recall", "truth_ratio")
WRITTEN_SETS = ("forget", *UTILITY_SETS)
RETRAINED_SETS = ("forget", "holdout")  # what a retrained model is asked
MAX_NEW_TOKENS, MAX_LENGTH = 200, 512


class Tofu(NamedTuple):
    """sets: by name.   missing: why a set, or a part of it, is not there."""

    sets: dict[str, QuestionSet]
    missing: dict[str, str]


# what another evaluation is compared by
RESULTS_SHAPE = {
    "benchmark": str,
    "split": str,
    "scores": {"model_utility": (float, None)},
    "per_question": {"forget": {"truth_ratio": ([float], None), "min_k": [float]}, "holdout?": {"min_k": [float]}},
}


class Retrained(NamedTuple):
    """What a model that never saw the forget set says about it; None where it was not measured."""

    name: str
    truth_ratio: list[float] | None
    forget_min_k: list[float]
    holdout_min_k: list[float] | None
    model_utility: float | None = None


def read_tofu(data: str, split: str, tokenizer: Any, max_length: int, max_examples: int | None = None) -> Tofu:
    """Reads what there is of TOFU.

    Args:
        data: folder with TOFU's files, or the hub's id of it.
        split: "forget01", "forget05", "forget10".
        max_examples: of each set, the first; None: all.

    Raises:
        UserError: `split` is no such name, there is no forget set, or a row is malformed; names file and line.
    """
    if not re.fullmatch(r"forget\d+", split):
        raise UserError(f"split must be forget01, forget05, forget10 or another forget set of TOFU, got {split!r}")
    files = {name: f"{name}_perturbed" for name in UTILITY_SETS} | {"holdout": split.replace("forget", "holdout")}
    rows = {name: named_rows(data, file) for name, file in files.items()}
    missing = {name: f"{file} is not in {data}" for name, file in files.items() if rows[name] is None}
    plain, perturbed = named_rows(data, split), named_rows(data, f"{split}_perturbed")
    if plain is None and perturbed is None:
        raise UserError(f"data: {data} has neither {split} nor {split}_perturbed, so there is nothing to forget")
    if perturbed is None:
        missing["truth_ratio"] = f"{split}_perturbed is not in {data}"
    elif plain is not None and len(plain) != len(perturbed):
        raise UserError(
            f"data: {split} has {len(plain)} rows and {split}_perturbed {len(perturbed)}: "
            "they must be the same questions"
        )
    found = {"forget": perturbed or plain} | {name: some for name, some in rows.items() if some is not None}
    sets = {name: encode_questions((some or [])[:max_examples], tokenizer, max_length) for name, some in found.items()}
    for name in UTILITY_SETS:
        if name in sets and sets[name].perturbed is None:
            missing[name] = f"{files[name]} of {data} has no perturbed_answer"
    if perturbed and sets["forget"].perturbed is None:
        missing["truth_ratio"] = f"{split}_perturbed of {data} has no perturbed_answer"
    return Tofu(sets, missing)


def retrained_from_measures(name: str, measures: Mapping[str, Measures]) -> Retrained:
    forget, holdout = measures["forget"], measures.get("holdout")
    return Retrained(
        name,
        None if forget.truth_ratio is None else forget.truth_ratio.tolist(),
        forget.min_k.tolist(),
        None if holdout is None else holdout.min_k.tolist(),
    )


def retrained_from_results(path: Path, split: str, num_questions: int) -> Retrained:
    """Reads results.json of an earlier evaluation.

    Raises:
        UserError: it is something else, or of another split or other questions.
    """
    try:
        results = read_json(path, RESULTS_SHAPE)
    except (OSError, UserError) as error:
        raise UserError(
            f"retain_model: {path} is not results.json of `simnpo evaluate --benchmark tofu`: {error}"
        ) from error
    forget = results["per_question"]["forget"]
    theirs = results["benchmark"], results["split"], len(forget["min_k"])
    holdout = results["per_question"].get("holdout", {}).get("min_k")
    utility = results["scores"]["model_utility"]
    retrained = Retrained(str(path), forget["truth_ratio"], forget["min_k"], holdout, utility)
    if theirs != ("tofu", split, num_questions):
        raise UserError(
            f"retain_model: {path} has {theirs[2]} questions of {theirs[1]} ({theirs[0]}), expected {num_questions} of "
            f"{split}"
        )
    return retrained


def tofu_results(
    measures: Mapping[str, Measures], missing: dict[str, str], retrained: Retrained | None
) -> dict[str, Any]:
    """Everything TOFU defines, from what was measured; a score that cannot be computed is None and has its reason."""
    not_available = {}
    sets = {name: _set_scores(name, m) for name, m in measures.items()}
    forget = measures["forget"]

    quality = None
    if forget.truth_ratio is None:
        not_available["forget_quality"] = missing["truth_ratio"]
    elif retrained is None:
        not_available["forget_quality"] = "it compares with a retrained model: --retain-model"
    elif retrained.truth_ratio is None:
        not_available["forget_quality"] = f"{retrained.name} has no truth ratios"
    else:
        quality = metrics.forget_quality(forget.truth_ratio, retrained.truth_ratio)

    utility = None
    terms = [
        (name, sets[name][measure] if name in sets else None) for name in UTILITY_SETS for measure in UTILITY_MEASURES
    ]
    lacking = dict.fromkeys(name for name, value in terms if value is None)
    if lacking:
        not_available["model_utility"] = "; ".join(missing[name] for name in lacking)
    else:
        utility = metrics.model_utility([value for _, value in terms])  # type: ignore[misc]

    privacy, reason = _privacy(measures, missing, retrained)
    if reason is not None:
        not_available["privacy_leak"] = reason
    return {
        "scores": {"forget_quality": quality, "model_utility": utility, **privacy},
        "retrained_scores": None if retrained is None else {"model_utility": retrained.model_utility},
        "not_available": not_available,
        "sets": sets,
        "forget_by_length": by_length(forget, None if retrained is None else retrained.truth_ratio),
        "per_question": {name: _per_question(measures[name]) for name in RETRAINED_SETS if name in measures},
    }


def _privacy(
    measures: Mapping[str, Measures], missing: Mapping[str, str], retrained: Retrained | None
) -> tuple[dict[str, float | None], str | None]:
    """AUC and leakage, and why there is no leakage."""
    scores: dict[str, float | None] = {"membership_auc": None, "privacy_leak": None}
    if "holdout" not in measures:
        return scores, missing["holdout"]
    scores["membership_auc"] = auc = metrics.membership_auc(measures["forget"].min_k, measures["holdout"].min_k)
    if retrained is None:
        return scores, "it compares with a retrained model: --retain-model"
    if retrained.holdout_min_k is None:
        return scores, f"{retrained.name} has no held-out answers"
    theirs = metrics.membership_auc(retrained.forget_min_k, retrained.holdout_min_k)
    if theirs == 0:
        return scores, f"to {retrained.name} every forget answer is more familiar than any other"
    scores["privacy_leak"] = metrics.privacy_leak(auc, theirs)
    return scores, None


def _set_scores(name: str, measures: Measures) -> dict[str, Any]:
    scores: dict[str, Any] = {"questions": len(measures.probability), **measures.means(), "truth_ratio": None}
    if measures.truth_ratio is not None:
        aggregate = metrics.truth_ratio_similarity if name == "forget" else metrics.truth_ratio_correctness
        scores["truth_ratio"] = aggregate(measures.truth_ratio)
    if name in OPTION_SETS:
        among = measures.probability_among_options
        scores["probability"] = None if among is None else float(among.mean())
    return scores


def _per_question(measures: Measures) -> dict[str, Any]:
    ratios = measures.truth_ratio
    return {"truth_ratio": None if ratios is None else ratios.tolist(), "min_k": measures.min_k.tolist()}


def answer_rows(sets: Mapping[str, QuestionSet], measures: Mapping[str, Measures]) -> list[dict[str, Any]]:
    """For answers.jsonl: every question, its answer, what the model wrote and how it scored."""
    rows = []
    for name, measured in measures.items():
        for i, example in enumerate(sets[name].answers):
            row: dict[str, Any] = {"set": name, "id": example.id}
            row |= {"question": example.prompt, "answer": example.response}
            row["written"] = None if measured.written is None else measured.written[i]
            for key in (*UTILITY_MEASURES, "extraction_strength", "exact_memorization", "min_k"):
                values = getattr(measured, key)
                row[key] = None if values is None else float(values[i])
            rows.append(row)
    return rows


SCORE_NAMES = {
    "forget_quality": "forget quality (p-value; above 0.05: passes for a retrained model)",
    "model_utility": "model utility",
    "membership_auc": "AUC of Min-40%, held-out against forget answers (0: all known, 0.5: none)",
    "privacy_leak": "privacy leakage, percent (0: as the retrained model, -100: all known)",
}


def tofu_page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    reasons = results["not_available"]
    scores = [
        [SCORE_NAMES[name], f"not available: {reasons[name]}" if name in reasons else value]
        for name, value in results["scores"].items()
        if name in reasons or value is not None
    ]
    if results["retrained_scores"] and results["retrained_scores"]["model_utility"] is not None:
        scores.append(["model utility of the retrained model", results["retrained_scores"]["model_utility"]])
    measures = (*UTILITY_MEASURES, "extraction_strength", "exact_memorization")
    sets = [[name, s["questions"], *(s[key] for key in measures)] for name, s in results["sets"].items()]
    columns = ["set", "questions", "probability", "ROUGE-L", "truth ratio", "extraction strength", "exact memorisation"]
    halves = results["forget_by_length"]
    rows = [] if halves is None else [_half_row(name, halves[name]) for name in HALVES]
    return "\n".join(
        [
            f"# TOFU, {results['split']}\n",
            facts(results, "model", "retain_model", "data"),
            markdown_table(["score", "value"], scores),
            markdown_table(columns, sets),
            "Probability of real authors and world facts: among the options. Truth ratio of the forget set: "
            "min(R, 1/R); of the others: max(0, 1 - R), with R = P(wrong) / P(right).\n",
            *([markdown_table(HALF_COLUMNS, rows)] if rows else []),
        ]
    )


HALF_COLUMNS = ("forget answers", "questions", "tokens", "forget quality", "probability", "ROUGE-L", "truth ratio")


def _half_row(name: str, half: Mapping[str, Any]) -> list[Any]:
    tokens = "{} to {}".format(*half["tokens"])
    return [f"{name} half", half["questions"], tokens, half["forget_quality"], *(half[key] for key in UTILITY_MEASURES)]
