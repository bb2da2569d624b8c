"""What every attack hands over: rows of scores along a strength, for the unlearned and the retrained model."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from simnpo import metrics
from simnpo.evaluation.measures import Measures, measure
from simnpo.evaluation.questions import QuestionSet
from simnpo.evaluation.results import facts, markdown_table
from simnpo.evaluation.subject import Subject
from simnpo.report.plots import THEMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNLEARNED, RETRAINED = "unlearned", "retrained"
COLOURS = dict(zip((UNLEARNED, RETRAINED), THEMES["light"]["colours"]))
MAX_COLUMNS = 3  # of a picture

Row = dict[str, Any]


@dataclass(frozen=True)
class Curves:
    """An attack's results.

    Attributes:
        attack: what was done, for a title.
        strength: key of the rows that says how far the attack went, and its label on an axis.
        scores: keys of the rows that are scores, each with its label.
        groups: keys that tell curves of one model apart, like the subset that was relearned.
        rows: one for each point; `model` is UNLEARNED or RETRAINED.
    """

    attack: str
    strength: tuple[str, str]
    scores: Mapping[str, str]
    groups: tuple[str, ...]
    rows: Sequence[Row]

    def page(self, results: Mapping[str, Any]) -> str:
        """As Markdown."""
        shown = {key: label for key, label in self.scores.items() if any(row.get(key) is not None for row in self.rows)}
        columns = ["model", *self.groups, self.strength[1], *shown.values()]
        keys = ("model", *self.groups, self.strength[0], *shown)
        table = markdown_table(columns, [[row.get(key) for key in keys] for row in self._averaged()])
        return "\n".join(
            [f"# {self.attack}\n", facts(results, "model", "retain_model", "forget"), table, "![curves](curves.png)\n"]
        )

    def _averaged(self) -> list[Row]:
        """The rows with repeats of the same point averaged."""
        points: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            points.setdefault(tuple(row[key] for key in ("model", *self.groups, self.strength[0])), []).append(row)
        averaged = []
        for rows in points.values():
            values = {key: [row[key] for row in rows if row.get(key) is not None] for key in self.scores}
            averaged.append(rows[0] | {key: fmean(some) if some else None for key, some in values.items()})
        return averaged

    def picture(self) -> bytes:
        """`figure` as PNG."""
        png = io.BytesIO()
        self.figure().savefig(png, dpi=100, format="png")
        return png.getvalue()

    def figure(self) -> "Figure":
        """Every score along the strength: a line a model and group, repeats thin."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        shown = [key for key in self.scores if any(row.get(key) is not None for row in self.rows)]
        columns = min(len(shown), MAX_COLUMNS)
        lines = -(-len(shown) // columns)
        figure = Figure(figsize=(3.6 * columns, 3.0 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes in grid[len(shown) :]:
            axes.remove()
        for axes, key in zip(grid, shown):
            self._draw(axes, self.rows, key, thin=True)
            self._draw(axes, self._averaged(), key, thin=False)
            axes.set_xlabel(self.strength[1])
            axes.set_ylabel(self.scores[key], fontsize=8)
            axes.set_ylim(0, 1.04)  # every score is between 0 and 1
            if not any(isinstance(row[self.strength[0]], str) for row in self.rows):
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.axes[0].legend(frameon=False, fontsize=8)
        return figure

    def _draw(self, axes: Any, rows: Sequence[Row], key: str, *, thin: bool) -> None:
        style: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.4} if thin else {"linewidth": 1.8, "marker": "o"}
        curves: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            repeat = (row.get("repeat"),) if thin else ()
            curves.setdefault((row["model"], *(row[group] for group in self.groups), *repeat), []).append(row)
        groups = list(dict.fromkeys(tuple(row[group] for group in self.groups) for row in rows))
        for name, points in curves.items():
            group = name[1 : 1 + len(self.groups)]
            line = ("-", "--", ":", "-.")[groups.index(group) % 4]
            xs, ys = zip(*((row[self.strength[0]], row.get(key)) for row in points))
            label = None if thin else ", ".join(map(str, (name[0], *group)))
            axes.plot(xs, ys, line, color=COLOURS[name[0]], label=label, markersize=3, **style)


def measure_sets(subject: Subject, sets: Mapping[str, QuestionSet], max_new_tokens: int) -> dict[str, Measures]:
    """Measures of every set, with the model's own answers where a set asks questions."""
    asking = [name for name, some in sets.items() if all(example.prompt_ids for example in some.answers)]
    return measure(subject, sets, write=asking, max_new_tokens=max_new_tokens)


def forget_scores(measures: Measures, retrained_truth_ratio: Any = None) -> Row:
    """The row of one point: means over the forget set, and TOFU's forget quality where it can be had.

    Args:
        retrained_truth_ratio: (n,) of the retrained model before any attack; None: there is none.
    """
    row: Row = dict(measures.means())
    if measures.truth_ratio is not None:
        row["truth_ratio"] = metrics.truth_ratio_similarity(measures.truth_ratio)
        if retrained_truth_ratio is not None:
            row["forget_quality"] = metrics.forget_quality(measures.truth_ratio, retrained_truth_ratio)
    return row
