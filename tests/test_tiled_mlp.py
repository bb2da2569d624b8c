"""An MLP in tiles gives what it gives at once, and holds less."""

import pytest
import torch
from conftest import make_model
from memory import peak_bytes
from torch import nn

from simnpo import SimNPO, attach
from simnpo.errors import UserError
from simnpo.memory.checkpoints import checkpoint_layers
from simnpo.memory.tiled_mlp import TiledForward, tile_mlps
from simnpo.model import add_lora, load_weights, relative_error

IDS = torch.arange(2 * 50).view(2, 50)


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(IDS, attention_mask=torch.ones_like(IDS), labels=IDS, objective=SimNPO()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tile_tokens", [1, 7, 64, 100, 1000])
def test_gradients_are_those_of_the_whole(tile_tokens, checkpointed):
    expected = step(attach(make_model().double()))
    model = attach(make_model().double())
    if checkpointed:
        checkpoint_layers(model, offload=False, device=torch.device("cpu"))
    assert tile_mlps(model, tile_tokens) == 2
    for name, gradient in step(model).items():
        assert relative_error(gradient, expected[name]) < 1e-12, name


def test_under_adapters():
    torch.manual_seed(0)
    plain = add_lora(attach(make_model().double()), 4, 8.0)
    for name, p in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    expected = step(plain)
    tile_mlps(plain, 9)
    for name, gradient in step(plain).items():
        assert relative_error(gradient, expected[name]) < 1e-6, name


def test_on_a_body_in_4_bits(tmp_path):
    make_model().save_pretrained(tmp_path)
    gradients = []
    for tile_tokens in (None, 9):
        model = attach(load_weights(str(tmp_path), dtype=torch.float32, in_4bit_on=torch.device("cpu")))
        if tile_tokens is not None:
            # no weight of such an MLP has a dtype that tokens could have
            assert not any(p.is_floating_point() for p in model.model.layers[0].mlp.parameters())
            assert tile_mlps(model, tile_tokens) == 2
        torch.manual_seed(0)
        gradients.append(step(add_lora(model, 4, 8.0)))
    whole, tiled = gradients
    assert sum(gradient.norm() > 0 for gradient in whole.values()) == 14
    for name, gradient in tiled.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_wide_activations_exist_for_a_tile_only():
    def peak(tile_tokens: int | None) -> int:
        model = make_model(num_hidden_layers=1, intermediate_size=4096)
        checkpoint_layers(model, offload=False, device=torch.device("cpu"))
        model.train()
        if tile_tokens is not None:
            tile_mlps(model, tile_tokens)
        ids = torch.arange(200)[None]
        return peak_bytes(lambda: model.model(ids).last_hidden_state.sum().backward())

    gradients = 3 * 4096 * 32 * 4
    wide = 200 * 4096 * 4
    whole, tiled = peak(None), peak(20)
    assert whole - gradients > 3 * wide
    # a tenth of each of the wide ones, and one tile's gradients of the weights beside their sums
    assert tiled < 2 * gradients + 0.8 * wide


def test_what_it_refuses():
    model = make_model()
    model.model.layers[1].mlp.forward = lambda x: x - x.mean(1, keepdim=True)
    with pytest.raises(UserError, match=r"layers.1.mlp \(LlamaMLP\) does not treat every token by itself"):
        tile_mlps(model, 4)
    assert not isinstance(model.model.layers[0].mlp.forward, TiledForward)
    model = make_model()
    for layer in model.model.layers:
        layer.add_module("other", layer._modules.pop("mlp"))
    with pytest.raises(UserError, match="LlamaForCausalLM has no modules called mlp or feed_forward"):
        tile_mlps(model, 4)
