"""What `simnpo plan` says of the float32 pass that reads NPO's log-ratio, beside the pass itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from memory import peak_bytes
from planned_step import examples
from transformers import AutoModelForCausalLM, LlamaConfig

from simnpo.attention import use_packed_attention
from simnpo.config import UnlearnConfig
from simnpo.planning.auto import largest_step
from simnpo.planning.loss import Sequences
from simnpo.planning.machine import Machine
from simnpo.planning.model_shape import ModelShape
from simnpo.planning.predict import Workload, _reading, predict, recipe_of
from simnpo.training import setup
from simnpo.training.forward import Collator, exact_logps

MODEL = LlamaConfig(
    hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=4096, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
CPU = Machine(1e11, 1e10, 1e10, 1e11, on_gpu=False, source="given")


def settings(folder: Path | str = "m", **changes: Any) -> UnlearnConfig:
    options = {"method": "npo", "batch_size": 1, "retain_batch_size": 1, "cpu": True}
    return UnlearnConfig(model=str(folder), forget="", retain="", output="", **options | changes)


@pytest.mark.parametrize("changes", [{"lora": True}, {"weights": "bf16"}, {"lora": True, "tile_tokens": 256}, {}])
def test_memory_is_that_of_the_pass(tmp_path, changes):
    AutoModelForCausalLM.from_config(MODEL).save_pretrained(tmp_path)
    config, cpu = settings(tmp_path, **changes), torch.device("cpu")
    forget = examples("forget", [2000], MODEL.vocab_size)
    workload = largest_step(config, forget, examples("retain", [20], MODEL.vocab_size))
    shape = ModelShape(MODEL)
    reading = _reading(shape, config, recipe_of(shape, config, CPU, packed=True), workload, 1)
    assert reading is not None
    segments = reading[0].segments
    weights = segments["start"]["weights"]
    predicted = sum(segments["reading the log-ratio"].values()) - weights

    model = setup.build_model(config, cpu)
    use_packed_attention(model.eval())
    collator = Collator(True, 0, cpu, None, exact_ratio=True)
    measured = peak_bytes(lambda: exact_logps(model, config, collator, forget))
    assert 0.9 < predicted / measured < 1.1


def test_only_runs_that_take_the_pass_pay_for_it():
    shape = ModelShape(MODEL)

    def seconds(T: int, **changes: Any) -> dict[str, float]:
        workload = Workload(Sequences.equal(1, T, is_retain=False), Sequences.equal(1, T, is_retain=True))
        return predict(shape, settings(**changes), workload, CPU).seconds

    long = seconds(2000)
    assert long["log-ratio"] > 0.5 * long["forward"]
    for others in (seconds(1000), seconds(2000, method="simnpo"), seconds(2000, exact_ratio="off")):
        assert "log-ratio" not in others


def test_a_document_is_read_a_few_pieces_at_a_time():
    shape, config = ModelShape(MODEL), settings()
    recipe = recipe_of(shape, config, CPU, packed=True)

    def read(pieces: int) -> tuple[int, float]:
        tokens = 2048 * pieces
        document = Sequences((tokens,), (tokens - 1,), (False,), ((2048,) * pieces,))
        found = _reading(shape, config, recipe, Workload(document, Sequences()), 1)
        assert found is not None
        return sum(found[0].segments["reading the log-ratio"].values()), found[1]

    assert read(2)[1] == 1
    assert read(8) == (read(2)[0], 4.0)
