"""What a command line asks to measure: models, what they are given, and the configuration of the run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from simnpo.benchmarks.throughput.memory import parse_bytes
from simnpo.benchmarks.throughput.shapes import SHAPES, random_model, vocab_size
from simnpo.benchmarks.throughput.workload import Workload, documents, tofu, tofu_sized
from simnpo.config import UnlearnConfig
from simnpo.demo import model_file
from simnpo.errors import UserError
from simnpo.loading import load_tokenizer

# the published forget05 run's
FORGET_COEF, RETAIN_COEF, LEARNING_RATE = 0.1375, 1.0, 1e-5


@dataclass(frozen=True)
class Case:
    """A model and what it is measured on; of the tokenizer only the pad token counts for a random model."""

    name: str
    config: UnlearnConfig
    tokenizer: Any
    workloads: list[Workload]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name models, data and machine."""
    parser.add_argument("--model", help="Hugging Face id, folder or .gguf file (default: the demo's SmolLM2-135M)")
    parser.add_argument("--model-shape", nargs="+", choices=SHAPES, help="random weights of these shapes instead")
    parser.add_argument("--models", type=Path, help="folder that keeps random models (default: a temporary one)")
    parser.add_argument("--data", type=Path, help="folder with TOFU's files (default: made-up rows of their lengths)")
    parser.add_argument("--context", nargs="+", type=int, metavar="T", help="documents of T tokens instead of TOFU")
    parser.add_argument("--memory-limit", help="as 24GB: of the GPU's memory, or of what a process allocates")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")
    parser.add_argument("--output", type=Path, default=Path("bench-results"))


def check(options: argparse.Namespace, at_least: dict[str, int]) -> torch.device:
    """Checks the options, turns the memory limit into bytes and sets it on a GPU; returns the device.

    Raises:
        UserError: an option makes no sense; names it.
    """
    if options.model and options.model_shape:
        raise UserError("model and model-shape are two ways to name the model: give one of them")
    if options.model_shape and options.data:
        raise UserError("data is text, and a random model has no tokenizer: leave data out, made-up rows are as long")
    if options.context and options.data:
        raise UserError("data and context are two things to measure on: give one of them")
    for name, least in at_least.items():
        if getattr(options, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(options, name)}")
    options.memory_limit = parse_bytes(options.memory_limit) if options.memory_limit else None
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    limit_gpu_memory(options.memory_limit, device)
    return device


def limit_gpu_memory(limit: int | None, device: torch.device) -> None:
    """Lets torch's allocator hand out `limit` bytes and no more, as a smaller card would; None: all there is."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit or total) / total), device)


def configuration(model: str, cpu: bool, **changes: Any) -> UnlearnConfig:
    """What `simnpo unlearn` would be given; the examples come from a `Workload`, so its two files are names only."""
    settings: dict[str, Any] = {
        "forget_coef": FORGET_COEF, "retain_coef": RETAIN_COEF, "learning_rate": LEARNING_RATE, "eval_examples": 0,
    }  # fmt: skip
    files = {"forget": "forget05.jsonl", "retain": "retain95.jsonl", "output": "unused"}
    return UnlearnConfig(model=model, cpu=cpu, **files, **settings | changes)


def cases(options: argparse.Namespace, models: Path, device: torch.device, **changes: Any) -> Iterator[Case]:
    """The models of the command line, one after the other; `changes` go into their configuration.

    Raises:
        UserError: the model or the data is not there.
    """
    for shape in options.model_shape or [None]:
        if shape is None:
            model = options.model or str(model_file())
            tokenizer: Any = load_tokenizer(model)
            name, words = Path(model).name, len(tokenizer)
        else:
            model, tokenizer = random_model(shape, models, device), SimpleNamespace(pad_token_id=0)
            name, words = f"{shape} (random weights)", vocab_size(shape)
        if options.context:
            workloads = [documents(T, words) for T in options.context]
        else:
            workloads = [tofu_sized(words) if options.data is None else tofu(options.data, tokenizer)]
        yield Case(name, configuration(model, options.cpu, **changes), tokenizer, workloads)
