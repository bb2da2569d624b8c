"""Whose the output folder is: what a run refuses to write to, who holds it, and when it is complete."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_resume import config, outcome, stop_after  # noqa: F401

from simnpo import cli
from simnpo.digests import check_written_model
from simnpo.errors import RunError, UserError
from simnpo.report import write_report
from simnpo.training import run_folder
from simnpo.training.checkpoint import checkpoints, newest_checkpoint, save_checkpoint
from simnpo.training.loop import unlearn


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupted(config, monkeypatch, step=3, **changes) -> Path:  # noqa: F811
    stop_after(step, monkeypatch)
    with pytest.raises(SystemExit):
        unlearn(config(**changes))
    monkeypatch.undo()
    return config().output_dir()


# What is refused


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("model", "lora"), [("v2/model", False), ("v2/adapter", True), ("v2", False), ("v2/deep/er", False)]
)
def test_a_folder_with_the_users_model_is_left_alone(config, model_dir, tmp_path, model, lora, resume):  # noqa: F811
    shutil.copytree(model_dir, tmp_path / model)
    (tmp_path / "v2/notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"output: .*v2 holds the model of this run, .*: choose another --output"):
        unlearn(config(model=str(tmp_path / model), output=str(tmp_path / "v2"), lora=lora, resume=resume))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("output", [".", "./", "here/.."])
def test_a_folder_that_is_no_run_is_left_alone(config, monkeypatch, tmp_path, output, resume):  # noqa: F811
    (tmp_path / "mine/here").mkdir(parents=True)
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    monkeypatch.chdir(tmp_path / "mine")
    with pytest.raises(UserError, match=r"is not empty and not the folder of a run, it holds here: choose another"):
        unlearn(config(output=output, resume=resume))
    assert contents(tmp_path) == {"mine/thesis.tex": b"years of work"}


def test_a_models_config_does_not_make_a_run(config, model_dir, tmp_path):  # noqa: F811
    shutil.copytree(model_dir, tmp_path / "run")
    with pytest.raises(UserError, match="not the folder of a run"):
        unlearn(config(resume=True))


def test_an_empty_name_is_no_folder(config):  # noqa: F811
    with pytest.raises(UserError, match="output must be the name of a folder, got ''"):
        unlearn(config(output=""))


def test_an_empty_folder_is_a_new_run_and_a_failed_start_leaves_nothing(config, tmp_path):  # noqa: F811
    with pytest.raises(FileNotFoundError):
        unlearn(config(output=str(tmp_path / "a/b/c"), forget="gone.jsonl"))
    assert not (tmp_path / "a").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError):
        unlearn(config(forget="gone.jsonl"))
    assert not any((tmp_path / "run").iterdir())
    assert (unlearn(config()) / "complete.json").is_file()


def test_without_config_json_a_run_continues_only_as_it_was(config, monkeypatch):  # noqa: F811
    output = interrupted(config, monkeypatch)
    (output / "config.json").unlink()
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        unlearn(config(learning_rate=1e-4))
    with pytest.raises(UserError, match=r"differs in learning_rate \(was 0.001, now 0.0001\)"):
        unlearn(config(learning_rate=1e-4, resume=True))
    unlearn(config(resume=True))


def test_files_that_a_user_put_into_a_run_stay(config, monkeypatch, tmp_path, caplog):  # noqa: F811
    output = interrupted(config, monkeypatch, keep_checkpoints=1)
    mine = {"notes.txt", "checkpoints/best.txt", "checkpoints/step-00000003/why.txt", "checkpoints/step-mine/a"}
    for name in mine:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(name)
    unlearn(config(resume=True, keep_checkpoints=1))
    assert {name: (output / name).read_text() for name in mine} == {name: name for name in mine}
    assert "step-00000003 is kept: it holds why.txt, which this run did not write" in caplog.text


# The lock


def test_a_second_process_is_told_who_holds_the_folder(config, tmp_path, capsys, monkeypatch):  # noqa: F811
    code = (
        "import sys; from pathlib import Path; from simnpo.training.run_folder import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    message = rf"output: .*run is being written to by process {holder.pid} on \S+ since {time.strftime('%Y')}-"
    for resume in (False, True):
        with pytest.raises(UserError, match=message):
            unlearn(config(resume=resume))
    holder.kill()  # and nothing is left to clean up
    holder.wait()
    unlearn(config())
    assert not (tmp_path / "run" / run_folder.LOCK).exists()


# Complete or not


def test_a_report_does_not_make_a_run_complete(config, monkeypatch, tmp_path):  # noqa: F811
    whole = outcome(unlearn(config(output=str(tmp_path / "whole"))))
    output = interrupted(config, monkeypatch)
    write_report(output)
    assert outcome(unlearn(config(resume=True))) == whole


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/tokenizer.json", "metrics.jsonl", "summary.json"])
def test_a_complete_run_is_checked_against_what_it_promises(config, name):  # noqa: F811
    output = unlearn(config())
    promised = json.loads((output / "complete.json").read_text())["files"]
    assert promised.keys() == contents(output).keys() - {"complete.json", "report.html"} - {
        path for path in contents(output) if path.startswith(("checkpoints/", "plots/"))
    }
    whole = outcome(output)
    (output / name).write_bytes((output / name).read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"holds a complete run, and {name} is not what was written"):
        unlearn(config(resume=True))
    (output / "complete.json").unlink()
    assert outcome(unlearn(config(resume=True))) == whole


def test_a_damaged_model_of_a_run_is_refused_by_its_readers(config, tmp_path):  # noqa: F811
    model = unlearn(config()) / "model"
    check_written_model(model)
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model: .*model.safetensors is not what was written"):
        check_written_model(model)
    shutil.copytree(model, tmp_path / "changed on purpose")
    check_written_model(tmp_path / "changed on purpose")


# Numbers that are not finite


def test_weights_that_are_not_finite_are_never_saved(config, monkeypatch, tmp_path):  # noqa: F811
    with pytest.raises(RunError, match=r"step 1: \S+weight is no longer finite after the update, so it is not saved"):
        unlearn(config(learning_rate=1e38, max_steps=1, warmup_ratio=0.0))
    assert not checkpoints(tmp_path / "run/checkpoints")
    assert not (tmp_path / "run/model").exists()

    # the last finite checkpoint survives
    spoil_weights(monkeypatch, step=3, value=float("nan"))
    output = tmp_path / "spoiled"
    with pytest.raises(RunError, match=r"step 3: .*checkpoints written before are intact"):
        unlearn(config(output=str(output), keep_checkpoints=1))
    assert newest_checkpoint(output / "checkpoints").name == "step-00000002"
    monkeypatch.undo()
    whole = outcome(unlearn(config(output=str(tmp_path / "whole"), keep_checkpoints=1)))
    assert outcome(unlearn(config(output=str(output), resume=True, keep_checkpoints=1))) == whole


def spoil_weights(monkeypatch, *, step: int, value: float) -> None:
    """Puts `value` into the trained weights before the checkpoint of a step is written."""

    def spoil(output, done, model, *args, **kwargs):
        if done == step:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad and parameter.dim() == 2:
                        parameter[:2] = value
        save_checkpoint(output, done, model, *args, **kwargs)

    monkeypatch.setattr("simnpo.training.loop.save_checkpoint", spoil)


NOT_FINITE = r"not finite|is (nan|-?inf)"


@pytest.mark.parametrize(
    "changes", [{}, {"eval_examples": 2, "weight_examples": 0}, {"weight_examples": 0}, {"lora": True}]
)
def test_a_model_whose_outputs_are_not_finite_is_not_handed_over(config, monkeypatch, tmp_path, changes):  # noqa: F811
    """Every weight is finite, and so large that the forward is not."""
    spoil_weights(monkeypatch, step=2, value=3e38)
    with pytest.raises(RunError, match=NOT_FINITE):
        unlearn(config(max_steps=2, **changes))
    assert checkpoints(tmp_path / "run/checkpoints")
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/complete.json").exists()
    for path in (tmp_path / "run").rglob("*.json*"):
        assert "NaN" not in path.read_text()
        assert "Infinity" not in path.read_text()


# Damaged checkpoints and other models


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(config, monkeypatch, tmp_path, caplog):  # noqa: F811
    whole = outcome(unlearn(config(output=str(tmp_path / "whole"))))
    for name in ("weights.safetensors", "run/metrics.jsonl", "manifest.json"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        output = interrupted(config, monkeypatch)
        file = output / "checkpoints/step-00000003" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        resumed = outcome(unlearn(config(resume=True)))
        assert resumed.pop("checkpoints") == whole["checkpoints"]
        assert {**resumed, "checkpoints": whole["checkpoints"]} == whole
        assert "step-00000003 is damaged and is not used" in caplog.text
        assert (output / "checkpoints/damaged-1-step-00000003").is_dir()
        caplog.clear()


def test_without_an_intact_checkpoint_nothing_is_continued(config, monkeypatch):  # noqa: F811
    output = interrupted(config, monkeypatch, step=1)
    (output / "checkpoints/step-00000001/weights.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"no checkpoint in .* is intact, step-00000001: weights.safetensors is missing"
    ):
        unlearn(config(resume=True))


@pytest.mark.parametrize("lora", [False, True])
def test_another_model_behind_the_same_name_is_refused(config, monkeypatch, model_dir, tmp_path, lora):  # noqa: F811
    from conftest import make_model

    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    interrupted(config, monkeypatch, model=str(model), lora=lora)
    changed = make_model()
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-2
    changed.save_pretrained(model)
    with pytest.raises(
        UserError, match=r"cannot continue .* to the same bits, changed: model \(was '\w+', now '\w+'\)"
    ):
        unlearn(config(model=str(model), lora=lora, resume=True))


def test_logs_and_scores_go_on_from_the_checkpoint(config, monkeypatch, tmp_path):  # noqa: F811
    """Whatever happens to the files of an interrupted run, they are those of the checkpoint again."""
    changes = {"method": "npo", "eval_examples": 2}
    whole = unlearn(config(output=str(tmp_path / "whole"), **changes))
    names = ("metrics.jsonl", "weights.jsonl", "evaluation.json", "reference.json")
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("[]\n")):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        output = interrupted(config, monkeypatch, **changes)
        for name in names:
            damage(output / name)
        assert outcome(unlearn(config(resume=True, **changes))) == outcome(whole)
        for name in names[2:]:
            assert (output / name).read_bytes() == (whole / name).read_bytes()


# Signals


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_a_signal_in_a_step_ends_the_run_after_it(config, monkeypatch, tmp_path, capsys, name, status):  # noqa: F811
    number, changes = getattr(signal, name), {"max_steps": 3, "save_steps": 0}
    monkeypatch.setattr("simnpo.training.loop.metrics_row", raising_signal(number))
    before = signal.getsignal(number)
    options = {**vars(config(**changes)), "output": tmp_path / "run"}
    given = [f"--{key}={value}" for key, value in options.items() if not (value is None or isinstance(value, bool))]
    assert cli.main(["unlearn", "--cpu", *given]) == status
    said = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{said}: the same command with --resume continues")
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step-00000001"]
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    whole = outcome(unlearn(config(output=str(tmp_path / "whole"), **changes)))
    resumed = outcome(unlearn(config(resume=True, **changes)))
    assert resumed.pop("checkpoints") == ["step-00000001", *whole.pop("checkpoints")]
    assert resumed == whole


def test_an_ignored_signal_stays_ignored(config, monkeypatch):  # noqa: F811
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("simnpo.training.loop.metrics_row", raising_signal(signal.SIGHUP))
        unlearn(config())
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def raising_signal(number):
    from simnpo.training.loop import metrics_row

    def row(*args):
        os.kill(os.getpid(), number)
        return metrics_row(*args)

    return row
