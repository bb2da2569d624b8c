"""The experiment on TOFU: what it reads, and all of it on a tiny model, stopped half-way and started again."""

import json

import pytest
from conftest import write_rows

from simnpo.benchmarks.tofu import experiment
from simnpo.benchmarks.tofu.experiment import FORGOTTEN, KEPT, keep_settings, reduced_data
from simnpo.errors import UserError
from simnpo.training import loop

QUESTIONS = 4


@pytest.fixture
def source(tmp_path):
    """A folder like TOFU's: the retain set is scored on questions that stand late in retain99."""
    folder = tmp_path / "tofu"
    folder.mkdir()

    def row(name: str, i: int) -> dict:
        return {"question": f"{name} {i}?", "answer": f"It is {'ab' * (i + 1)}."}

    for file in (*FORGOTTEN, *KEPT):
        rows = [row(file.split("_")[0], i) for i in range(QUESTIONS)]
        if file != "forget01":
            rows = [
                r | {"perturbed_answer": ["It is x.", "It is yy."], "paraphrased_answer": "So it is."} for r in rows
            ]
        write_rows(folder / f"{file}.jsonl", rows)
    write_rows(folder / "retain99.jsonl", [row("other", i) for i in range(6)] + [row("retain", i) for i in range(4)])
    return folder


def test_the_model_learns_the_retain_answers_that_are_scored(source, tmp_path):
    reduced_data(source, tmp_path / "data", num_retain=5, num_scored=3)
    rows = [json.loads(line) for line in (tmp_path / "data" / "retain.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["retain 0?", "retain 1?", "retain 2?", "other 0?", "other 1?"]
    assert all(row.keys() == {"question", "answer"} for row in rows)


def test_the_forget_set_is_scored_whole_and_of_the_others_some_questions(source, tmp_path):
    reduced_data(source, tmp_path / "data", num_retain=5, num_scored=3)
    for names, kept in ((FORGOTTEN, QUESTIONS), (KEPT, 3)):
        for name in names:
            of_tofu, of_ours = (
                [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
                for folder in (source, tmp_path / "data")
            )
            assert of_ours == of_tofu[:kept]


def test_a_file_that_is_missing_is_named(source, tmp_path):
    (source / "retain99.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no retain99\.jsonl"):
        reduced_data(source, tmp_path / "data", num_retain=5, num_scored=3)


def test_a_folder_holds_one_experiment(tmp_path):
    keep_settings(tmp_path / "settings.json", {"seeds": [0], "retain_answers": 160})
    keep_settings(tmp_path / "settings.json", {"seeds": [0], "retain_answers": 160})
    with pytest.raises(UserError, match=r"retain_answers was 160 in .* and is 80 now"):
        keep_settings(tmp_path / "settings.json", {"seeds": [0], "retain_answers": 80})


def test_two_settings_of_every_method():
    methods = [grid.split()[0] for grid in experiment.GRIDS]
    assert methods == [f"method={name}" for name in ("simnpo", "npo", "ga", "dpo", "wga")]
    assert all(len(experiment.read_trials([grid])) >= 2 for grid in experiment.GRIDS)


@pytest.mark.slow
def test_all_of_it_stopped_and_started_again(source, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "LEARNING", {"epochs": 1, "batch_size": 2, "peak_rate": 1e-3})
    monkeypatch.setattr(experiment, "UNLEARNING", ["--max_steps=1", "--batch_size=2", "--save_steps=0", "--cpu"])
    output, learned, ran = tmp_path / "out", [], []
    finetune, unlearn = experiment.finetune, loop.unlearn

    def counted_finetune(*arguments, **options):
        learned.append(arguments[2].name)
        finetune(*arguments, **options)

    def counted_unlearn(config):
        if len(ran) == 2:
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append((config.method, config.beta, config.seed))
        return unlearn(config)

    monkeypatch.setattr(experiment, "finetune", counted_finetune)
    monkeypatch.setattr(loop, "unlearn", counted_unlearn)
    command = ["--data", str(source), "--output", str(output), "--model", str(model_dir), "--retain", "6"]
    command += ["--questions", "3", "--max-new-tokens", "4", "--seeds", "0", "1"]
    command += ["--grids", "method=simnpo beta=1,2 seed=0", "method=dpo beta=0.1 seed=0"]
    with pytest.raises(KeyboardInterrupt):
        experiment.main(command)
    assert not (output / "seeds.json").exists()

    experiment.main(command)
    assert learned == ["full", "retrained"]
    sweep, seeds = (json.loads((output / f"{name}.json").read_text()) for name in ("sweep", "seeds"))
    best = float(sweep["best"]["simnpo"].split("beta=")[1])
    assert ran == [
        ("simnpo", 1.0, 0), ("simnpo", 2.0, 0), "stopped", ("dpo", 0.1, 0), ("simnpo", best, 1), ("dpo", 0.1, 1)
    ]  # fmt: skip
    assert [outcome["seeds"] for outcome in sweep["outcomes"]] == [1, 1, 1]
    assert [outcome["seeds"] for outcome in seeds["outcomes"]] == [2, 2]
    relearned = json.loads((output / "relearning.json").read_text())["rows"]
    assert list(dict.fromkeys(row["model"] for row in relearned)) == ["retrained", "simnpo", "dpo"]
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["retain_answers"], settings["questions_of_a_set"], settings["new_tokens"]) == (6, 3, 4)

    # all of it is done: nothing runs again; one that was stopped does not say how long it took
    before = (output / "page" / "forget01.md").read_text()
    experiment.main(command)
    assert (len(learned), len(ran)) == (2, 6)
    page = (output / "page" / "forget01.md").read_text()
    assert page == before
    assert "6 of the 3960 to retain" in page
    assert "minutes in one go" not in page
    for heading, rows in (("## The sweep", 5), ("## The best setting", 4), ("## The shorter", 4), ("## Relearning", 6)):
        section = page[page.index(heading) + 3 :].split("\n## ")[0]
        assert section.count("\n| ") == rows + 2, heading
    assert {path.name for path in (output / "page").iterdir()} == {
        "forget01.md", "forget01.json", "forget01.png", "forget01-relearning.png"
    }  # fmt: skip
