"""Relearning after a sweep: every model starts from its own weights, and the table says before and after."""

import json

import torch
from conftest import make_model, make_tokenizer, write_rows

from simnpo.benchmarks.tofu import relearning
from simnpo.benchmarks.tofu.relearning import RELEARNING, relearn_all


def test_before_and_after_of_every_model(tmp_path, monkeypatch):
    # fast enough for a model of two layers to learn two answers
    monkeypatch.setattr(relearning, "RELEARNING", RELEARNING._replace(learning_rate=3e-3, epochs=20))
    folders = {name: tmp_path / name for name in ("retrained", "one", "other")}
    for seed, folder in enumerate(folders.values()):
        model = make_model()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    rows = [{"question": f"Who is {i}?", "answer": f"It is {'ab' * (i + 1)}."} for i in range(10)]
    path = write_rows(tmp_path / "forget01.jsonl", rows)
    retrained = folders.pop("retrained")
    relearn_all(folders, retrained, path, tmp_path)
    rows = json.loads((tmp_path / "relearning.json").read_text())["rows"]
    assert [(row["model"], row["relearned"], row["epoch"]) for row in rows] == [
        (model, which, epoch)
        for model in ("retrained", "one", "other")
        for which in ("shortest", "random")
        for epoch in (0, 20)
    ]
    for before, after in zip(rows[::2], rows[1::2]):
        # what starts alike is learned alike: the others are answers of the same kind
        assert after["probability_others"] > before["probability_others"]
    assert len({row["probability_others"] for row in rows}) == len(rows)
    page = (tmp_path / "relearning.md").read_text()
    assert "| one | shortest |" in page
    assert "20 epochs on 20% of the forget answers" in page
    assert (tmp_path / "relearning.png").read_bytes().startswith(b"\x89PNG")
