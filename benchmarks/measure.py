"""Time, memory and error of a piece of work, and the facts a result file must state about the machine."""

from __future__ import annotations

import ctypes
import gc
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROC = Path("/proc/self")


class Timing(NamedTuple):
    """Milliseconds over the rounds: the median, and the quartiles as the spread."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(milliseconds: Sequence[float]) -> Timing:
        if len(milliseconds) == 1:
            return Timing(milliseconds[0], milliseconds[0], milliseconds[0])
        low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return Timing(median, low, high)


class Timings(NamedTuple):
    """A rival's time, and that of each of its stages."""

    total: Timing
    stages: list[Timing]


Stages = Sequence[Callable[..., Any]]


def time_interleaved(
    rivals: Mapping[str, Callable[[], Any] | Stages], device: torch.device, *, rounds: int = 7, warmup: int = 1
) -> dict[str, Timings]:
    """Run every rival once a round, so that a clock that drifts or a neighbour that wakes up hits all of them.

    Args:
        rivals: name -> a function, or functions run one after the other, each handed the result of the one before.
        device: where they run: CUDA events on a GPU, wall-clock time elsewhere.
        rounds, warmup: measured rounds and those before them.
    """
    stages = {name: [work] if callable(work) else list(work) for name, work in rivals.items()}
    for _ in range(warmup):
        for work in stages.values():
            _run_stages(work, device)
    names = list(stages)
    seen: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(rounds):
        # a different first each round: nobody always follows the same rival's cache and clock
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seen[name].append(_run_stages(stages[name], device))
    return {
        name: Timings(Timing.of([sum(run) for run in runs]), [Timing.of(column) for column in zip(*runs, strict=True)])
        for name, runs in seen.items()
    }


def _run_stages(stages: Stages, device: torch.device) -> list[float]:
    """Milliseconds of each stage."""
    result: tuple[Any, ...] = ()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        torch.cuda.synchronize(device)
        events[0].record()
        for stage, event in zip(stages, events[1:], strict=True):
            result = (stage(*result),)
            event.record()
        torch.cuda.synchronize(device)
        return [before.elapsed_time(after) for before, after in pairwise(events)]
    milliseconds = []
    for stage in stages:
        start = time.perf_counter()
        result = (stage(*result),)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return milliseconds


def peak_memory(work: Callable[[], Any], device: torch.device) -> float:
    """MiB that `work` had at its worst, on top of what was there before it.

    On a GPU what torch's allocator handed out. On the CPU the high-water mark of the process, which also sees the
    scratch memory of the libraries; allocations below 32 MiB may come out of memory the process already has.

    Raises:
        RuntimeError: on a CPU whose system does not let a process reset its high-water mark (Linux does).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    _give_back_freed_memory()
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(
            "peak memory on the CPU needs Linux and a writable /proc/self/clear_refs, got "
            f"{error}: run on Linux outside a restricted container, or measure on a GPU"
        ) from error
    before = _status_kib("VmRSS")
    work()
    return max(0.0, (_status_kib("VmHWM") - before) / 2**10)


def resident_mib(device: torch.device) -> float:
    """MiB held now: allocated by torch on a GPU, resident in RAM on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) / 2**20
    _give_back_freed_memory()
    return _status_kib("VmRSS") / 2**10


def _give_back_freed_memory() -> None:
    """What earlier work has freed must not count as already there."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library: the mark then hides what it kept, at most some MiB
        return


def _status_kib(field: str) -> int:
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{PROC}/status has no {field}: this system does not report a process's memory")


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """L2 distance over the L2 norm of the exact value, in blocks of rows: no float64 copy of a (V, D) gradient."""
    distance = norm = 0.0
    for ours, theirs in zip(torch.atleast_1d(actual).split(16384), torch.atleast_1d(exact).split(16384), strict=True):
        theirs = theirs.double()
        distance += (ours.double() - theirs).square().sum().item()
        norm += theirs.square().sum().item()
    return (distance / max(norm, 1e-300)) ** 0.5


def environment(device: torch.device, dtype: torch.dtype, command: str) -> dict[str, str]:
    """What a result file states: machine, versions, commit, dtype, command."""
    facts = {"device": _cpu_name(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": str(torch.version.cuda),
        }
    return facts | {
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "simnpo": _installed("simnpo"),
        "commit": _commit(),
        "python": platform.python_version(),
        "dtype": str(dtype).removeprefix("torch."),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "command": command,
    }


def command_line(module: str, argv: list[str] | None) -> str:
    """What a result file names as its command: a module of the benchmarks and `argv`, or this process's arguments."""
    return " ".join([f"python -m simnpo.benchmarks.{module}", *(sys.argv[1:] if argv is None else argv)])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def _commit() -> str:
    """The commit of the checkout this file lies in, with a + where files differ from it."""
    folder = str(Path(__file__).resolve().parent)
    # installed into an environment inside somebody's own repository, that repository's commit would say nothing
    if _output("git", "-C", folder, "ls-files", "measure.py") != "measure.py":
        return "unknown"
    commit = _output("git", "-C", folder, "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no", "--", "..")
    return commit + ("+" if changed not in ("", "unknown") else "")


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
