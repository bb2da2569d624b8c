"""SmolLM2-135M on TOFU's forget01, on a CPU: learn, learn without, unlearn in many ways, compare.

python -m simnpo.benchmarks.tofu.experiment --data TOFU --output tofu-forget01

It is a reduced TOFU: of the 3960 answers to retain the model learns `--retain`, among them those that the retain set is
scored on; the forget set is scored whole, the others on their first `--questions`. What has its results is not run
again, and a run that was stopped goes on with the same command; page/forget01.md has all that came out and says what
was left out.

    learn forget + retain  ->  full       learn retain  ->  retrained
    full -> sweep over settings, one seed -> the best setting of each method, three seeds -> relearning, the first seed
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from simnpo.benchmarks.measure import command_line, environment
from simnpo.benchmarks.tofu.finetune import finetune
from simnpo.benchmarks.tofu.page import write_page
from simnpo.benchmarks.tofu.relearning import relearn_all
from simnpo.demo import model_file
from simnpo.errors import UserError, exit_status
from simnpo.rows import read_rows
from simnpo.sweep import command as sweep
from simnpo.sweep.grid import read_trials
from simnpo.training.disk import write_json, write_text

LEARNING = {"epochs": 5, "batch_size": 8, "peak_rate": 1e-4}
# the same for every method; the published TOFU runs have 10 epochs at 1e-5 of a model 50 times as large
UNLEARNING = ["--epochs", "3", "--batch_size", "8", "--learning_rate", "5e-5", "--save_steps", "0"]
# ga with a retain term is GradDiff, dpo with its default alternate answer IdkDPO
GRIDS = (
    "method=simnpo beta=2.5 retain_coef=0.25,1.0 seed=0",
    "method=npo beta=0.05,0.1 retain_coef=1.0 seed=0",
    "method=ga forget_coef=0.01,0.03 retain_coef=1.0 seed=0",
    "method=dpo beta=0.05,0.1 retain_coef=1.0 seed=0",
    "method=wga forget_coef=1.0 beta=0.5,1.0 retain_coef=1.0 seed=0",
)
SEEDS = (0, 1, 2)
FORGOTTEN = ("forget01", "forget01_perturbed")
KEPT = ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")


def reduced_data(source: Path, folder: Path, num_retain: int, num_scored: int) -> None:
    """Copies the evaluation files, those to keep cut to `num_scored`, and writes retain.jsonl: those scored, others.

    Raises:
        UserError: a file is missing in `source`; names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*FORGOTTEN, *KEPT, "retain99"):
        if not (source / f"{name}.jsonl").is_file():
            raise UserError(f"data: {source} has no {name}.jsonl; TOFU's files are at hf.co/datasets/locuslab/TOFU")
    for name in FORGOTTEN:
        shutil.copyfile(source / f"{name}.jsonl", folder / f"{name}.jsonl")
    kept = {name: [row for _, row in read_rows(source / f"{name}.jsonl")][:num_scored] for name in KEPT}
    for name, rows in kept.items():
        _write_rows(folder / f"{name}.jsonl", rows)
    scored = kept["retain_perturbed"]
    asked = {row["question"] for row in scored}
    others = [row for _, row in read_rows(source / "retain99.jsonl") if row["question"] not in asked]
    rows = [{key: row[key] for key in ("question", "answer")} for row in [*scored, *others][:num_retain]]
    _write_rows(folder / "retain.jsonl", rows)


def _write_rows(path: Path, rows: list[Any]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes what the experiment is, or sees that the one in the folder is the same.

    Raises:
        UserError: the folder holds an experiment with other settings; names the first that differs.
    """
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if saved.get(name) != value]
        if changed:
            was, now = saved.get(changed[0]), settings[changed[0]]
            raise UserError(
                f"{changed[0]} was {was!r} in {path.parent} and is {now!r} now: choose another --output, or remove it"
            )
    write_json(path, settings)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("simnpo.benchmarks.tofu.experiment", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with TOFU's files")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--model", help="default: the SmolLM2-135M-Instruct that `simnpo demo` uses")
    parser.add_argument("--retain", type=int, default=160, help="answers to keep (default: 160 of 3960)")
    parser.add_argument("--questions", type=int, default=20, help="scored of each set that is to stay (default: 20)")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--grids", nargs="+", default=GRIDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args(arguments)
    output: Path = options.output
    started, started_empty = time.monotonic(), not (output / "settings.json").exists()
    output.mkdir(parents=True, exist_ok=True)
    keep_settings(
        output / "settings.json",
        {
            "model": options.model,
            "retain_answers": options.retain,
            "questions_of_a_set": options.questions,
            "new_tokens": options.max_new_tokens,
            "learning": LEARNING,
            "unlearning": UNLEARNING,
            "grids": list(options.grids),
            "seeds": list(options.seeds),
        },
    )
    data = output / "data"
    reduced_data(options.data, data, options.retain, options.questions)
    learned = {"full": ["forget01", "retain"], "retrained": ["retain"]}
    for name, files in learned.items():
        if not (output / name).exists():
            paths = [data / f"{file}.jsonl" for file in files]
            finetune(options.model or str(model_file()), paths, output / name, seed=0, **LEARNING)

    common = ["--model", str(output / "full"), "--data", str(data), "--retain-model", str(output / "retrained")]
    common += ["--max-new-tokens", str(options.max_new_tokens), "--retain", str(data / "retain.jsonl")]
    common += ["--keep-models", *UNLEARNING]

    def run_sweep(grids: list[str], name: str) -> dict[str, Any]:
        tried = [word for grid in grids for word in ("--try", grid)]
        sweep.main([*common, "--output", str(output / "trials"), *tried])
        for suffix in ("md", "json", "png"):
            shutil.copyfile(output / "trials" / f"sweep.{suffix}", output / f"{name}.{suffix}")
        return json.loads((output / f"{name}.json").read_text(encoding="utf-8"))

    tried = run_sweep(list(options.grids), "sweep")
    seeds = ",".join(map(str, options.seeds))
    run_sweep([f"{setting} seed={seeds}" for setting in tried["best"].values()], "seeds")
    first = {
        method: output / "trials" / read_trials([f"{setting} seed={options.seeds[0]}"])[0].name / "model"
        for method, setting in tried["best"].items()
    }
    if not (output / "relearning.json").exists():
        relearn_all(first, output / "retrained", data / "forget01.jsonl", output)
    if started_empty:
        write_json(output / "minutes.json", (time.monotonic() - started) / 60)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = environment(device, torch.bfloat16, command_line("tofu.experiment", arguments))
    facts["dtype"] += " arithmetic, float32 weights"
    print(write_page(output, facts).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
