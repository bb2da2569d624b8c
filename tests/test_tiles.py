"""MLPs and norms in tiles give what they give at once, and hold less."""

from typing import Any

import pytest
import torch
from conftest import make_model
from memory import peak_bytes
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    Olmo2Config,
    PreTrainedModel,
    Qwen3Config,
)

from simnpo import SimNPO, attach
from simnpo.errors import UserError
from simnpo.loading import load_weights
from simnpo.memory.checkpoints import checkpoint_layers
from simnpo.memory.tiles import TiledForward, tile_layers
from simnpo.model import add_lora, relative_error
from simnpo.planning import levers
from simnpo.planning.ledger import LiveBytes
from simnpo.planning.model_shape import ModelShape

IDS = torch.arange(2 * 50).view(2, 50)
D = 32
SIZES: dict[str, Any] = {
    "hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
NO_DROPOUT: dict[str, Any] = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
# with how many norms of hidden states: Gemma 3's layers have four, Olmo 2's norms of queries are as wide as those
MODELS = {
    "gemma": (GemmaConfig(**SIZES), 5),
    "gemma3": (Gemma3TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention"], sliding_window=20), 9),
    "qwen3": (Qwen3Config(**SIZES), 5),
    "olmo2": (Olmo2Config(**SIZES | {"head_dim": 8}), 7),
    "gpt2": (GPT2Config(vocab_size=260, n_embd=D, n_layer=2, n_head=4, n_positions=64, **NO_DROPOUT), 5),
}


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name][0]).double().eval()
    with torch.no_grad():
        # norms that multiply by more than 1, and add something where they add
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def tiled_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in vars(module)} - {""}


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
    assert tile_layers(model, tile_tokens) == 2 + 5
    for name, gradient in step(model).items():
        assert relative_error(gradient, expected[name]) < 1e-12, name


@pytest.mark.parametrize("name", MODELS)
def test_of_other_models(name, caplog):
    model, plain = random_model(name), random_model(name)
    assert tile_layers(model, 9) == 2 + MODELS[name][1]
    assert "tile_tokens" not in caplog.text, "norms of heads are not even tried"
    names = tiled_names(model)
    assert len(names) == 2 + MODELS[name][1]
    assert name == "olmo2" or not any("q_norm" in tiled or "k_norm" in tiled for tiled in names)
    with torch.no_grad():
        whole = plain(IDS).logits
        assert relative_error(model(IDS).logits, whole) < 1e-12
    gradients, expected = step(attach(model)), step(attach(plain))
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        # the gradient of Gemma's norms is summed in float32
        assert relative_error(gradient, expected[key]) < 1e-6, key


@pytest.mark.parametrize("name", MODELS)
def test_the_planner_tiles_the_same_modules(name):
    with torch.device("meta"):
        simulated = ModelShape(MODELS[name][0]).build(2, torch.float32, "sdpa")
    model = random_model(name)
    levers.tile_layers(simulated, 9)
    tile_layers(model, 9)
    assert tiled_names(simulated) == tiled_names(model)


def test_under_adapters():
    torch.manual_seed(0)
    plain = add_lora(attach(make_model().double()), 4, 8.0)
    for name, p in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    expected = step(plain)
    tile_layers(plain, 9)
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
            assert tile_layers(model, tile_tokens) == 2 + 5
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
            tile_layers(model, tile_tokens)
        ids = torch.arange(200)[None]
        return peak_bytes(lambda: model.model(ids).last_hidden_state.sum().backward())

    gradients = 3 * 4096 * 32 * 4
    wide = 200 * 4096 * 4
    whole, tiled = peak(None), peak(20)
    assert whole - gradients > 3 * wide
    # a tenth of each of the wide ones, and one tile's gradients of the weights beside their sums
    assert tiled < 2 * gradients + 0.8 * wide


def norm_and_input(tile_tokens: int | None) -> tuple[nn.Module, torch.Tensor]:
    """A norm of a bf16 model, and what it gets: 10 tiles of 64 KiB."""
    model = make_model(hidden_size=512).bfloat16()
    if tile_tokens is not None:
        tile_layers(model, tile_tokens)
    return model.model.norm, torch.randn(2, 320, 512, dtype=torch.bfloat16, requires_grad=True)


def test_a_norm_keeps_its_input_and_nothing_else():
    def kept(tile_tokens: int | None) -> int:
        norm, x = norm_and_input(tile_tokens)
        with LiveBytes() as counter:
            counter.adopt(x)
            out = norm(x)
        return counter.live - x.nbytes - out.nbytes

    # beside it normalised in float32 and in bf16, and where a sum of squares was taken
    assert kept(None) > 3 * 2 * 320 * 512 * 2
    assert kept(64) == 0
    assert kept(640) == kept(None)


def test_backward_of_a_norm_widens_a_tile_only():
    def peak(tile_tokens: int | None) -> int:
        norm, x = norm_and_input(tile_tokens)
        out = norm(x)
        gradient = torch.ones_like(out)
        return peak_bytes(lambda: out.backward(gradient))

    whole, tiled, in_float32 = peak(None), peak(64), 2 * 320 * 512 * 4
    assert whole > 3 * in_float32
    # the gradient in bf16, and a tenth of what is wide
    assert tiled < 1.5 * in_float32


def test_no_gradient_no_checkpoint(monkeypatch):
    norm, x = norm_and_input(64)
    expected = norm_and_input(None)[0](x)
    monkeypatch.setattr("simnpo.memory.tiles.checkpoint", None)
    with torch.no_grad():
        assert norm(x).equal(expected)
    # nor for what is a tile already
    assert norm(x[:, :32]).equal(expected[:, :32])


def test_a_module_inside_a_tiled_one_is_not_tiled_again():
    model = make_model()
    mlp = model.model.layers[0].mlp
    mlp.inner = nn.LayerNorm(D)
    mlp.mlp = nn.Linear(D, D)
    forward = mlp.forward
    mlp.forward = lambda x: forward(mlp.inner(mlp.mlp(x)))
    assert tile_layers(model, 4) == 2 + 5
    assert isinstance(mlp.forward, TiledForward)
    assert "forward" not in vars(mlp.inner) | vars(mlp.mlp)


def test_what_it_refuses():
    model = make_model()
    model.model.layers[1].mlp.forward = lambda x: x - x.mean(1, keepdim=True)
    with pytest.raises(UserError, match=r"layers.1.mlp \(LlamaMLP\) does not treat every token by itself"):
        tile_layers(model, 4)
    assert not any(isinstance(module.forward, TiledForward) for module in model.model.modules())
    model = make_model()
    for layer in model.model.layers:
        layer.add_module("other", layer._modules.pop("mlp"))
    with pytest.raises(UserError, match="LlamaForCausalLM has no modules called mlp or feed_forward"):
        tile_layers(model, 4)


class GatedNorm(nn.LayerNorm):
    """Of two tensors."""

    def forward(self, input: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(input if gate is None else input * gate)


def test_norms_that_stay_whole(caplog):
    model = make_model()
    first, second = model.model.layers
    first.input_layernorm.forward = lambda x: x - x.mean(1, keepdim=True)
    # of a batch's channels: it cannot take hidden states at all
    second.input_layernorm = nn.BatchNorm2d(D)
    second.post_attention_layernorm = GatedNorm(D)
    assert tile_layers(model, 4) == 2 + 2
    assert "tile_tokens: layers.0.input_layernorm (LlamaRMSNorm) does not treat every token by itself" in caplog.text
    assert "tile_tokens: layers.1.input_layernorm (BatchNorm2d) does not" in caplog.text
    assert "post_attention" not in caplog.text
    tiled = {name for name, module in model.model.named_modules() if isinstance(module.forward, TiledForward)}
    assert tiled == {"layers.0.mlp", "layers.1.mlp", "layers.0.post_attention_layernorm", "norm"}
