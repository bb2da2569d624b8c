"""The throughput benchmark's rows as Markdown and JSON."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from simnpo.benchmarks.report import markdown_facts, markdown_table
from simnpo.benchmarks.throughput.loops import OPEN_UNLEARNING, PUBLISHED

Row = dict[str, Any]
KINDS = ("agreement", "steps", "npo", "runs")

NOTES = """\
A step is the batch made, loss, backward, clipping, AdamW, gradients dropped. All loops share the model's weights, the
batches, the optimizer and the arithmetic: they differ in what they compute and in nothing else. "useful" tokens are the
targets that count: {tokens}. Times are medians of interleaved rounds, a new
batch a round; "x" is the median over the rounds of the other's time over this one's. Peak memory is all of it, weights,
gradients, optimizer, reference model, activations and logits: {memory}.
"""
TOKENS = "the answers of TOFU, or all but the first of a document"
MEMORY = {
    "cuda": "what torch's allocator handed out, in one process",
    "cpu": "the high-water mark of a fresh process,\nless what it held before the model was built",
}
AGREEMENT_COLUMNS = ("model", "loop", "loss", "gradient")
STEP_COLUMNS = ("loop", "step ms", "quartiles", "useful tokens/s", "x published", "x open-unlearning", "peak MiB", "")
RUN_COLUMNS = ("loop", "steps", "seconds", "useful tokens", "useful tokens/s", "")
NPO_COLUMNS = ("batch", "SimNPO step ms", "NPO step ms", "NPO / SimNPO", "quartiles")


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)


def step_cells(row: Row) -> list[str]:
    """One line; a loop that did not fit has no time in it."""
    peak = _number(row["peak_mib"], ".0f")
    if row.get("ms") is None:
        status = row["status"] if row["status"] != "ok" else "not timed"
        return [row["rival"], status, "", "", "", "", peak, row["note"]]
    quartiles = f"{row['ms_low']:.4g}-{row['ms_high']:.4g}"
    ratios = [_number(row["x"].get(loop.name), ".2f") for loop in (PUBLISHED, OPEN_UNLEARNING)]
    return [row["rival"], _number(row["ms"]), quartiles, _number(row["tokens_per_second"]), *ratios, peak, row["note"]]


def run_cells(row: Row) -> list[str]:
    whole = "the whole run" if row["whole"] else "its first steps"
    numbers = [_number(row[key]) for key in ("seconds", "tokens", "tokens_per_second")]
    return [row["rival"], str(row["steps"]), *numbers, whole]


def npo_cells(row: Row) -> list[str]:
    numbers = [_number(row[key]) for key in ("simnpo_ms", "npo_ms")]
    return [row["batch"], *numbers, _number(row["ratio"], ".3f"), f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}"]


def markdown(results: dict[str, list[Row]], facts: dict[str, str], name: str, device_type: str) -> str:
    """The whole report; `results` holds the rows of each of KINDS."""
    parts = [f"# Benchmark: {name}\n", markdown_facts(facts), NOTES.format(tokens=TOKENS, memory=MEMORY[device_type])]
    about = "Distance of the loss and of the gradient of all weights from ours on the first batch, relative.\n"
    lines = [
        [row["model"], row["rival"], f"{row['loss']:.1e}", f"{row['gradient']:.1e}"] for row in results["agreement"]
    ]
    parts.append(f"## The same loss and gradient\n\n{about}\n{markdown_table(AGREEMENT_COLUMNS, lines)}")
    for title, rows in groupby(results["steps"], lambda row: (row["model"], row["workload"], row["batch"])):
        table = markdown_table(STEP_COLUMNS, map(step_cells, rows))
        parts.append(f"## A step: {title[0]}, {title[1]}, batch {title[2]}\n\n{table}")
    for title, rows in groupby(results["runs"], lambda row: (row["model"], row["workload"], row["batch"])):
        table = markdown_table(RUN_COLUMNS, map(run_cells, rows))
        about = (
            "Ours by `simnpo unlearn`'s own loop, its log, probes of the weights and checkpoint among the seconds.\n"
        )
        parts.append(f"## A run: {title[0]}, {title[1]}, batch {title[2]}\n\n{about}\n{table}")
    if results["npo"]:
        about = "Our own step, after the one pass that writes down the reference's log-probabilities; paired rounds.\n"
        parts.append(f"## NPO against SimNPO\n\n{about}\n{markdown_table(NPO_COLUMNS, map(npo_cells, results['npo']))}")
    return "\n".join(parts)


def write_results(
    results: dict[str, list[Row]], facts: dict[str, str], folder: Path, name: str, device_type: str
) -> list[Path]:
    """`name`.md and `name`.json in `folder`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / f"{name}.md", folder / f"{name}.json"
    text.write_text(markdown(results, facts, name, device_type), encoding="utf-8")
    data.write_text(json.dumps({"facts": facts, **results}, indent=1) + "\n", encoding="utf-8")
    return [text, data]
