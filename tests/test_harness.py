"""WMDP and MMLU: what is said without lm-evaluation-harness, and a task of its own kind where it is installed."""

import importlib.util
import json

import pytest

from simnpo.cli import main
from simnpo.evaluation import harness

TASK = {
    "task": "tiny",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["A", "B"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def test_without_the_harness_it_says_how_to_get_it(model_dir, tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))
    options = ["evaluate", "--benchmark=wmdp", f"--model={model_dir}", f"--output={tmp_path / 'out'}"]
    assert main(options) == 2
    assert "pip install simnpo[harness]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_accuracy_comes_back(model_dir, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install simnpo[harness]")
    rows = [{"question": f"{i}?", "answer": i % 2} for i in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}}
    monkeypatch.setitem(harness.TASKS, "wmdp", [task])
    options = ["evaluate", "--benchmark=wmdp", f"--model={model_dir}", "--cpu", "--precision=fp32"]
    assert main([*options, f"--output={tmp_path / 'out'}"]) == 0
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert scores["tiny"]["accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert "| tiny |" in (tmp_path / "out" / "results.md").read_text()
