import json
import shutil
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer, write_rows

from simnpo.cli import main
from simnpo.errors import UserError
from simnpo.sweep.grid import read_trials
from simnpo.sweep.table import best, outcomes


def test_grid_is_the_product_of_its_lists():
    trials = read_trials(["method=simnpo beta=1,2.5 seed=0,1", "method=ga lora=true"])
    assert [trial.settings for trial in trials][:2] == [
        {"method": "simnpo", "beta": 1.0, "seed": 0},
        {"method": "simnpo", "beta": 1.0, "seed": 1},
    ]
    assert [trial.group for trial in trials] == ["method=simnpo beta=1"] * 2 + ["method=simnpo beta=2.5"] * 2 + [
        "method=ga lora=true"
    ]
    assert len({trial.name for trial in trials}) == 5
    # a group is a grid again
    assert read_trials([trials[0].group])[0].settings == {"method": "simnpo", "beta": 1.0}
    assert read_trials([trials[4].group])[0].settings == {"method": "ga", "lora": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method simnpo", r"takes NAME=VALUE\[,VALUE...\] separated by spaces, got 'method'"),
        ("betta=1", "'betta' is no option that a sweep can vary; these are: retain, heldout, method, beta"),
        ("output=x", "'output' is no option that a sweep can vary"),
        ("beta=high", "beta must be of type float, got 'high'"),
        ("lora=yes", "lora is true or false, got 'yes'"),
        ("beta=1 beta=2", "beta twice"),
    ],
)
def test_grids_that_mean_nothing(text, message):
    with pytest.raises(UserError, match=message):
        read_trials([text])


def result(quality: float, utility: float) -> dict:
    scores = {"probability": 0.5, "rouge_l_recall": 0.4, "truth_ratio": 0.3}
    return {
        "scores": {"forget_quality": quality, "model_utility": utility},
        "sets": {"forget": scores, "retain": scores},
        "summary": {"seconds": 2.0},
    }


def test_seeds_are_summarised_and_the_best_passes_before_it_is_useful():
    trials = read_trials(["beta=1,2,3 seed=0,1"])
    qualities = [(0.2, 0.5), (0.4, 0.7), (0.01, 0.9), (0.02, 0.9), (0.9, 0.3), (0.8, 0.3)]
    found = outcomes(trials, {trial.name: result(*values) for trial, values in zip(trials, qualities)})
    assert [outcome.seeds for outcome in found] == [2, 2, 2]
    assert found[0].forget_quality == pytest.approx(0.3)
    assert found[0].forget_quality_range == (0.2, 0.4)
    assert found[0].model_utility == pytest.approx(0.6)
    assert found[0].model_utility_spread == pytest.approx(0.1414, abs=1e-4)
    assert best(found).group == "beta=1"
    assert best(found[1:2] + found[1:2]).group == "beta=2"
    # a sweep in progress has the trials that are done
    assert outcomes(trials, {trials[0].name: result(0.1, 0.2)})[0].model_utility_spread is None


@pytest.fixture
def tofu(tmp_path: Path) -> Path:
    """A folder like TOFU's, of three questions a set."""
    folder = tmp_path / "tofu"
    folder.mkdir()

    def rows(name: str, wrong: int) -> list[dict]:
        return [
            {
                "question": f"{name} {i}?",
                "answer": f"It is {name} {'x' * i}.",
                "paraphrased_answer": f"{name} {'x' * i} it is.",
                "perturbed_answer": [f"It is {j}{'y' * i}." for j in range(wrong)],
            }
            for i in range(3)
        ]

    for name, wrong in (("forget01", 5), ("retain", 5), ("real_authors", 3), ("world_facts", 3)):
        full = rows(name, wrong)
        write_rows(folder / f"{name}_perturbed.jsonl", full)
        if name == "forget01":
            write_rows(folder / "forget01.jsonl", [{k: row[k] for k in ("question", "answer")} for row in full])
    return folder


@pytest.mark.slow
def test_sweep_scores_every_trial_and_goes_on_where_it_was(tofu, model_dir, retain_file, tmp_path, capsys, monkeypatch):
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "retrained")
    make_tokenizer().save_pretrained(tmp_path / "retrained")
    output = tmp_path / "sweep"
    command = ["sweep", "--model", str(model_dir), "--retain-model", str(tmp_path / "retrained"), "--data", str(tofu)]
    command += ["--output", str(output), "--max-new-tokens", "4", "--max_steps", "1", "--batch_size", "2", "--cpu"]
    command += ["--retain", str(retain_file)]
    command += ["--try", "method=simnpo beta=1 seed=0,1", "--try", "method=ga learning_rate=1e-2"]
    assert main(command) == 0
    saved = json.loads((output / "sweep.json").read_text())
    assert json.loads((output / "method=simnpo-beta=1-seed=0/config.json").read_text())["retain"] == str(retain_file)
    assert [outcome["seeds"] for outcome in saved["outcomes"]] == [2, 1]
    assert saved["best"].keys() == {"simnpo", "ga"}
    page = (output / "sweep.md").read_text()
    assert "| before |" in page
    assert "| retrained |" in page
    assert "| method=ga learning_rate=0.01 | 1 |" in page
    assert (output / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(output.glob("method*/model"))

    # one trial is lost, the others are not run again
    shutil.rmtree(output / "method=ga-learning_rate=0.01")
    ran = []
    from simnpo.training import loop

    unlearn = loop.unlearn
    monkeypatch.setattr(loop, "unlearn", lambda config: (ran.append(config.method), unlearn(config))[1])
    assert main(command) == 0
    assert ran == ["ga"]
    assert (output / "sweep.md").read_text().splitlines()[:8] == page.splitlines()[:8]

    # the same folder for other settings
    capsys.readouterr()
    assert main([*command, "--weight_decay", "0.5"]) == 2
    assert "holds a trial with other settings" in capsys.readouterr().err


def test_sweep_needs_what_it_compares(tofu, model_dir, tmp_path, capsys):
    (tofu / "world_facts_perturbed.jsonl").unlink()
    command = ["sweep", "--model", str(model_dir), "--retain-model", str(model_dir), "--data", str(tofu), "--cpu"]
    assert main([*command, "--output", str(tmp_path / "out"), "--try", "beta=1", "--max-new-tokens", "4"]) == 2
    assert "a sweep compares model_utility: world_facts_perturbed is not in" in capsys.readouterr().err
