"""The pictures of a report, once for light and once for dark pages."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simnpo.report.examined import TofuScores
from simnpo.text import visible

# Okabe and Ito's colours, which colour-blind readers tell apart, lighter on a dark page
THEMES: dict[str, dict[str, Any]] = {
    "light": {"ink": "#33383f", "grid": "#e3e6ea", "colours": ("#d55e00", "#0072b2", "#009e73")},
    "dark": {"ink": "#c6ccd4", "grid": "#343a43", "colours": ("#ff8b3d", "#56b4e9", "#2fc99a")},
}
MARKERS = ("o", "s", "^")
SIZE = (5.2, 3.4)  # inches
DPI = 180


def nll_plot(metrics: list[dict[str, Any]], theme: str) -> bytes:
    """NLL per token of the forget and retain sequences of each step, as PNG.

    Args:
        metrics: rows of metrics.jsonl.
        theme: a key of THEMES.
    """
    with _figure(theme) as (png, axes):
        steps = [row["step"] for row in metrics]
        for key, label, colour in zip(("forget_nll", "retain_nll"), ("forget", "retain"), THEMES[theme]["colours"]):
            values = [row[key] for row in metrics]
            if any(values):  # a run without a retain set has none
                marker = "o" if len(steps) <= 60 else None
                axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("NLL (nats per token)")
        axes.set_ylim(bottom=0)
        _legend(axes)
    return png.getvalue()


def weights_plot(weights: list[dict[str, Any]], theme: str) -> bytes:
    """Gradient weight of every forget sequence against its length, at start, middle and end, as PNG.

    Args:
        weights: rows of weights.jsonl.
        theme: a key of THEMES.
    """
    with _figure(theme) as (png, axes):
        for row, colour, marker in zip(_three(weights), THEMES[theme]["colours"], MARKERS):
            axes.scatter(
                row["num_tokens"], row["weights"], s=30, alpha=0.8, linewidths=0, color=colour, marker=marker,
                label=f"step {row['step']}",
            )  # fmt: skip
        seen = [weight for row in weights for weight in row["weights"]]
        positive = [weight for weight in seen if weight > 0]
        if positive and max(positive) > 20 * min(positive):
            # the smallest positive weights of a forgotten sequence stand for the zeros too
            axes.set_yscale("log") if len(positive) == len(seen) else axes.set_yscale("symlog", linthresh=min(positive))
        elif min(seen, default=0) < 0:
            # a method that raises its targets
            axes.set_ylim(top=0)
        else:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("response length (tokens)")
        axes.set_ylabel("gradient weight per token")
        _legend(axes)
    return png.getvalue()


def tofu_plot(scores: list[TofuScores], theme: str) -> bytes:
    """Forget quality against model utility, a point a model, as PNG: up and to the right is better.

    The retrained model is a star: told from itself it has a forget quality of 1.

    Args:
        scores: those with both numbers.
        theme: a key of THEMES.
    """
    with _figure(theme) as (png, axes):
        colours = THEMES[theme]["colours"]
        for i, one in enumerate(scores):
            quality, utility = one.forget_quality or 0.0, one.model_utility or 0.0
            axes.plot(
                utility, math.log10(max(quality, 1e-300)), MARKERS[(i + i // len(colours)) % len(MARKERS)],
                color=colours[i % len(colours)], markersize=8, label=_label(one.name),
                linestyle="none",
            )  # fmt: skip
        for i, utility in enumerate(sorted({one.retrained_utility for one in scores} - {None})):  # type: ignore
            axes.plot(
                utility, 0.0, "*", color=THEMES[theme]["ink"], markersize=12, linestyle="none",
                label="retrained" if i == 0 else None,
            )  # fmt: skip
        axes.axhline(math.log10(0.05), color=THEMES[theme]["ink"], linewidth=0.8, linestyle=":")
        axes.set_xlabel("model utility")
        axes.set_ylabel("log10 of forget quality")
        _legend(axes)
    return png.getvalue()


def _legend(axes: Axes) -> None:
    """Above the axes, where no data is."""
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handletextpad=0.4)


def _label(name: str) -> str:
    """A name as it is: a dollar would begin a formula, and what begins with _ has no place in a legend."""
    return (" " if name.startswith("_") else "") + visible(name).replace("$", r"\$")


def _three(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first, the middle and the last row, or as many as there are."""
    return [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})]


@contextmanager
def _figure(theme: str) -> Iterator[tuple[io.BytesIO, Axes]]:
    """An empty picture, and the buffer that holds its PNG once the block has ended."""
    ink, grid = THEMES[theme]["ink"], THEMES[theme]["grid"]
    style: dict[Any, Any] = {
        "text.color": ink,
        "axes.edgecolor": grid,
        "axes.labelcolor": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "xtick.color": ink,
        "ytick.color": ink,
        "font.size": 10,
        "lines.linewidth": 1.6,
    }
    png = io.BytesIO()
    with mpl.rc_context(style):
        # a Figure of its own: pyplot would keep global state and may want a display
        figure = Figure(figsize=SIZE, layout="constrained")
        yield png, figure.add_subplot()
        figure.savefig(png, dpi=DPI, transparent=True, format="png")
