"""The memory options of a run: each takes the same steps as the run without it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file

from simnpo import SimNPO, attach
from simnpo.config import UnlearnConfig
from simnpo.errors import RunError, UserError
from simnpo.loading import load_weights
from simnpo.model import add_lora, relative_error
from simnpo.training import smaller
from simnpo.training.loop import unlearn


@pytest.fixture
def config(model_dir, forget_file, retain_file, tmp_path):
    def make(**changes: object) -> UnlearnConfig:
        options = {"model": str(model_dir), "forget": str(forget_file), "retain": str(retain_file), "cpu": True}
        options |= {"output": str(tmp_path / "run"), "max_steps": 4, "batch_size": 4, "learning_rate": 1e-3}
        options |= {"save_steps": 1, "eval_examples": 0, "precision": "fp32", "max_grad_norm": 0.0}
        return UnlearnConfig(**options | changes)

    return make


def weights(output: Path) -> torch.Tensor:
    tensors = load_file(output / "model" / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "lever",
    [
        {"gradient_checkpointing": True},
        {"tile_tokens": 16},
        {"gradient_checkpointing": True, "tile_tokens": 16},
        {"separate_terms": True},
        {"separate_terms": True, "gradient_accumulation_steps": 3, "packing": "off"},
        {"gradient_release": True},
        {"gradient_release": True, "gradient_checkpointing": True, "tile_tokens": 16, "chunk_tokens": 16},
        {"attention": "sdpa"},
        {"attention": "eager", "packing": "off"},
    ],
)
@pytest.mark.parametrize("method", ["simnpo", "npo"])
def test_a_lever_changes_the_memory_and_not_the_weights(config, tmp_path, lever, method):
    start = weights_of_folder(config())
    plain = weights(unlearn(config(method=method, output=str(tmp_path / "plain"))))
    ours = weights(unlearn(config(method=method, **lever)))
    # AdamW divides by the size of a gradient: where that is next to nothing, its rounding decides
    assert relative_error(ours - start, plain - start) < 2e-3
    for row, expected in zip(rows(tmp_path / "run"), rows(tmp_path / "plain"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["tokens"] == expected["tokens"]


def weights_of_folder(config: UnlearnConfig) -> torch.Tensor:
    tensors = load_file(Path(config.model) / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
@pytest.mark.parametrize("release", [False, True])
def test_bf16_weights_end_near_those_of_float32(config, tmp_path, optimizer, release):
    options = {"precision": "bf16", "optimizer": optimizer, "learning_rate": 1e-4, "gradient_release": release}
    start = weights_of_folder(config())
    plain = weights(unlearn(config(**options | {"gradient_release": False}, output=str(tmp_path / "plain"))))
    ours = weights(unlearn(config(**options, weights="bf16")))
    assert relative_error(ours, plain) < 4e-3  # the last digit of bf16
    assert not ours.equal(start)
    assert (rows(tmp_path / "run")[0]["grad_norm"] is None) == release


def unlearn_until(step: int, config: UnlearnConfig, monkeypatch) -> None:
    """A run that ends in `step`, counted from 0, as `smaller.accumulate` stands; undoes every patch."""
    accumulate = smaller.accumulate

    def stops(accelerator, model, collator, sampler, config, now):
        if now == step:
            raise SystemExit
        return accumulate(accelerator, model, collator, sampler, config, now)

    monkeypatch.setattr(smaller, "accumulate", stops)
    with pytest.raises(SystemExit):
        unlearn(config)
    monkeypatch.undo()


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "bf16", "precision": "bf16"},
        {"weights": "bf16", "precision": "bf16", "gradient_release": True, "optimizer": "adafactor"},
        {"optimizer": "adamw8bit", "gradient_release": True},
        {"separate_terms": True, "gradient_checkpointing": True, "tile_tokens": 8},
    ],
)
def test_resumes_to_the_same_bits(config, tmp_path, monkeypatch, changes):
    whole = unlearn(config(**changes, output=str(tmp_path / "whole")))
    unlearn_until(2, config(**changes), monkeypatch)
    assert weights(unlearn(config(**changes, resume=True))).equal(weights(whole))


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_a_step_that_runs_out_of_memory_is_taken_in_smaller_pieces(config, tmp_path, monkeypatch, caplog, message):
    plain = weights(unlearn(config(output=str(tmp_path / "plain"))))
    monkeypatch.setattr(smaller, "accumulate", out_of_memory_in(smaller.accumulate, step=2, until=2, message=message))
    output = unlearn(config())
    assert f"step 3 ran out of memory ({message}" in caplog.text
    assert "with gradient_accumulation_steps 2; the mathematics is the same" in caplog.text
    changes = json.loads((output / "out_of_memory.json").read_text())["changes"]
    assert changes == [{"step": 2, "gradient_accumulation_steps": 2}]
    assert relative_error(weights(output), plain) < 1e-5


def out_of_memory_in(accumulate, step: int, until: int, message: str = "CUDA out of memory"):
    """`accumulate` that fails in `step`, halfway through its gradients, until it is cut into `until` micro-batches."""

    def fails(accelerator, model, collator, sampler, config, now):
        totals = accumulate(accelerator, model, collator, sampler, config, now)
        if now == step and config.gradient_accumulation_steps < until:
            raise (torch.OutOfMemoryError if "CUDA" in message else RuntimeError)(message)
        return totals

    return fails


def test_what_did_not_fit_is_known_after_a_resume(config, tmp_path, monkeypatch):
    monkeypatch.setattr(smaller, "accumulate", out_of_memory_in(smaller.accumulate, step=1, until=4))
    whole = weights(unlearn(config(output=str(tmp_path / "whole"))))
    unlearn_until(3, config(save_steps=2), monkeypatch)
    assert weights(unlearn(config(save_steps=2, resume=True))).equal(whole)


def test_a_step_taken_again_draws_its_dropout_anew(config, tmp_path, monkeypatch):
    make_model(attention_dropout=0.3).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")

    def make(**changes):
        return config(model=str(tmp_path / "model"), **changes)

    monkeypatch.setattr(smaller, "accumulate", out_of_memory_in(smaller.accumulate, step=1, until=4))
    whole = unlearn(make(output=str(tmp_path / "whole")))
    unlearn_until(2, make(), monkeypatch)
    # back to before the step that did not fit, as after a kill
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000002")
    assert weights(unlearn(make(resume=True))).equal(weights(whole))


def test_chunks_are_halved_when_micro_batches_cannot_be(config, monkeypatch):
    accumulate, seen = smaller.accumulate, []

    def fails(accelerator, model, collator, sampler, config, step):
        seen.append((config.gradient_accumulation_steps, config.chunk_tokens))
        if config.chunk_tokens != 512:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return accumulate(accelerator, model, collator, sampler, config, step)

    monkeypatch.setattr(smaller, "accumulate", fails)
    unlearn(config(max_steps=1))
    assert seen == [(1, None), (2, None), (4, None), (4, 2048), (4, 1024), (4, 512)]


def test_a_step_that_cannot_get_smaller_ends_the_run_with_its_checkpoints(config, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    unlearn_until(2, config(), monkeypatch)
    monkeypatch.setattr(smaller, "accumulate", fails)
    with pytest.raises(RunError, match=r"step 3 ran out of memory .* single sequences and a chunk of 256 tokens"):
        unlearn(config(resume=True))
    monkeypatch.undo()
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
    unlearn(config(resume=True))


def test_updates_inside_backward_go_back_to_a_checkpoint(config, monkeypatch):
    monkeypatch.setattr(smaller, "accumulate", out_of_memory_in(smaller.accumulate, step=2, until=2))
    with pytest.raises(RunError, match="--resume goes back to the newest checkpoint and takes the step with chunk_tok"):
        unlearn(config(gradient_release=True))
    monkeypatch.undo()
    unlearn(config(gradient_release=True, resume=True))


def test_another_error_is_not_taken_for_it(config, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(smaller, "accumulate", fails)
    with pytest.raises(RuntimeError, match="must match"):
        unlearn(config())


def test_a_body_in_4_bits_is_merged_into_the_weights_it_was_rounded_from(config, tmp_path):
    model_dir = tmp_path / "model"  # of whole blocks of 64 weights
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(model_dir)
    make_tokenizer().save_pretrained(model_dir)
    output = unlearn(config(model=str(model_dir), lora=True, load_in_4bit=True, learning_rate=1e-2))
    losses = [row["loss"] for row in rows(output)]
    assert losses[-1] < losses[0]
    before, after = load_file(model_dir / "model.safetensors"), load_file(output / "model/model.safetensors")
    assert before.keys() == after.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    change = after[name] - before[name]
    assert 0 < change.norm() < before[name].norm()
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 16
    assert after["model.embed_tokens.weight"].equal(before["model.embed_tokens.weight"])


def test_gradients_through_a_body_in_4_bits(tmp_path):
    """After a forward without a gradient as well, where bitsandbytes would repack the weights on some CPUs."""
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    ids = torch.arange(24).view(2, 12)

    def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = add_lora(model, 4, 8.0)
        with torch.no_grad():
            model(ids, labels=ids, objective=SimNPO())
        model.train()
        model(ids, labels=ids, objective=SimNPO()).loss.backward()
        # the first matrices of the adapters have no gradient yet: the second ones are 0
        return [p.grad for name, p in model.named_parameters() if "lora_B" in name]

    in_4bit = attach(load_weights(str(tmp_path), dtype=torch.float32, in_4bit_on=torch.device("cpu")))
    plain = load_weights(str(tmp_path), dtype=torch.float32)
    for name, module in in_4bit.named_modules():
        if type(module).__name__ == "Linear4bit":
            rounded = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(rounded)
    assert relative_error(plain.model.layers[0].mlp.up_proj.weight, make_model_weight(tmp_path)) > 0.01
    ours, expected = gradients(in_4bit), gradients(attach(plain))
    assert len(ours) == len(expected) == 14
    for one, other in zip(ours, expected):
        assert other.norm() > 0
        assert relative_error(one, other) < 1e-4


def make_model_weight(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload_activations": True}, "offload_activations needs gradient_checkpointing"),
        ({"load_in_4bit": True}, "load_in_4bit needs lora"),
        ({"gradient_release": True, "max_grad_norm": 1.0}, "gradient_release needs max_grad_norm 0"),
        ({"gradient_release": True, "separate_terms": True}, "gradient_release needs one backward a step"),
        ({"weights": "bf16"}, "weights bf16 are for training the whole model in bf16 arithmetic"),
        ({"weights": "bf16", "precision": "bf16", "lora": True}, "weights bf16 are for training the whole model"),
        ({"stride": 512}, "stride must be less than max_length, got 512"),
        ({"optimizer": "sgd"}, "optimizer must be adamw, adamw8bit or adafactor, got 'sgd'"),
    ],
)
def test_levers_that_do_not_go_together(config, changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_offloading_is_refused_on_a_cpu(config):
    with pytest.raises(UserError, match="moves activations from a GPU to the host's memory, and this run is on cpu"):
        unlearn(config(gradient_checkpointing=True, offload_activations=True))
