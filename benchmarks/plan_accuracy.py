"""How close `simnpo plan` comes on a CPU: predicted peaks and times beside those of a process that takes the steps.

    python -m simnpo.benchmarks.plan_accuracy

Each case runs in processes of its own, one for its memory and one for its time: a model of random weights is made, and
the loop takes two steps, the second with the optimizer's states, or four. What the process had before, Python and its
libraries, is not counted; what the libraries allocate for themselves is. Times are predicted from the rate of one large
product and of one copy, as `simnpo plan` does, and measured with nothing beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from simnpo.attention import use_packed_attention
from simnpo.batch import Sampler
from simnpo.benchmarks.measure import environment, peak_memory
from simnpo.config import UnlearnConfig
from simnpo.data import Example
from simnpo.demo import model_file
from simnpo.loading import DTYPE
from simnpo.planning.auto import largest_step
from simnpo.planning.machine import Machine, make_machine
from simnpo.planning.model_shape import ModelShape, read_config
from simnpo.planning.predict import Prediction, predict
from simnpo.training import setup
from simnpo.training.forward import Collator
from simnpo.training.optimizer import clip_gradients, make_optimizer
from simnpo.training.step import accumulate

RESULT = Path(__file__).with_name("results") / "plan.md"
# freed blocks of this size and more go back to the system at once, so that the mark is that of what is alive
MMAP_THRESHOLD = 1 << 16
WARMUP: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}


class Case(NamedTuple):
    """A model ("" is SmolLM2-135M), memory options, and the tokens of forget and retain sequences."""

    name: str
    model: Any
    options: dict[str, Any]
    forget: tuple[int, ...]
    retain: tuple[int, ...]


def llama(D: int, V: int, *, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=D, intermediate_size=3 * D, num_hidden_layers=4, num_attention_heads=D // 64,
        num_key_value_heads=D // 64, vocab_size=V, tie_word_embeddings=tied, max_position_embeddings=8192,
    )  # fmt: skip


QWEN2 = Qwen2Config(
    hidden_size=384, intermediate_size=1152, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
    vocab_size=32_000, tie_word_embeddings=False,
)  # fmt: skip
PRECISIONS: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
FULL_BF16 = {"weights": "bf16", "optimizer": "adafactor", "gradient_checkpointing": True, "tile_tokens": 1024}
SMALL, WIDE = llama(256, 8192, tied=False), llama(576, 49_152, tied=True)
CASES = [
    Case("4 layers, D 256, V 8 192", SMALL, {}, (512,) * 2, (512,) * 2),
    Case(
        "4 layers, D 256, V 8 192", SMALL, {"gradient_checkpointing": True}, (512,) * 8, (512,) * 8
    ),
    Case("4 layers, D 256, V 49 152, tied", llama(256, 49_152, tied=True), {"precision": "fp32"}, *((256,) * 2,) * 2),
    Case("4 layers, D 576, V 49 152, tied", WIDE, {}, (512,) * 2, (512,) * 2),
    Case("4 layers, D 576, V 49 152, tied", WIDE, {"lora": True}, (512,) * 2, (512,) * 2),
    Case("4 layers, D 576, V 49 152, tied", WIDE, FULL_BF16, (512,) * 4, (512,) * 4),
    Case("4 layers of Qwen2, D 384, V 32 000", QWEN2, {}, (2000,), (700, 300)),
    Case("SmolLM2-135M", "", {}, (256,) * 2, (256,) * 2),
    Case(
        "SmolLM2-135M", "", {"gradient_accumulation_steps": 2, "separate_terms": True, "gradient_checkpointing": True},
        (512,) * 2, (512,) * 2,
    ),
    Case("SmolLM2-135M", "", {"lora": True, "gradient_checkpointing": True}, (512,) * 2, (512,) * 2),
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs every case; returns the exit status: 1 where a prediction is off by more than a tenth."""
    parser = argparse.ArgumentParser(description="predicted and measured peak memory on this CPU")
    parser.add_argument("--output", type=Path, default=RESULT, help=f"Markdown to write (default: {RESULT})")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.case is not None:
        measure = measured_seconds if arguments.time else measured_mib
        print(measure(CASES[arguments.case], arguments.folder))
        return 0
    lines, worst, ratios = [], 0.0, []
    cpu = torch.device("cpu")
    machines = {name: make_machine(cpu, name, memory=1e12, on_gpu=False) for name in PRECISIONS}
    with tempfile.TemporaryDirectory() as folder:
        for k, case in enumerate(CASES):
            path = Path(folder, str(k))
            config = read_config(str(model_file())) if case.model == "" else case.model
            config.save_pretrained(path)
            found, seconds = _in_own_process(k, path), _in_own_process(k, path, "--time")
            expected = predicted(case, path, machines)
            mib = expected.peak / 2**20
            worst = max(worst, abs(mib / found - 1))
            options = ", ".join(name if value is True else f"{name} {value}" for name, value in case.options.items())
            tokens = f"{sum(case.forget)} + {sum(case.retain)}"
            memory = f"{mib:.0f} | {found:.0f} | {mib / found:.3f}"
            times = f"{expected.step_seconds:.3g} | {seconds:.3g} | {expected.step_seconds / seconds:.2f}"
            ratios.append(expected.step_seconds / seconds)
            lines.append(f"| {case.name} | {options or 'none'} | {tokens} | {memory} | {times} |")
            print(lines[-1], flush=True)
    arguments.output.write_text(_page(lines, worst, ratios), encoding="utf-8")
    return int(worst > 0.1)


def _in_own_process(k: int, folder: Path, *more: str) -> float:
    command = [sys.executable, "-m", "simnpo.benchmarks.plan_accuracy", "--case", str(k), "--folder", str(folder)]
    command += more
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    if not more:
        environ["MALLOC_MMAP_THRESHOLD_"] = str(MMAP_THRESHOLD)
    run = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"case {k} ended with {run.returncode}:\n{run.stderr[-2000:]}")
    return float(run.stdout.strip().splitlines()[-1])


def run_config(case: Case, folder: Path) -> UnlearnConfig:
    return UnlearnConfig(
        model=str(folder), forget="", retain="", output="", cpu=True,
        batch_size=len(case.forget), retain_batch_size=len(case.retain), **case.options,
    )  # fmt: skip


def examples(name: str, lengths: tuple[int, ...]) -> list[Example]:
    """Made-up tokens, all but the first of each a target."""
    rows = [[(11 * i + 3 * n) % 8000 for n in range(length)] for i, length in enumerate(lengths)]
    return [Example(f"{name}:{i}", "", "", ids, list(ids)) for i, ids in enumerate(rows)]


def predicted(case: Case, folder: Path, machines: dict[str, Machine]) -> Prediction:
    """`machines` by the arithmetic whose products they are measured with."""
    config = run_config(case, folder)
    workload = largest_step(config, examples("forget", case.forget), examples("retain", case.retain))
    return predict(ModelShape(read_config(config.model)), config, workload, machines[config.precision])


def measured_seconds(case: Case, folder: Path) -> float:
    """The median of the steps after the first."""
    setup.load_weights = random_weights
    return statistics.median(take_steps(case, folder, num_steps=4)[1:])


def measured_mib(case: Case, folder: Path) -> float:
    """MiB that this process had at its worst, over what it had before the model was made."""
    setup.load_weights = random_weights
    AutoConfig.from_pretrained(folder)
    # loads the libraries and what they keep for themselves
    with tempfile.TemporaryDirectory() as tiny:
        LlamaConfig(vocab_size=8192, **WARMUP).save_pretrained(tiny)
        take_steps(case._replace(forget=(64,) * len(case.forget), retain=(64,) * len(case.retain)), Path(tiny))
    return peak_memory(lambda: take_steps(case, folder), torch.device("cpu"))


def random_weights(name_or_path: str, *, dtype: torch.dtype, attention: str | None = None) -> Any:
    """In the place of `load_weights`, whose reading of a file leaves marks of its own."""
    config = AutoConfig.from_pretrained(name_or_path)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, **{DTYPE: dtype}).eval()


def take_steps(case: Case, folder: Path, num_steps: int = 2) -> list[float]:
    """The model, its optimizer and some steps of the loop; returns the seconds of each."""
    config = run_config(case, folder)
    forget, retain = examples("forget", case.forget), examples("retain", case.retain)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model: nn.Module = setup.build_model(config, accelerator.device)
    use_packed_attention(model)
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config.weight_decay, name=config.optimizer)
    sampler = Sampler(forget, retain, len(forget), len(retain), config.seed)
    collator = Collator(True, 0, accelerator.device, ref_logps=None)
    seconds = []
    for step in range(num_steps):
        start = time.perf_counter()
        accumulate(accelerator, model, collator, sampler, config, step)
        clip_gradients(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def _page(lines: list[str], worst: float, ratios: list[float]) -> str:
    facts = environment(torch.device("cpu"), torch.bfloat16, "python -m simnpo.benchmarks.plan_accuracy")
    stated = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"""# Predicted and measured peak memory and time of a step, CPU

The prediction is that of `simnpo plan` and of `simnpo unlearn --auto`. Measured: the high-water mark of a fresh process
over what it had before the model was made, two steps of the loop, freed memory given back at once
(`MALLOC_MMAP_THRESHOLD_={MMAP_THRESHOLD}`). Tokens are forget + retain. The largest error in memory is {worst:.1%}.

Seconds are predicted from two rates measured here, of one large product and of one copy, and measured in another fresh
process: the median of three steps after the first. The prediction is {min(ratios):.2f} to {max(ratios):.2f} of that.

| model | memory options | tokens | predicted MiB | measured MiB | ratio | predicted s | measured s | ratio |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

{stated}
"""


if __name__ == "__main__":
    sys.exit(main())
