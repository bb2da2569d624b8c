"""What is loaded is what the files hold, however they are cut, tied or packed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

from simnpo import attach
from simnpo.errors import UserError
from simnpo.loading import load_model, load_tokenizer, load_weights
from simnpo.planning.model_shape import ModelShape, read_config

CPU = torch.device("cpu")
IDS = torch.arange(40, 52)[None]


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def refusal(folder: Path, dtype: torch.dtype = torch.float32, in_4bit_on: torch.device | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_weights(str(folder), dtype=dtype, in_4bit_on=in_4bit_on)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_base_model_without_its_tied_head(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(load_weights(str(tmp_path), dtype=torch.float32)), logits(model))


def test_base_model_without_its_own_head_and_a_classifier(tmp_path):
    make_model().model.save_pretrained(tmp_path)
    assert refusal(tmp_path).endswith("lacks lm_head.weight, which LlamaForCausalLM needs and would have at random")
    LlamaForSequenceClassification(make_model().config).save_pretrained(tmp_path)
    assert "lacks lm_head.weight" in refusal(tmp_path)


def test_buffers_of_old_checkpoints_are_no_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["model.layers.0.self_attn.masked_bias"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_weights(str(folder), dtype=torch.float32)), logits(make_model()))


@pytest.mark.parametrize("tied", [True, False])
def test_sharded(tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert torch.equal(logits(load_weights(str(tmp_path), dtype=torch.float32)), logits(model))
    second = sorted(tmp_path.glob("model-*"))[1]
    content = second.read_bytes()
    second.write_bytes(content[:-8])
    assert f"{second} is damaged: " in refusal(tmp_path)
    second.unlink()
    assert f"index.json lists {second.name}, which is not there" in refusal(tmp_path)
    second.write_bytes(content)
    for wrong in ([], {}, {"a": 1}):
        edit(tmp_path / "model.safetensors.index.json", weight_map=wrong)
        assert "model.safetensors.index.json: weight_map must be an object of file names" in refusal(tmp_path)


def test_bin(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(logits(load_weights(str(folder), dtype=torch.float32)), logits(make_model()))
    whole = (folder / "pytorch_model.bin").read_bytes()
    for content in (whole[:4000], whole[:-3], b"", b"no weights"):
        (folder / "pytorch_model.bin").write_bytes(content)
        assert "pytorch_model.bin is damaged, or holds something else than weights: " in refusal(folder)
    # what torch refuses to run
    torch.save({"lm_head.weight": Path("x")}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin is damaged, or holds something else than weights: " in refusal(folder)
    torch.save({"lm_head.weight": 3}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin must hold weights by name" in refusal(folder)
    torch.save(weights | {"lm_head.weight": torch.full((260, 32), torch.nan)}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: lm_head.weight has weights that are NaN or infinite" in refusal(folder)
    assert "pytorch_model.bin: lm_head.weight has weights that are NaN" in refusal(folder, in_4bit_on=CPU)


def test_4bit(folder):
    pytest.importorskip("bitsandbytes")
    model = load_weights(str(folder), dtype=torch.float32, in_4bit_on=CPU)
    model.save_pretrained(folder / "packed")
    assert torch.equal(logits(load_weights(str(folder / "packed"), dtype=torch.float32)), logits(model))
    weights = load_file(folder / "model.safetensors")
    up = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {up: weights[up] / 0}, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"model.safetensors: {up} has weights that are NaN or infinite" in refusal(folder, in_4bit_on=CPU)
    del weights[up]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks {up}" in refusal(folder, in_4bit_on=CPU)


def test_weights_that_the_dtype_cannot_hold(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = 3.4e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_weights(str(folder), dtype=torch.float32)
    assert "model.norm.weight has weights that are NaN or infinite" in refusal(folder, dtype=torch.bfloat16)


def test_adapter_folder(folder, tmp_path):
    base, adapter = folder, tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    make_tokenizer().save_pretrained(adapter)
    assert "holds a PEFT adapter, not a model: merge it into its base model" in refusal(adapter)


def test_config_that_asks_for_more_than_there_is(folder):
    edit(folder / "config.json", vocab_size=10**10)
    assert "config.json describes 640,000,020,640 weights, and the files hold 37,280" in refusal(folder)
    edit(folder / "config.json", vocab_size=260, num_hidden_layers=10**9)
    assert "config.json: num_hidden_layers is 1000000000, and the weight files hold 21 tensors" in refusal(folder)
    edit(folder / "config.json", num_hidden_layers=2, logit_scale=10**300)
    assert "config.json: logit_scale must be below 2**63" in refusal(folder)


@pytest.mark.parametrize("value", [0, 0.0, "2", True, [1.0], float("nan"), float("inf"), 1e-50, 1e60, -1e300])
@pytest.mark.parametrize("name", ["logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping"])
def test_logit_factor_that_is_no_number(name, value):
    model = make_model()
    setattr(model.config, name, value)
    with pytest.raises(UserError, match=f"model: {name} in the configuration must be a number between"):
        attach(model)


def test_attention_from_the_hub_that_the_configuration_names(folder):
    edit(folder / "config.json", attn_implementation="someone/kernel")
    assert "config.json asks for code from the hub: attention someone/kernel" in refusal(folder)
    with pytest.raises(UserError, match="asks for code from the hub"):
        read_config(str(folder))


def test_custom_code_is_not_run(folder):
    (folder / "code.py").write_text("raise AssertionError('ran')")
    edit(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.A", "AutoModelForCausalLM": "code.B"})
    assert "config.json" in refusal(folder)


def test_configuration_that_plan_cannot_use(folder):
    edit(folder / "config.json", num_hidden_layers="x")
    with pytest.raises(UserError, match=r"model: "):
        ModelShape(read_config(str(folder)))


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"type": "BPE"}}', "\0", '{"version": 7}'])
def test_tokenizer_that_is_none(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"model: .*tokenizer"):
        load_tokenizer(str(folder))


def test_line_of_a_broken_json_file(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"head_dim": 8,', '"head_dim": 8'))
    with pytest.raises(UserError, match=r"config\.json:11: not valid JSON: Expecting ',' delimiter"):
        load_model(str(folder))


def test_end_token_that_is_none(folder):
    edit(folder / "generation_config.json", eos_token_id="x")
    assert "eos_token_id of" in refusal(folder)


def test_damaged_gguf_file(tmp_path):
    for content in (b"", b"GGUF\3\0\0\0", b"no gguf at all"):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(UserError, match=r"m\.gguf"):
            load_weights(str(tmp_path / "m.gguf"), dtype=torch.float32)


def test_memory_that_runs_out_is_no_wrong_model(folder, monkeypatch):
    def fails(*args: object, **options: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(MemoryError, match="no more"):
        load_weights(str(folder), dtype=torch.float32)


def test_forward_that_fails_is_the_models():
    model: Any = make_model()
    model.model.layers[1].mlp.forward = lambda x: x[0, 0, 0, 0, 0]
    with pytest.raises(UserError, match="model: LlamaForCausalLM cannot run: "):
        attach(model)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=4, n_positions=3)).eval()
    with pytest.raises(UserError, match="model: GPT2LMHeadModel cannot run: "):
        attach(model)
