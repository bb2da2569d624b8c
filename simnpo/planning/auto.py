"""`simnpo unlearn --auto`: the memory options of a run, from the data it will draw and the memory there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from simnpo.config import UnlearnConfig
from simnpo.data import Example
from simnpo.errors import UserError
from simnpo.kernels.objective_terms import is_local
from simnpo.planning.loss import Sequences
from simnpo.planning.machine import Machine, make_machine
from simnpo.planning.model_shape import ModelShape, read_config
from simnpo.planning.predict import Workload
from simnpo.planning.search import LEVERS, changed_levers, choose


def choose_levers(
    config: UnlearnConfig, forget: Sequence[Example], retain: Sequence[Example], machine: Machine, *, ranks: int = 1
) -> UnlearnConfig:
    """The configuration with the memory options that let its largest step fit, `auto` itself turned off.

    Args:
        config: options the user set unequal to their default stay as they are.
        forget, retain: all examples of the run, of which a step draws the longest at worst.
        machine: its budget and its rates.
        ranks: processes that share a step.

    Raises:
        UserError: nothing fits, or the model cannot be simulated.
    """
    workload = largest_step(config, forget, retain, ranks)
    shape = ModelShape(read_config(config.model))
    choice = choose(shape, config, workload, machine, packed=config.packing != "off", ranks=ranks)
    if choice.best is None:
        need = choice.smallest
        raise UserError(
            f"auto: no memory options make this run fit: {machine.budget / 2**30:.2f} GiB may be used and the least "
            f"found is {need.prediction.peak / 2**30:.2f} GiB; use a smaller max_length or batch_size, or lora"
        )
    return replace(choice.best.config, auto=False)


def resumed(config: UnlearnConfig, saved: dict[str, Any] | None) -> UnlearnConfig:
    """With `auto`, the options that were chosen when the run began that is resumed.

    Args:
        saved: its configuration; None: there is none.
    """
    if not (config.auto and config.resume and saved is not None):
        return config
    # what the user sets now is compared with the saved value, as every other field
    chosen = {name: saved[name] for name in LEVERS if name in saved and name not in changed_levers(config)}
    return replace(config, **chosen, auto=False)


def choose_here(
    config: UnlearnConfig, forget: Sequence[Example], retain: Sequence[Example], device: torch.device, ranks: int
) -> UnlearnConfig:
    """`choose_levers` for the machine this runs on; says what was chosen.

    Raises:
        UserError: nothing fits, or the model cannot be simulated.
    """
    if not config.auto:
        return config
    machine = make_machine(device, config.precision, memory=None, on_gpu=device.type == "cuda")
    chosen = choose_levers(config, forget, retain, machine, ranks=ranks)
    print(f"auto: {describe(chosen)}")
    return chosen


def largest_step(
    config: UnlearnConfig, forget: Sequence[Example], retain: Sequence[Example], ranks: int = 1
) -> Workload:
    """The longest sequences a step can draw, as one rank sees them; forget sequences with their alternates."""
    known = is_local(config.objective())
    num_forget, num_retain = -(-config.batch_size // ranks), -(-config.retain_sequences() // ranks)
    alternates = config.alternates()

    def of_forget(example: Example) -> Sequences:
        if alternates == "none":
            return _sequence(example, known)
        assert example.alternate is not None, "loaded with one"
        other = _sequence(example.alternate, known)
        return other if alternates == "instead" else _sequence(example, known) + other

    return Workload(
        _longest([of_forget(example) for example in forget], num_forget),
        _longest([_sequence(example, True) for example in retain], num_retain),
    )


def _sequence(example: Example, is_retain: bool) -> Sequences:
    tokens = len(example.input_ids)
    return Sequences((tokens,), (example.num_targets,), (is_retain,), (example.piece_lengths or (tokens,),))


def _longest(rows: list[Sequences], count: int) -> Sequences:
    """`count` of them, the longest first; each again and again where there are too few, as the sampler does."""
    rows = sorted(rows, key=lambda row: -row.num_tokens)
    chosen: Any = Sequences()
    for i in range(count if rows else 0):
        chosen = chosen + rows[i % len(rows)]
    return chosen


def describe(config: UnlearnConfig) -> str:
    """The chosen options, for a line on the terminal."""
    levers = changed_levers(config)
    return ", ".join(f"{name} {value}" for name, value in levers.items()) or "no memory option is needed"
