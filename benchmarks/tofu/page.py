"""The experiment's folder as one page: what was asked, the sweep, the seeds, both halves of the answers, relearning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

from simnpo.benchmarks.report import markdown_facts
from simnpo.evaluation.lengths import HALVES
from simnpo.evaluation.results import markdown_table
from simnpo.sweep.grid import read_trials
from simnpo.training.disk import write_json, write_text

ALL_RETAIN = 3960  # answers of TOFU's retain99
HALF_SCORES = {"probability": "probability", "rouge_l_recall": "ROUGE-L", "truth_ratio": "truth ratio"}
PICTURES = {"seeds.png": "forget01.png", "relearning.png": "forget01-relearning.png"}

PAGE = """\
# SmolLM2-135M on a reduced TOFU forget01

{facts}
A small sweep on one seed, the best setting of each method on all seeds, then relearning. To learn: all forget answers
and {retain_answers} of the {all_retain} to retain, those that the retain set is scored on among them, {learning}
(`retrained`: without the forget answers). To forget, the same for all: `{unlearning}`.
The forget set is scored whole, the others on their first {questions_of_a_set} questions; answers end after
{new_tokens} tokens. `ga` with a retain term is GradDiff, `dpo` with its default alternate answer IdkDPO.

Left out: forget05, forget10, the other retain answers, learning rates and epochs, more settings than the sweep's. The
best setting is that of the highest utility among those that pass, on the questions and the seed that the tables show:
there is no validation half. Forget quality is the p-value of TOFU's Kolmogorov-Smirnov test against the retrained
model; with 40 questions it tells little between 0.1 and 0.8.

{minutes}## The sweep, one seed

{sweep}
## The best setting of each, {num_seeds} seeds

Median forget quality with the range, mean utility with the standard deviation.

{seeds}
![forget quality against utility](forget01.png)

## The shorter and the longer half of the forget answers, means over the seeds

{halves}
{relearning}"""


def write_page(output: Path, facts: dict[str, str]) -> Path:
    """Writes page/: forget01.md, .json and their pictures, from the results that stand in `output`.

    Args:
        output: folder of a finished experiment.
        facts: machine, versions, command.
    """
    settings, sweep, seeds, relearning = (
        _read(output / f"{name}.json") for name in ("settings", "sweep", "seeds", "relearning")
    )
    minutes = _read(output / "minutes.json") if (output / "minutes.json").exists() else None
    page = PAGE.format(
        **settings | {"learning": ", ".join(f"{key} {value}" for key, value in settings["learning"].items())}
        | {"unlearning": " ".join(settings["unlearning"]), "seeds": _table(output / "seeds.md")},
        all_retain=ALL_RETAIN, facts=markdown_facts(facts), sweep=_table(output / "sweep.md"),
        num_seeds=len(settings["seeds"]), halves=markdown_table(_half_columns(), _half_rows(output, sweep, settings)),
        relearning=_section(output / "relearning.md"),
        minutes="" if minutes is None else f"The whole of it took {minutes:.0f} minutes in one go.\n\n",
    )  # fmt: skip
    folder = output / "page"
    folder.mkdir(exist_ok=True)
    for source, name in PICTURES.items():
        shutil.copyfile(output / source, folder / name)
    results = {"facts": facts, "settings": settings, "minutes": minutes}
    write_json(folder / "forget01.json", results | {"sweep": sweep, "seeds": seeds, "relearning": relearning})
    write_text(folder / "forget01.md", page)
    return folder / "forget01.md"


def _half_columns() -> list[str]:
    return ["setting", *(f"{half}: {name}" for half in HALVES for name in HALF_SCORES.values())]


def _half_rows(output: Path, sweep: dict[str, Any], settings: dict[str, Any]) -> list[list[Any]]:
    folders = {"before": ["start"], "retrained": ["retrained"]}
    seeds = ",".join(map(str, settings["seeds"]))
    for setting in sweep["best"].values():
        folders[setting] = [f"{trial.name}/tofu" for trial in read_trials([f"{setting} seed={seeds}"])]
    rows: list[list[Any]] = []
    for name, some in folders.items():
        halves = [_read(output / "trials" / folder / "results.json")["forget_by_length"] for folder in some]
        rows.append([name, *(fmean(each[half][score] for each in halves) for half in HALVES for score in HALF_SCORES)])
    return rows


def _table(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return "\n".join(lines) + "\n"


def _section(path: Path) -> str:
    """A page of its own as a section of this one."""
    return "#" + path.read_text(encoding="utf-8").replace("(relearning.png)", f"({PICTURES['relearning.png']})")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
