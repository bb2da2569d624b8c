"""A run that is killed and resumed ends with the bits of one that was not."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simnpo.config import UnlearnConfig
from simnpo.errors import RunError, UserError
from simnpo.training import disk
from simnpo.training.checkpoint import checkpoints, save_checkpoint
from simnpo.training.loop import unlearn

TIMINGS = ("tokens_per_second", "peak_memory_mib", "seconds")


@pytest.fixture
def config(model_dir, forget_file, retain_file, tmp_path):
    def make(**changes: object) -> UnlearnConfig:
        options = {"model": str(model_dir), "forget": str(forget_file), "retain": str(retain_file)}
        options |= {"output": str(tmp_path / "run"), "max_steps": 5, "batch_size": 4, "learning_rate": 1e-3}
        options |= {"save_steps": 1, "eval_examples": 0, "cpu": True}
        return UnlearnConfig(**options | changes)

    return make


def outcome(output: Path) -> dict[str, object]:
    """What has to be the same, bit for bit."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": hashlib.sha256((output / "model/model.safetensors").read_bytes()).hexdigest(),
        "metrics": [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows],
        "probes": (output / "weights.jsonl").read_text(),
        "leftovers": [path.name for path in output.rglob(f"{disk.TEMPORARY}*")],
        "checkpoints": [path.name for path in checkpoints(output / "checkpoints")],
    }


# bf16, with the ratio in float32
NPO = {"method": "npo", "precision": "bf16", "exact_ratio": "on"}


def stop_after(step: int, monkeypatch) -> None:
    """Ends the run with an exception right after checkpoint `step` is written."""

    def save_and_stop(output, done, *args, **kwargs):
        save_checkpoint(output, done, *args, **kwargs)
        if done == step:
            raise SystemExit

    monkeypatch.setattr("simnpo.training.loop.save_checkpoint", save_and_stop)


@pytest.mark.parametrize(
    "changes",
    [{}, NPO, {"lora": True}, {"precision": "fp32", "gradient_accumulation_steps": 2, "packing": "off"}],
)
@pytest.mark.parametrize("step", [2, 5])
def test_resumed_run_equals_uninterrupted_run(config, monkeypatch, tmp_path, changes, step):
    whole = outcome(unlearn(config(output=str(tmp_path / "whole"), **changes)))
    stop_after(step, monkeypatch)
    with pytest.raises(SystemExit):
        unlearn(config(**changes))
    monkeypatch.undo()
    assert outcome(unlearn(config(resume=True, **changes))) == whole


def test_dropout_continues_to_the_same_bits(config, monkeypatch, tmp_path, model_dir):
    model = tmp_path / "dropout"
    shutil.copytree(model_dir, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.3}))
    whole = outcome(unlearn(config(model=str(model), output=str(tmp_path / "whole"))))
    assert whole["weights"] != outcome(unlearn(config(output=str(tmp_path / "without"))))["weights"]
    stop_after(3, monkeypatch)
    with pytest.raises(SystemExit):
        unlearn(config(model=str(model)))
    monkeypatch.undo()
    assert outcome(unlearn(config(model=str(model), resume=True))) == whole


def test_references_are_computed_once(config, monkeypatch):
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        unlearn(config(method="npo"))
    monkeypatch.undo()
    monkeypatch.delattr("simnpo.training.reference.cache_key")
    monkeypatch.delattr("simnpo.training.reference.reference_logps")
    unlearn(config(method="npo", resume=True))


def test_rows_written_after_the_checkpoint_are_dropped(config, monkeypatch, tmp_path):
    whole = outcome(unlearn(config(output=str(tmp_path / "whole"), save_steps=2)))
    stop_after(4, monkeypatch)
    with pytest.raises(SystemExit):
        unlearn(config(save_steps=2))
    monkeypatch.undo()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.0}\n{"step": 6, "lo')
    assert outcome(unlearn(config(save_steps=2, resume=True))) == whole


def test_resume_of_nothing_starts_and_of_a_complete_run_ends_at_once(config, caplog):
    output = unlearn(config(resume=True))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert unlearn(config(resume=True)) == output
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert "is complete: nothing is left to do" in caplog.text


def test_changed_configuration_and_data_are_refused(config, monkeypatch, tmp_path, forget_file):
    data = tmp_path / "forget.jsonl"
    shutil.copy(forget_file, data)
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        unlearn(config(forget=str(data)))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"differs in beta \(was None, now 3\.0\)"):
        unlearn(config(forget=str(data), beta=3.0, resume=True))
    data.write_text(data.read_text().replace("number 3", "number 4"))
    with pytest.raises(UserError, match=r"cannot continue .* to the same bits, changed: data \(was '\w+', now '\w+'\)"):
        unlearn(config(forget=str(data), resume=True))


def test_the_last_checkpoints_are_kept(config, tmp_path):
    unlearn(config(keep_checkpoints=3))
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"step-00000003", "step-00000004", "step-00000005"}


# Killed


KILL = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from simnpo.config import UnlearnConfig
from simnpo.report import plots
from simnpo.training.loop import unlearn

# drawn in memory, longer than a step takes
plots.Figure.savefig = lambda self, png, **_: png.write(b"a picture")

def killed_run(config, event):
    # in a child: SIGKILL at the event-th file it opens, renames or removes in the run's folder
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    seen = 0
    def audit(name, args):
        nonlocal seen
        if name in WATCHED and config.output in str(args[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    unlearn(config)
    os._exit(0)

WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
options, start, stride = json.loads(sys.argv[1])
# here first: the children find everything imported
unlearn(UnlearnConfig(**options, output=f"{sys.argv[2]}/whole"))
event, finished = start, False
while not finished:
    config = UnlearnConfig(**options, output=f"{sys.argv[2]}/{event}")
    status = killed_run(config, event)
    finished = os.WIFEXITED(status)
    assert not finished or os.waitstatus_to_exitcode(status) == 0, f"the run fails before event {event}"
    resumed = UnlearnConfig(**options, output=config.output, resume=True)
    assert os.waitstatus_to_exitcode(killed_run(resumed, 0)) == 0, f"resume fails after event {event}"
    event += stride
"""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"method": "npo"}, {"lora": True}])
def test_kill_9_at_every_kind_of_moment(config, tmp_path, changes):
    """Every write, rename and removal of a run is a moment; every seventh is tried, the last one past the end."""
    settings = {"max_steps": 2, "save_steps": 1, **changes}
    options = vars(config(**settings)) | {"output": None}
    del options["output"], options["resume"]
    folder = tmp_path / "killed"
    # torch's pool of the parent's threads is no child's: transformers must not load weights in threads there
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    arguments = [json.dumps([options, 1, 7]), str(folder)]
    subprocess.run([sys.executable, "-c", KILL, *arguments], check=True, env=environment)
    whole = outcome(folder / "whole")
    assert len(whole["metrics"]) == 2
    outputs = sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name))
    assert len(outputs) > 10
    for output in outputs:
        assert outcome(output) == whole, output.name


# Files that are whole or not there


def break_off(target: Path) -> None:
    with disk.whole_folder(target) as folder:
        (folder / "a").write_text("2")
        raise KeyError


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "folder"
    with disk.whole_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(KeyError):
        break_off(target)
    assert (target / "a").read_text() == "1"
    with disk.whole_folder(target) as folder:
        (folder / "a").write_text("2")
        (folder / "b").write_text("3")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "2", "b": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "notes").write_text("mine")
    message = r"folder would be replaced, and it holds notes, which was not written by this"
    with pytest.raises(RunError, match=message), disk.whole_folder(target) as folder:
        (folder / "a").write_text("1")
    assert {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"notes": "mine"}


def test_an_incomplete_checkpoint_is_not_seen(tmp_path):
    (tmp_path / f"{disk.TEMPORARY}step-00000009").mkdir()
    (tmp_path / "step-00000003").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003"]
    disk.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_checkpoint_of_another_model_is_refused(config, monkeypatch, tmp_path):
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        unlearn(config())
    monkeypatch.undo()
    monkeypatch.setattr(
        "simnpo.training.checkpoint._trained", lambda model: {"other": torch.nn.Parameter(torch.ones(1))}
    )
    with pytest.raises(UserError, match="does not hold the 1 trained parameters of this model"):
        unlearn(config(resume=True))
