"""What each memory option of `simnpo unlearn` saves in one step and what it costs, alone and together.

python -m simnpo.benchmarks.levers --model-shape smollm2-135m --batch-size 8

Every row is the run's own step with some fields of its configuration changed, and its time is measured in turns with
the plain step's. Peak memory is all of the step's: weights, gradients, optimizer, activations, logits.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from simnpo.benchmarks.measure import command_line, environment
from simnpo.benchmarks.report import markdown_facts, markdown_table
from simnpo.benchmarks.throughput.cases import Case, add_arguments, cases, check
from simnpo.benchmarks.throughput.memory import Outcome, in_fresh_process, outcome_of, step_peak
from simnpo.benchmarks.throughput.subject import make_subject
from simnpo.benchmarks.throughput.timing import time_steps
from simnpo.benchmarks.throughput.workload import Workload, every_row_a_target
from simnpo.errors import UserError, exit_status

PLAIN = "plain: packed, response rows only, float32 weights, AdamW"
COLUMNS = ("lever", "peak MiB", "x plain's", "step ms", "quartiles", "x plain's", "")
NOTES = """\
A step of `simnpo unlearn`'s own loop. Times are medians of rounds in which the plain step and the lever's took turns on
the same batches; "x plain's" is the ratio of the two peaks, and the median of the ratios of the rounds. Peak memory is
all of the step's: {memory}. A lever's fields are those of the configuration of `simnpo unlearn`.
"""
MEMORY = {"cuda": "what torch's allocator handed out", "cpu": "the high-water mark of a fresh process"}


class Lever(NamedTuple):
    """Fields of the configuration that differ from the plain step's; every_row: prompts are targets as well."""

    name: str
    changes: dict[str, Any]
    every_row: bool = False


def levers(tile_tokens: int, chunk_tokens: int, *, on_gpu: bool) -> list[Lever]:
    """The levers one by one, then those that go together."""
    checkpointing = {"gradient_checkpointing": True}
    offloaded = {**checkpointing, "offload_activations": True}
    tiled = {"tile_tokens": tile_tokens}
    # offloading is from a GPU to the host
    activations = (offloaded if on_gpu else checkpointing) | tiled
    release = {"gradient_release": True, "max_grad_norm": 0.0}
    adapters = {"lora": True, "load_in_4bit": True}
    return [
        Lever(PLAIN, {}),
        Lever("padding instead of packing", {"packing": "off"}),
        Lever("packing without a shared prefix", {"share_prefix": "off"}),
        Lever("every row a target", {}, every_row=True),
        Lever(f"{chunk_tokens} rows of logits at a time", {"chunk_tokens": chunk_tokens}),
        Lever("forget and retain apart", {"separate_terms": True}),
        Lever("activation checkpointing", checkpointing),
        Lever("activation checkpointing, offloaded", offloaded),
        Lever(f"MLPs and norms in tiles of {tile_tokens} tokens", tiled),
        Lever("AdamW in 8 bits", {"optimizer": "adamw8bit"}),
        Lever("Adafactor", {"optimizer": "adafactor"}),
        Lever("bf16 weights, compensated", {"weights": "bf16"}),
        Lever("gradient release", release),
        Lever("LoRA", {"lora": True}),
        Lever("LoRA, 4-bit body", adapters),
        Lever("together, all weights", {**activations, **release, "weights": "bf16", "optimizer": "adamw8bit"}),
        Lever("together, LoRA", {**activations, **adapters, "separate_terms": True, "chunk_tokens": chunk_tokens}),
    ]


def measure_lever(lever: Lever, case: Case, work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """A row: the peak of its step alone, then its time in turns with the plain step."""
    on_cpu = options.device.type == "cpu"
    pad_token_id = case.tokenizer.pad_token_id
    row: dict[str, Any] = {"lever": lever.name, "changes": lever.changes, "workload": work.name}
    theirs = every_row_a_target(work) if lever.every_row else work
    try:
        config = replace(case.config, **lever.changes)
    except UserError as error:
        return row | vars(Outcome("not here", note=str(error)))
    peak = functools.partial(step_peak, None, config, theirs, pad_token_id)
    row |= vars(in_fresh_process(peak, options.memory_limit) if on_cpu else outcome_of(peak))
    _free(options.device)
    if row["status"] != "ok" or not options.rounds:
        return row
    outcome = outcome_of(lambda: _time(row, lever, case, config, (work, theirs), options.rounds))
    _free(options.device)
    if outcome.status != "ok":
        row["note"] = f"{outcome.status} beside the plain step: {outcome.note}"
    return row


def _time(
    row: dict[str, Any], lever: Lever, case: Case, config: Any, works: tuple[Workload, Workload], rounds: int
) -> float:
    pad_token_id = case.tokenizer.pad_token_id
    subjects = {PLAIN: (None, make_subject(case.config, works[0], pad_token_id))}
    if lever.name != PLAIN:
        subjects[lever.name] = (None, make_subject(config, works[1], pad_token_id))
    times = time_steps(subjects, rounds)
    timing = times[lever.name].timing
    # times_as_fast_as is the other's time over its own
    ratio = times[PLAIN].times_as_fast_as(times[lever.name])
    row |= {"ms": timing.median, "ms_low": timing.low, "ms_high": timing.high, "ms_ratio": ratio}
    return timing.median


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cells(row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """One line; a lever that cannot be had here, or did not fit, has no number in it."""
    if row["status"] != "ok":
        return [row["lever"], row["status"], "", "", "", "", row["note"]]
    ratio = f"{row['peak_mib'] / plain['peak_mib']:.2f}" if plain.get("peak_mib") else ""
    memory = [row["lever"], f"{row['peak_mib']:.0f}", ratio]
    if "ms" not in row:
        return [*memory, "", "", "", row["note"]]
    quartiles = f"{row['ms_low']:.4g}-{row['ms_high']:.4g}"
    return [*memory, f"{row['ms']:.4g}", quartiles, f"{row['ms_ratio']:.2f}", row["note"]]


def write_results(tables: dict[str, list[dict[str, Any]]], facts: dict[str, str], options: argparse.Namespace) -> Path:
    """`name`.md and `name`.json in the output folder; returns the first."""
    options.output.mkdir(parents=True, exist_ok=True)
    parts = [f"# Benchmark: {options.name}\n", markdown_facts(facts), NOTES.format(memory=MEMORY[options.device.type])]
    for title, rows in tables.items():
        plain = next((row for row in rows if row["lever"] == PLAIN), {})
        parts.append(f"## {title}\n\n{markdown_table(COLUMNS, [cells(row, plain) for row in rows])}")
    path = options.output / f"{options.name}.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    data = {"facts": facts, "rows": [{"title": title, **row} for title, rows in tables.items() for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m simnpo.benchmarks.levers", description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="forget, and as many retain, sequences")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="the plain step and levers whose name has one of these"
    )
    parser.add_argument("--tile-tokens", type=int, default=256, help="of MLPs and norms in tiles")
    parser.add_argument("--chunk-tokens", type=int, default=128, help="rows of logits, where they are a lever")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each; 0: only the memory")
    parser.add_argument("--name", default="levers", help="of the files in --output")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, command: str) -> int:
    """Measures and prints everything the command line asks for."""
    options.device = check(options, {"batch_size": 1, "tile_tokens": 1, "chunk_tokens": 1, "rounds": 0})
    facts = environment(options.device, torch.bfloat16, command)
    wanted = [
        lever
        for lever in levers(options.tile_tokens, options.chunk_tokens, on_gpu=options.device.type == "cuda")
        if lever.name == PLAIN or not options.only or any(part in lever.name for part in options.only)
    ]
    tables: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases(options, options.models or Path(temporary), options.device, batch_size=options.batch_size):
            for work in case.workloads:
                rows = tables[f"{case.name}, {work.name}, batch {options.batch_size}+{options.batch_size}"] = []
                for lever in wanted:
                    rows.append(measure_lever(lever, case, work, options))
                    # after each lever: what is measured is not lost to the next one
                    path = write_results(tables, facts, options)
    print(path.read_text(encoding="utf-8"))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 a disk is full, 2 wrong input."""
    options = parse(argv)
    return exit_status(lambda: measure(options, command_line("levers", argv)))


if __name__ == "__main__":
    sys.exit(main())
