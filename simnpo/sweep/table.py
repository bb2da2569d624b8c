"""The outcome of a sweep: sweep.md, sweep.json and sweep.png."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from simnpo.evaluation.results import markdown_table
from simnpo.sweep.grid import Trial
from simnpo.training.disk import write_bytes, write_json, write_text

PASSES = 0.05  # a forget quality above it: the two sets of truth ratios pass for one


MEASURES = ("probability", "rouge_l_recall", "truth_ratio")


class Outcome(NamedTuple):
    """The seeds of one setting. Spread is the sample's standard deviation, None for a single seed."""

    group: str
    seeds: int
    forget_quality: float  # median over seeds
    forget_quality_range: tuple[float, float]
    model_utility: float
    model_utility_spread: float | None
    forget: dict[str, float]  # means over seeds of the forget set's scores
    retain: dict[str, float]
    seconds: float


COLUMNS = (
    "setting", "seeds", "forget quality", "model utility", "forget: probability", "ROUGE-L", "truth ratio",
    "retain: probability", "ROUGE-L", "seconds",
)  # fmt: skip


def outcomes(trials: Sequence[Trial], results: dict[str, dict[str, Any]]) -> list[Outcome]:
    """One outcome for each setting that has results; those of several seeds together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial.name in results:
            groups.setdefault(trial.group, []).append(results[trial.name])
    return [_outcome(group, runs) for group, runs in groups.items()]


def _outcome(group: str, runs: list[dict[str, Any]]) -> Outcome:
    qualities = [run["scores"]["forget_quality"] for run in runs]
    utilities = [run["scores"]["model_utility"] for run in runs]

    def means(name: str) -> dict[str, float]:
        return {key: fmean(run["sets"][name][key] for run in runs) for key in MEASURES}

    return Outcome(
        group,
        seeds=len(runs),
        forget_quality=median(qualities),
        forget_quality_range=(min(qualities), max(qualities)),
        model_utility=fmean(utilities),
        model_utility_spread=stdev(utilities) if len(utilities) > 1 else None,
        forget=means("forget"),
        retain=means("retain"),
        seconds=fmean(run["summary"]["seconds"] for run in runs),
    )


def best(found: Sequence[Outcome]) -> Outcome:
    """The setting with the highest utility among those whose median forget quality passes; else the highest quality."""
    passing = [outcome for outcome in found if outcome.forget_quality > PASSES]
    if passing:
        return max(passing, key=lambda outcome: outcome.model_utility)
    return max(found, key=lambda outcome: outcome.forget_quality)


def write_sweep(
    folder: Path, split: str, trials: Sequence[Trial], results: dict[str, dict[str, Any]], start: dict[str, Any],
    retrained: dict[str, Any],
) -> str:  # fmt: skip
    """Writes the three files; returns the page."""
    found = outcomes(trials, results)
    page = _page(split, found, start, retrained)
    write_text(folder / "sweep.md", page)
    chosen = {method: best(some).group for method, some in _by_method(found).items()}
    write_json(
        folder / "sweep.json", {"split": split, "best": chosen, "outcomes": [outcome._asdict() for outcome in found]}
    )
    _plot(folder / "sweep.png", split, found, start, retrained)
    return page


def _page(split: str, found: Sequence[Outcome], start: dict[str, Any], retrained: dict[str, Any]) -> str:
    rows = [_reference_row("before", start), _reference_row("retrained", retrained), *map(_row, found)]
    chosen = {method: best(some) for method, some in _by_method(found).items()}
    lines = [f"* {method}: {outcome.group}\n" for method, outcome in chosen.items()]
    return "\n".join(
        [
            f"# Sweep on TOFU, {split}\n",
            "Forget quality is the p-value of TOFU's Kolmogorov-Smirnov test against the retrained model: the median "
            "over seeds, with the range; utility and the others are means, utility with its standard deviation.\n",
            markdown_table(COLUMNS, rows),
            f"Of each method, the setting of the highest utility whose forget quality is above {PASSES}; if none is, "
            "that of the highest forget quality:\n",
            "".join(lines),
        ]
    )


def _row(outcome: Outcome) -> list[Any]:
    low, high = outcome.forget_quality_range
    quality = f"{outcome.forget_quality:.3g}" + (f" ({low:.2g} to {high:.2g})" if outcome.seeds > 1 else "")
    spread = outcome.model_utility_spread
    utility = f"{outcome.model_utility:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
    sets = [*outcome.forget.values(), outcome.retain["probability"], outcome.retain["rouge_l_recall"]]
    return [outcome.group, outcome.seeds, quality, utility, *sets, round(outcome.seconds)]


def _reference_row(name: str, results: dict[str, Any]) -> list[Any]:
    scores, sets = results["scores"], results["sets"]
    forget = [sets["forget"][key] for key in ("probability", "rouge_l_recall", "truth_ratio")]
    retain = [sets["retain"][key] for key in ("probability", "rouge_l_recall")]
    return [name, "", scores["forget_quality"], scores["model_utility"], *forget, *retain, ""]


def _by_method(found: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    methods: dict[str, list[Outcome]] = {}
    for outcome in found:
        words = dict(word.split("=", 1) for word in outcome.group.split())
        methods.setdefault(words.get("method", "simnpo"), []).append(outcome)
    return methods


def _plot(path: Path, split: str, found: Sequence[Outcome], start: dict[str, Any], retrained: dict[str, Any]) -> None:
    """Forget quality against utility; up and to the right is better, the star is where a retrained model stands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    for method, some in _by_method(found).items():
        axes.errorbar(
            [outcome.model_utility for outcome in some],
            [_log10(outcome.forget_quality) for outcome in some],
            xerr=[outcome.model_utility_spread or 0.0 for outcome in some],
            fmt="o", label=method, capsize=2,
        )  # fmt: skip
    axes.plot(retrained["scores"]["model_utility"], 0.0, "*", color="black", markersize=14, label="retrained")
    axes.plot(
        start["scores"]["model_utility"], _log10(start["scores"]["forget_quality"]), "s", color="gray", label="before"
    )
    axes.axhline(_log10(PASSES), color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="model utility", ylabel="log10 of forget quality", title=f"TOFU {split}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    write_bytes(path, buffer.getvalue())


def _log10(p: float) -> float:
    return math.log10(max(p, 1e-300))
