"""The fastest settings that fit: which memory options to try, in what order, and the longest context they reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from simnpo.config import UnlearnConfig
from simnpo.errors import UserError
from simnpo.planning.machine import Machine
from simnpo.planning.model_shape import ModelShape
from simnpo.planning.predict import (
    Prediction,
    Workload,
    chunk_tokens,
    optimizer_bytes,
    passes_of,
    predict,
)

# fields that the search may change, where the user left them at their default
LEVERS = (
    *("gradient_accumulation_steps", "separate_terms", "gradient_checkpointing", "tile_tokens"),
    *("offload_activations", "chunk_tokens", "weights", "optimizer", "gradient_release", "max_grad_norm"),
    "load_in_4bit",
)
# rows of logits in the smallest chunk, and tokens in the smallest tile
SMALL_CHUNK, SMALL_TILE = 256, 1024
# the tokens of the largest pass are cut into this many tiles
TILES = 8
# tokens: the longest context is looked for in steps of this, and not beyond that
STEP, LONGEST = 64, 2**24


@dataclass(frozen=True)
class Candidate:
    """A configuration and what it takes."""

    config: UnlearnConfig
    prediction: Prediction

    @property
    def levers(self) -> dict[str, Any]:
        """The memory options that are set, as options of the command line."""
        return changed_levers(self.config)


@dataclass(frozen=True)
class Choice:
    """Attributes:
    best: the fastest that fits, with the fewest changes to the mathematics; None: nothing fits.
    tried: everything that was predicted, in that order.
    """

    best: Candidate | None
    tried: list[Candidate]

    @property
    def smallest(self) -> Candidate:
        return min(self.tried, key=lambda one: one.prediction.peak)


def changed_levers(config: UnlearnConfig) -> dict[str, Any]:
    """The memory options of a configuration that are not at their default."""
    defaults = {field.name: field.default for field in fields(UnlearnConfig)}
    return {name: getattr(config, name) for name in LEVERS if getattr(config, name) != defaults[name]}


def choose(
    shape: ModelShape, config: UnlearnConfig, workload: Workload, machine: Machine, *, packed: bool, ranks: int = 1
) -> Choice:
    """Tries the options that leave the mathematics as it is, and only if none of them fits those that round weights
    or states, one tier after another.

    Args:
        config: what the user set; a lever not at its default stays as it is.
        workload: the largest step of one process.

    Raises:
        UserError: the model cannot be simulated.
    """
    tried: list[Candidate] = []

    def attempt(candidate: UnlearnConfig) -> Candidate:
        known = next((one for one in tried if one.config == candidate), None)
        if known is None:
            prediction = predict(shape, candidate, workload, machine, packed=packed, ranks=ranks)
            known = Candidate(candidate, prediction)
            tried.append(known)
        return known

    starts = [one for tier in tiers(config, ranks) if (one := with_levers(config, **tier)) is not None]
    for started in starts:
        # the first says what is asked for, the last what is the least; between them only what has a chance
        if started not in (starts[0], starts[-1]) and _fixed_bytes(shape, started) > machine.budget:
            continue
        best = _choose_in_tier(shape, started, workload, machine, attempt, ranks)
        if best is not None:
            return Choice(best, tried)
    return Choice(None, tried)


def tiers(config: UnlearnConfig, ranks: int) -> list[dict[str, Any]]:
    """What the exact options start from, the least change to the mathematics first."""
    if config.lora:
        # a GGUF file cannot be loaded in 4 bits
        return [{}] if config.model.endswith(".gguf") else [{}, {"load_in_4bit": True}]
    bf16 = {"weights": "bf16"}
    rounded = [{}, bf16, bf16 | {"optimizer": "adamw8bit"}, bf16 | {"optimizer": "adafactor"}]
    # an update inside backward cannot wait for the other ranks
    release = {"gradient_release": True, "max_grad_norm": 0.0}
    return [*rounded, *(tier | release for tier in rounded[2:] if ranks == 1)]


def _fixed_bytes(shape: ModelShape, config: UnlearnConfig) -> float:
    """What no other option can make smaller: weights and states, and gradients that wait for each other."""
    if config.lora:
        return 0.5 * shape.num_parameters
    low = config.weights == "bf16"
    gradients = 0 if config.gradient_release else (2 if low else 4) * shape.num_parameters
    return 4 * shape.num_parameters + gradients + optimizer_bytes(config.optimizer, shape.trained_shapes)


def with_levers(config: UnlearnConfig, **levers: Any) -> UnlearnConfig | None:
    """The configuration with some options set; None where that would overrule the user, or does not go together."""
    defaults = {field.name: field.default for field in fields(UnlearnConfig)}
    for name, value in levers.items():
        if getattr(config, name) not in (defaults[name], value):
            return None
    try:
        return replace(config, **levers)
    except UserError:
        return None


def _choose_in_tier(
    shape: ModelShape, config: UnlearnConfig, workload: Workload, machine: Machine,
    attempt: Callable[[UnlearnConfig], Candidate], ranks: int,
) -> Candidate | None:  # fmt: skip
    def fits(one: Candidate) -> bool:
        return one.prediction.peak <= machine.budget

    if fits(plain := attempt(config)):
        return plain
    least = attempt(smallest_settings(shape, config, workload, machine, ranks))
    if not fits(least):
        return None
    splits = [config, *_splits(config, workload, ranks)]
    stages = [splits]
    checkpointed = [with_levers(one, gradient_checkpointing=True) for one in splits]
    if not config.gradient_checkpointing:
        stages.append([one for one in checkpointed if one is not None])
    fitting = [found for stage in stages if stage and (found := _first_that_fits(stage, attempt, fits)) is not None]
    if fitting:
        return min(fitting, key=lambda one: one.prediction.step_seconds)
    for one in _last_resorts(shape, stages[-1][-1] if stages[-1] else config, workload, machine):
        candidate = attempt(one)
        if fits(candidate):
            return candidate
    return None


def _first_that_fits(
    ladder: list[UnlearnConfig], attempt: Callable[[UnlearnConfig], Candidate], fits: Callable[[Candidate], bool]
) -> Candidate | None:
    """The first of settings that need less and less, found by halving."""
    if fits(first := attempt(ladder[0])):
        return first
    low, high = 0, len(ladder) - 1
    if not fits(best := attempt(ladder[high])):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        candidate = attempt(ladder[middle])
        if fits(candidate):
            high, best = middle, candidate
        else:
            low = middle
    return best


def _splits(config: UnlearnConfig, workload: Workload, ranks: int) -> Iterator[UnlearnConfig]:
    """More and more, smaller and smaller passes: micro-batches, and forget and retain apart."""
    most = min(len(workload.forget.tokens), config.batch_size // ranks)
    counts = {1, *(2**k for k in range(1, max(most, 1).bit_length()) if 2**k <= most), max(most, 1)}
    seen = {_largest(config, workload)}
    for count in sorted(counts):
        for separate in (False, True):
            split = with_levers(
                config, **({} if count == 1 else {"gradient_accumulation_steps": count}),
                **({"separate_terms": True} if separate else {}),
            )  # fmt: skip
            if split is None or (separate and not (workload.forget and workload.retain)):
                continue
            # only what makes the largest pass smaller
            if (size := _largest(split, workload)) < min(seen):
                seen.add(size)
                yield split


def _largest(config: UnlearnConfig, workload: Workload) -> int:
    return max(some.num_tokens for some in passes_of(config, workload))


def _last_resorts(
    shape: ModelShape, config: UnlearnConfig, workload: Workload, machine: Machine
) -> Iterator[UnlearnConfig]:
    """With everything checkpointed and split: smaller chunks of logits, tiles, offloading, all of them."""
    tile = max(SMALL_TILE, -(-_largest(config, workload) // TILES))
    chunk = config.chunk_tokens or chunk_tokens(shape, config, machine)
    small = {"chunk_tokens": SMALL_CHUNK} if chunk > SMALL_CHUNK else {}
    tiled = {"tile_tokens": tile} if tile < _largest(config, workload) else {}
    offloaded = {"offload_activations": True} if config.gradient_checkpointing and machine.on_gpu else {}
    both = tiled | offloaded
    seen = []
    for levers in (small, tiled, small | tiled, offloaded, small | offloaded, both, small | both):
        if levers and levers not in seen:
            seen.append(levers)
            candidate = with_levers(config, **levers)
            if candidate is not None:
                yield candidate


def smallest_settings(
    shape: ModelShape, config: UnlearnConfig, workload: Workload, machine: Machine, ranks: int = 1
) -> UnlearnConfig:
    """The configuration with every exact option, and those of its own tier."""
    config = _last_of(_splits(config, workload, ranks), config)
    config = with_levers(config, gradient_checkpointing=True) or config
    return _last_of(_last_resorts(shape, config, workload, machine), config)


def _last_of(configs: Iterable[UnlearnConfig], default: UnlearnConfig) -> UnlearnConfig:
    return [default, *configs][-1]


def longest_context(peak: Callable[[int], int], start: int, budget: float) -> int:
    """The most tokens T, in steps of STEP and to about 2 %, with peak(T) <= budget; 0: not even STEP.

    Args:
        peak: bytes that a context of T tokens takes; never falls with T.
        start: where to look first.
    """
    peaks: dict[int, int] = {0: 0}

    def probe(T: float) -> int:
        T = int(min(max(T, STEP), LONGEST) // STEP * STEP)
        peaks[T] = peaks.get(T) or peak(T)
        return T

    first, second = probe(start), probe(start / 2)
    if first != second and peaks[first] > peaks[second]:
        # nearly a line: where it meets the budget, and a little less and more
        slope = (peaks[first] - peaks[second]) / (first - second)
        probe(first + (budget - peaks[first]) / slope)
    while True:
        low = max(T for T, value in peaks.items() if value <= budget)
        above = [T for T, value in peaks.items() if value > budget]
        if not above:
            if low >= LONGEST:
                return low
            probe(2 * low)
            continue
        high = min(above)
        if high - low <= max(STEP, low // 50):
            return low
        part = (budget - peaks[low]) / (peaks[high] - peaks[low]) if low else 0.5
        probe(low + max(STEP, (high - low) * min(max(part, 0.02), 0.98)))


def rounded_time(seconds: float) -> str:
    """Two digits, for people."""
    if seconds <= 0:
        return "0 s"
    digits = max(0, 1 - math.floor(math.log10(seconds)))
    return f"{seconds:.{digits}f} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"
