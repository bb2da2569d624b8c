"""Every method of the command line: its name, and its step on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from formulas import EVERY, batch_loss
from test_training import CPU, config, examples, rows  # noqa: F401, the fixture

from simnpo import cli
from simnpo.attached_model import attach
from simnpo.batch import Sampler
from simnpo.data import IGNORE_INDEX
from simnpo.objectives.methods import METHODS, describe
from simnpo.training.forward import Collator, token_logps
from simnpo.training.loop import unlearn
from simnpo.training.step import accumulate

ROOT = Path(__file__).parents[1]


def test_every_objective_has_a_name():
    assert {type(objective) for objective in EVERY} == {method.objective for method in METHODS.values()}


def test_list_methods_names_formula_weight_and_source(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["unlearn", "--list-methods"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.strip() == describe()
    for name, method in METHODS.items():
        entry = text.split(f"\n{name}")[1].split("\n\n")[0]
        objective = method.objective
        assert all(fact in entry for fact in (objective.formula, objective.weight, objective.source))
    assert "satimp  (beta1=5, beta2=1)" in text
    assert "\nw-graddiff\n    fixed   normalize=True\n" in text


def test_the_readme_has_every_method():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Objectives")[1].split("\n## ")[0]
    assert all(f"`{name}`" in section for name in METHODS)


def drawn():
    forget = [replace(e, alternate=o) for e, o in zip(examples("f", (1, 4, 7)), examples("a", (6, 2, 5)), strict=True)]
    return forget, examples("r", (3, 8))


def references(forget):
    both = [*forget, *(example.alternate for example in forget)]
    sums = {example.id: -1.5 * example.num_targets for example in both}
    tokens = {e.id: [-0.1 * (i % 7) for i in range(len(e.input_ids))] for e in both}
    return sums, tokens


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packed", [True, False])
def test_step_is_the_formula_on_the_models_own_logits(config, method, packed):  # noqa: F811
    settings = config(method=method, batch_size=3, forget_coef=0.6, retain_coef=1.7)
    forget, retain = drawn()
    ref_logps, ref_token_logps = references(forget)
    sampler = Sampler(forget, retain, 3, 2, seed=0)
    trained = attach(make_model())
    collator = Collator(packed, 256, CPU, ref_logps, ref_token_logps, settings.alternates())
    totals = accumulate(Accelerator(cpu=True), trained, collator, sampler, settings, 0)

    plain = make_model()
    batch = collator._replace(packed=False)(*sampler.step(0, 0))
    logits = plain(batch.input_ids, attention_mask=batch.attention_mask).logits
    loss = batch_loss(
        settings.objective(), logits, batch.targets, retain_mask=batch.retain_mask, ref_logps=batch.ref_logps,
        ref_token_logps=batch.ref_token_logps, alternates=batch.alternates, forget_coef=0.6, retain_coef=1.7,
    )  # fmt: skip
    loss.backward()
    assert totals.loss == pytest.approx(loss.item(), rel=1e-4)
    for (name, ours), theirs in zip(trained.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-3, atol=2e-5, msg=name)


def test_token_logps_are_the_initial_models(config):  # noqa: F811
    some = examples("f", (1, 4, 7))
    model = make_model()
    expected = []
    for example in some:
        logps = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        targets = [*example.labels[1:], IGNORE_INDEX]
        expected.append([logps[i, t].item() if t != IGNORE_INDEX else 0.0 for i, t in enumerate(targets)])
    for packed in (True, False):
        ours = token_logps(attach(make_model()), config(), Collator(packed, 256, CPU, None), [some[:2], some[2:]])
        for a, b in zip(ours, expected, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_run(config, method):  # noqa: F811
    output = unlearn(config(method=method, max_steps=2))
    assert (output / "model").is_dir()
    first, last = rows(output / "weights.jsonl")[0], rows(output / "weights.jsonl")[-1]
    assert len(first["ids"]) == len(first["weights"]) == 10
    # these weigh the target the same whatever its probability, pdu while it is not the most likely token
    assert (first["weights"] == last["weights"]) == (method in ("ga", "w-graddiff", "me", "sga", "pdu"))
    if method in ("dpo", "kto"):
        assert len(json.loads((output / "reference.json").read_text())) == 20
        # theta is the reference: sigmoid(0) twice, and no other answer is more likely than it was
        assert first["weights"] == pytest.approx([1.0 if method == "dpo" else 0.5] * 10, abs=1e-4)
    if method == "tnpo":
        reference = json.loads((output / "reference.json").read_text())
        assert all(isinstance(logps, list) for logps in reference.values())
        # at the start p = q, so that a token's weight is 1 and a sequence's 1/n
        expected = [1 / n for n in first["num_tokens"]]
        assert first["weights"] == pytest.approx(expected, rel=1e-4)
    if method == "jensun":
        assert all(weight < 0 for weight in first["weights"])
