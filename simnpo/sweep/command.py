"""`simnpo sweep`: unlearn with many settings, score each on TOFU, show forget quality against utility.

A trial that has its results is not run again, and one that was stopped continues from its checkpoint: the same command
goes on where it was. Trials are run one after the other, in the order given.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from simnpo.cli import COMMANDS, read_config
from simnpo.config import UnlearnConfig
from simnpo.errors import UserError
from simnpo.evaluation.command import MOST_TOKENS, check_numbers, show
from simnpo.shapes import read_json
from simnpo.sweep.grid import fingerprint, read_trials
from simnpo.training.disk import write_json

START = "start"  # the model before it forgets
RETRAINED_SHAPE = {
    "scores": {"forget_quality": (float, None), "model_utility": float},
    "sets": {
        "forget": {"probability": float, "rouge_l_recall": float, "truth_ratio": float},
        "retain": {"probability": float, "rouge_l_recall": float},
    },
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "simnpo sweep",
        description=f"{COMMANDS['sweep']}. Every option of `simnpo unlearn` may follow; it holds for all trials.",
        allow_abbrev=False,  # --retain is an option of a trial, not short for --retain-model
    )
    parser.add_argument("--model", required=True, help="that has learned the data: id, folder or .gguf file")
    parser.add_argument("--output", required=True, help="folder of the sweep")
    parser.add_argument("--data", required=True, help="folder with TOFU's files")
    parser.add_argument("--split", default="forget01", help="the forget set (default: forget01)")
    parser.add_argument("--retain-model", required=True, help="that never saw the forget set; or its results.json")
    parser.add_argument(
        "--try", dest="trials", action="append", required=True, metavar="GRID",
        help="settings to try, e.g. 'method=simnpo beta=1,2.5 seed=0,1'; may be given several times",
    )  # fmt: skip
    parser.add_argument("--max-examples", type=int, help="evaluated of each set (default: all)")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer (default: 200)")
    parser.add_argument("--keep-models", action="store_true", help="do not delete the unlearned models")
    return parser


def main(options: list[str]) -> int:
    """Runs the command; returns the exit status."""
    # brings matplotlib
    from simnpo.sweep.table import write_sweep

    arguments, rest = parser().parse_known_args(options)
    check_numbers(arguments, "max_examples")
    check_numbers(arguments, "max_new_tokens", most=MOST_TOKENS)
    trials = read_trials(arguments.trials)
    output = Path(arguments.output)
    common = _common(arguments, rest)
    # every configuration is looked at before the first of them runs
    configs = {trial.name: replace(common, **trial.settings, output=str(output / trial.name)) for trial in trials}

    results: dict[str, dict[str, Any]] = {}
    arguments.cpu = common.cpu
    retrained = _evaluate(arguments, arguments.retain_model, output / "retrained", retrained=None)
    arguments.retain_model = str(output / "retrained" / "results.json")
    start = _evaluate(arguments, arguments.model, output / START, retrained=arguments.retain_model)
    lacking = [name for name in ("forget_quality", "model_utility") if start["scores"][name] is None]
    if lacking:
        raise UserError(f"a sweep compares {' and '.join(lacking)}: {start['not_available'][lacking[0]]}")
    page = ""
    for i, trial in enumerate(trials):
        print(f"trial {i + 1}/{len(trials)}: {trial.name}", flush=True)
        results[trial.name] = _run(arguments, configs[trial.name])
        # after every trial, so that a sweep that is stopped has a table of what it did
        page = write_sweep(output, arguments.split, trials, results, start, retrained)
    show(page)
    print(f"table and plot: {output / 'sweep.md'}, {output / 'sweep.png'}")
    return 0


def _common(arguments: argparse.Namespace, rest: list[str]) -> UnlearnConfig:
    own = ["--model", arguments.model, "--output", arguments.output]
    if "--forget" not in rest:
        own += ["--forget", str(Path(arguments.data) / f"{arguments.split}.jsonl")]
    config = read_config([*own, *rest], "simnpo sweep", COMMANDS["sweep"])
    # what a trial scores is TOFU's business, after it
    return replace(config, eval_examples=0, weight_examples=0, resume=False)


def _run(arguments: argparse.Namespace, config: UnlearnConfig) -> dict[str, Any]:
    """Unlearn and evaluate, unless both were done before; returns the results with what the run took."""
    from simnpo.training.loop import unlearn
    from simnpo.training.run_folder import discard

    folder = config.output_dir()
    asked, done = folder.with_name(f"{folder.name}.json"), folder / "tofu" / "results.json"
    finished = asked.exists() and read_json(asked, object) == fingerprint(config)
    if finished and done.exists():
        return _read(done) | {"summary": _read(folder / "summary.json")}
    if folder.exists() and not finished:
        raise UserError(f"{folder} holds a trial with other settings: choose another --output, or remove it")
    asked.parent.mkdir(parents=True, exist_ok=True)
    write_json(asked, fingerprint(config))
    unlearn(replace(config, resume=True))
    results = _evaluate(arguments, str(folder / "model"), folder / "tofu", retrained=arguments.retain_model)
    discard(folder, "checkpoints", *(() if arguments.keep_models else ("model", "adapter")))
    return results | {"summary": _read(folder / "summary.json")}


def _evaluate(arguments: argparse.Namespace, model: str, output: Path, *, retrained: str | None) -> dict[str, Any]:
    """TOFU's results of a model, from its folder if they are there."""
    from simnpo.evaluation import command

    if model.endswith(".json"):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "results.json", _read(Path(model), RETRAINED_SHAPE))
    elif not (output / "results.json").exists():
        options = ["--model", model, "--benchmark", "tofu", "--data", arguments.data, "--split", arguments.split]
        options += ["--output", str(output)]
        given = {"--max-examples": arguments.max_examples, "--max-new-tokens": arguments.max_new_tokens}
        given["--retain-model"] = retrained
        options += ["--cpu"] if arguments.cpu else []
        for name, value in given.items():
            options += [] if value is None else [name, str(value)]
        command.tofu(command.parser().parse_args(options))
    return _read(output / "results.json")


def _read(path: Path, shape: Any = None) -> dict[str, Any]:
    try:
        return read_json(path, shape or {})
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
