"""The machine a plan is for: how fast it multiplies and moves bytes, and how much memory there is to use."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from simnpo.errors import UserError

UNITS = {"GB": 1e9, "GIB": 2**30, "MB": 1e6, "MIB": 2**20}
# what no tensor may use: on a GPU the CUDA context, libraries' workspaces and gaps between blocks; on a CPU Python with
# its libraries and theirs. Assumed, not measured
RESERVED_BYTES, RESERVED_SHARE = 768 << 20, 0.05
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
MEASURE_SECONDS = 0.5


@dataclass(frozen=True)
class Machine:
    """Attributes:
    gemm_flops: matrix products, flop/s in the run's arithmetic.
    bandwidth: bytes/s read and written in the memory of the tensors.
    host_bandwidth: bytes/s between it and the host's memory.
    budget: bytes that tensors may take: `memory` less what is reserved.
    memory: bytes there are.
    on_gpu: whether the plan is for a GPU.
    source: where the rates come from, for people.
    """

    gemm_flops: float
    bandwidth: float
    host_bandwidth: float
    memory: float
    on_gpu: bool
    source: str

    @property
    def budget(self) -> float:
        return max(self.memory * (1 - RESERVED_SHARE) - RESERVED_BYTES, 0.0)


def parse_memory(text: str) -> float:
    """Bytes of "24GB" (24e9) or "24GiB" (24 x 2^30).

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise UserError(f"gpu_memory must be a number above 0 with GB or GiB behind it, as in 24GB, got {text!r}")
    return float(match[1]) * unit


def free_memory(device: torch.device) -> float:
    """Bytes that are free now; on a CPU as Linux estimates it, else half of what there is.

    Raises:
        UserError: this system does not say.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        raise UserError("gpu_memory must be given here: this system does not say how much memory is free")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return float(lines["MemAvailable"].split()[0]) * 1024


def make_machine(
    device: torch.device, precision: Literal["bf16", "fp32"], *, memory: float | None, on_gpu: bool,
    gemm_flops: float | None = None, bandwidth: float | None = None, host_bandwidth: float | None = None,
) -> Machine:  # fmt: skip
    """The machine with what was given, and the rest measured on `device` in a second or two.

    Args:
        memory: bytes; None: what is free on `device`.
        on_gpu: what the plan is for, which may not be where it is made.
        gemm_flops, bandwidth, host_bandwidth: flop/s and bytes/s; None: measured.
    """
    given = [name for name, x in (("GEMM", gemm_flops), ("memory", bandwidth), ("host", host_bandwidth)) if x]
    here = "this GPU" if device.type == "cuda" else "this CPU"
    source = f"measured on {here}" if not given else f"{', '.join(given)} given"
    if given and len(given) < 3:
        source += f", the rest measured on {here}"
    return Machine(
        gemm_flops or measure_gemm(device, precision),
        bandwidth or measure_copy(device, device),
        host_bandwidth or measure_copy(device, torch.device("cpu")),
        free_memory(device) if memory is None else memory,
        on_gpu,
        source,
    )


def measure_gemm(device: torch.device, precision: Literal["bf16", "fp32"]) -> float:
    """flop/s of square matrix products, the fastest seen."""
    n = GEMM_SIZE.get(device.type, 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _fastest(lambda: torch.mm(a, b), device)


def measure_copy(source: torch.device, target: torch.device) -> float:
    """bytes/s of a copy: read and written bytes within one memory, copied bytes between two; the fastest seen."""
    nbytes = COPY_BYTES.get(source.type, 256 << 20)
    crosses = source.type != target.type
    x = torch.ones(nbytes // 4, device=source)
    y = torch.ones(nbytes // 4, device=target, pin_memory=crosses)
    return (1 if crosses else 2) * nbytes / _fastest(lambda: y.copy_(x, non_blocking=True), source)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run within MEASURE_SECONDS, after a first that does not count."""
    best, start = float("inf"), time.perf_counter()
    for turn in range(10_000):
        before = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if turn:
            best = min(best, now - before)
        if turn > 1 and now - start > MEASURE_SECONDS:
            break
    return best
