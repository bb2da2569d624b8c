"""Predictions against what real steps of the loop took, counted storage by storage; the search; the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from planned_step import examples, measured_peak
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen2Config

from simnpo.cli import main
from simnpo.config import UnlearnConfig
from simnpo.errors import UserError
from simnpo.planning.auto import choose_levers, largest_step, resumed
from simnpo.planning.command import command_line
from simnpo.planning.ledger import Ledger
from simnpo.planning.loss import Sequences
from simnpo.planning.machine import RESERVED_BYTES, RESERVED_SHARE, Machine, parse_memory
from simnpo.planning.model_shape import ModelShape, read_config
from simnpo.planning.predict import Workload, optimizer_bytes, predict, predict_eager
from simnpo.planning.search import _last_resorts, changed_levers, choose, longest_context
from simnpo.planning.simulate import FEW_LAYERS, Recipe, _run, simulate

V = 2000
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
}
# for what only asks for many predictions: a simulation takes as long as its layers, of more than five it takes nine
SHALLOW = LlamaConfig(**SIZES | {"num_hidden_layers": 2}, tie_word_embeddings=False)
FORGET, RETAIN = examples("forget", [100, 200, 150, 120], V), examples("retain", [180, 100, 90, 160], V)
NONE_OF_IT = {"gradient_checkpointing": True, "gradient_release": True, "max_grad_norm": 0.0}
# model, configuration, whether sequences are packed
STEPS = [
    ("untied", {}, True),
    ("untied", {}, False),
    ("untied", {"attention": "sdpa"}, True),
    ("untied", {"gradient_checkpointing": True, "tile_tokens": 128}, True),
    ("untied", {"weights": "bf16"}, True),
    ("untied", {"weights": "bf16"} | NONE_OF_IT, True),
    ("tied", {"precision": "fp32"}, True),
    ("tied", {"gradient_checkpointing": True}, True),
    ("tied", {"weights": "bf16", "optimizer": "adafactor"}, True),
    ("qwen2", {"lora": True}, True),
    ("qwen2", {"chunk_tokens": 128, "gradient_accumulation_steps": 4, "separate_terms": True}, True),
    ("gemma", {"lora": True, "precision": "fp32", "gradient_checkpointing": True}, True),
    ("gemma", {"lora": True, "gradient_checkpointing": True, "tile_tokens": 128}, True),
]


def machine(gigabytes: float, *, on_gpu: bool = False) -> Machine:
    """One whose rates and memory are round numbers."""
    return Machine(1e12, 1e11, 1e10, gigabytes * 1e9, on_gpu, "given")


def with_budget(nbytes: float) -> Machine:
    """A GPU whose tensors may take so many bytes."""
    return replace(machine(8, on_gpu=True), memory=(nbytes + RESERVED_BYTES) / (1 - RESERVED_SHARE))


def run_config(model: str, **options: Any) -> UnlearnConfig:
    return UnlearnConfig(model=model, forget="f", retain="r", output="o", **{"batch_size": 4, **options})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The models of CONFIGS, saved."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        made[name] = str(tmp_path_factory.mktemp(name))
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


@pytest.mark.parametrize(("name", "options", "packed"), STEPS)
def test_peak_is_within_a_tenth_of_a_real_step(
    name: str, options: dict[str, Any], packed: bool, folders: dict[str, str]
) -> None:
    config = run_config(folders[name], **options)
    measured = measured_peak(config, FORGET, RETAIN, packed=packed)
    workload = largest_step(config, FORGET, RETAIN)
    predicted = predict(ModelShape(read_config(config.model)), config, workload, machine(8), packed=packed)
    assert sum(predicted.parts.values()) == predicted.peak
    assert abs(predicted.peak / measured - 1) < 0.1, (predicted, measured)


def test_a_long_packed_sequence(folders: dict[str, str]) -> None:
    forget, retain = examples("forget", [1500], V), examples("retain", [700, 100], V)
    config = run_config(folders["tied"], batch_size=1, retain_batch_size=2, gradient_checkpointing=True)
    measured = measured_peak(config, forget, retain, packed=True)
    workload = largest_step(config, forget, retain)
    predicted = predict(ModelShape(read_config(config.model)), config, workload, machine(8))
    assert abs(predicted.peak / measured - 1) < 0.1


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(lora_rank=4, gradient_checkpointing=True), Recipe(loss="eager")])
def test_few_layers_stand_for_all(recipe: Recipe) -> None:
    shape = ModelShape(LlamaConfig(**SIZES | {"num_hidden_layers": 9}))
    sequences = Sequences.equal(2, 96, is_retain=False)
    recipe = replace(recipe, packed=recipe.loss == "ours")
    extrapolated, whole = simulate(shape, recipe, sequences), _run(shape, recipe, sequences, 9)
    assert shape.num_layers > FEW_LAYERS[1]
    assert max(sum(p.values()) for p in extrapolated.segments.values()) == max(
        sum(p.values()) for p in whole.segments.values()
    )
    for kind, work in whole.work.items():
        assert extrapolated.work[kind].numbers() == pytest.approx(work.numbers())
    assert sorted(extrapolated.trained) == sorted(whole.trained)


def test_work_is_that_of_the_schedule() -> None:
    shape = ModelShape(CONFIGS["untied"])
    sequences = Sequences.equal(2, 129, is_retain=True)
    G = 2.0 * 256 * V * SIZES["hidden_size"]
    for lora_rank, products in ((None, 3), (4, 2)):
        found = simulate(shape, Recipe(lora_rank=lora_rank, chunk_tokens=64), sequences)
        assert found.work["loss"].gemm_flops == pytest.approx(products * G)
    plain, checkpointed = (simulate(shape, Recipe(gradient_checkpointing=on), sequences) for on in (False, True))
    assert "recompute" not in plain.work
    # a layer again but for its last product, whose result nobody needs
    share = checkpointed.work["recompute"].gemm_flops / checkpointed.work["forward"].gemm_flops
    assert 0.6 < share < 1
    assert checkpointed.checkpoint_bytes == 258 * SIZES["hidden_size"] * 4
    assert checkpointed.checkpoint_bytes < plain.checkpoint_bytes / 10


def test_ledger_counts_what_is_alive() -> None:
    with Ledger() as ledger:
        a = torch.zeros(1000)
        b = a + 1
        del b
        c = a.view(10, 100)
        ledger.enter("later", "later")
        d = c @ c.t()
    assert ledger.segments["start"].peak == 8000
    assert ledger.segments["later"].peak == 4000 + 400
    assert ledger.work["later"].gemm_flops == 2 * 10 * 10 * 100
    assert d.shape == (10, 10)


def test_optimizer_states_are_those_of_the_optimizers() -> None:
    from transformers.optimization import Adafactor

    p = torch.nn.Parameter(torch.ones(300, 70))
    for name, optimizer in (
        ("adamw", torch.optim.AdamW([p])),
        ("adafactor", Adafactor([p], scale_parameter=False, relative_step=False, lr=1e-3)),
    ):
        p.grad = torch.ones_like(p)
        optimizer.step()
        states = sum(x.nbytes for x in optimizer.state[p].values() if isinstance(x, torch.Tensor) and x.dim())
        assert optimizer_bytes(name, [p.shape]) == states, name


def test_eager_holds_all_logits_and_a_second_model_for_npo(folders: dict[str, str]) -> None:
    config = run_config(folders["untied"])
    shape, workload = ModelShape(read_config(config.model)), largest_step(config, FORGET, RETAIN)
    eager = predict_eager(shape, config, workload, machine(8))
    N = 8 * 200
    # in bf16, in float32, their log-softmax and its gradient at the very least
    assert eager.parts["loss chunk"] >= N * V * (2 + 4 + 4)
    npo = predict_eager(shape, replace(config, method="npo"), workload, machine(8))
    assert npo.parts["second model"] == npo.parts["weights"]
    assert npo.peak - eager.peak == npo.parts["weights"]


def test_offloaded_checkpoints_are_in_the_host() -> None:
    shape = ModelShape(LlamaConfig(**SIZES | {"num_hidden_layers": 40}))
    config = run_config("m", gradient_checkpointing=True)
    workload = Workload(Sequences.equal(1, 4096, is_retain=False), Sequences())
    here = predict(shape, config, workload, machine(8, on_gpu=True))
    away = predict(shape, replace(config, offload_activations=True), workload, machine(8, on_gpu=True))
    assert away.host_bytes == 40 * 4096 * SIZES["hidden_size"] * 4
    assert away.peak < here.peak
    recipe = Recipe(gradient_checkpointing=True, on_gpu=True, attention="linear")
    runs = [simulate(shape, replace(recipe, offload_activations=on), workload.forget) for on in (False, True)]
    alive = [run.segments["backward of the last layer"]["activations"] for run in runs]
    # all but the two that are on their way
    assert alive[0] - alive[1] == 38 / 40 * away.host_bytes


@pytest.mark.parametrize("is_uniform", [True, False])
def test_with_offloading_activations_do_not_grow_with_the_layers(is_uniform: bool) -> None:
    recipe = Recipe(gradient_checkpointing=True, offload_activations=True, on_gpu=True, attention="linear")
    found = []
    for num_layers in (8, 16):
        shape = ModelShape(LlamaConfig(**SIZES | {"num_hidden_layers": num_layers}))
        # of layers that differ all are run
        shape.is_uniform = is_uniform
        run = simulate(shape, recipe, Sequences.equal(1, 512, is_retain=False))
        assert run.checkpoint_bytes == 512 * SIZES["hidden_size"] * 4
        found.append({name: parts.get("activations", 0) for name, parts in run.segments.items()})
    few, many = found
    assert {name: many[name] for name in few} == few
    assert max(many.values()) == max(few.values())
    # where there are two layers' inputs anyway, and where all but two of them have left
    for direction in ("forward", "backward"):
        alive = [few[f"{direction} of the {place} layer"] for place in ("second", "last but one", "last")]
        assert len(set(alive)) == 1, alive


@pytest.mark.parametrize("lora_rank", [4, None])
def test_norms_in_tiles_lower_the_peak(lora_rank: int | None) -> None:
    # so narrow an MLP is nowhere near the peak
    shape = ModelShape(LlamaConfig(**SIZES | {"num_hidden_layers": 2, "intermediate_size": 16}))
    recipe = Recipe(
        lora_rank=lora_rank, gradient_checkpointing=True, on_gpu=True, attention="linear", chunk_tokens=64
    )  # fmt: skip
    peaks = []
    for tile_tokens in (None, 256, 64):
        run = simulate(shape, replace(recipe, tile_tokens=tile_tokens), Sequences.equal(1, 2048, is_retain=False))
        peaks.append(max(sum(parts.values()) for parts in run.segments.values()))
    # two float32 of (T, D) at the least
    assert peaks[0] - peaks[1] > 2 * 2048 * SIZES["hidden_size"] * 4
    assert peaks[2] == peaks[1], "no more than 8 tiles are simulated"


def test_the_fastest_that_fits_and_nothing_when_nothing_is_needed() -> None:
    shape, config = ModelShape(SHALLOW), run_config("m", batch_size=8)
    workload = Workload(Sequences.equal(8, 512, is_retain=False), Sequences.equal(8, 512, is_retain=True))
    roomy = choose(shape, config, workload, machine(8, on_gpu=True), packed=True)
    assert roomy.best is not None
    assert roomy.best.levers == {}
    need = roomy.best.prediction.peak
    tight = with_budget(0.5 * need)
    found = choose(shape, config, workload, tight, packed=True)
    assert found.best is not None
    assert found.best.levers
    assert found.best.prediction.peak <= tight.budget
    fitting = [one.prediction.step_seconds for one in found.tried if one.prediction.peak <= tight.budget]
    assert found.best.prediction.step_seconds == min(fitting)
    assert found.best.config.weights == "fp32", "exact options are enough here"
    none = choose(shape, config, workload, with_budget(1e6), packed=True)
    assert none.best is None
    assert none.smallest.prediction.peak < tight.budget


def test_tiles_and_offloading_are_tried_without_a_smaller_chunk() -> None:
    config = run_config("m", batch_size=1, gradient_checkpointing=True)
    workload = Workload(Sequences.equal(1, 16384, is_retain=False), Sequences())
    resorts = list(_last_resorts(ModelShape(SHALLOW), config, workload, machine(8, on_gpu=True)))
    tried = [changed_levers(one).keys() - {"gradient_checkpointing"} for one in resorts]
    assert tried[-2:] == [
        {"tile_tokens", "offload_activations"},
        {"tile_tokens", "offload_activations", "chunk_tokens"},
    ]


def test_what_the_user_set_stays() -> None:
    shape = ModelShape(SHALLOW)
    config = run_config("m", batch_size=8, gradient_accumulation_steps=2, optimizer="adafactor", chunk_tokens=500)
    workload = Workload(Sequences.equal(8, 512, is_retain=False), Sequences.equal(8, 512, is_retain=True))
    for one in choose(shape, config, workload, with_budget(1e6), packed=True).tried:
        assert one.config.gradient_accumulation_steps == 2
        assert one.config.optimizer == "adafactor"
        assert one.config.chunk_tokens == 500


def test_auto_chooses_and_resumes_with_its_choice(tmp_path: Path) -> None:
    SHALLOW.save_pretrained(tmp_path / "model")
    config = replace(run_config(str(tmp_path / "model")), auto=True, output=str(tmp_path))
    assert choose_levers(config, FORGET, RETAIN, machine(8, on_gpu=True)) == replace(config, auto=False)
    plain = predict(
        ModelShape(read_config(config.model)), config, largest_step(config, FORGET, RETAIN), machine(8, on_gpu=True)
    )  # fmt: skip
    tight = with_budget(0.6 * plain.peak)
    chosen = choose_levers(config, FORGET, RETAIN, tight)
    assert chosen != replace(config, auto=False)
    saved = json.loads(json.dumps(chosen.__dict__))
    assert resumed(replace(config, resume=True), saved) == replace(chosen, resume=True)
    with pytest.raises(UserError, match="auto: no memory options"):
        choose_levers(config, FORGET, RETAIN, with_budget(1e6))


def test_largest_step_draws_the_longest() -> None:
    workload = largest_step(run_config("m", batch_size=2, retain_batch_size=5), FORGET, RETAIN)
    assert workload.forget.tokens == (200, 150)
    assert workload.forget.targets == (199, 149)
    assert workload.retain.tokens == (180, 160, 100, 90, 180)
    assert workload.retain.is_retain == (True,) * 5


def test_longest_context_is_where_the_budget_ends() -> None:
    asked = []

    def peak(T: int) -> int:
        asked.append(T)
        return 1000 + 3 * T + T * T // 5000

    found = longest_context(peak, 2048, 100_000.0)
    assert peak(found) <= 100_000 < peak(found + max(64, found // 40))
    assert len(asked) < 12
    assert longest_context(peak, 2048, 500.0) == 0


def test_memory_is_read_in_either_unit() -> None:
    assert parse_memory("24GB") == 24e9
    assert parse_memory("1.5 GiB") == 1.5 * 2**30
    for text in ("24", "GB", "-1GB", "0GB", "24TB"):
        with pytest.raises(UserError, match=r"gpu_memory must be .* got"):
            parse_memory(text)


def test_command_prints_what_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SHALLOW.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    rates = ["--gemm-tflops", "1", "--bandwidth-gbs", "10", "--host-gbs", "10"]
    options = ["plan", "--model", str(tmp_path / "config.json"), "--context", "256", "--batch", "4", *rates]
    assert main([*options, "--gpu-memory", "2GB", "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["command"] in printed
    assert plan["fits"]
    assert plan["predictions"]["chosen"]["peak"] <= plan["machine"]["budget"]
    reach = list(plan["longest_context"].values())
    assert reach[0] > 256
    assert reach[0] > reach[2], "eager reaches less"
    assert main([*options, "--gpu-memory", "0.82GB"]) == 1
    assert "nothing fits" in capsys.readouterr().out


def test_command_line_names_every_field_that_is_not_at_its_default() -> None:
    config = run_config("a b", gradient_checkpointing=True, chunk_tokens=128, max_grad_norm=0.0)
    assert command_line(config) == (
        "simnpo unlearn --model 'a b' --forget f --output o --retain r --batch_size 4 --max_grad_norm 0 "
        "--chunk_tokens 128 --gradient_checkpointing"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/such/folder.gguf", "--context", "64"], "model: no such file"),
        (["--model", "CONFIG", "--context", "1"], "context must be at least 2"),
        (["--model", "CONFIG", "--context", "64", "--gemm-tflops", "0"], "gemm_flops must be greater than 0"),
        (["--model", "CONFIG", "--context", "64", "--gpu-memory", "24"], "gpu_memory must be"),
    ],
)
def test_bad_input_is_named(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SHALLOW.save_pretrained(tmp_path)
    options = [str(tmp_path / "config.json") if option == "CONFIG" else option for option in options]
    assert main(["plan", *options]) == 2
    assert message in capsys.readouterr().err
