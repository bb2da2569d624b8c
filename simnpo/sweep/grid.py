"""Which runs a sweep consists of."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import product
from math import prod
from typing import Any, NamedTuple, get_type_hints

from simnpo.config import UnlearnConfig
from simnpo.errors import UserError
from simnpo.text import shorten

MOST_TRIALS = 10_000
FORBIDDEN = ("output", "resume", "forget", "model")  # the sweep's own


class Trial(NamedTuple):
    """name: of its folder.   settings: what it sets beside the options all runs share."""

    name: str
    settings: dict[str, Any]

    @property
    def group(self) -> str:
        """The settings but the seed, as a person writes them: what the runs of several seeds have in common."""
        return " ".join(f"{name}={_text(value)}" for name, value in self.settings.items() if name != "seed")


def _text(value: Any) -> str:
    """As `read_trials` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_trials(texts: Sequence[str]) -> list[Trial]:
    """The runs of some grids.

    Args:
        texts: grids such as "method=simnpo beta=1,2.5 seed=0,1"; each is the product of its lists.

    Raises:
        UserError: a name is no option of `simnpo unlearn`, or a value is of the wrong kind; names it.
    """
    trials: dict[str, Trial] = {}
    for text in texts:
        axes: dict[str, list[Any]] = {}
        for word in text.split():
            name, equals, values = word.partition("=")
            if not equals or not values:
                raise UserError(f"--try takes NAME=VALUE[,VALUE...] separated by spaces, got {word!r} in {text!r}")
            if name in axes:
                raise UserError(f"--try has {name} twice in {text!r}: write {name}=VALUE,VALUE")
            axes[name] = [_value(name, value) for value in values.split(",")]
        if (count := prod(map(len, axes.values()))) > MOST_TRIALS:
            raise UserError(f"--try: {shorten(text)} asks for {count} runs, more than {MOST_TRIALS}")
        for values in product(*axes.values()):
            settings = dict(zip(axes, values))
            name = "-".join(f"{key}={_text(value)}" for key, value in settings.items()).replace("/", "_")
            trials[name] = Trial(name, settings)
    return list(trials.values())


def _value(name: str, text: str) -> Any:
    kinds = {field.name: _kind(field.name) for field in fields(UnlearnConfig) if field.name not in FORBIDDEN}
    if name not in kinds:
        raise UserError(f"--try: {name!r} is no option that a sweep can vary; these are: {', '.join(kinds)}")
    if kinds[name] is bool:
        if text not in ("true", "false"):
            raise UserError(f"--try: {name} is true or false, got {text!r}")
        return text == "true"
    try:
        return kinds[name](text)
    except ValueError:
        raise UserError(f"--try: {name} must be of type {kinds[name].__name__}, got {shorten(repr(text))}") from None


def _kind(name: str) -> type:
    hint = get_type_hints(UnlearnConfig)[name]
    members = getattr(hint, "__args__", (hint,))
    for kind in (bool, int, float):
        if kind in members:
            return kind
    return str


def fingerprint(config: UnlearnConfig) -> str:
    """Of everything in a configuration that changes a run, to see whether a finished one is still the one asked for."""
    free = ("output", "resume", "reference_cache")
    return json.dumps({name: value for name, value in asdict(config).items() if name not in free})
