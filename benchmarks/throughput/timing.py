"""Steps of several loops in turns, and whole runs."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from simnpo.benchmarks.measure import Timing, time_interleaved
from simnpo.benchmarks.throughput.loops import Loop
from simnpo.benchmarks.throughput.subject import Subject, make_subject, prepare, steps_of, take_step, with_reference
from simnpo.benchmarks.throughput.workload import Workload
from simnpo.config import UnlearnConfig
from simnpo.training import reference, run_folder
from simnpo.training.loop import Run, train
from simnpo.training.reference_cache import model_digest
from simnpo.training.signals import StopSignals

OURS = "simnpo"


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of the rounds of one loop, and the targets that counted in each."""

    milliseconds: list[float]
    tokens: list[int]

    @property
    def timing(self) -> Timing:
        return Timing.of(self.milliseconds)

    @property
    def tokens_per_second(self) -> float:
        """Median over the rounds."""
        return statistics.median(1e3 * n / ms for n, ms in zip(self.tokens, self.milliseconds))

    def times_as_fast_as(self, other: StepTimes) -> float:
        """Median over the rounds of the other's time over this one's: of the same batch, minutes apart at most."""
        pairs = zip(other.milliseconds, self.milliseconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def time_steps(
    subjects: Mapping[str, tuple[Loop | None, Subject]], rounds: int, *, warmup: int = 1
) -> dict[str, StepTimes]:
    """Every loop takes step k in round k, in an order that changes; making a reference model is not timed.

    Args:
        subjects: by what the row is called: a loop (None: ours) and what it works on. They may share a model.
        rounds, warmup: timed steps of each, and those before them.
    """
    steps = {name: steps_of(loop, subject) for name, (loop, subject) in subjects.items()}
    for name, (loop, subject) in subjects.items():
        prepare(loop, subject)
        for _ in range(warmup):
            steps[name]()
    names = list(subjects)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        # as time_interleaved does within its rounds: nobody always follows the same rival's cache and clock
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            loop, subject = subjects[name]
            prepare(loop, subject)
            timing = time_interleaved({name: steps[name]}, subject.device, rounds=1, warmup=0)
            seen[name].append(timing[name].total.median)
    return {
        name: StepTimes(times, [subjects[name][1].useful_tokens(warmup + turn) for turn in range(rounds)])
        for name, times in seen.items()
    }


def npo_over_simnpo(subject: Subject, rounds: int) -> tuple[Timing, StepTimes, StepTimes]:
    """What a step of ours costs with NPO over what it costs with SimNPO, after the pass that caches the reference.

    Returns:
        The ratio of the two over the rounds, and the times of both.
    """
    npo = with_reference(subject.on(subject.workload, method="npo", beta=None, gamma=0.0))
    simnpo = subject.on(subject.workload, method="simnpo", beta=None)
    simnpo = replace(simnpo, collator=subject.collator._replace(ref_logps=None))
    times = time_steps({"npo": (None, npo), "simnpo": (None, simnpo)}, rounds)
    pairs = zip(times["npo"].milliseconds, times["simnpo"].milliseconds)
    return Timing.of([a / b for a, b in pairs]), times["npo"], times["simnpo"]


def our_run(config: UnlearnConfig, work: Workload, tokenizer: Any) -> dict[str, Any]:
    """A run of our own loop from the pretrained model: NPO's reference, the log, the probes of the weights and the
    checkpoint are in its time, loading the model is not."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output=folder, reference_cache=folder, save_steps=0, eval_examples=0)
        subject = make_subject(config, work, tokenizer.pad_token_id)
        run_folder.open_output(config, None)
        start = time.perf_counter()
        collator = reference.with_reference(
            config, subject.accelerator, subject.model, model_digest(subject.model), subject.collator, work.forget,
            reload=False,
        )  # fmt: skip
        run = Run(config, subject.accelerator, subject.model, tokenizer, collator, work.forget, work.retain, [], {})
        train(run, None, StopSignals())
        seconds = time.perf_counter() - start
    return _run_row(OURS, subject, run.num_steps, seconds, whole=True)


def their_run(loop: Loop, subject: Subject, steps: int) -> dict[str, Any]:
    """The first steps of somebody's run, from the pretrained model."""
    num_steps = subject.config.num_steps(len(subject.workload.forget))
    prepare(loop, subject)
    start = time.perf_counter()
    for step in range(steps):
        take_step(loop, subject, step)
    return _run_row(loop.name, subject, steps, time.perf_counter() - start, whole=steps >= num_steps)


def _run_row(name: str, subject: Subject, steps: int, seconds: float, *, whole: bool) -> dict[str, Any]:
    tokens = sum(subject.useful_tokens(step) for step in range(steps))
    return {"rival": name, "steps": steps, "whole": whole, "seconds": seconds, "tokens": tokens,
            "tokens_per_second": tokens / seconds}  # fmt: skip
