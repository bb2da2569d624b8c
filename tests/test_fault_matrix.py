"""Every file of a run x what can happen to it x what reads it: the bits of an undisturbed run, or a refusal.

A sample of the cases runs with all tests; SIMNPO_FAULTS=full (`make test-faults`) runs every one.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import write_rows
from test_resume import TIMINGS
from test_tofu import write_tofu

from simnpo.cli import main
from simnpo.training import loop

FULL = os.environ.get("SIMNPO_FAULTS") == "full"
SAMPLE = 12  # cases of each test
PLACES = 3 if FULL else 1  # in a file, at which it is cut or changed
STEPS = 3


def flip(path: Path, random: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def retype(path: Path, random: random.Random) -> None:
    """Another JSON type where it is JSON, a folder where it is not."""
    if path.suffix in (".json", ".jsonl"):
        path.write_text("[1]\n")
    else:
        path.unlink()
        path.mkdir()


def truncate(path: Path, random: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: random.randrange(len(data)) if data else 0])


# a run with another seed has the same files; `other` is its file
FAULTS: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "deleted": lambda path, other, random: path.unlink(),
    "truncated": lambda path, other, random: truncate(path, random),
    "one bit flipped": lambda path, other, random: flip(path, random),
    "wrong type": lambda path, other, random: retype(path, random),
    "from another run": lambda path, other, random: shutil.copyfile(other, path),
}


@dataclass(frozen=True)
class Runs:
    """A run in some state, one with another seed in the same state, and how the first ends undisturbed."""

    options: list[str]
    base: Path
    other: Path
    clean: Path
    tofu: Path
    forget: Path


@pytest.fixture(scope="module", params=["complete", "interrupted", "complete lora", "interrupted lora"])
def runs(request, model_dir, forget_file, retain_file, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    options = ["unlearn", "--cpu", f"--model={model_dir}", f"--forget={forget_file}", f"--retain={retain_file}"]
    options += [f"--max-steps={STEPS}", "--save-steps=1", "--batch-size=2", "--learning-rate=1e-3"]
    options += ["--eval-examples=1", "--weight-examples=2", "--method=npo"]
    options += ["--lora"] if "lora" in request.param else []
    names = {"base": 0, "other": 1, "clean": 0}
    for name, seed in names.items():
        with pytest.MonkeyPatch.context() as patched:
            stops = "interrupted" in request.param and name != "clean"
            if stops:
                patched.setattr(loop, "metrics_row", terminated_at(STEPS - 1))
            assert main([*options, f"--output={folder / name}", f"--seed={seed}"]) == (143 if stops else 0)
    forget = write_rows(folder / "few.jsonl", [json.loads(line) for line in forget_file.open()][-2:])
    return Runs(options, folder / "base", folder / "other", folder / "clean", write_tofu(folder / "tofu"), forget)


def terminated_at(last: int):
    metrics_row = loop.metrics_row

    def row(run, step, *rest):
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics_row(run, step, *rest)

    return row


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untimed(run: Path) -> dict[str, object]:
    """What must be the same, bit for bit, in the folder of a complete run."""
    files = {
        name: data for name, data in contents(run).items()
        if name.startswith(("model/", "adapter/")) or name in ("weights.jsonl", "evaluation.json", "reference.json")
    }  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return files | {"metrics": [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]}


# Each command on a run: its exit status, and what it hands over, or None where it refuses


def resume(run: Path, runs: Runs, work: Path):
    status = main([*runs.options, f"--output={run}", "--resume"])
    return status, untimed(run) if status == 0 else None


def report(run: Path, runs: Runs, work: Path):
    status = main(["report", str(run)])
    return status, (run / "report.html").read_text() if status == 0 else None


def attack(run: Path, runs: Runs, work: Path):
    options = ["--prefix-tokens=0", "--max-new-tokens=2", "--cpu", "--precision=fp32"]
    command = ["attack", "prefix", f"--model={run / 'model'}", f"--forget={runs.forget}", f"--output={work / 'attack'}"]
    status = main([*command, *options])
    return status, json.loads((work / "attack/results.json").read_text())["rows"] if status == 0 else None


def evaluate(run: Path, runs: Runs, work: Path):
    options = ["--max-examples=1", "--max-new-tokens=2", "--cpu", "--precision=fp32"]
    command = ["evaluate", "--benchmark=tofu", f"--model={run / 'model'}", f"--data={runs.tofu}"]
    status = main([*command, f"--output={work / 'tofu'}", *options])
    return status, json.loads((work / "tofu/results.json").read_text())["sets"] if status == 0 else None


COMMANDS = {"resume": resume, "report": report, "attack": attack, "evaluate": evaluate}
# what a command may write into the folder of a run that it does not refuse
WRITES = {"resume": ("",), "report": ("report.html", "plots/"), "attack": (), "evaluate": ()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_fault_gives_the_same_bits_or_a_refusal(runs, command, tmp_path, capsys):
    run = COMMANDS[command]
    expected = attempt(run, runs, runs.base, tmp_path / "expected", lambda path: None)[1]
    if command == "resume":
        assert expected == untimed(runs.clean)
    files = sorted(contents(runs.base))
    at_places = ("truncated", "one bit flipped")
    cases = [(name, fault, i) for name in files for fault in FAULTS for i in range(PLACES if fault in at_places else 1)]
    if command in ("attack", "evaluate"):
        # nothing else of a run is read by them
        cases = [case for case in cases if case[0].startswith("model/") or "/" not in case[0]]
    chosen = cases if FULL else random.Random(f"{command} {files}").sample(cases, min(SAMPLE, len(cases)))
    wrong = []
    for i, (name, fault, place) in enumerate(chosen):

        def damage(copy: Path, name=name, fault=fault, place=place) -> None:
            FAULTS[fault](copy / name, runs.other / name, random.Random(f"{name} {fault} {place}"))

        work = tmp_path / str(i)
        try:
            status, result, changed = attempt(run, runs, runs.base, work, damage)
        except Exception as error:
            wrong.append(f"{command}, {name} {fault}: {type(error).__name__}: {error}")
            continue
        writes = () if command == "resume" and status else WRITES[command]
        problems = {
            f"exit status {status}": status not in (0, 1, 2),
            "other bits": status == 0 and result != expected,
            f"changed {changed}": any(not path.startswith(writes) for path in changed),
        }
        wrong += [f"{command}, {name} {fault}: {problem}" for problem, holds in problems.items() if holds]
        shutil.rmtree(work)
    if FULL:
        with capsys.disabled():
            print(f"\nfault matrix: {len(chosen)} cases of {command}, {len(wrong)} failed", flush=True)
    assert not wrong, "\n".join(wrong)


def attempt(command, runs: Runs, base: Path, work: Path, damage: Callable[[Path], None]):
    """Runs a command on a damaged copy of a run; its status, its result, and the files of the copy that it changed."""
    copy = work / "run"
    shutil.copytree(base, copy)
    damage(copy)
    before = contents(copy)
    status, result = command(copy, runs, work)
    after = contents(copy)
    return status, result, sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
