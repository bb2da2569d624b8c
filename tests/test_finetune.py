"""Learning what TOFU unlearns from, on a tiny model."""

import math

import pytest
import torch
from conftest import make_model, write_rows

from simnpo.benchmarks.tofu.finetune import finetune
from simnpo.data import load_examples
from simnpo.errors import UserError
from simnpo.loading import load_tokenizer, load_weights

ROWS = [{"question": f"Who is {i}?", "answer": f"It is {name}."} for i, name in enumerate(("Ada", "Bo", "Cy", "Di"))]
SETTINGS = {"epochs": 40, "batch_size": 2, "peak_rate": 5e-3, "seed": 0}


@torch.no_grad()
def probability(model, path, tokenizer) -> float:
    """Mean over the answers of the length-normalised probability, from all the logits."""
    found = []
    for example in load_examples(path, tokenizer, 200):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        found.append(math.exp(-model(input_ids=ids, labels=labels).loss))
    return sum(found) / len(found)


def test_it_learns_the_files_it_is_given_and_no_other(model_dir, tmp_path):
    seen = [write_rows(tmp_path / "a.jsonl", ROWS[:2]), write_rows(tmp_path / "b.jsonl", ROWS[2:])]
    unseen = write_rows(tmp_path / "c.jsonl", [{"question": "Who is 9?", "answer": "Zed the 2nd, of Quux!"}])
    finetune(str(model_dir), seen, tmp_path / "learned", **SETTINGS)
    model = load_weights(str(tmp_path / "learned"), dtype=torch.float32)
    tokenizer = load_tokenizer(str(tmp_path / "learned"))
    for path in seen:
        assert probability(make_model(), path, tokenizer) < 0.05
        assert probability(model, path, tokenizer) > 0.8
    assert probability(model, unseen, tokenizer) < 0.3


def test_a_seed_gives_the_same_weights(model_dir, tmp_path):
    data = [write_rows(tmp_path / "a.jsonl", ROWS)]
    weights = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        finetune(str(model_dir), data, tmp_path / name, **(SETTINGS | {"epochs": 1, "seed": seed}))
        weights.append(load_weights(str(tmp_path / name), dtype=torch.float32).lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_less_than_a_batch_is_refused(model_dir, tmp_path):
    data = [write_rows(tmp_path / "a.jsonl", ROWS)]
    with pytest.raises(UserError, match="4 examples are less than one batch of 5"):
        finetune(str(model_dir), data, tmp_path / "learned", **(SETTINGS | {"batch_size": 5}))
    assert not (tmp_path / "learned").exists()
