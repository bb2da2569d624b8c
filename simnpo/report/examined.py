"""What `simnpo evaluate` and `simnpo attack` wrote into folders inside that of a run."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

from simnpo.errors import UserError
from simnpo.rows import check_file
from simnpo.shapes import check, read_json

TOFU_SETS = {
    "forget": "Forget", "retain": "Retain", "real_authors": "Real authors", "world_facts": "World facts",
    "holdout": "Held-out",
}  # fmt: skip
MUSE_SCORES = {
    "verbmem_forget": "VerbMem on forget, lower: forgotten",
    "knowmem_forget": "KnowMem on forget, lower: forgotten",
    "knowmem_retain": "KnowMem on retain, higher: kept",
    "membership_auc": "AUC of Min-40%",
    "privleak": "PrivLeak, percent, 0: as the retrained model",
}
MAYBE = (float, None)
SET_SCORES = ("probability", "rouge_l_recall", "truth_ratio", "extraction_strength", "exact_memorization")
SET_SHAPE = {"questions": int, **{f"{name}?": MAYBE for name in (*SET_SCORES, "forget_quality")}}
HARNESS_SHAPE = {"scores": {str: {"accuracy": float}}}
# of results.json, by what the evaluation or the attack was
SHAPES: dict[str, Any] = {
    "tofu": {
        "scores": dict.fromkeys(("forget_quality", "model_utility", "privacy_leak"), MAYBE),
        "sets": {str: SET_SHAPE},
        "forget_by_length?": ({str: SET_SHAPE | {"tokens": [int]}}, None),
        "retrained_scores?": ({"model_utility?": MAYBE}, None),
    },
    "muse": {"scores": dict.fromkeys(MUSE_SCORES, MAYBE), "retrained_scores": ({str: MAYBE}, None)},
    "wmdp": HARNESS_SHAPE,
    "mmlu": HARNESS_SHAPE,
}
ATTACK_SHAPE = {"attack": str, "settings": {}}
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"


class TofuScores(NamedTuple):
    """TOFU's scores of one model; None where they could not be computed.

    name: of its folder.   sets: (title, scores) of each set, then of both halves of the forget set by the length of
    the answer.   retrained_utility: of the retrained model it was compared with.
    """

    name: str
    forget_quality: float | None
    model_utility: float | None
    privacy_leak: float | None
    sets: list[tuple[str, dict[str, Any]]]
    retrained_utility: float | None


class BenchmarkScores(NamedTuple):
    """The scores of another benchmark: (what, value, of the retrained model), None where there is none."""

    name: str
    title: str
    rows: list[tuple[str, float | None, float | None]]


class Attack(NamedTuple):
    """name: of its folder.   kind: "relearn", "quantize", "prefix".   picture: its curves, a data: address."""

    name: str
    kind: str
    settings: dict[str, Any]
    picture: str


def find_tofu(run_dir: Path) -> list[TofuScores]:
    """TOFU's results in the folders of a run: the run's own model and whatever it is compared with, by folder name."""
    found = []
    for path, results in _results(run_dir):
        if results.get("benchmark") == "tofu":
            scores = {name: results["scores"][name] for name in ("forget_quality", "model_utility", "privacy_leak")}
            retrained = (results.get("retrained_scores") or {}).get("model_utility")
            found.append(TofuScores(path.parent.name, **scores, sets=_tofu_sets(results), retrained_utility=retrained))
    return found


def _tofu_sets(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    sets = [(title, results["sets"][name]) for name, title in TOFU_SETS.items() if name in results["sets"]]
    quality = {"forget_quality": results["scores"]["forget_quality"]}
    # an evaluation from before there were halves has none
    halves = (results.get("forget_by_length") or {}).items()
    by_half = [("Forget, {} half ({} to {} tokens)".format(name, *half["tokens"]), half) for name, half in halves]
    return [(title, one | quality) if title == TOFU_SETS["forget"] else (title, one) for title, one in sets] + by_half


def find_benchmarks(run_dir: Path) -> list[BenchmarkScores]:
    """Results of MUSE, WMDP and MMLU in the folders of a run."""
    found = []
    for path, results in _results(run_dir):
        benchmark = results.get("benchmark", "")
        rows: list[tuple[str, float | None, float | None]] = []
        if benchmark == "muse":
            retrained = results["retrained_scores"] or {}
            rows = [(title, results["scores"][name], retrained.get(name)) for name, title in MUSE_SCORES.items()]
        elif benchmark in ("wmdp", "mmlu"):
            rows = [(f"accuracy, {task}", one["accuracy"], None) for task, one in results["scores"].items()]
        if rows:
            found.append(BenchmarkScores(path.parent.name, benchmark.upper(), rows))
    return found


def find_attacks(run_dir: Path) -> list[Attack]:
    """Attacks on the run's model, those that have their curves."""
    found = []
    for path, results in _results(run_dir):
        curves = path.with_name("curves.png")
        if "attack" in results and curves.exists():
            picture = f"data:image/png;base64,{base64.b64encode(_read_png(curves)).decode()}"
            found.append(Attack(path.parent.name, results["attack"], results["settings"], picture))
    return found


def _results(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every results.json and what it holds, of the shape that the report needs."""
    found = []
    for path in sorted({*run_dir.glob("*/results.json"), *run_dir.glob("*/*/results.json")}):
        results = read_json(path, {"benchmark?": str, "attack?": str})
        shape = ATTACK_SHAPE if "attack" in results else SHAPES.get(results.get("benchmark", ""), {})
        check(results, shape, str(path))
        for name, half in (results.get("forget_by_length") or {}).items() if results.get("benchmark") == "tofu" else ():
            if len(half["tokens"]) != 2:
                raise UserError(f"{path}: forget_by_length.{name}.tokens must be two integers, got {half['tokens']}")
        found.append((path, results))
    return found


def _read_png(path: Path) -> bytes:
    """The bytes of a picture.

    Raises:
        UserError: it is no PNG, or its end is missing.
    """
    check_file(path)
    data = path.read_bytes()
    if not data.startswith(PNG_START) or PNG_END not in data[-12:]:
        raise UserError(f"{path}: expected a whole PNG picture, got {len(data)} bytes that are none")
    return data
