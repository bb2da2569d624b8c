"""The measuring code on work whose answer is known."""

import argparse
import json
import os
import time
from dataclasses import replace

import pytest
import torch

from simnpo.benchmarks import rivals, suite
from simnpo.benchmarks.measure import Timing, peak_memory, relative_error, time_interleaved
from simnpo.benchmarks.operands import SHAPES, exact, make_batch, real_batch
from simnpo.cli import main
from simnpo.data import load_examples
from simnpo.errors import UserError
from simnpo.loading import load_model

CPU = torch.device("cpu")
TINY = ["--shapes", "tiny", "--sequence-tokens", "16", "--rounds", "2", "--device", "cpu", "--dtype", "float32"]


def test_timing_is_the_median_and_the_quartiles():
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3.0, 2.0, 4.0)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0)


def test_rivals_take_turns_and_stages_hand_on():
    calls = []
    seen = {}
    work = {
        "one": lambda: calls.append("one"),
        "two": [lambda: calls.append("two") or 20, lambda x: seen.update(got=x) or time.sleep(0.02)],
    }
    timings = time_interleaved(work, CPU, rounds=3, warmup=1)
    assert calls == ["one", "two", "one", "two", "two", "one", "one", "two"]
    assert seen == {"got": 20}
    first, second = (stage.median for stage in timings["two"].stages)
    assert first < 10 <= 20 <= second < 200
    assert timings["two"].total.median == pytest.approx(first + second, rel=0.2)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system keeps its high-water mark")
def test_peak_memory_sees_what_was_there_for_a_moment():
    def work():
        a = torch.ones(64 << 20, dtype=torch.uint8)
        b = a + 1
        del a, b
        return torch.ones(32 << 20, dtype=torch.uint8)

    assert peak_memory(work, CPU) == pytest.approx(128, rel=0.1)
    assert peak_memory(lambda: None, CPU) < 4


def test_peak_memory_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr("simnpo.benchmarks.measure.PROC", tmp_path / "absent")
    with pytest.raises(RuntimeError, match="clear_refs"):
        peak_memory(lambda: None, CPU)


def test_relative_error():
    exact_value = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert relative_error(exact_value.float() * 1.1, exact_value) == pytest.approx(0.1, rel=1e-5)
    assert relative_error(torch.tensor(2.0), torch.tensor(4.0)) == 0.5


def test_the_truth_is_autograd_in_float64():
    batch = make_batch(SHAPES["tiny"], 64, 16, "text", torch.float64, CPU)
    truth = exact(batch)
    leaves = batch.require_grad("trained")
    logps = torch.log_softmax(batch.hidden_states @ batch.weight.T, -1).gather(1, batch.targets[:, None])[:, 0]
    retain, forget = logps.view(4, 16).sum(1).split(2)
    sigmoid = torch.sigmoid(-2.5 / 16 * forget - 0.3)
    loss = 0.5 * (-2 / 2.5 * sigmoid.log()).mean() - retain.sum() / 32
    assert relative_error(truth.loss, loss.detach()) < 1e-12
    for ours, autograd in zip((truth.dhidden, truth.dweight), torch.autograd.grad(loss, leaves), strict=True):
        assert relative_error(ours, autograd) < 1e-12
    assert truth.nll == pytest.approx(-logps.mean().item())


def test_real_operands_are_the_models_own_at_the_responses(model_dir, forget_file):
    batch = real_batch(str(model_dir), str(forget_file), 64, 16, torch.float32, CPU)
    assert (batch.B, batch.T, batch.hidden_states.shape, batch.weight.shape) == (4, 16, (64, 32), (260, 32))
    model, tokenizer = load_model(str(model_dir))
    first = load_examples(forget_file, tokenizer, max_length=512)[0]
    with torch.no_grad():
        logits = model(torch.tensor([first.input_ids])).logits[0]
    counted = [t for t, label in enumerate(first.labels) if label != -100]
    assert batch.targets[: len(counted)].tolist() == [first.labels[t] for t in counted]
    ours = (batch.hidden_states @ batch.weight.T)[: len(counted)]
    torch.testing.assert_close(ours, logits[[t - 1 for t in counted]], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="at least 4096 response tokens"):
        real_batch(str(model_dir), str(forget_file), 4096, 2048, torch.float32, CPU)


def wrong_gradient(batch):
    """Right loss, half the gradient of the head."""
    half = batch.weight * 0.5 + batch.weight.detach() * 0.5
    return rivals.simnpo_of(rivals.flat_logps)(replace(batch, weight=half))


def raises(batch):
    raise ValueError("no kernel for this head")


def test_no_number_from_a_wrong_row():
    batch = make_batch(SHAPES["tiny"], 64, 16, "text", torch.float32, CPU)
    competitors = [
        rivals.RIVALS[0],
        rivals.Rival("wrong", None, wrong_gradient),
        rivals.Rival("raises", None, raises),
        rivals.Rival("absent", None, raises, "no_such_package", "pip install no-such-package"),
        rivals.Rival("greedy", None, raises, bytes_per_logit=1 << 50),
    ]
    about = {"shape": "tiny", "D": 64, "V": 512, "N": 64, "T": 16, "spectrum": "text"}
    rows = {row["rival"]: row for row in suite.measure_batch(batch, ["trained"], competitors, 2, 2048, about)}
    assert {name: row["status"] for name, row in rows.items()} == {
        suite.PRODUCTS: "ok", "simnpo": "ok", "wrong": "wrong", "raises": "failed", "absent": "missing",
        "greedy": "missing",
    }  # fmt: skip
    assert "ms" in rows["simnpo"]
    assert rows["simnpo"]["ratio"] == pytest.approx(rows["simnpo"]["ms"] / rows[suite.PRODUCTS]["ms"])
    for name in ("wrong", "raises", "absent", "greedy"):
        assert not {"ms", "forward_ms", "peak_mib"} & rows[name].keys()
    assert rows["wrong"]["errors"]["dW"] == pytest.approx(0.5, rel=1e-3)
    assert rows["raises"]["note"] == "ValueError: no kernel for this head"
    assert rows["absent"]["note"] == "not installed: pip install no-such-package"


def test_command_writes_tables_data_and_plots(tmp_path, capsys):
    options = [*TINY, "--tokens", "64", "128", "--rivals", "simnpo", "flat", "--output", str(tmp_path)]
    assert main(["bench", *options]) == 0
    assert "log-probabilities only" in capsys.readouterr().out
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["facts"]["command"].startswith("simnpo bench --shapes tiny")
    assert {"device", "torch", "commit", "dtype", "triton"} <= data["facts"].keys()
    timed = [row for row in data["rows"] if row["status"] == "ok"]
    assert {row["N"] for row in timed} == {64, 128}
    assert {row["mode"] for row in timed} == set(suite.MODES)
    assert {"simnpo", "eager, flat rows", suite.PRODUCTS} <= {row["rival"] for row in timed}
    text = (tmp_path / "bench.md").read_text()
    assert text.count("## ") == 6
    assert (tmp_path / "bench-tiny-text.png").stat().st_size > 10_000


def test_sub_batch_keeps_whole_sequences_of_both_kinds():
    batch = make_batch(SHAPES["tiny"], 128, 16, "flat", torch.float32, CPU)
    part = batch.first(64)
    assert (part.B, part.T, int(part.retain_mask.sum())) == (4, 16, 2)
    assert torch.equal(part.targets, torch.cat([batch.targets[:32], batch.targets[64:96]]))


def test_refuses_a_batch_it_cannot_halve(capsys):
    with pytest.raises(SystemExit):
        suite.parse([*TINY, "--tokens", "100"])
    assert "multiples of 32" in capsys.readouterr().err


def test_default_is_minutes_on_a_cpu_and_everything_on_a_gpu():
    assert suite.parse(["--device", "cpu"]).tokens == suite.PRESETS["small"]["tokens"]
    full = suite.parse(["--device", "cuda"])
    assert isinstance(full, argparse.Namespace)
    assert (max(full.tokens), len(full.shapes)) == (131072, 4)
