"""Float32 arithmetic on half-precision weights: the numbers of a float32 copy, and a model that is left as it was."""

import copy

import pytest
import torch
from conftest import make_model
from memory import peak_bytes
from torch import nn
from torch.nn import functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from simnpo import attach, attention, upcast
from simnpo.errors import UserError
from simnpo.loading import load_weights
from simnpo.memory.tiles import tile_layers
from simnpo.model import add_lora, relative_error
from simnpo.upcast import check_float32, float32_arithmetic, product_of_parts

IDS = torch.arange(3 * 40).view(3, 40) % 250
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 260}  # fmt: skip
MODELS = {
    "llama": make_model,
    "tied llama": lambda: make_model(tie_word_embeddings=True),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=260)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),  # biases
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
}


def bf16(model: nn.Module) -> nn.Module:
    """The model as it is loaded in bf16: its parameters, and not the frequencies of its rotary embedding."""
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.bfloat16()
    return model.eval()


def float32_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float()


def logps(model: nn.Module) -> torch.Tensor:
    return model(IDS, attention_mask=torch.ones_like(IDS), labels=IDS, token_logps=True)


@pytest.mark.parametrize("name", MODELS)
def test_has_the_numbers_of_a_float32_copy(name):
    torch.manual_seed(0)
    model = attach(bf16(MODELS[name]()))
    with torch.no_grad():
        expected, rounded = logps(attach(float32_copy(model))), logps(model)
    check_float32(model)
    with float32_arithmetic(model):
        ours = logps(model)
    assert relative_error(ours, expected) < 1e-6
    assert relative_error(rounded, expected) > 1e-5


def test_leaves_the_model_as_it_was():
    model = attach(bf16(make_model()))
    before = dict(model.named_parameters())
    assert all(p.requires_grad for p in before.values())
    values = {name: p.detach().clone() for name, p in before.items()}

    def fail_in_the_middle() -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("in the middle")

        with float32_arithmetic(model):
            model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
            logps(model)

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle()
    for name, p in model.named_parameters():
        assert p is before[name]
        assert torch.equal(p, values[name])
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 1  # the test's own
    assert torch.is_grad_enabled()


def test_under_adapters_and_tiles_with_tf32_and_autocast_on():
    torch.manual_seed(0)
    model = add_lora(attach(bf16(make_model())), 4, 8.0).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        expected = logps(float32_copy(model))
    tile_layers(model, 7)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), float32_arithmetic(model):
            assert torch.get_float32_matmul_precision() == "highest"
            assert relative_error(logps(model), expected) < 1e-6
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_body_in_4_bits(tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = attach(load_weights(str(tmp_path), dtype=torch.bfloat16, in_4bit_on=torch.device("cpu")))
    exact = make_model(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for name, p in exact.named_parameters():
            mine = model.get_parameter(name)
            if not mine.is_floating_point():
                state = copy.copy(mine.quant_state)
                state.dtype = torch.float32
                mine = dequantize_4bit(mine.data, state)
            p.copy_(mine)
        rounded, expected = logps(model), logps(attach(exact))
        with float32_arithmetic(model):
            ours = logps(model)
        again = logps(model)
    assert relative_error(ours, expected) < 1e-5
    assert relative_error(rounded, expected) > 1e-3
    assert torch.equal(again, rounded)


def test_no_float32_copy_of_the_model_exists():
    model = attach(bf16(make_model(hidden_size=128, intermediate_size=512, num_hidden_layers=12)))
    weights = sum(p.numel() * 2 for p in model.parameters())

    def run() -> None:
        with float32_arithmetic(model):
            model(IDS[:1], labels=IDS[:1], token_logps=True)

    # the largest weight, 512 x 128, in float32, and the activations of 40 tokens
    assert peak_bytes(run) < 4 * 512 * 128 + 40 * 512 * 4 * 8 < 0.3 * weights


@pytest.mark.skipif(not attention.SUPPORTED, reason="no registry of attention masks")
def test_attention_that_casts_to_half_precision_is_replaced():
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    def casts(module, query, key, value, mask, **options):
        sdpa = AttentionInterface()["sdpa"]
        half = (x.bfloat16() for x in (query, key, value))
        return sdpa(module, *half, mask, **options)[0].to(query.dtype), None

    AttentionInterface.register("casts", casts)
    AttentionMaskInterface.register("casts", sdpa_mask)
    model = attach(bf16(make_model()))
    with torch.no_grad():
        expected = logps(attach(float32_copy(model)))
    model.set_attn_implementation("casts")
    with float32_arithmetic(model):
        assert relative_error(logps(model), expected) < 1e-6
    assert model.config._attn_implementation == "casts"


def test_refuses_a_module_that_uses_the_weights_of_another():
    model = attach(bf16(make_model()))
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: F.linear(x, mlp.down_proj.weight.t()) @ mlp.down_proj.weight.t()
    with pytest.raises(UserError, match=r"LlamaForCausalLM cannot compute in float32 .*use --precision fp32"):
        check_float32(model)


def test_refuses_hidden_states_that_are_rounded():
    model = attach(bf16(make_model()))
    model.model.norm.register_forward_hook(lambda module, args, out: out.bfloat16())
    with pytest.raises(UserError, match="its hidden states are rounded on the way"):
        check_float32(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_of_parts_is_a_float32_product(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(70, 300), torch.randn(90, 300).to(dtype)

    def add_product(total, a, b):
        assert a.dtype == b.dtype == torch.bfloat16
        product = a.float() @ b.float()
        return product if total is None else total + product

    exact = x.double() @ weight.double().t()
    # 16 bits of each operand
    assert relative_error(product_of_parts(x, weight, add_product).double(), exact) < 2**-16
    assert relative_error((x.bfloat16().float() @ weight.bfloat16().float().t()).double(), exact) > 2**-10


def test_linear_layers_of_a_gpu_multiply_in_parts(monkeypatch):
    # what a GPU's library does, on a CPU
    monkeypatch.setattr(upcast, "_has_fast_bf16", lambda weight: True)
    monkeypatch.setattr(
        upcast, "_tensor_cores", lambda total, a, b: (0 if total is None else total) + a.float() @ b.float()
    )
    model = attach(bf16(MODELS["qwen2"]()))
    names = [name for name, module in model.named_modules() if "forward" in vars(module)]
    with torch.no_grad():
        expected = logps(attach(float32_copy(model)))
    with float32_arithmetic(model):
        ours = logps(model)
        assert "forward" in vars(model.model.layers[0].mlp.up_proj)
    assert relative_error(ours, expected) < 1e-5
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == names
