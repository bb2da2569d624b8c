"""The suite's rows as a table on the terminal, Markdown, JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]

COLUMNS = (
    "rival",
    "forward ms",
    "backward ms",
    "both ms",
    "quartiles",
    "x products",
    "peak MiB",
    "beyond gradients",
    "error vs float64",
)
WHO = {"trained": "head trained", "frozen": "head frozen", "logps": "log-probabilities only"}
NOTES = """\
Times are medians of interleaved rounds. "x products" is the time over that of the matrix products alone, measured in
the same rounds. Peak memory is what a step needs on top of the operands, with and without the gradients it returns.
Errors against float64 are relative L2 (loss, dH, dW) or root mean square nats (logps), on {tokens} tokens at most.
A row beyond the limit is "wrong" and has no time. A method that computes its gradients in the forward shows them there.
"""


def groups(rows: list[Row]) -> Iterable[tuple[str, list[Row]]]:
    """The rows of one batch and mode, with its title."""

    def key(row: Row) -> tuple[Any, ...]:
        return (
            row["shape"],
            row["D"],
            row["V"],
            row["N"],
            row["T"],
            row["spectrum"],
            row["nll"],
            row["entropy"],
            row["mode"],
        )

    for (shape, D, V, N, T, spectrum, nll, entropy, mode), members in groupby(rows, key):
        yield (
            f"{shape} (D {D}, V {V}), {N} tokens in sequences of {T}, {spectrum} operands "
            f"(NLL {nll:.3g}, entropy {entropy:.3g} nats), {WHO[mode]}",
            list(members),
        )


def cells(row: Row) -> list[str]:
    """One line of the table; a row that did not pass its check has no time in it."""
    errors = ", ".join(f"{name} {value:.2g}" for name, value in row.get("errors", {}).items())
    if row["status"] != "ok":
        return [row["rival"], row["status"], "", "", "", "", "", "", row["note"] or errors]
    backward = "" if row["backward_ms"] is None else f"{row['backward_ms']:.4g}"
    forward = f"{row['forward_ms']:.4g}" if row["rival"] != "the products alone" else ""
    memory = ["", ""]
    if "peak_mib" in row:
        memory = [f"{row['peak_mib']:.0f}", f"{max(0, row['peak_mib'] - row['gradients_mib']):.0f}"]
    quartiles = f"{row['ms_low']:.4g}-{row['ms_high']:.4g}"
    return [row["rival"], forward, backward, f"{row['ms']:.4g}", quartiles, f"{row['ratio']:.2f}", *memory, errors]


def print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    for title, members in groups(rows):
        table = Table(*COLUMNS, title=title)
        for row in members:
            table.add_row(*cells(row))
        console.print(table)


def markdown_table(columns: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    rows = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def markdown_facts(facts: dict[str, str]) -> str:
    return "".join(f"* {name}: {f'`{value}`' if name == 'command' else value}\n" for name, value in facts.items())


def write_report(rows: list[Row], facts: dict[str, str], folder: Path, name: str) -> list[Path]:
    """`name`.md, .json and plots in `folder`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    checked = max((row["checked_tokens"] for row in rows), default=0)
    parts = [f"# Benchmark: {name}\n", markdown_facts(facts), NOTES.format(tokens=checked)]
    parts += [f"## {title}\n\n{markdown_table(COLUMNS, map(cells, members))}" for title, members in groups(rows)]
    markdown, data = folder / f"{name}.md", folder / f"{name}.json"
    markdown.write_text("\n".join(parts), encoding="utf-8")
    # one row a line, so that two results can be compared line by line
    lines = ",\n".join(json.dumps(row) for row in rows)
    data.write_text(f'{{"facts": {json.dumps(facts)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
    return [markdown, data, *_plots(rows, folder, name)]


def _plots(rows: list[Row], folder: Path, name: str) -> list[Path]:
    """For each model head: time and memory against tokens, and error against time; one column a mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [row for row in rows if row["status"] == "ok"]
    written = []
    for shape, spectrum in sorted({(row["shape"], row["spectrum"]) for row in timed}):
        mine = [row for row in timed if (row["shape"], row["spectrum"]) == (shape, spectrum)]
        modes = [mode for mode in WHO if any(row["mode"] == mode for row in mine)]
        figure, axes = plt.subplots(3, len(modes), figsize=(5 * len(modes), 11), squeeze=False)
        for column, mode in zip(axes.T, modes, strict=True):
            _plot_mode(column, [row for row in mine if row["mode"] == mode])
            column[0].set_title(f"{shape}, {spectrum}: {WHO[mode]}")
        axes[0, 0].legend(fontsize=7)
        figure.tight_layout()
        written.append(folder / f"{name}-{shape}-{spectrum}.png")
        figure.savefig(written[-1], dpi=80)
        plt.close(figure)
    return written


def _plot_mode(axes: Any, rows: list[Row]) -> None:
    time, memory, error = axes
    largest = max(row["N"] for row in rows)
    for rival in dict.fromkeys(row["rival"] for row in rows):
        mine = sorted((row for row in rows if row["rival"] == rival), key=lambda row: row["N"])
        (line,) = time.plot([row["N"] for row in mine], [row["ms"] for row in mine], marker="o", label=rival)
        measured = [row for row in mine if "peak_mib" in row]
        memory.plot(
            [row["N"] for row in measured], [row["peak_mib"] for row in measured], marker="o", color=line.get_color()
        )
        last = mine[-1]
        if last["N"] == largest and last.get("errors"):
            error.plot(last["ms"], max(last["errors"].values()), "o", color=line.get_color())
    time.set(xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
    memory.set(xlabel="tokens", ylabel="peak MiB", xscale="log", yscale="log")
    error.set(xlabel=f"ms at {largest} tokens", ylabel="largest error vs float64", xscale="log", yscale="log")
