"""The end-to-end benchmarks: everybody minimises the same loss, pads as its loop does, and has honest rows."""

import functools
import json
import shutil

import pytest
import torch

from simnpo.benchmarks import fit, levers
from simnpo.benchmarks.throughput import __main__ as command
from simnpo.benchmarks.throughput import agreement
from simnpo.benchmarks.throughput.agreement import require_agreement
from simnpo.benchmarks.throughput.cases import configuration
from simnpo.benchmarks.throughput.loops import LOOPS, OPEN_UNLEARNING, PUBLISHED, TRL, Theirs
from simnpo.benchmarks.throughput.memory import Outcome, in_fresh_process, outcome_of, parse_bytes, step_peak
from simnpo.benchmarks.throughput.subject import (
    make_subject,
    our_gradient,
    prepare,
    take_step,
    their_gradient,
    with_reference,
)
from simnpo.benchmarks.throughput.timing import OURS, StepTimes, time_steps
from simnpo.benchmarks.throughput.workload import Workload, documents, every_row_a_target, tofu, tofu_sized
from simnpo.data import load_examples
from simnpo.errors import RunError, UserError
from simnpo.loading import load_tokenizer
from simnpo.objectives import NPO, SimNPO

PAD = 256
THEIRS = Theirs(pad_to=100)


@pytest.fixture
def work(model_dir, forget_file, retain_file):
    tokenizer = load_tokenizer(str(model_dir))
    return Workload("small", *(load_examples(path, tokenizer, 500) for path in (forget_file, retain_file)))


@pytest.fixture
def subject_of(model_dir, work):
    def make(theirs=THEIRS, **changes):
        config = configuration(str(model_dir), True, **{"batch_size": 3, "precision": "fp32", **changes})
        return make_subject(config, work, PAD, theirs)

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 0.4},
        {"method": "npo"},
        {"packing": "off"},
        {"gradient_checkpointing": True, "retain_coef": 3.0},
        {"retain_batch_size": 5},
        {"lora": True},
    ],
    ids=str,
)
def test_all_loops_have_our_loss_and_gradient(subject_of, changes):
    subject = subject_of(**changes)
    differences = require_agreement(subject, LOOPS)
    assert differences.keys() == {loop.name for loop in LOOPS}
    assert all(loss < 1e-5 and gradient < 1e-4 for loss, gradient in differences.values())
    assert all(parameter.grad is None for parameter in subject.parameters)


def test_all_loops_compare_with_the_reference_and_not_with_the_model_as_it_is(subject_of):
    subject = with_reference(subject_of(method="npo"))
    prepare(PUBLISHED, subject)
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.mul_(1.1)
    ours = our_gradient(subject, 0)
    for loop in LOOPS:
        assert their_gradient(loop, subject, 0).item() == pytest.approx(ours, rel=1e-5)
    unmoved = with_reference(subject)
    assert our_gradient(unmoved, 0) != pytest.approx(ours, rel=1e-3)


def gradient_of_half(loop):
    """The right loss, half its gradient."""

    def loss(*arguments):
        value = loop.loss(*arguments)
        return value / 2 + value.detach() / 2

    return loop._replace(loss=loss)


def slightly_larger(loop):
    return loop._replace(loss=lambda *arguments: loop.loss(*arguments) * 1.001)


def without_margin(loop):
    """The forget term of another objective, and the right retain term."""

    def loss(model, reference, forget, retain, terms):
        return loop.loss(model, reference, forget, retain, terms._replace(objective=SimNPO(beta=0.1, gamma=0.0)))

    return loop._replace(loss=loss)


@pytest.mark.parametrize("breaks", [gradient_of_half, slightly_larger, without_margin])
@pytest.mark.parametrize("broken", LOOPS, ids=lambda loop: loop.name)
def test_a_loop_that_computes_something_else_is_not_timed(subject_of, broken, breaks):
    loops = [breaks(loop) if loop is broken else loop for loop in LOOPS]
    with pytest.raises(RunError, match=f"nothing was timed.*{broken.name}") as caught:
        require_agreement(subject_of(gamma=0.1), loops)
    assert not any(loop.name in str(caught.value) for loop in LOOPS if loop is not broken)


def test_neither_is_anybody_when_ours_is_wrong(subject_of, monkeypatch):
    def other_batch(subject, step):
        return our_gradient(subject.on(subject.workload, forget_coef=0.9), step)

    monkeypatch.setattr(agreement, "our_gradient", other_batch)
    with pytest.raises(RunError, match=r"published.*open-unlearning.*TRL"):
        require_agreement(subject_of(), LOOPS)


def test_each_loop_pads_as_its_own(subject_of):
    subject = subject_of()
    forget, retain = subject.sampler.step(0, 0)
    longest = [max(len(example.input_ids) for example in examples) for examples in (forget, retain)]
    assert len({*longest, 100}) == 3
    take_step(None, subject, 0)  # the first packed step looks once whether the model keeps sequences apart
    shared = subject.collator(forget, retain).shared_prefix
    assert shared
    seen = []
    subject.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape))
    )
    for loop, shapes in (
        (PUBLISHED, [(3, 100), (3, 100)]),
        (OPEN_UNLEARNING, [(3, longest[0]), (3, longest[1])]),
        (TRL, [(6, max(longest))]),
        # what all six begin with stands there once, and the last token of each predicts nothing
        (None, [(1, sum(len(example.input_ids) - 1 for example in (*forget, *retain)) - 5 * shared)]),
    ):
        seen.clear()
        take_step(loop, subject, 0)
        assert seen == shapes


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_micro_batches_of_theirs_are_one_batch(subject_of, loop):
    """One sequence at a time: the same forget term. The retain term becomes a mean of means and is left out."""
    whole, pieces = (
        subject_of(THEIRS._replace(micro_batch=size), batch_size=2, beta=0.1, retain_coef=1e-9) for size in (None, 1)
    )
    gradients = []
    for subject in (whole, pieces):
        prepare(loop, subject)
        loss = their_gradient(loop, subject, 0).item()
        gradients.append([loss, *(p.grad.clone() for p in subject.parameters)])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    shapes = []
    pieces.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[0]))
    take_step(loop, pieces, 0)
    assert shapes == ([2, 2] if loop is TRL else [1, 1, 1, 1])


def test_who_holds_a_reference(subject_of):
    held = {loop.name: [loop.holds_reference(objective) for objective in (SimNPO(), NPO())] for loop in LOOPS}
    assert held == {PUBLISHED.name: [True, True], OPEN_UNLEARNING.name: [False, True], TRL.name: [False, False]}
    subject = subject_of()
    prepare(PUBLISHED, subject)
    assert subject.reference is not subject.model
    prepare(None, subject)
    assert subject.reference is None


def test_every_loop_takes_the_same_steps(subject_of):
    subject = subject_of()
    weights = {}
    start = {name: value.clone() for name, value in subject.model.state_dict().items()}
    for loop in (*LOOPS, None):
        subject = subject_of(learning_rate=1e-3)
        for step in range(2):
            take_step(loop, subject, step)
        weights[loop] = subject.model.state_dict()
    for name, value in weights[None].items():
        for loop in LOOPS:
            torch.testing.assert_close(weights[loop][name], value, rtol=1e-3, atol=2e-5)
    assert any(not torch.equal(start[name], value) for name, value in weights[None].items())


def test_times_are_of_the_same_batches_and_ratios_of_the_same_rounds(subject_of):
    subject = subject_of()
    times = time_steps({PUBLISHED.name: (PUBLISHED, subject), OURS: (None, subject)}, rounds=3, warmup=1)
    expected = [subject.useful_tokens(step) for step in (1, 2, 3)]
    assert [seen.tokens for seen in times.values()] == [expected, expected]
    assert len(set(expected)) > 1
    ours, other = StepTimes([10.0, 20.0, 40.0], [5, 10, 30]), StepTimes([20.0, 60.0, 160.0], [5, 10, 30])
    assert ours.tokens_per_second == 500
    assert ours.times_as_fast_as(other) == 3


def test_workloads(tmp_path, work):
    made_up = tofu_sized(260)
    assert (len(made_up.forget), len(made_up.retain)) == (200, 3800)
    assert all(13 <= example.num_targets <= 82 for example in made_up.retain)
    assert max(max(example.input_ids) for example in made_up.forget) < 260
    [*_, document] = documents(50, 260).retain
    assert (len(document.input_ids), document.num_targets) == (50, 49)
    every = every_row_a_target(work).forget[0]
    assert every.num_targets == len(every.input_ids) - 1 > work.forget[0].num_targets
    with pytest.raises(UserError, match=r"context must be at least 2.*got 1"):
        documents(1, 260)
    with pytest.raises(UserError, match=r"data: .* has no forget05\.jsonl"):
        tofu(tmp_path, None)


def test_what_an_allocation_that_fails_becomes():
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert outcome_of(fails) == Outcome(
        "out of memory", None, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    assert outcome_of(lambda: torch.ones(1 << 60, dtype=torch.uint8).sum().item()).status == "out of memory"
    assert outcome_of(lambda: 1 / 0).status == "failed"
    assert outcome_of(lambda: 2.0) == Outcome("ok", 2.0)


def test_bytes():
    assert [parse_bytes(text) for text in ("24GB", "1.5 GiB", "100")] == [24 * 10**9, 3 << 29, 100]
    for text in ("24 gigabytes", "", "GB", "1.2.3GB"):
        with pytest.raises(UserError, match="memory-limit must be"):
            parse_bytes(text)


def arguments(model_dir, data, output, *more):
    return [
        "--model", str(model_dir), "--data", str(data), "--batch-size", "2", "--precision", "fp32", "--cpu",
        "--output", str(output), *more,
    ]  # fmt: skip


@pytest.fixture
def data(tmp_path, forget_file, retain_file):
    for name, path in (("forget05", forget_file), ("retain95", retain_file)):
        shutil.copyfile(path, tmp_path / f"{name}.jsonl")
    return tmp_path


def test_command_writes_rows_of_everybody_and_says_who_did_not_fit(model_dir, data, monkeypatch, capsys):
    def memory(loop, subject, limit):
        return Outcome("out of memory", note="too large") if loop is PUBLISHED else Outcome("ok", 12.0)

    monkeypatch.setattr(command, "measure_memory", memory)
    options = arguments(
        model_dir, data, data / "out", "--rounds", "2", "--npo-rounds", "2", "--whole-run", "--epochs", "0.4",
        "--rival-steps", "1",
    )  # fmt: skip
    assert command.main(options) == 0
    results = json.loads((data / "out" / "throughput.json").read_text())
    rows = {row["rival"]: row for row in results["steps"]}
    assert rows.keys() == {loop.name for loop in LOOPS} | {OURS}
    assert rows[PUBLISHED.name]["status"] == "out of memory"
    assert "ms" not in rows[PUBLISHED.name]
    ours = rows[OURS]
    assert ours["x"][OPEN_UNLEARNING.name] > 0
    assert PUBLISHED.name not in ours["x"]
    assert {row["rival"]: (row["steps"], row["whole"]) for row in results["runs"]} == {
        OURS: (2, True), **{loop.name: (1, False) for loop in LOOPS},
    }  # fmt: skip
    assert 0 < results["npo"][0]["ratio_low"] <= results["npo"][0]["ratio"]
    assert {"commit", "torch", "device", "command"} <= results["facts"].keys()
    text = (data / "out" / "throughput.md").read_text()
    assert f"| {PUBLISHED.name} | out of memory |" in text
    assert "| its first steps |" in text
    assert text in capsys.readouterr().out


def test_command_times_nothing_when_the_loops_differ(model_dir, data, monkeypatch, capsys):
    monkeypatch.setattr(command, "LOOPS", [PUBLISHED, slightly_larger(TRL)])
    assert command.main(arguments(model_dir, data, data / "out")) == 1
    assert TRL.name in capsys.readouterr().err
    assert not (data / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rounds", "-1"], "rounds must be at least 0, got -1"),
        (["--batch-size", "4", "6", "--micro-batch", "4"], "micro-batch must divide every batch-size, [4, 6]; got 4"),
        (["--model-shape", "tiny"], "model and model-shape"),
        (["--context", "64"], "data and context"),
        (["--memory-limit", "much"], "memory-limit must be"),
    ],
)
def test_command_refuses(model_dir, data, capsys, more, message):
    assert command.main(arguments(model_dir, data, data / "out", *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_that_does_not_fit_its_limit_is_out_of_memory(model_dir, work):
    config = configuration(str(model_dir), True, batch_size=2)
    ours = functools.partial(step_peak, None, config, work, PAD, THEIRS)
    assert in_fresh_process(ours, 300 << 20).status == "ok"
    padded = functools.partial(step_peak, PUBLISHED.name, config, work, PAD, Theirs(pad_to=20_000))
    assert in_fresh_process(padded, 300 << 20).status == "out of memory"


def test_a_lever_that_cannot_be_had_has_no_number(model_dir, work):
    options = levers.parse(["--cpu", "--rounds", "1"])
    options.device, options.memory_limit = torch.device("cpu"), None
    case = command.Case("tiny", configuration(str(model_dir), True), load_tokenizer(str(model_dir)), [work])
    row = levers.measure_lever(levers.Lever("4 bits", {"load_in_4bit": True}), case, work, options)
    assert (row["status"], row["peak_mib"]) == ("not here", None)
    assert levers.cells(row, {}) == ["4 bits", "not here", "", "", "", "", "load_in_4bit needs lora"]


def test_levers_name_fields_of_the_configuration():
    known = levers.levers(256, 128, on_gpu=True)
    assert len({lever.name for lever in known}) == len(known)
    for lever in known:
        configuration("model", True, **lever.changes)


@pytest.mark.slow
def test_levers_beside_the_plain_step(tmp_path):
    options = ["--cpu", "--model-shape", "tiny", "--batch-size", "2", "--rounds", "1", "--only", "every row"]
    assert levers.main([*options, "--output", str(tmp_path)]) == 0
    plain, every = json.loads((tmp_path / "levers.json").read_text())["rows"]
    assert (plain["lever"], plain["ms_ratio"]) == (levers.PLAIN, 1.0)
    assert every["ms"] > 0
    assert every["peak_mib"] > 0
    assert "| every row a target |" in (tmp_path / "levers.md").read_text()


def test_fit_runs_dry_and_keeps_its_budgets(tmp_path, capsys):
    assert fit.main(["8b-lora", "1b-full", "8b-4bit", "--dry", "--output", str(tmp_path)]) == 0
    assert "not a measurement" in capsys.readouterr().out
    rows = json.loads((tmp_path / "fit.json").read_text())["rows"]
    assert {(row["budget"], row["loop"]) for row in rows} == {
        (name, loop) for name in fit.BUDGETS for loop in (OURS, OPEN_UNLEARNING.name)
    }
    assert all(row["status"] == "ok" for row in rows)


def test_fit_stops_where_memory_runs_out(tmp_path, monkeypatch):
    def measure(loop, config, T, shape, steps, device):
        fits = loop is None or T < 32
        return {**vars(Outcome("ok", 1.0) if fits else Outcome("out of memory")), "T": T, "seconds": 1.0}

    monkeypatch.setattr(fit, "measure_step", measure)
    monkeypatch.setattr(fit, "SHORTEST", 8)
    rows = fit.measure_budget("8b-lora", fit.dry(fit.BUDGETS["8b-lora"]), tmp_path, torch.device("cpu"))
    assert [(row["loop"], row["T"], row["status"]) for row in rows] == [
        (OURS, 64, "ok"), *((OPEN_UNLEARNING.name, T, "ok") for T in (8, 16)),
        (OPEN_UNLEARNING.name, 32, "out of memory"),
    ]  # fmt: skip
