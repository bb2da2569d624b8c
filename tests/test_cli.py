import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from conftest import write_rows

from simnpo import cli
from simnpo.config import UnlearnConfig


@pytest.fixture
def arguments(model_dir, forget_file, retain_file, tmp_path):
    options = {"model": model_dir, "forget": forget_file, "retain": retain_file, "output": tmp_path / "run"}
    options |= {"max_steps": 2, "batch_size": 2, "eval_examples": 2}
    return ["unlearn", "--cpu", *(f"--{name}={value}" for name, value in options.items())]


def test_unlearn_leaves_model_scores_and_report(arguments, tmp_path, capsys):
    assert cli.main([*arguments, "--lora", "--beta", "0.5"]) == 0
    assert "unlearned model: " in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {
        "adapter",
        "checkpoints",
        "config.json",
        "evaluation.json",
        "metrics.jsonl",
        "model",
        "report.html",
    }
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config == vars(UnlearnConfig(**config))
    assert (config["lora"], config["beta"], config["max_steps"]) == (True, 0.5, 2)
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert [(when, *scores) for when, scores in evaluation.items()] == [
        ("before", "forget", "retain"),
        ("after", "forget", "retain"),
    ]
    assert len(evaluation["after"]["forget"]["examples"]) == 2


def test_every_option_has_its_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["unlearn", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in UnlearnConfig.__dataclass_fields__)


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"simnpo {version('simnpo')}\n"


@pytest.mark.parametrize("wrong", [["--method", "dpo"], ["--no_such_option", "1"], []])
def test_wrong_usage(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["unlearn", "--model", "m", *wrong])
    assert stopped.value.code == 2
    assert "usage: simnpo unlearn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--beta=-1", "beta must be greater than 0, got -1.0"),
        ("--forget=gone.jsonl", "no such file: gone.jsonl"),
        ("--model=no/such/model/here", "model: cannot load 'no/such/model/here'"),
        ("--max_length=12", "nothing of the response is left at max_length=12"),
        ("--batch_size=1 --gradient_accumulation_steps=2", "batch_size must be at least"),
    ],
)
def test_user_errors_are_one_line_and_no_traceback(arguments, wrong, message, capsys, tmp_path):
    assert cli.main([*arguments, *wrong.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_to_stop_ends_with_1(arguments, monkeypatch, capsys):
    from simnpo.training import smaller

    def nan(*args):
        return totals(*args)._replace(loss=float("nan"))

    totals = smaller.accumulate
    monkeypatch.setattr(smaller, "accumulate", nan)
    assert cli.main(arguments) == 1
    assert "error: step 1: the loss is nan" in capsys.readouterr().err


def test_overlap_is_warned_about(arguments, tmp_path, forget_file, caplog):
    rows = [json.loads(line) for line in forget_file.read_text().splitlines()]
    retain = write_rows(tmp_path / "overlap.jsonl", rows[2:4])
    assert cli.main([*arguments, f"--retain={retain}"]) == 0
    assert "forget.jsonl:3 = overlap.jsonl:1, forget.jsonl:4 = overlap.jsonl:2" in caplog.text


def test_rows_that_were_cut_are_counted_in_the_summary(arguments, tmp_path):
    assert cli.main([*arguments, "--max_length=66", "--max_steps=1", "--eval_examples=0"]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    rows_cut = summary["rows_cut"]
    assert rows_cut.keys() == {"forget", "retain"}
    assert 0 < rows_cut["forget"] < 10
    assert f"forget {rows_cut['forget']}" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(arguments, tmp_path):
    command = [sys.executable, "-m", "simnpo.cli", *arguments, "--max_steps=100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("interrupted: the same command with --resume continues")
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{last:08d}"]


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom simnpo.cli import main\n"
        "try: main(['unlearn', '--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
