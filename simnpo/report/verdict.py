"""Whether a run did its job: forgot what it should, kept what it should."""

from dataclasses import dataclass
from typing import Any

FORGET_FACTOR = 20.0  # the forget answers must be this many times less probable
KEPT_WITHIN = 0.10  # and the held-out answers as probable as before, give or take this share


@dataclass(frozen=True)
class Verdict:
    """What evaluation.json says.

    Attributes:
        forgot, kept: whether the two conditions hold; `kept` is None where nothing was scored that should be kept.
        text: one sentence with the numbers.
    """

    forgot: bool
    kept: bool | None
    text: str


def judge(evaluation: dict[str, Any]) -> Verdict:
    """Compares the mean probabilities of the reference answers before and after.

    What must be kept is read off the held-out set. Without one it is read off the retain set, where only a fall counts:
    these rows were trained on, so theirs rise.

    Args:
        evaluation: evaluation.json: {"before": {set name: scores}, "after": the same}.
    """
    before, after = evaluation["before"], evaluation["after"]
    # below the smallest positive double both print as "never"
    factor = max(before["forget"]["probability"], 1e-300) / max(after["forget"]["probability"], 1e-300)
    forgot = factor >= FORGET_FACTOR
    text = f"{'Forgotten' if forgot else 'Not forgotten'}: the forget answers are {_times(factor)}"

    name = next((name for name in ("heldout", "retain") if name in after), None)
    if name is None:
        return Verdict(forgot, None, f"{text}. Nothing that should be kept was scored.")
    change = after[name]["probability"] / max(before[name]["probability"], 1e-300) - 1
    kept = change >= -KEPT_WITHIN and (change <= KEPT_WITHIN or name == "retain")
    label = {"heldout": "held-out", "retain": "retain"}[name]
    return Verdict(
        forgot, kept, f"{text}. {'Kept' if kept else 'Not kept'}: the {label} answers are {_percent(change)} probable."
    )


def _times(factor: float) -> str:
    if factor < 1:
        return f"{1 / factor:.3g}x more probable than before"
    return f"{factor:,.0f}x less probable than before" if factor >= 10 else f"{factor:.1f}x less probable than before"


def _percent(change: float) -> str:
    if abs(change) < 0.0005:
        return "exactly as"
    return f"{abs(change):.1%} {'more' if change > 0 else 'less'}"
