"""Which models and contexts fit a memory budget on a GPU, with stated settings, and how far the usual loop gets in it.

python -m simnpo.benchmarks.fit 8b-lora 1b-full 8b-4bit

Each budget is a limit on what torch's allocator may hand out. Ours takes whole steps of one forget and one retain
document of T tokens. The usual loop is open-unlearning's (all the logits, a forward for each kind) with the same
adapters, weights and optimizer and with activation checkpointing; its T is doubled until memory runs out.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from simnpo.benchmarks.measure import command_line, environment, peak_memory, resident_mib
from simnpo.benchmarks.report import markdown_facts, markdown_table
from simnpo.benchmarks.throughput.cases import configuration, limit_gpu_memory
from simnpo.benchmarks.throughput.loops import OPEN_UNLEARNING, Loop
from simnpo.benchmarks.throughput.memory import outcome_of
from simnpo.benchmarks.throughput.shapes import random_model, vocab_size
from simnpo.benchmarks.throughput.subject import make_subject, prepare, steps_of
from simnpo.benchmarks.throughput.timing import OURS
from simnpo.benchmarks.throughput.workload import documents
from simnpo.config import UnlearnConfig
from simnpo.errors import UserError, exit_status

PAD_TOKEN_ID = 0
SHORTEST = 1024  # T the usual loop starts with
COLUMNS = ("budget", "loop", "T", "settings", "fits", "peak MiB", "limit MiB", "s a step", "")


class Budget(NamedTuple):
    """A model that is to train at T tokens within `limit` bytes.

    shared: fields of the configuration that both loops have; ours: those that only ours has.
    steps: 2 where the optimizer's states, made after the first backward, weigh; 1 where they are an adapter's.
    """

    shape: str
    T: int
    limit: int
    shared: dict[str, Any]
    ours: dict[str, Any]
    steps: int


STREAMED = {"offload_activations": True, "tile_tokens": 4096, "chunk_tokens": 1024}
LORA = {"lora": True, "gradient_checkpointing": True}
FULL = {"weights": "bf16", "optimizer": "adamw8bit", "gradient_checkpointing": True}
BUDGETS = {
    "8b-lora": Budget("llama-3.1-8b", 32768, 24 * 10**9, LORA, {**STREAMED, "separate_terms": True}, 2),
    "1b-full": Budget("llama-3.2-1b", 32768, 24 * 10**9, FULL, {**STREAMED, "separate_terms": True}, 2),
    "8b-4bit": Budget(
        "llama-3.1-8b", 131072, 80 * 10**9, {**LORA, "load_in_4bit": True}, {**STREAMED, "separate_terms": True}, 1
    ),
}
# what the CPU can do of it at a tiny shape: does the script run?
DRY = {"T": 64, "shape": "tiny"}
NOT_ON_A_CPU = ("offload_activations", "load_in_4bit", "optimizer")


def dry(budget: Budget) -> Budget:
    shared, ours = (
        {name: value for name, value in fields.items() if name not in NOT_ON_A_CPU}
        for fields in (budget.shared, budget.ours)
    )
    return budget._replace(**DRY, shared=shared, ours=ours)


def measure_step(
    loop: Loop | None, config: UnlearnConfig, T: int, shape: str, steps: int, device: torch.device
) -> dict[str, Any]:
    """Whether whole steps fit, their peak over all of them, and the seconds of the last."""
    seconds = 0.0

    def peak() -> float:
        nonlocal seconds
        before = resident_mib(device)
        subject = make_subject(config, documents(T, vocab_size(shape)), PAD_TOKEN_ID)
        prepare(loop, subject)
        held, step = resident_mib(device) - before, steps_of(loop, subject)

        def take() -> None:
            nonlocal seconds
            for _ in range(steps):
                start = time.perf_counter()
                step()
                _wait(device)
                seconds = time.perf_counter() - start

        return held + peak_memory(take, device)

    row = vars(outcome_of(peak)) | {"T": T}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row | ({"seconds": seconds} if row["status"] == "ok" else {})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_budget(name: str, budget: Budget, models: Path, device: torch.device) -> list[dict[str, Any]]:
    """Ours at the budget's T, then the usual loop at longer and longer ones."""
    limit_gpu_memory(None, device)
    configure: Callable[..., UnlearnConfig] = functools.partial(
        configuration, random_model(budget.shape, models, device), device.type == "cpu", batch_size=1
    )
    limit_gpu_memory(budget.limit, device)
    about = {"budget": name, "shape": budget.shape, "limit_mib": budget.limit / 2**20}
    measure = functools.partial(measure_step, shape=budget.shape, steps=budget.steps, device=device)
    ours = measure(None, configure(**budget.shared, **budget.ours), budget.T)
    rows = [about | ours | {"loop": OURS, "settings": budget.shared | budget.ours}]
    T = min(SHORTEST, budget.T)
    while T <= budget.T:
        row = measure(OPEN_UNLEARNING, configure(**budget.shared), T)
        rows.append(about | row | {"loop": OPEN_UNLEARNING.name, "settings": budget.shared})
        if row["status"] != "ok":
            break
        T *= 2
    return rows


def fits(row: dict[str, Any]) -> bool:
    return row["status"] == "ok" and row["peak_mib"] <= row["limit_mib"]


def cells(row: dict[str, Any]) -> list[str]:
    settings = ", ".join(name if value is True else f"{name} {value}" for name, value in row["settings"].items())
    numbers = [f"{row['peak_mib']:.0f}" if row["status"] == "ok" else "", f"{row['limit_mib']:.0f}"]
    seconds = f"{row['seconds']:.3g}" if row["status"] == "ok" else ""
    verdict = "yes" if fits(row) else "no" if row["status"] == "ok" else row["status"]
    return [f"{row['budget']}: {row['shape']}", row["loop"], str(row["T"]), settings, verdict, *numbers, seconds,
            row["note"]]  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m simnpo.benchmarks.fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("budgets", nargs="+", choices=BUDGETS)
    parser.add_argument("--models", type=Path, help="folder that keeps random models (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    parser.add_argument("--name", default="fit", help="of the files in --output")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny: not a measurement")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, command: str) -> int:
    """Measures and prints the budgets of the command line; 1 where ours does not keep one."""
    if not options.dry and not torch.cuda.is_available():
        raise UserError("no CUDA device here: a budget is a GPU's; --dry tries the script on the CPU")
    device = torch.device("cpu" if options.dry else "cuda")
    facts = environment(device, torch.bfloat16, command)
    rows: list[dict[str, Any]] = []
    title = f"# Benchmark: {options.name}{' (dry run, not a measurement)' if options.dry else ''}\n"
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.name}.md"
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.budgets:
            budget = dry(BUDGETS[name]) if options.dry else BUDGETS[name]
            rows += measure_budget(name, budget, options.models or Path(temporary), device)
            table = markdown_table(COLUMNS, map(cells, rows))
            parts = [title, (__doc__ or "").split("\n\n")[2] + "\n", markdown_facts(facts), table]
            path.write_text("\n".join(parts), encoding="utf-8")
            path.with_suffix(".json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    print(path.read_text(encoding="utf-8"))
    return int(not all(fits(row) for row in rows if row["loop"] == OURS))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 a budget of ours is not kept, 2 wrong input."""
    options = parse(argv)
    return exit_status(lambda: measure(options, command_line("fit", argv)))


if __name__ == "__main__":
    sys.exit(main())
