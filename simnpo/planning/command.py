"""`simnpo plan`: what a run would take, and the command for the fastest settings that fit; without weights or data."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from simnpo.cli import COMMANDS
from simnpo.config import UnlearnConfig, is_float32
from simnpo.errors import UserError
from simnpo.objectives.methods import METHODS
from simnpo.planning.loss import Sequences
from simnpo.planning.machine import Machine, make_machine, parse_memory
from simnpo.planning.model_shape import ModelShape, read_config
from simnpo.planning.predict import Prediction, Workload, predict, predict_eager
from simnpo.planning.search import Choice, choose, longest_context, smallest_settings
from simnpo.planning.tables import Plan, print_plan
from simnpo.rows import check_file
from simnpo.text import shorten
from simnpo.training.disk import write_json


def main(options: list[str]) -> int:
    """Runs the command; returns the exit status: 0, or 1 where nothing fits.

    Raises:
        UserError: an argument makes no sense, or the model's configuration cannot be read.
    """
    arguments = _parser().parse_args(options)
    config = unlearn_config(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    memory = None if arguments.gpu_memory is None else parse_memory(arguments.gpu_memory)
    if memory is not None and not is_float32(memory):
        raise UserError(f"gpu_memory must be in the range of float32, got {shorten(str(arguments.gpu_memory))}")
    on_gpu = device.type == "cuda" or (memory is not None and not arguments.cpu)
    rates = {
        "gemm_flops": (arguments.gemm_tflops, 1e12),
        "bandwidth": (arguments.bandwidth_gbs, 1e9),
        "host_bandwidth": (arguments.host_gbs, 1e9),
    }
    for name, (value, unit) in rates.items():
        if value is not None and not (value > 0 and is_float32(value * unit)):
            raise UserError(f"{name} must be greater than 0 and in the range of float32, got {value}")
    if arguments.json is not None:
        check_writable(Path(arguments.json))
    machine = make_machine(
        device, config.precision, memory=memory, on_gpu=on_gpu,
        **{name: None if value is None else value * unit for name, (value, unit) in rates.items()},
    )  # fmt: skip
    plan = make_plan(config, machine, arguments.context)
    print_plan(plan, Console(highlight=False))
    if arguments.json is not None:
        write_json(Path(arguments.json), as_json(plan))
    return 0 if plan.choice.best is not None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("simnpo plan", description=COMMANDS["plan"])
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face id, folder, config.json or .gguf file; weights are not read")
    add("--context", type=int, required=True, metavar="T", help="tokens of each sequence")
    add("--gpu-memory", metavar="24GB", help="GB or GiB of the GPU (default: what is free; on a CPU the free RAM)")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--lora", action="store_true", help="train adapters")
    trained.add_argument("--full", action="store_true", help="train all weights (default)")
    add("--lora-rank", type=int, default=16, help="rank of the adapters (default: 16)")
    add("--batch", type=int, default=8, help="forget sequences of an optimizer step (default: 8)")
    add("--retain-batch", type=int, help="retain sequences of an optimizer step; 0: none (default: as --batch)")
    add("--method", default="simnpo", choices=METHODS, metavar="METHOD", help="as in simnpo unlearn (default: simnpo)")
    add("--precision", default="bf16", choices=("bf16", "fp32"), help="of the arithmetic (default: bf16)")
    add("--attention", help="attention implementation, as transformers names it (default: simnpo unlearn's own)")
    add("--forget", default="forget.jsonl", help="goes into the printed command")
    add("--retain", default="retain.jsonl", help="goes into the printed command")
    add("--output", default="run", help="goes into the printed command")
    add("--gemm-tflops", type=float, help="rate of matrix products in 1e12 flop/s (default: measured here)")
    add("--bandwidth-gbs", type=float, help="memory bandwidth in 1e9 bytes/s (default: measured here)")
    add("--host-gbs", type=float, help="bandwidth between GPU and host in 1e9 bytes/s (default: measured here)")
    add("--cpu", action="store_true", help="plan for the CPU even if there is a GPU")
    add("--json", metavar="FILE", help="also write the plan there")
    return parser


def check_writable(path: Path) -> None:
    """Whether a file can be written there, before the work that fills it.

    Raises:
        UserError: it is a folder or a device, or its folder is not there or not writable.
    """
    if path.exists():
        check_file(path)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"json: cannot write {path}: {path.parent} must be a folder that can be written to")


def unlearn_config(arguments: argparse.Namespace) -> UnlearnConfig:
    """The run that is to be planned, without any memory option.

    Raises:
        UserError: a number makes no sense.
    """
    if arguments.context < 2:
        raise UserError(f"context must be at least 2: one token to read and one to predict, got {arguments.context}")
    retain_batch = arguments.batch if arguments.retain_batch is None else arguments.retain_batch
    if retain_batch < 0:
        raise UserError(f"retain_batch must be 0 or more, got {retain_batch}")
    return UnlearnConfig(
        model=arguments.model,
        forget=arguments.forget,
        retain=arguments.retain if retain_batch else None,
        output=arguments.output,
        method=arguments.method,
        lora=arguments.lora,
        lora_rank=arguments.lora_rank,
        batch_size=arguments.batch,
        retain_batch_size=retain_batch if retain_batch not in (0, arguments.batch) else None,
        max_length=arguments.context,
        precision=arguments.precision,
        attention=arguments.attention,
        cpu=arguments.cpu,
    )


def make_plan(config: UnlearnConfig, machine: Machine, context: int) -> Plan:
    """Predicts, chooses, and looks for the longest context.

    Raises:
        UserError: the model's configuration cannot be read or simulated.
    """
    shape = ModelShape(read_config(config.model))

    def of_context(T: int) -> Workload:
        alternates = 1 + (config.alternates() == "beside")
        forget = Sequences.equal(config.batch_size * alternates, T, is_retain=False)
        return Workload(forget, Sequences.equal(config.retain_sequences(), T, is_retain=True))

    def ours(settings: UnlearnConfig, T: int) -> Prediction:
        return predict(shape, settings, of_context(T), machine)

    workload = of_context(context)
    choice: Choice = choose(shape, config, workload, machine, packed=True)
    chosen = choice.best or choice.smallest

    def smallest(T: int) -> UnlearnConfig:
        return smallest_settings(shape, chosen.config, of_context(T), machine)

    reach = {
        "these settings": longest_context(lambda T: ours(chosen.config, T).peak, context, machine.budget),
        "with every exact option": longest_context(lambda T: ours(smallest(T), T).peak, context, machine.budget),
        "eager": longest_context(
            lambda T: predict_eager(shape, config, of_context(T), machine).peak, context, machine.budget
        ),
    }
    plain, eager = ours(config, context), predict_eager(shape, config, workload, machine)
    return Plan(shape, config, machine, context, choice, chosen, plain, eager, reach, command_line(chosen.config))


def command_line(config: UnlearnConfig) -> str:
    """The command that runs a configuration: every field that is not at its default."""
    words = ["simnpo", "unlearn"]
    for name, field in UnlearnConfig.__dataclass_fields__.items():
        value = getattr(config, name)
        if value == field.default:
            continue
        words.append(f"--{name}")
        if value is not True:
            words.append(shlex.quote(f"{value:g}" if isinstance(value, float) else str(value)))
    return " ".join(words)


def as_json(plan: Plan) -> dict[str, Any]:
    """All numbers of a plan: bytes and seconds."""
    predictions = {"chosen": plan.chosen.prediction, "no options": plan.plain, "eager": plan.eager}
    return {
        "model": plan.config.model,
        "context": plan.context,
        "fits": plan.choice.best is not None,
        "machine": asdict(plan.machine) | {"budget": plan.machine.budget},
        "settings": plan.chosen.levers,
        "predictions": {
            name: asdict(prediction) | {"step_seconds": prediction.step_seconds}
            for name, prediction in predictions.items()
        },
        "tried": [
            {"settings": one.levers, "peak": one.prediction.peak, "step_seconds": one.prediction.step_seconds}
            for one in plan.choice.tried
        ],
        "longest_context": plan.reach,
        "command": plan.command,
    }
