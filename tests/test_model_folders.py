"""Damages a model folder in every way: what loads has the logits transformers gives, and all else is refused.

SIMNPO_FAULTS=full tries every field with every value and thousands of flipped bits; otherwise a fixed sample is tried.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from simnpo import attach
from simnpo.errors import UserError
from simnpo.loading import DTYPE, load_model

FULL = os.environ.get("SIMNPO_FAULTS") == "full"
VALUES = (None, 0, -1, 10**30, "x", [], float("nan"), {}, True, 0.5)
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
FILES = (*JSON_FILES, "tokenizer.json", "model.safetensors", "chat_template.jinja")
IDS = torch.arange(40, 52)[None]
# values with which the tiny model must be refused, whatever transformers makes of them
REFUSED = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads", "hidden_act")

Damage = Callable[[Path], None]


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    make_model(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "model"))


def loads(folder: Path) -> bool:
    """Whether our loader takes the folder; if so, its logits are those of transformers, and every weight was read."""
    try:
        model = attach(load_model(str(folder))[0])
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError("a refusal of several lines") from error
        return False
    with torch.no_grad():
        ours = model(IDS).logits
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **{DTYPE: torch.float32})
        plain, info = loaded
        expected = plain.eval()(IDS).logits
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(ours, expected)
    assert expected.isfinite().all()
    return True


def sampled(cases: list, quick: int) -> list:
    return cases if FULL else random.Random(0).sample(cases, min(quick, len(cases)))


def edit(file: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


NEW = "logit_scale logits_scaling final_logit_softcapping attn_implementation quantization_config auto_map rope_theta"
NEW += " return_dict is_encoder_decoder layer_types torch_dtype id2label sliding_window output_attentions"
GENERATION = "bos_token_id eos_token_id pad_token_id use_cache do_sample temperature top_k"
TOKENIZER = "backend eos_token extra_special_tokens model_max_length pad_token tokenizer_class auto_map chat_template"
FIELDS = {
    "config.json": [*make_model().config.to_dict(), *NEW.split()],
    "generation_config.json": GENERATION.split(),
    "tokenizer_config.json": [*TOKENIZER.split(), "added_tokens_decoder", "padding_side"],
}
EDITS = [(file, field, value) for file in JSON_FILES for field in FIELDS[file] for value in VALUES]


@pytest.mark.parametrize(("file", "field", "value"), sampled(EDITS, 70))
def test_field_of_another_value(folder: Path, file: str, field: str, value: object):
    edit(folder / file, lambda fields: fields.update({field: value}))
    loads(folder)


@pytest.mark.parametrize("field", REFUSED)
def test_size_that_the_weights_do_not_have(folder: Path, field: str):
    edit(folder / "config.json", lambda fields: fields.update({field: fields[field] * 2}))
    assert not loads(folder)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def other_model(folder: Path) -> None:
    make_model(hidden_size=32).save_pretrained(folder / "other")
    (folder / "other" / "model.safetensors").replace(folder / "model.safetensors")


NAMES = ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
BREAK: dict[str, Callable[[dict, str], object]] = {
    "dropped": lambda weights, name: weights.pop(name),
    "renamed": lambda weights, name: weights.update({name + "s": weights.pop(name)}),
    "wider": lambda weights, name: weights.update({name: torch.cat([weights[name], weights[name]])}),
    "flat": lambda weights, name: weights.update({name: weights[name].flatten()[:-1]}),
    "empty": lambda weights, name: weights.update({name: weights[name][:0]}),
    "nan": lambda weights, name: weights[name].view(-1)[3:4].fill_(float("nan")),
    "infinite": lambda weights, name: weights[name].view(-1)[3:4].fill_(-float("inf")),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", BREAK)
def test_wrong_weight(folder: Path, how: str, name: str):
    tensors(lambda weights: BREAK[how](weights, name))(folder)
    with pytest.raises(UserError, match=r"model") as error:
        load_model(str(folder))
    assert name in str(error.value) or "describes" in str(error.value)


def test_weight_too_many_and_weights_of_another_model(folder: Path):
    assert loads(folder)
    tensors(lambda weights: weights.update(extra=torch.ones(2)))(folder)
    with pytest.raises(UserError, match=r"model\.safetensors holds extra, of which LlamaForCausalLM knows nothing"):
        load_model(str(folder))
    other_model(folder)
    assert not loads(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["gone", "empty", "half", "list", "binary", "folder"])
def test_broken_file(folder: Path, file: str, how: str):
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(
            {"empty": b"", "half": content[: len(content) // 2], "list": b"[]", "binary": b"\xff\xfe\0"}[how]
        )
    taken = loads(folder)
    # without them there are defaults
    assert not taken or file in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("seed", range(4000 if FULL else 45))
def test_flipped_bit(folder: Path, seed: int):
    chance = random.Random(seed)
    path = folder / chance.choice(FILES[:-1])
    content = bytearray(path.read_bytes())
    # a header is short: half of the bits are flipped there
    where = chance.randrange(min(len(content), chance.choice([2000, len(content)])))
    content[where] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    loads(folder)
