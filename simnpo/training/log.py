"""The numbers of a run: rows in metrics.jsonl and weights.jsonl, and a progress bar."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simnpo.training.disk import append_json

PLAIN_LINES = 20  # where there is no terminal to draw a bar in


class RunLog:
    """Writes rows and shows progress; a context manager.

    Args:
        output: folder of the run.
        start, num_steps: steps done already, and in all.
        enabled: False on every rank but the first, which then writes and shows nothing.
    """

    def __init__(self, output: Path, start: int, num_steps: int, *, enabled: bool = True) -> None:
        self.output, self.enabled, self.num_steps = output, enabled, num_steps
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("unlearning"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self.task = self.progress.add_task("steps", total=num_steps, completed=start, numbers="")

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def step(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl."""
        self._append("metrics.jsonl", row)
        numbers = (
            f"forget NLL {row['forget_nll']:.3f}  retain NLL {row['retain_nll']:.3f}  "
            f"{row['tokens_per_second']:.0f} tokens/s  {row['peak_memory_mib']:.0f} MiB"
        )
        self.progress.update(self.task, completed=row["step"], numbers=numbers)
        step, every = row["step"], max(1, self.num_steps // PLAIN_LINES)
        if self.enabled and not self.console.is_terminal and (step % every == 0 or step == self.num_steps):
            self.console.print(f"step {step}/{self.num_steps}  {numbers}", soft_wrap=True)

    def weights(self, row: dict[str, Any]) -> None:
        """One row of weights.jsonl: {step, ids, num_tokens, weights}."""
        self._append("weights.jsonl", row)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self.enabled:
            append_json(self.output / name, row)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: allocated on a CUDA device, resident in RAM elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB


class Clock:
    """Tokens and seconds of a run, counted on from what a resumed run had."""

    def __init__(self, tokens: int, seconds: float) -> None:
        self.tokens, self._started = tokens, time.perf_counter() - seconds
        self._lap = (tokens, time.perf_counter())

    def add(self, tokens: float) -> None:
        self.tokens += int(tokens)

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def lap(self) -> float:
        """Tokens per second since the last call."""
        tokens, since = self._lap
        self._lap = (self.tokens, time.perf_counter())
        return (self.tokens - tokens) / (self._lap[1] - since)
