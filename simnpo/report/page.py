"""From the files of a run to report.html."""

import base64
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from simnpo.config import FREE_ON_RESUME, UnlearnConfig
from simnpo.digests import check_report_inputs
from simnpo.errors import UserError
from simnpo.report.examined import find_attacks, find_benchmarks, find_tofu
from simnpo.report.plots import THEMES, nll_plot, tofu_plot, weights_plot
from simnpo.report.verdict import judge
from simnpo.shapes import read_json, read_lines
from simnpo.text import visible
from simnpo.training.disk import write_bytes, write_text

SET_NAMES = {"forget": "Forget", "retain": "Retain", "heldout": "Held-out"}
# the settings that decide what comes out; a resumed run may differ in the others, and no checkpoint knows them
DECIDING = {field.name for field in fields(UnlearnConfig)} - FREE_ON_RESUME
MAX_ANSWERS = 200  # of a set, on the page; evaluation.json has them all
EXAMPLE_SHAPE = {"prompt": str, "answer": (str, None), "probability": float}
SCORES_SHAPE = {"probability": float, "nll": float, "rouge_l_recall": (float, None), "examples": [EXAMPLE_SHAPE]}
COSTS_SHAPE = dict.fromkeys(("seconds", "tokens", "tokens_per_second", "peak_memory_mib"), float)
SHAPES: dict[str, Any] = {
    "config.json": {"model": str, "method": str, "lora?": bool},
    "metrics.jsonl": {"step": int, "forget_nll": float, "retain_nll": (float, None), **COSTS_SHAPE},
    "weights.jsonl": {"step": int, "num_tokens": [int], "weights": [float]},
    "evaluation.json": {"before?": {"forget": SCORES_SHAPE, str: SCORES_SHAPE}, "after?": {str: SCORES_SHAPE}},
    "summary.json": {
        "steps": int, **COSTS_SHAPE, "device": str, "ranks": int, "versions?": {str: str}, "rows_cut?": {str: int},
    },
}  # fmt: skip


@dataclass(frozen=True)
class RunFiles:
    """What a run left behind; None where a file is missing."""

    config: dict[str, Any] | None
    metrics: list[dict[str, Any]] | None
    weights: list[dict[str, Any]] | None
    evaluation: dict[str, Any] | None
    summary: dict[str, Any] | None


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html, and its pictures once more as files to plots/.

    A section whose file is missing says so. What `simnpo evaluate` and `simnpo attack` wrote into folders inside
    run_dir becomes sections of their own, named by the folders.

    Args:
        run_dir: folder of a run, finished or not.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: a file is not what a run, an evaluation or an attack writes; nothing is written then.
        RunError: the disk is full or not writable.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        if run_dir.exists():
            raise UserError(f"run must be the folder of a run, and {run_dir} is a file")
        raise FileNotFoundError(f"no such folder: {run_dir}")
    check_report_inputs(run_dir)
    run = _read(run_dir)
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("simnpo.report", "."), autoescape=True, trim_blocks=True, finalize=_seen
    )
    pages.filters["number"] = _number
    compared = run.evaluation if run.evaluation and {"before", "after"} <= run.evaluation.keys() else None
    tofu, benchmarks, attacks = find_tofu(run_dir), find_benchmarks(run_dir), find_attacks(run_dir)
    placed = [one for one in tofu if one.forget_quality is not None and one.model_utility is not None]
    html = pages.get_template("report.html.jinja").render(
        config=run.config and {name: value for name, value in run.config.items() if name in DECIDING},
        summary=run.summary,
        last=run.metrics[-1] if run.metrics else None,
        verdict=judge(compared) if compared else None,
        scores=list(_score_rows(compared)) if compared else None,
        answers=list(_answer_sections(compared)) if compared else None,
        nll_images=_pictures(run_dir, "nll", nll_plot, run.metrics),
        weight_images=_pictures(run_dir, "weights", weights_plot, run.weights),
        tofu=tofu,
        tofu_images=_pictures(run_dir, "tofu", tofu_plot, placed or None),
        benchmarks=benchmarks,
        attacks=attacks,
    )
    path = run_dir / "report.html"
    write_text(path, html)
    return path


def _read(run_dir: Path) -> RunFiles:
    """The files of a run, each of the shape that the report needs."""
    found = {}
    for name, shape in SHAPES.items():
        path = run_dir / name
        read = read_lines if name.endswith(".jsonl") else read_json
        found[name] = (read(path, shape) or None) if path.exists() else None
    run = RunFiles(*found.values())
    for row in run.weights or []:
        if len(row["num_tokens"]) != len(row["weights"]):
            counts = f"{len(row['num_tokens'])} num_tokens and {len(row['weights'])} weights"
            raise UserError(f"{run_dir / 'weights.jsonl'}: step {row['step']} must have as many, got {counts}")
    before, after = ((run.evaluation or {}).get(when) for when in ("before", "after"))
    if before is not None and after is not None and (missing := before.keys() ^ after.keys()):
        raise UserError(f"{run_dir / 'evaluation.json'}: before and after must score the same sets, got {missing}")
    return run


def _seen(value: Any) -> Any:
    """Text of the page in which all characters can be seen."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _pictures(
    run_dir: Path, name: str, plot: Callable[[list[Any], str], bytes], rows: list[Any] | None
) -> dict[str, str] | None:
    """The picture in every theme as a data: address; the PNGs go to plots/ too."""
    if rows is None:
        return None
    (run_dir / "plots").mkdir(exist_ok=True)
    pictures = {}
    for theme in THEMES:
        png = plot(rows, theme)
        write_bytes(run_dir / "plots" / (f"{name}.png" if theme == "light" else f"{name}-{theme}.png"), png)
        pictures[theme] = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return pictures


def _score_rows(evaluation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, after in evaluation["after"].items():
        before = evaluation["before"][name]
        yield {"name": SET_NAMES.get(name, name), "count": len(after["examples"]), "before": before, "after": after}


def _answer_sections(evaluation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, after in evaluation["after"].items():
        pairs = [
            (old, new)
            for old, new in zip(evaluation["before"][name]["examples"], after["examples"])
            if old["answer"] is not None and new["answer"] is not None
        ]
        rows = []
        for old, new in pairs[:MAX_ANSWERS]:
            before, after_words = marked_words(old["answer"], new["answer"])
            rows.append({"old": old, "new": new, "before": before, "after": after_words})
        if rows:
            yield {"name": SET_NAMES.get(name, name), "rows": rows, "left_out": len(pairs) - len(rows)}


def marked_words(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Two texts cut into runs of words, each with whether the other text lacks it there."""
    old, new = before.split(), after.split()
    marked_old, marked_new = [], []
    for kind, i, i_end, j, j_end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        marked_old.append((" ".join(old[i:i_end]), kind != "equal"))
        marked_new.append((" ".join(new[j:j_end]), kind != "equal"))
    return [run for run in marked_old if run[0]], [run for run in marked_new if run[0]]


def _number(value: float | None) -> str:
    """Three digits that count, no exponent unless it is tiny."""
    if value is None:
        return "–"
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
