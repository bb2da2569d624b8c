"""Runs whose objective sees a log-ratio read in float32, on a body and in arithmetic that are bf16."""

import copy
import json
import logging

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from test_pieces import documents
from test_training import CPU, config, examples  # noqa: F401, the fixture
from torch import nn

from simnpo import attach, attached_model
from simnpo.batch import Sampler
from simnpo.config import UnlearnConfig
from simnpo.errors import UserError
from simnpo.model import add_lora
from simnpo.training import setup
from simnpo.training.forward import Collator, exact_logps, sequence_logps
from simnpo.training.loop import unlearn
from simnpo.training.step import accumulate, objective_weights

METHODS = {"npo": "none", "kto": "beside", "dpo": "beside"}


def bf16_policy() -> nn.Module:
    """A frozen body in bf16 under adapters that have been trained a little."""
    model = make_model()
    for p in model.parameters():
        p.data = p.data.bfloat16()
    model = add_lora(attach(model), 4, 8.0).eval()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return model


def forget_examples(method: str):
    if METHODS[method] == "none":
        return [*examples("f", (3, 9, 30)), *documents()]
    alternates = examples("a", (4, 7, 11))
    for example, alternate in zip(forget := examples("f", (3, 9, 30)), alternates, strict=True):
        object.__setattr__(example, "alternate", alternate)
    return forget


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packed", [True, False])
def test_weights_are_those_of_a_float32_model(config, method, packed):  # noqa: F811
    settings = config(method=method, precision="bf16", lora=True)
    forget = forget_examples(method) if packed else forget_examples(method)[:3]
    beside = [e.alternate for e in forget if e.alternate is not None]
    model = bf16_policy()
    exact = copy.deepcopy(model).float()
    # a reference a nat away, where the weight is steep
    in_fp32 = config(method=method, lora=True)
    alone = [[e] for e in (*forget, *beside)]
    plain = Collator(packed, 256, CPU, None)
    ref = {e[0].id: s - 1 for e, s in zip(alone, sequence_logps(exact, in_fp32, plain, alone), strict=True)}
    collator = Collator(packed, 256, CPU, ref, alternates=METHODS[method])

    def weights(some_model, some_settings, some_collator):
        rows = objective_weights(some_model, some_settings, some_collator, forget, len(forget))
        return torch.tensor([row[2] for row in rows], dtype=torch.float64)

    expected = weights(exact, in_fp32, collator)
    ours = weights(model, settings, collator._replace(exact_ratio=True))
    rounded = weights(model, settings, collator)
    assert (ours / expected - 1).abs().max() < 1e-5
    assert (rounded / expected - 1).abs().max() > 1e-4


def test_the_step_takes_its_gradient_in_bf16_at_the_exact_weight(config):  # noqa: F811
    settings = config(method="npo", precision="bf16", lora=True, batch_size=6, retain_batch_size=3)
    forget, retain = forget_examples("npo"), examples("r", (5, 8, 13))
    model = bf16_policy()
    known = exact_logps(model, settings, Collator(True, 256, CPU, None), forget)
    ref = {name: s - 1 for name, s in known.items()}
    sampler = Sampler(forget, retain, 6, 3, seed=0)
    # NPO one nat above its reference is gradient ascent at this weight
    same = config(method="ga", precision="bf16", lora=True, batch_size=6, retain_batch_size=3)
    same = UnlearnConfig(**vars(same) | {"forget_coef": 2 * torch.sigmoid(torch.tensor(0.1)).item()})
    plain, found = Collator(True, 256, CPU, None), []
    for one, collator in ((settings, plain._replace(ref_logps=ref, exact_ratio=True)), (same, plain)):
        model.zero_grad()
        totals = accumulate(Accelerator(cpu=True), model, collator, sampler, one, 0)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert totals.forget_nll == pytest.approx(-sum(known[e.id] for e in sampler.step(0, 0)[0]), rel=1e-2)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.fixture
def forwards(monkeypatch):
    """What `linear_unlearn_loss` was called with, forward by forward."""
    calls, loss = [], attached_model.linear_unlearn_loss

    def spy(*args, **kwargs):
        calls.append((args[0].dtype, kwargs.get("logits_dtype"), kwargs.get("exact_logps") is not None))
        return loss(*args, **kwargs)

    monkeypatch.setattr(attached_model, "linear_unlearn_loss", spy)
    return calls


@pytest.mark.parametrize(
    ("changes", "long", "exact", "logits"),
    [
        ({"method": "npo"}, False, False, None),
        ({"method": "npo"}, True, True, None),
        ({"method": "npo", "lora": True}, True, True, None),
        ({"method": "npo", "exact_ratio": "on"}, False, True, None),
        ({"method": "npo", "exact_ratio": "off"}, True, False, torch.float32),
        ({"method": "npo", "precision": "fp32"}, True, False, None),
        # its mean over a sequence rounds to nothing, and so does SimNPO's
        ({"method": "n-npo"}, True, False, None),
        ({"method": "simnpo"}, True, False, None),
    ],
)
def test_which_runs_read_it(config, monkeypatch, forwards, changes, long, exact, logits):  # noqa: F811
    if long:
        monkeypatch.setattr("simnpo.config.LONG_TARGETS", 5)
        monkeypatch.setattr(setup, "LONG_TARGETS", 5)
    output = unlearn(config(**{"precision": "bf16", "max_steps": 2, "eval_examples": 0} | changes))
    assert any(known for *_, known in forwards) == exact
    assert {dtype for _, dtype, _ in forwards} == {logits}
    if exact:
        # every loss of forget sequences has it; the reference and the readings themselves are in float32
        assert {known for *_, known in forwards} == {True, False}
        assert all(known or dtype == torch.float32 for dtype, _, known in forwards)
        first = json.loads((output / "weights.jsonl").read_text().splitlines()[0])
        assert first["weights"] == pytest.approx([1.0] * len(first["weights"]), rel=1e-5)


def test_documents_are_read_piece_by_piece(config, monkeypatch):  # noqa: F811
    settings, model = config(method="npo", precision="bf16"), attach(make_model()).bfloat16()
    long = max(documents(), key=lambda example: len(example.piece_lengths))
    collator, lengths = Collator(True, 256, CPU, None), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr("simnpo.training.forward.MAX_TOKENS", max(long.piece_lengths))
    exact_logps(model, settings, collator, [long])
    assert max(lengths) <= max(long.piece_lengths) < len(long.input_ids)


def test_a_model_that_cannot_is_refused_or_read_in_bf16(config, monkeypatch, caplog, forwards):  # noqa: F811
    def refuse(model: nn.Module) -> None:
        raise UserError("exact_ratio: LlamaForCausalLM cannot compute in float32")

    monkeypatch.setattr(setup, "check_float32", refuse)
    monkeypatch.setattr("simnpo.config.LONG_TARGETS", 5)
    monkeypatch.setattr(setup, "LONG_TARGETS", 5)
    npo = {"method": "npo", "precision": "bf16", "max_steps": 1}
    with pytest.raises(UserError, match="cannot compute in float32"):
        unlearn(config(**npo, exact_ratio="on"))
    assert not config().output_dir().exists()
    with caplog.at_level(logging.WARNING):
        unlearn(config(**npo))
    assert "the log-ratio is read in bf16" in caplog.text
    assert {dtype for _, dtype, _ in forwards} == {torch.float32}


@pytest.mark.parametrize("method", ["simnpo", "ga", "tnpo", "simpo"])
def test_methods_without_such_a_ratio_refuse_it(config, method):  # noqa: F811
    with pytest.raises(UserError, match=f"exact_ratio: method '{method}' takes no log-ratio"):
        config(method=method, exact_ratio="on")
