"""Checkpoints that leave the device come back the same, and no more of them at once than allowed."""

import pytest
import torch
from conftest import make_model

from simnpo import SimNPO, attach
from simnpo.errors import UserError
from simnpo.memory.checkpoints import AHEAD, OffloadedCheckpoints, checkpoint_layers

CPU = torch.device("cpu")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(24).view(2, 12)
    model.train()
    model(ids, attention_mask=torch.ones_like(ids), labels=ids, objective=SimNPO()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def offloaded_model(**changes: object) -> tuple[torch.nn.Module, OffloadedCheckpoints]:
    model, run = attach(make_model(**changes)), OffloadedCheckpoints(CPU)
    checkpoint_layers(model, offload=False, device=CPU)
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = run
    return model, run


def test_gradients_are_those_of_a_run_without_checkpoints():
    expected = gradients(attach(make_model(num_hidden_layers=5)))
    model, run = offloaded_model(num_hidden_layers=5)
    for name, gradient in gradients(model).items():
        assert gradient.equal(expected[name]), name
    assert run.waiting == []


def test_the_checkpoints_are_what_leaves(monkeypatch):
    left, back, most = [], [], 0
    leave, send_for = OffloadedCheckpoints._leave, OffloadedCheckpoints._send_for

    def count_leaving(self, tensor):
        packed = leave(self, tensor)
        left.append(packed is not tensor)
        return packed

    def count_returning(self, entry):
        nonlocal most
        back.append(entry)
        send_for(self, entry)
        most = max(most, sum(entry.device_copy is not None for entry in {id(e): e for e in back}.values()))

    monkeypatch.setattr(OffloadedCheckpoints, "_leave", count_leaving)
    monkeypatch.setattr(OffloadedCheckpoints, "_send_for", count_returning)
    gradients(offloaded_model(num_hidden_layers=6)[0])
    assert sum(left) == 6
    assert len({id(entry) for entry in back}) == 6
    assert most == AHEAD


def test_a_forward_without_a_backward_leaves_nothing_behind():
    model, run = offloaded_model()
    ids = torch.arange(12)[None]
    model.train()
    for _ in range(3):
        model(ids, labels=ids, objective=SimNPO())
    gradients(model)
    assert len(run.waiting) <= 2 * 3  # those of the forwards whose backward never came


def test_nothing_leaves_a_cpu():
    with pytest.raises(UserError, match=r"offload_activations moves activations from a GPU .* this run is on cpu"):
        checkpoint_layers(make_model(), offload=True, device=CPU)


def test_a_model_without_layers_to_checkpoint(monkeypatch):
    def refuse(*_: object) -> None:
        raise ValueError("LlamaForCausalLM does not support gradient checkpointing.")

    model = make_model()
    monkeypatch.setattr(model, "gradient_checkpointing_enable", refuse)
    monkeypatch.setattr(model, "activation_checkpointing_enable", refuse, raising=False)
    with pytest.raises(UserError, match="gradient_checkpointing: LlamaForCausalLM does not support"):
        checkpoint_layers(model, offload=False, device=CPU)
