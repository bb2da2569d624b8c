"""The most memory of a whole step: weights, gradients, optimizer, reference model, activations, logits.

On a GPU what torch's allocator handed out. On the CPU the high-water mark of a fresh process, less what the libraries
held before the model was built; nothing of another loop is in it.
"""

from __future__ import annotations

import json
import pickle
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simnpo.benchmarks.measure import peak_memory, resident_mib
from simnpo.benchmarks.rivals import free_bytes
from simnpo.benchmarks.throughput.loops import AS_PUBLISHED, LOOPS, Theirs
from simnpo.benchmarks.throughput.subject import make_subject, prepare, steps_of, with_reference
from simnpo.benchmarks.throughput.workload import Workload
from simnpo.config import UnlearnConfig
from simnpo.errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# what other processes of a machine may still ask for while a fresh process of ours grows
SPARE = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of a step: its peak in MiB, or why there is none."""

    status: str  # "ok", "out of memory", "not here", "failed"
    peak_mib: float | None = None
    note: str = ""


def parse_bytes(text: str) -> int:
    """24GB, 24GiB, 500MB, 1000000.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"([0-9.]+) ?([KMG]i?B)?", text)
    try:
        assert match is not None
        return int(float(match[1]) * UNITS[match[2] or ""])
    except (AssertionError, ValueError):
        raise UserError(f"memory-limit must be a number of bytes such as 24GB or 24GiB, got {text!r}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch reports one on the CPU as a RuntimeError like any other."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def outcome_of(measure: Callable[[], float]) -> Outcome:
    """Runs `measure`, which returns MiB; an allocation that fails, or a lever that cannot be had, is an outcome too."""
    try:
        return Outcome("ok", measure())
    except UserError as error:
        return Outcome("not here", note=_first_line(error))
    except Exception as error:  # somebody else's code may fail in any way it likes; its row says how
        status = "out of memory" if is_out_of_memory(error) else "failed"
        return Outcome(status, note=_first_line(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def peak_mib(step: Callable[[], Any], before: float, device: torch.device) -> float:
    """MiB of a step at its worst, counted from `before`; a first step makes the optimizer's states."""
    step()
    return resident_mib(device) - before + peak_memory(step, device)


def step_peak(
    loop_name: str | None, config: UnlearnConfig, work: Workload, pad_token_id: int, theirs: Theirs = AS_PUBLISHED
) -> float:
    """Peak of a step of the loop of that name (None: ours) with everything it needs, MiB."""
    device = torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
    before = resident_mib(device)
    subject = make_subject(config, work, pad_token_id, theirs)
    if config.method == "npo":
        subject = with_reference(subject)
    loop = next((loop for loop in LOOPS if loop.name == loop_name), None)
    prepare(loop, subject)
    return peak_mib(steps_of(loop, subject), before, device)


def in_fresh_process(measure: Callable[[], float], limit: int | None) -> Outcome:
    """`outcome_of(measure)` in a process of its own, on the CPU.

    Args:
        measure: picklable.
        limit: bytes that it may allocate beyond what the libraries take; None: what is free, so that the system never
            has to choose a process to kill.
    """
    limit = limit if limit is not None else max(free_bytes(torch.device("cpu")) - SPARE, SPARE)
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder, "task"), Path(folder, "result")
        task.write_bytes(pickle.dumps((measure, limit, torch.get_num_threads())))
        command = [sys.executable, "-m", __spec__.name, str(task), str(result)]
        run = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if result.exists():
            return Outcome(**json.loads(result.read_text()))
        last = next(reversed(run.stderr.strip().splitlines()), "")
        return Outcome("failed", note=f"its process ended with {run.returncode}: {last[:160]}")


def main(task: Path, result: Path) -> None:
    """What the fresh process does."""
    measure, limit, threads = pickle.loads(task.read_bytes())
    torch.set_num_threads(threads)
    # the sixth number is the pages of data and stack, what RLIMIT_DATA counts
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + limit, held + limit))
    result.write_text(json.dumps(vars(outcome_of(measure))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
