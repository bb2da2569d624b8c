"""What a GPU is asked apart from the suite: numerics, the library's products, the kernels' bandwidth, a profile.

    python -m simnpo.benchmarks.campaign numerics|products|kernels|profile [--output FOLDER] [--dry]

`gpu_campaign.sh` runs it. With --dry everything runs on the CPU at tiny shapes: that shows it runs, nothing more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():  # before triton is imported: the kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from simnpo import linear_unlearn_loss
from simnpo.benchmarks.measure import command_line, environment, relative_error, time_interleaved
from simnpo.benchmarks.operands import FORGET_COEF, OBJECTIVE, RETAIN_COEF, SHAPES, Batch, Shape, exact, make_batch
from simnpo.benchmarks.report import markdown_facts, markdown_table
from simnpo.benchmarks.rivals import BUDGET, flat_logps, ours, simnpo_of
from simnpo.errors import UserError, exit_status
from simnpo.kernels.gemm import add_mm_
from simnpo.kernels.head import LogitTransform
from simnpo.kernels.linear_logps import RowStats
from simnpo.kernels.passes import TRITON
from simnpo.kernels.sequence_pass import SequenceResults

REGIMES = ("flat", "text", "memorised", "forgotten")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# the interpreter of the dry run computes bf16 wrongly
DRY_DTYPES = (torch.float16, torch.float32)
CHUNK_TOKENS = (512, 1024, 2048, 4096, 8192)

Table = tuple[list[str], list[list[Any]]]


def numerics(device: torch.device, dry: bool) -> Table:
    """Relative L2 error against float64 of our loss and gradients, and over eager's (x), in four regimes."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from numerics import regime_operands  # type: ignore[import-not-found]

    N, D, V, T = (2048, 1024, 32768, 128) if device.type == "cuda" else (256, 256, 8192, 32)
    N, D, V, T = (32, 16, 150, 8) if dry else (N, D, V, T)
    rivals = {
        "eager": simnpo_of(flat_logps),
        "ours": ours,
        "ours, float32 logits": lambda batch: ours(batch, logits_dtype=torch.float32),
        f"ours, gradient_error {BUDGET}": lambda batch: ours(batch, BUDGET),
    }
    lines = []
    for regime in REGIMES:
        h, w, targets = (x.to(device) for x in regime_operands(regime, N, D, V))
        for dtype in DRY_DTYPES if dry else DTYPES:
            batch = Batch(h.to(dtype), w.to(dtype), targets, T)
            truth = exact(batch)
            eager: list[float] = []
            for name, loss_of in rivals.items():
                leaves = batch.require_grad("trained")
                loss = loss_of(batch)
                values = [loss.detach(), *torch.autograd.grad(loss, leaves)]
                exact_values = (truth.loss, truth.dhidden, truth.dweight)
                errors = [relative_error(a, b) for a, b in zip(values, exact_values)]
                eager = eager or errors
                ratios = [f"{error:.1e} ({error / max(base, 1e-300):.2g}x)" for error, base in zip(errors, eager)]
                lines.append([regime, _name(dtype), name, *ratios])
    return ["regime", "dtype", "who", "loss", "dH", "dW"], lines


def products(device: torch.device, dry: bool) -> Table:
    """The head's products by rows in a chunk: TFLOP/s of the library, and of dW added up in float32."""
    lines = []
    for name in ("tiny",) if dry else ("llama-3.2-1b", "llama-3.1-8b", "gemma-2-2b"):
        D, V = SHAPES[name]
        w = torch.randn(V, D, device=device).to(torch.bfloat16)
        total = torch.zeros(V, D, device=device)
        dw = torch.empty_like(w)
        for n in (16, 32) if dry else CHUNK_TOKENS:
            h = torch.randn(n, D, device=device).to(torch.bfloat16)
            z = h.new_empty(n, V)
            dh = torch.empty_like(h)
            work: dict[str, Callable[[], Any]] = {
                "logits = h W^T": lambda h=h, w=w, z=z: torch.mm(h, w.t(), out=z),
                "dH = dZ W": lambda z=z, w=w, dh=dh: torch.mm(z, w, out=dh),
                "dW = dZ^T h": lambda z=z, h=h, dw=dw: torch.mm(z.t(), h, out=dw),
                "dW += dZ^T h, float32": lambda z=z, h=h, total=total: add_mm_(total, z.t(), h),
            }
            for product, timings in time_interleaved(work, device, rounds=3 if dry else 15).items():
                rate = 2 * n * D * V / timings.total.median / 1e9
                lines.append([name, n, product, f"{timings.total.median:.4g}", f"{rate:.3g}"])
    return ["head", "rows", "product", "ms", "TFLOP/s"], lines


def kernels(device: torch.device, dry: bool) -> Table:
    """Bytes each kernel must move, over its time, beside a device copy of the same number of bytes."""
    lines = []
    for name in ("tiny",) if dry else ("llama-3.1-8b", "gemma-2-2b", "smollm2"):
        shape, n, T = SHAPES[name], (32 if dry else 2048), (8 if dry else 128)
        dtype = torch.float16 if dry else torch.bfloat16
        for kernel, (moved, run) in _kernel_runs(shape, n, T, dtype, device).items():
            source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device=device).random_(0, 255)
            copy = torch.empty_like(source)
            rivals = {"kernel": run, "copy": lambda copy=copy, source=source: copy.copy_(source)}
            timings = time_interleaved(rivals, device, rounds=3 if dry else 25)
            ms = {who: timing.total.median for who, timing in timings.items()}
            rates = [f"{moved / ms[who] / 1e6:.4g}" for who in ("kernel", "copy")]
            lines.append([name, n, kernel, f"{moved / 2**20:.3g}", f"{ms['kernel']:.4g}", *rates,
                          f"{ms['copy'] / ms['kernel']:.2f}"])  # fmt: skip
    return ["head", "rows", "kernel", "MiB moved", "ms", "GB/s", "copy's GB/s", "share of a copy"], lines


def _kernel_runs(
    shape: Shape, n: int, T: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Each kernel on a chunk of n rows: (bytes it must read and write once, what to run)."""
    batch = make_batch(shape, n, T, "text", dtype, device)
    h, w, targets = batch.hidden_states, batch.weight, batch.targets
    D, V = shape
    size, transform = dtype.itemsize, LogitTransform()
    logits = torch.mm(h, w.t())
    out = torch.empty_like(logits)
    target_logits = TRITON.indexed_dot(h, w, targets)
    stats = RowStats(target_logits, *TRITON.row_pass(logits, targets, target_logits, transform, write_gradient=False))
    coefs = torch.rand(n, device=device)
    results = SequenceResults.zeros(batch.B, coefs)
    sequences, scaled = torch.arange(batch.B, device=device), torch.empty_like(h)
    overwritten = logits.clone()  # its second round reads gradients: numbers all the same
    return {
        "row pass, log-probabilities": (
            n * V * size,
            lambda: TRITON.row_pass(logits, targets, target_logits, transform, write_gradient=False),
        ),
        "row pass with gradient": (
            2 * n * V * size,
            lambda: TRITON.row_pass(overwritten, targets, target_logits, transform, write_gradient=True),
        ),
        "row gradient": (
            2 * n * V * size, lambda: TRITON.row_gradient(logits, targets, *stats, transform, out, coefs=coefs)
        ),
        "column pass": (n * V * size, lambda: TRITON.column_pass(logits, targets, *stats, transform, coefs)),
        "indexed dot": (2 * n * D * size, lambda: TRITON.indexed_dot(h, w, targets)),
        "row scale": (2 * n * D * size, lambda: TRITON.scale_rows(h, coefs, scaled)),
        "sequence pass": (
            8 * n,
            lambda: TRITON.sequence_pass(
                stats.logps, coefs, batch.cu_seqlens, sequences, batch.retain_mask, results, OBJECTIVE, None, 1.0
            ),
        ),
    }  # fmt: skip


def profile(device: torch.device, dry: bool) -> Table:
    """Where the time of three steps goes, by torch's profiler: one line an operation that takes 1 % or more."""
    lines = []
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if device.type == "cuda" else [activity.CPU]
    for name, N in (("tiny", 32),) if dry else (("llama-3.1-8b", 8192), ("llama-3.2-1b", 2048)):
        batch = make_batch(SHAPES[name], N, 8 if dry else 128, "text", torch.bfloat16, device)
        for mode in ("trained", "frozen"):
            leaves = batch.require_grad(mode)

            def step(batch: Batch = batch, leaves: list[torch.Tensor] = leaves) -> None:
                loss = linear_unlearn_loss(
                    batch.hidden_states, batch.weight, batch.targets, OBJECTIVE, cu_seqlens=batch.cu_seqlens,
                    retain_mask=batch.retain_mask, forget_coef=FORGET_COEF, retain_coef=RETAIN_COEF,
                ).loss  # fmt: skip
                torch.autograd.grad(loss, leaves)

            step()
            with torch.profiler.profile(activities=activities) as seen:
                for _ in range(3):
                    step()
            field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            events = sorted(seen.key_averages(), key=lambda event: -getattr(event, field))
            total = sum(getattr(event, field) for event in events)
            for event in events:
                share = getattr(event, field) / max(total, 1)
                if share >= 0.01:
                    ms = f"{getattr(event, field) / 3e3:.4g}"
                    lines.append(
                        [name, N, mode, event.key[:80].replace("|", "/"), event.count // 3, ms, f"{share:.0%}"]
                    )
    return ["head", "tokens", "who", "operation", "calls a step", "ms a step", "share"], lines


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


STAGES = {"numerics": numerics, "products": products, "kernels": kernels, "profile": profile}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("campaign", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny: not a measurement")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, command: str) -> int:
    """Asks and prints what the command line names."""
    on_gpu = torch.cuda.is_available() and not options.dry
    if not on_gpu and not options.dry and options.stage != "numerics":
        raise UserError("no CUDA device here: these are questions to a GPU; --dry tries the script on the CPU")
    device = torch.device("cuda" if on_gpu else "cpu")
    columns, lines = STAGES[options.stage](device, options.dry)
    facts = environment(device, torch.bfloat16, command)
    del facts["dtype"]
    title = f"{options.stage}{' (dry run, not a measurement)' if options.dry else ''}"
    about = STAGES[options.stage].__doc__
    text = [[str(value) for value in line] for line in lines]
    table = markdown_table(columns, text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.stage}.md").write_text(f"# {title}\n\n{about}\n\n{markdown_facts(facts)}\n{table}")
    data = {"facts": facts, "columns": columns, "rows": lines}
    (options.output / f"{options.stage}.json").write_text(json.dumps(data, indent=0) + "\n")
    print(table)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 wrong input."""
    options = parse(argv)
    return exit_status(lambda: measure(options, command_line("campaign", argv)))


if __name__ == "__main__":
    sys.exit(main())
