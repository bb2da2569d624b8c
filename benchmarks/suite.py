"""`simnpo bench`: every rival on the same batches; correct first, then time, memory and what the products alone cost.

check against float64  ->  peak memory  ->  interleaved timing  ->  table, Markdown, JSON, plots
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simnpo.benchmarks.measure import Timings, environment, peak_memory, relative_error, time_interleaved
from simnpo.benchmarks.operands import SHAPES, SPECTRA, Batch, Exact, exact, make_batch, real_batch
from simnpo.benchmarks.report import print_table, write_report
from simnpo.benchmarks.rivals import RIVALS, Rival

MODES = ("trained", "frozen", "logps")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PRODUCTS = "the products alone"
# a row with a larger error is wrong: relative L2 of loss and gradients, root mean square nats of log-probabilities
LIMITS = {
    torch.bfloat16: {"loss": 2e-2, "dH": 1e-1, "dW": 1e-1, "logps": 1e-1},
    torch.float16: {"loss": 5e-3, "dH": 2e-2, "dW": 2e-2, "logps": 2e-2},
    torch.float32: {"loss": 1e-4, "dH": 1e-3, "dW": 1e-3, "logps": 1e-3},
}
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"shapes": ["smollm2"], "tokens": [512, 2048], "spectra": ["text"], "rounds": 5},
    "cpu": {"shapes": ["cpu"], "tokens": [2048], "spectra": ["peaked", "text", "flat"], "rounds": 5},
    "full": {
        "shapes": ["llama-3.2-1b", "llama-3.1-8b", "gemma-2-2b", "smollm2"],
        "tokens": [512, 2048, 8192, 32768, 131072], "spectra": ["peaked", "text", "flat"], "rounds": 7,
    },
}  # fmt: skip
PRODUCT_ROWS = 8192

Row = dict[str, Any]


def errors_of(rival: Rival, batch: Batch, mode: str, truth: Exact) -> dict[str, float]:
    """Distance from the exact loss and gradients."""
    leaves = batch.require_grad(mode)
    if mode == "logps":
        assert rival.token_logps is not None
        with torch.no_grad():
            difference = rival.token_logps(batch).double() - truth.logps
        return {"logps": difference.square().mean().sqrt().item()}
    loss = rival.loss(batch)
    gradients = torch.autograd.grad(loss, leaves)
    errors = {"loss": relative_error(loss.detach(), truth.loss)}
    for name, ours, theirs in zip(("dH", "dW"), gradients, (truth.dhidden, truth.dweight)):
        errors[name] = relative_error(ours, theirs)
    return errors


def steps_of(rival: Rival, batch: Batch, mode: str) -> list[Callable[..., Any]]:
    """What is timed: the forward and, where something takes a gradient, the backward."""
    leaves = batch.require_grad(mode)
    if mode == "logps":
        return [lambda: _without_grad(rival, batch)]
    return [lambda: rival.loss(batch), lambda loss: torch.autograd.grad(loss, leaves)]


def _without_grad(rival: Rival, batch: Batch) -> Tensor:
    assert rival.token_logps is not None
    with torch.no_grad():
        return rival.token_logps(batch)


def products_alone(batch: Batch, mode: str) -> Callable[[], None]:
    """The matrix products no exact method can do without: one, two or three with the head; outputs allocated before."""
    h, w = batch.hidden_states.detach(), batch.weight.detach()
    chunk = h.new_empty(min(len(h), PRODUCT_ROWS), len(w))
    dh = torch.empty_like(h) if mode != "logps" else None
    dw = torch.empty_like(w) if mode == "trained" else None

    def run() -> None:
        for rows in torch.arange(len(h)).split(PRODUCT_ROWS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            z = torch.mm(h[part], w.t(), out=chunk[: len(rows)])
            if dh is not None:
                torch.mm(z, w, out=dh[part])
            if dw is not None:
                torch.mm(z.t(), h[part], out=dw)

    return run


def measure_batch(
    batch: Batch, modes: list[str], rivals: list[Rival], rounds: int, check_tokens: int, about: Row
) -> Iterator[Row]:
    """One row for each mode and rival; `about` goes into each."""
    torch.compiler.reset()
    sample = batch if len(batch.targets) <= check_tokens else batch.first(check_tokens)
    truth = exact(sample)
    about = about | {"nll": truth.nll, "entropy": truth.entropy, "checked_tokens": len(sample.targets)}
    rows: dict[tuple[str, str], Row] = {}
    for mode in modes:
        for rival in rivals:
            if mode == "logps" and rival.token_logps is None:
                continue
            row = rows[mode, rival.name] = about | {"mode": mode, "rival": rival.name, "status": "missing"}
            row["note"] = rival.missing(batch)
            if row["note"] is None:
                _check(row, rival, sample, mode, truth)
    del truth

    for mode in modes:
        standing = [r for r in rivals if rows.get((mode, r.name), {}).get("status") == "ok"]
        yield from _time_mode(batch, mode, standing, rows, rounds, about)


def _check(row: Row, rival: Rival, sample: Batch, mode: str, truth: Exact) -> None:
    """Fill in the errors and whether the row stands."""
    try:
        row["errors"] = errors_of(rival, sample, mode, truth)
    except Exception as error:  # a peer may fail in any way it likes; its row says how
        row.update(status="failed", note=_first_line(error))
        return
    # a budget on dlogits comes out of the products with W and H up to three times as large
    slack = {"dH": 4 * rival.gradient_error, "dW": 4 * rival.gradient_error}
    limits = {name: limit + slack.get(name, 0.0) for name, limit in LIMITS[sample.weight.dtype].items()}
    # not "any above": a NaN is above nothing
    right = all(value <= limits[name] for name, value in row["errors"].items())
    row["status"] = "ok" if right else "wrong"


def _time_mode(
    batch: Batch, mode: str, rivals: list[Rival], rows: dict[tuple[str, str], Row], rounds: int, about: Row
) -> Iterator[Row]:
    """Memory one by one, then the time of all of them interleaved with the products."""
    device = batch.targets.device
    work: dict[str, Any] = {}
    gradients_mib = sum(leaf.nbytes for leaf in batch.require_grad(mode)) / 2**20
    for rival in rivals:
        row, steps = rows[mode, rival.name], steps_of(rival, batch, mode)
        try:
            for _ in range(2):  # the first run compiles, tunes and fills caches
                row["peak_mib"] = peak_memory(lambda steps=steps: _run(steps), device)
            row["gradients_mib"] = gradients_mib
            work[rival.name] = steps
        except Exception as error:
            row.update(status="failed", note=_first_line(error))
    work[PRODUCTS] = products_alone(batch, mode)
    work[PRODUCTS]()  # the others are warm by now
    timings = time_interleaved(work, device, rounds=rounds, warmup=0)
    floor = timings[PRODUCTS].total.median
    products: Row = {"mode": mode, "rival": PRODUCTS, "status": "ok", "note": None}
    for row in [about | products, *(row for key, row in rows.items() if key[0] == mode)]:
        if row["rival"] in timings:
            row |= _times(timings[row["rival"]], floor)
        yield row


def _times(timings: Timings, floor: float) -> Row:
    stages = [stage.median for stage in timings.stages]
    return {
        "forward_ms": stages[0], "backward_ms": stages[1] if len(stages) > 1 else None,
        "ms": timings.total.median, "ms_low": timings.total.low, "ms_high": timings.total.high,
        "ratio": timings.total.median / floor,
    }  # fmt: skip


def _run(steps: list[Callable[..., Any]]) -> None:
    result: tuple[Any, ...] = ()
    for step in steps:
        result = (step(*result),)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def run_suite(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """All the rows of a command line."""
    dtype = DTYPES[options.dtype]
    rivals = [r for r in RIVALS if not options.rivals or any(part in r.name for part in options.rivals)]
    deadline = time.monotonic() + 60 * options.minutes
    rows: list[Row] = []
    for name, N, spectrum in [(s, n, p) for s in options.shapes for n in options.tokens for p in options.spectra]:
        if time.monotonic() > deadline:
            print(f"time is up: {name}, {N} tokens, {spectrum} not measured")
            continue
        if options.real:
            name, spectrum = Path(options.real[0]).stem, "real"
            model, data = options.real
            batch = real_batch(model, data, N, options.sequence_tokens, dtype, device)
        else:
            batch = make_batch(SHAPES[name], N, options.sequence_tokens, spectrum, dtype, device)
        V, D = batch.weight.shape
        about = {"shape": name, "D": D, "V": V, "N": len(batch.targets), "T": batch.T, "spectrum": spectrum}
        new = list(measure_batch(batch, options.modes, rivals, options.rounds, options.check_tokens, about))
        print_table(new)
        rows += new
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("simnpo bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, help="default: full on a GPU, small (minutes) on a CPU")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens in a batch, multiples of twice --sequence-tokens")
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="who takes a gradient")
    parser.add_argument("--rivals", nargs="+", metavar="PART", help="only those whose name contains one of these")
    parser.add_argument("--real", nargs=2, metavar=("MODEL", "JSONL"), help="hidden states of a model's responses")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--sequence-tokens", type=int, default=128)
    parser.add_argument("--check-tokens", type=int, default=2048, help="tokens of the comparison with float64")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no new batch after this long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    parser.add_argument("--name", default="bench", help="of the files in --output")
    options = parser.parse_args(argv)
    for name in ("sequence_tokens", "check_tokens", "rounds"):
        if (value := getattr(options, name)) is not None and not 1 <= value < 2**31:
            parser.error(f"--{name.replace('_', '-')} must be at least 1 and below 2^31, got {value}")
    if not 0 <= options.minutes < float("inf"):
        parser.error(f"--minutes must be 0 or more and finite, got {options.minutes}")
    try:
        torch.device(options.device)
    except RuntimeError as error:
        parser.error(f"--device must be a device of torch, got {options.device!r}: {str(error).splitlines()[0]}")
    preset = PRESETS[options.preset or ("full" if options.device.startswith("cuda") else "small")]
    for field, value in preset.items():
        if getattr(options, field) is None:
            setattr(options, field, value)
    if options.real:
        options.shapes, options.spectra = ["real"], ["real"]
    for N in options.tokens:
        if not 1 <= N < 2**31 or N % (2 * options.sequence_tokens):
            parser.error(f"--tokens must be multiples of {2 * options.sequence_tokens} (half of them retain), got {N}")
    return options


def main(argv: list[str] | None = None, command: str = "simnpo bench") -> int:
    """Run the command line; 1 if one of our own rows is wrong."""
    options = parse(argv)
    device = torch.device(options.device)
    facts = environment(device, DTYPES[options.dtype], " ".join([command, *(argv or [])]))
    rows = run_suite(options, device)
    for path in write_report(rows, facts, options.output, options.name):
        print(path)
    return int(any(row["status"] in ("wrong", "failed") for row in rows if row["rival"].startswith("simnpo")))
