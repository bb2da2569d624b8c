"""Useful target tokens a second and peak memory of whole unlearning steps and runs: ours and other people's loops.

python -m simnpo.benchmarks.throughput --data TOFU --batch-size 4 8

Same model, batches, optimizer and arithmetic for all (see loops.py); their losses and gradients are compared first.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from simnpo.benchmarks.measure import command_line, environment
from simnpo.benchmarks.throughput.agreement import require_agreement
from simnpo.benchmarks.throughput.cases import Case, add_arguments, cases, check
from simnpo.benchmarks.throughput.loops import LOOPS, Loop, Theirs
from simnpo.benchmarks.throughput.memory import Outcome, in_fresh_process, outcome_of, peak_mib, step_peak
from simnpo.benchmarks.throughput.subject import Subject, make_subject, prepare, steps_of, with_reference
from simnpo.benchmarks.throughput.tables import KINDS, Row, write_results
from simnpo.benchmarks.throughput.timing import OURS, npo_over_simnpo, our_run, their_run, time_steps
from simnpo.benchmarks.throughput.workload import MAX_LENGTH, Workload
from simnpo.config import UnlearnConfig
from simnpo.errors import UserError, exit_status

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure_case(case: Case, options: argparse.Namespace, deadline: float) -> dict[str, list[Row]]:
    """How far the loops are from ours, steps, NPO against SimNPO, and runs, of one model.

    Raises:
        RunError: the loops do not agree on the first batch.
    """
    results: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    loops = [loop for loop in LOOPS if not options.loops or any(part in loop.name for part in options.loops)]
    here = [loop for loop in loops if importlib.util.find_spec(loop.package) is not None]
    about = {"model": case.name}
    theirs = Theirs(options.pad_to, options.micro_batch)
    subject = make_subject(case.config, case.workloads[0], case.tokenizer.pad_token_id, theirs)
    results["agreement"] = [
        about | {"rival": name, **difference._asdict()} for name, difference in require_agreement(subject, here).items()
    ]
    for work in case.workloads:
        for batch_size in options.batch_size:
            if time.monotonic() > deadline:
                print(f"time is up: {case.name}, {work.name}, batch {batch_size} not measured", file=sys.stderr)
                continue
            sized = subject.on(work, batch_size=batch_size)
            where = about | {"workload": work.name, "batch": batch_name(batch_size, theirs)}
            if options.rounds:
                results["steps"] += [where | row for row in measure_steps(sized, loops, options)]
            if options.npo_rounds:
                ratio, npo, simnpo = npo_over_simnpo(sized, options.npo_rounds)
                results["npo"].append(
                    where | {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high,
                             "npo_ms": npo.timing.median, "simnpo_ms": simnpo.timing.median}
                )  # fmt: skip
    del subject
    if options.whole_run:
        for work in case.workloads:
            for batch_size in options.batch_size:
                config = replace(case.config, batch_size=batch_size)
                where = about | {"workload": work.name, "batch": batch_name(batch_size, theirs)}
                runs = measure_runs(config, work, case.tokenizer, here, theirs, options.rival_steps)
                results["runs"] += [where | row for row in runs]
    return results


def batch_name(batch_size: int, theirs: Theirs) -> str:
    name, size = f"{batch_size}+{batch_size}", theirs.micro_batch
    return name if size in (None, batch_size) else f"{name}, the others' in micro-batches of {size}+{size}"


def measure_steps(subject: Subject, loops: list[Loop], options: argparse.Namespace) -> list[Row]:
    """Memory one by one, then the time of those that fit, in turns."""
    if subject.config.method == "npo":
        subject = with_reference(subject)
    everybody: dict[str, Loop | None] = {**{loop.name: loop for loop in loops}, OURS: None}
    rows = {
        name: {"rival": name, **vars(measure_memory(loop, subject, options.memory_limit))}
        for name, loop in everybody.items()
    }
    forget, retain = subject.sampler.step(0, 0)
    if (ours := rows[OURS])["status"] == "ok" and (shared := subject.collator(forget, retain).shared_prefix):
        sizes = [len(example.input_ids) for example in (*forget, *retain)]
        ours["note"] = (
            f"{shared} of {sum(sizes) / len(sizes):.0f} tokens of a sequence are the same in all: once a step"
        )
    standing = {name: (loop, subject) for name, loop in everybody.items() if rows[name]["status"] == "ok"}
    # on a GPU the measurement of memory has warmed up this process already
    warmup = 0 if subject.device.type == "cuda" else 1
    times = {}

    def time_them() -> float:
        times.update(time_steps(standing, options.rounds, warmup=warmup))
        return 0.0

    if standing and (outcome := outcome_of(time_them)).status != "ok":
        for name in standing:
            rows[name]["note"] = f"{outcome.status} while it was timed: {outcome.note}"
    for name, seen in times.items():
        timing = seen.timing
        rows[name] |= {
            "ms": timing.median, "ms_low": timing.low, "ms_high": timing.high,
            "tokens_per_second": seen.tokens_per_second,
            "x": {other: seen.times_as_fast_as(times[other]) for other in times},
        }  # fmt: skip
    return list(rows.values())


def measure_memory(loop: Loop | None, subject: Subject, limit: int | None) -> Outcome:
    if loop is not None and importlib.util.find_spec(loop.package) is None:
        return Outcome("not here", note=f"not installed: pip install {loop.package}")
    if subject.device.type == "cpu":
        pad_token_id = subject.collator.pad_token_id
        step = functools.partial(
            step_peak, loop.name if loop else None, subject.config, subject.workload, pad_token_id, subject.theirs
        )
        return in_fresh_process(step, limit)

    def run() -> float:
        prepare(loop, subject)
        return peak_mib(steps_of(loop, subject), 0.0, subject.device)

    outcome = outcome_of(run)
    subject.optimizer.zero_grad()
    torch.cuda.empty_cache()
    return outcome


def measure_runs(
    config: UnlearnConfig, work: Workload, tokenizer: Any, loops: list[Loop], theirs: Theirs, steps: int
) -> Iterator[Row]:
    yield our_run(config, work, tokenizer)
    for loop in loops:
        subject = make_subject(config, work, tokenizer.pad_token_id, theirs)
        if config.method == "npo":
            subject = with_reference(subject)
        yield their_run(loop, subject, steps)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m simnpo.benchmarks.throughput", description=(__doc__ or "").splitlines()[0]
    )
    add_arguments(parser)
    parser.add_argument("--batch-size", nargs="+", type=int, default=[4], help="forget, and as many retain, sequences")
    parser.add_argument("--loops", nargs="+", metavar="PART", help="only others whose name contains one of these")
    parser.add_argument("--method", choices=("simnpo", "npo"), default="simnpo")
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="of the arithmetic")
    parser.add_argument(
        "--weights", choices=("fp32", "bf16"), default="fp32", help="of the model, for all loops; bf16: compensated"
    )
    parser.add_argument("--lora", action="store_true", help="adapters on a bf16 body, for all loops")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for all loops")
    parser.add_argument("--pad-to", type=int, default=MAX_LENGTH, help="width of the published loop's rows at least")
    parser.add_argument("--micro-batch", type=int, help="forget, and as many retain, sequences of the others' forward")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each loop that are timed; 0: none")
    parser.add_argument("--npo-rounds", type=int, default=0, help="paired steps of NPO and SimNPO by our loop")
    parser.add_argument("--whole-run", action="store_true", help="our own loop for --epochs, others --rival-steps")
    parser.add_argument("--epochs", type=float, default=1.0, help="of the whole run")
    parser.add_argument("--rival-steps", type=int, default=3, help="of the others, which take too long for whole runs")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no new batch after this long")
    parser.add_argument("--name", default="throughput", help="of the files in --output")
    return parser.parse_args(argv)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the configuration that the command line sets."""
    names = ("method", "epochs", "precision", "weights", "lora", "gradient_checkpointing")
    return {"batch_size": options.batch_size[0], **{name: getattr(options, name) for name in names}}


def measure(options: argparse.Namespace, command: str) -> int:
    """Measures and prints everything the command line asks for."""
    device = check(options, {"rounds": 0, "npo_rounds": 0, "rival_steps": 1})
    if options.micro_batch is not None and (
        options.micro_batch < 1 or any(size % options.micro_batch for size in options.batch_size)
    ):
        raise UserError(f"micro-batch must divide every batch-size, {options.batch_size}; got {options.micro_batch}")
    facts = environment(device, DTYPES[options.precision], command)
    facts["dtype"] += " arithmetic, " + (
        "bfloat16 body, float32 adapters" if options.lora else f"{options.weights} weights"
    )
    deadline = time.monotonic() + 60 * options.minutes
    results: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases(options, options.models or Path(temporary), device, **settings(options)):
            for kind, rows in measure_case(case, options, deadline).items():
                results[kind] += rows
            # after each model: what is measured is not lost to the next one
            written = write_results(results, facts, options.output, options.name, device.type)
    print(written[0].read_text(encoding="utf-8"))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 the loops disagree, 2 wrong input."""
    options = parse(argv)
    return exit_status(lambda: measure(options, command_line("throughput", argv)))


if __name__ == "__main__":
    sys.exit(main())
