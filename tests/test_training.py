import errno
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, make_tokenizer, write_rows
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from simnpo.attached_model import attach
from simnpo.batch import Sampler
from simnpo.config import UnlearnConfig
from simnpo.data import encode, load_examples
from simnpo.errors import RunError, UserError
from simnpo.loading import load_model
from simnpo.training import checkpoint as checkpoint_module
from simnpo.training.forward import Collator, sequence_logps
from simnpo.training.loop import unlearn
from simnpo.training.optimizer import learning_rate, make_optimizer
from simnpo.training.step import accumulate

CPU = torch.device("cpu")


@pytest.fixture
def config(model_dir, forget_file, retain_file, tmp_path):
    """Makes a configuration of four quick fp32 steps."""

    def make(**changes: object) -> UnlearnConfig:
        options = {
            "model": str(model_dir),
            "forget": str(forget_file),
            "retain": str(retain_file),
            "output": str(tmp_path / "run"),
            "max_steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "eval_examples": 0,
            "cpu": True,
        }
        return UnlearnConfig(**options | changes)

    return make


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def examples(name: str, lengths: tuple[int, ...]):
    tokenizer = make_tokenizer()
    data = [{"prompt": name * (n % 3 + 1), "response": "xyz"[n % 3] * n} for n in lengths]
    return [encode(row, tokenizer, f"{name}:{n}", 200) for n, row in zip(lengths, data)]


def gradients(config: UnlearnConfig, *, packed: bool = True, step: int = 0):
    """Totals and gradients of one step on the tiny model."""
    model = attach(make_model())
    reference = {f"f:{n}": -2.0 * n for n in range(40)} if config.method == "npo" else None
    forget, retain = examples("f", tuple(range(1, 12))), examples("r", tuple(range(3, 20)))
    sampler = Sampler(forget, retain, config.batch_size, 5, seed=0)
    totals = accumulate(Accelerator(cpu=True), model, Collator(packed, 256, CPU, reference), sampler, config, step)
    return totals, {name: p.grad for name, p in model.named_parameters()}


METHODS = [{"gamma": 0.3}, {"method": "npo"}, {"method": "ga"}]


@pytest.mark.parametrize("method", METHODS)
def test_packed_step_equals_padded_step(config, method):
    ours, theirs = (gradients(config(batch_size=6, **method), packed=packed) for packed in (True, False))
    assert_same_step(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pieces", [2, 4, 6])
def test_accumulation_does_not_change_the_step(config, method, pieces):
    # over 4 micro-batches the 6 forget sequences are uneven; of 6, one has none of the 5 retain sequences
    options = {"batch_size": 6, "forget_coef": 0.7, "retain_coef": 1.3, **method}
    whole, cut = (gradients(config(**options, gradient_accumulation_steps=k), step=2) for k in (1, pieces))
    assert_same_step(cut, whole)


def assert_same_step(ours, theirs):
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=1e-5, atol=1e-5)
    for name, gradient in ours[1].items():
        assert gradient.norm() > 0
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_step_is_the_formula_on_the_models_own_logits(config):
    """Against plain autograd through the logits: SimNPO's mean over sequences, plus retain NLL per token."""
    settings = config(batch_size=3, beta=1.5, gamma=0.4, forget_coef=0.6, retain_coef=1.7)
    sampler = Sampler(examples("f", (1, 5, 9)), examples("r", (2, 4, 30)), 3, 2, seed=0)
    trained = attach(make_model())
    totals = accumulate(Accelerator(cpu=True), trained, Collator(True, 256, CPU, None), sampler, settings, 0)

    model, forget_losses, retain_logps = make_model(), [], []
    forget, retain = sampler.step(0, 0)
    for example in (*forget, *retain):
        logps = model(torch.tensor([example.input_ids])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(example.labels[1:])
        logps = logps[labels != -100].gather(1, labels[labels != -100, None])
        if example in retain:
            retain_logps.append(logps)
        else:
            x = -1.5 / len(logps) * logps.sum() - 0.4
            forget_losses.append(-2 / 1.5 * torch.nn.functional.logsigmoid(x))
    loss = 0.6 * torch.stack(forget_losses).mean() - 1.7 * torch.cat(retain_logps).mean()
    loss.backward()
    assert totals.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


# Whole runs


def test_run_leaves_a_model_that_loads_and_equals_the_trained_weights(config, model_dir):
    output = unlearn(config())
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    trained = load_file(output / "checkpoints/step-00000004/weights.safetensors")
    start = load_model(str(model_dir))[0]
    assert trained.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name])
        assert not torch.equal(parameter, start.get_parameter(name))
    assert AutoTokenizer.from_pretrained(output / "model").chat_template
    assert json.loads((output / "config.json").read_text())["learning_rate"] == 1e-3
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["versions"]["torch"] == torch.__version__
    assert not list(output.rglob(".simnpo-*"))


def test_metrics_and_weights_have_a_row_per_logged_step(config):
    output = unlearn(config(max_steps=5, logging_steps=2))
    metrics, weights = rows(output / "metrics.jsonl"), rows(output / "weights.jsonl")
    assert [row["step"] for row in metrics] == [2, 4, 5]
    assert metrics[-1].keys() == {
        *("step", "epoch", "loss", "forget_loss", "retain_loss", "forget_nll", "retain_nll", "grad_norm"),
        *("learning_rate", "tokens", "tokens_per_second", "peak_memory_mib", "seconds"),
    }
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert metrics[0]["tokens"] < metrics[1]["tokens"]
    assert [row["step"] for row in weights] == [0, 2, 5]
    assert [len(row["ids"]) for row in weights] == [10] * 3
    assert [len(row["weights"]) for row in weights] == [10] * 3


@pytest.mark.parametrize("most", [3, 0])
def test_weights_are_written_of_as_many_forget_examples_as_asked(config, most):
    output = unlearn(config(max_steps=2, weight_examples=most))
    assert (output / "weights.jsonl").exists() == (most > 0)
    if most:
        assert [len(row["ids"]) for row in rows(output / "weights.jsonl")] == [most] * 3


def test_logged_weights_are_the_formulas(config, forget_file):
    output = unlearn(config(beta=0.5, gamma=0.2))
    row = rows(output / "weights.jsonl")[0]
    for n, logp, weight in zip(row["num_tokens"], row["logps"], row["weights"]):
        assert weight == pytest.approx(2 / n / (1 + math.exp(-(0.5 / n * logp + 0.2))), rel=1e-5)


@pytest.mark.parametrize("method", ["simnpo", "npo", "ga"])
@pytest.mark.parametrize("lora", [False, True])
def test_every_method_forgets_and_retains(config, method, lora):
    beta = {"simnpo": 0.1}.get(method)  # the tiny model knows nothing: a large beta would leave it alone
    rate = 1e-2 if lora else 2e-3
    output = unlearn(config(method=method, beta=beta, lora=lora, max_steps=15, learning_rate=rate, retain_coef=3.0))
    first, *_, last = rows(output / "metrics.jsonl")
    assert last["forget_nll"] > first["forget_nll"] + 0.5
    assert last["retain_nll"] < first["retain_nll"] - 0.2


def test_without_a_retain_file_there_is_no_retain_term(config):
    output = unlearn(config(retain=None, method="ga"))
    assert all(row["retain_loss"] == 0 and row["loss"] == row["forget_loss"] for row in rows(output / "metrics.jsonl"))


def test_npo_references_are_the_initial_models_log_probabilities(config, model_dir, forget_file):
    settings = config(method="npo")
    output = unlearn(settings)
    saved = json.loads((output / "reference.json").read_text())
    model, tokenizer = load_model(str(model_dir))
    forget = load_examples(forget_file, tokenizer, 512)
    again = sequence_logps(attach(model), settings, Collator(False, 256, CPU, None), [[e] for e in forget])
    assert [saved[example.id] for example in forget] == pytest.approx(again, rel=1e-5, abs=1e-4)
    # so the first step weighs every sequence by 1
    assert rows(output / "weights.jsonl")[0]["weights"] == pytest.approx([1.0] * 10, abs=1e-5)


def test_lora_saves_the_adapter_and_the_merged_model(config):
    output = unlearn(config(lora=True, lora_rank=4, learning_rate=1e-2))
    assert (output / "adapter/adapter_model.safetensors").exists()
    assert all("lora" in name for name in load_file(output / "checkpoints/step-00000004/weights.safetensors"))
    ids = torch.arange(20)[None]
    merged = AutoModelForCausalLM.from_pretrained(output / "model")
    beside = AutoModelForCausalLM.from_pretrained(config().model)
    start = beside(ids).logits
    beside.load_adapter(output / "adapter")
    torch.testing.assert_close(merged(ids).logits, beside(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, start, atol=1e-2)


def test_merged_adapters_are_not_rounded_to_the_bodys_bf16(config, model_dir):
    output = unlearn(config(lora=True, precision="bf16"))
    layer = "model.layers.1.mlp.up_proj"
    merged = AutoModelForCausalLM.from_pretrained(output / "model").get_parameter(f"{layer}.weight")
    body = load_model(str(model_dir), dtype=torch.bfloat16)[0].get_parameter(f"{layer}.weight").float()
    adapter = load_file(output / "adapter/adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{layer}.lora_{name}.weight"] for name in "AB")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged - body, 2.0 * b @ a, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_bf16_arithmetic_keeps_what_trains_in_fp32(config, lora):
    output = unlearn(config(precision="bf16", lora=lora, learning_rate=1e-2))
    trained = load_file(output / "checkpoints/step-00000004/weights.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert rows(output / "metrics.jsonl")[-1]["loss"] < rows(output / "metrics.jsonl")[0]["loss"]


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True}, {"packing": "off"}, {"gradient_accumulation_steps": 2}]
)
@pytest.mark.parametrize("lora", [False, True])
def test_memory_options_do_not_change_the_result(config, tmp_path, changes, lora):
    plain = unlearn(config(output=str(tmp_path / "plain"), lora=lora))
    other = unlearn(config(output=str(tmp_path / "other"), lora=lora, **changes))
    for ours, theirs in zip(rows(other / "metrics.jsonl"), rows(plain / "metrics.jsonl")):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_packing_falls_back_to_padding_where_it_would_mix_sequences(config, monkeypatch, caplog):
    monkeypatch.setattr("simnpo.training.setup.keeps_sequences_apart", lambda model: False)
    output = unlearn(config())
    assert "padding instead of packing: LlamaForCausalLM mixes sequences" in caplog.text
    assert json.loads((output / "summary.json").read_text())["packed"] is False
    with pytest.raises(UserError, match="packing: LlamaForCausalLM mixes sequences that are packed into one row"):
        unlearn(config(packing="on", output=str(output) + "-on"))


def test_output_that_holds_a_run_is_refused(config):
    unlearn(config())
    with pytest.raises(UserError, match="already holds a run: continue it with --resume, or choose another --output"):
        unlearn(config())


def test_output_that_is_a_file_is_refused(config, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="output must be a folder"):
        unlearn(config())


def test_wrong_data_leaves_no_run_behind(config, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    with pytest.raises(UserError, match=r"bad\.jsonl:1: found keys"):
        unlearn(config(forget=str(bad)))
    assert not (tmp_path / "run").exists()


def test_tokenizer_of_another_model_is_refused(config, tmp_path):
    make_model(vocab_size=250, pad_token_id=None).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"forget\.jsonl:1: token 258 is outside the model's vocabulary of 250"):
        unlearn(config(model=str(tmp_path / "small")))


def test_more_micro_batches_than_sequences_is_refused(config):
    with pytest.raises(UserError, match=r"batch_size must be at least ranks x gradient_accumulation_steps = 8.*got 4"):
        unlearn(config(gradient_accumulation_steps=8))


# What stops a run


def break_at_step(monkeypatch, step: int, what) -> None:
    """Calls `what(module)` before step `step`, counted from 0, accumulates."""
    calls = []

    def breaking(accelerator, module, *args):
        if len(calls) == step:
            what(module)
        calls.append(None)
        return accumulate(accelerator, module, *args)

    monkeypatch.setattr("simnpo.training.smaller.accumulate", breaking)


def test_nan_in_hidden_states_stops_before_the_optimizer_and_names_the_examples(config, monkeypatch, tmp_path):
    def poison(model):
        # of the forget rows only the eighth has a 7
        model.model.embed_tokens.weight.data[make_tokenizer()("7")["input_ids"][0]] = float("nan")

    break_at_step(monkeypatch, 2, poison)
    with pytest.raises(RunError, match=r"step 3: the loss is nan .*stopped before the update; examples: ") as caught:
        unlearn(config(save_steps=1, batch_size=10))
    named = str(caught.value).split("examples: ")[1].split(". The")[0].split(", ")
    assert [name for name in named if name.startswith("forget")] == ["forget.jsonl:8"]
    saved = load_file(tmp_path / "run/checkpoints/step-00000002/weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "run/model").exists()


def test_infinite_gradient_stops_too(config, monkeypatch, tmp_path):
    def poison(model):
        model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))

    break_at_step(monkeypatch, 1, poison)
    with pytest.raises(
        RunError, match=r"step 2: the loss is \d.* and the gradient norm (inf|nan), .*examples: forget\.jsonl:\d+"
    ):
        unlearn(config(save_steps=1))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("writer", ["save_file", "torch_save"])
def test_full_disk_leaves_the_old_checkpoint(config, monkeypatch, tmp_path, writer):
    """The third checkpoint fails halfway, after some bytes are down."""
    saves = []
    owner, name = (checkpoint_module, "save_file") if writer == "save_file" else (torch, "save")
    write = getattr(owner, name)

    def full(value, path):
        saves.append(path)
        write(value, path)
        if len(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(RunError, match=r"cannot write .*step-00000003: .*No space left on device.*before are intact"):
        unlearn(config(save_steps=1))
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-00000001", "step-00000002"}
    monkeypatch.undo()
    unlearn(config(save_steps=1, resume=True))
    assert (tmp_path / "run/model/model.safetensors").exists()


# The optimizer


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 10, peak=1.0, warmup_ratio=0.3) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[3:] == pytest.approx([1.0, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert learning_rate(0, 1, 1.0, 0.0) == 1.0
    assert learning_rate(0, 1, 1.0, 1.0) == 1.0


def test_vectors_do_not_decay():
    matrices, vectors = make_optimizer(make_model().parameters(), 0.1).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in vectors["params"]} == {1}


def test_gradients_are_clipped_to_the_norm(config, tmp_path):
    """Adam forgets the scale of a gradient, so the test looks at the gradients the optimizer got."""
    seen = []

    def look(optimizer, args, kwargs):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat(gradients).norm().item())

    hook = register_optimizer_step_pre_hook(look)
    unlearn(config(max_grad_norm=0.5))
    unlearn(config(max_grad_norm=0.0, output=str(tmp_path / "free")))
    hook.remove()
    assert seen[:4] == pytest.approx([0.5] * 4, rel=1e-4)
    assert min(seen[4:]) > 0.6
