"""A plan on the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simnpo.config import UnlearnConfig
from simnpo.planning.machine import RESERVED_BYTES, RESERVED_SHARE, Machine
from simnpo.planning.model_shape import ModelShape
from simnpo.planning.predict import PARTS, Prediction
from simnpo.planning.search import Candidate, Choice, rounded_time
from simnpo.text import visible

SHOWN = 8  # settings in the table of alternatives
SHOWN_BYTES = 0.0005e9  # what three decimals of a GB can show
TIMES = (
    *("forward", "recompute", "backward", "attention", "loss", "log-ratio", "optimizer", "offloading"),
    "second model",
)  # fmt: skip
EAGER = (
    "eager: the published loops. One padded batch of all sequences through the model's own head; logits of every "
    "position in the arithmetic's dtype and in float32, cross entropy on them transposed, their whole gradient; AdamW; "
    "no checkpointing"
)


@dataclass(frozen=True)
class Plan:
    """Attributes:
    chosen: the best, or the smallest where nothing fits.
    plain: the same run without any memory option.
    reach: settings -> longest context in tokens that fits.
    command: runs the chosen settings.
    """

    shape: ModelShape
    config: UnlearnConfig
    machine: Machine
    context: int
    choice: Choice
    chosen: Candidate
    plain: Prediction
    eager: Prediction
    reach: dict[str, int]
    command: str


def print_plan(plan: Plan, console: Console) -> None:
    """Parts of ours, of ours without memory options and of eager; the settings; the command."""
    config, machine = plan.config, plan.machine
    what = f"LoRA of rank {config.lora_rank}" if config.lora else "all weights trained"
    console.print(
        f"{escape(visible(config.model))}: {plan.shape.num_parameters / 1e6:.4g} M parameters, "
        f"{plan.shape.num_layers} layers, D = {plan.shape.hidden_size}, V = {plan.shape.vocab_size}; {what}, "
        f"{config.method}, {config.batch_size} forget and {config.retain_sequences()} retain sequences of "
        f"{plan.context} tokens a step, {config.precision}",
        soft_wrap=True,
    )
    where, who = ("GPU", "the CUDA context") if machine.on_gpu else ("CPU", "Python")
    console.print(
        f"{machine.memory / 1e9:.2f} GB ({machine.memory / 2**30:.2f} GiB) of {where} memory, "
        f"of which tensors may take {machine.budget / 1e9:.2f} GB: {RESERVED_BYTES / 2**20:.0f} MiB and "
        f"{RESERVED_SHARE:.0%} are left to {who}, libraries and gaps (assumed)",
        soft_wrap=True,
    )
    console.print(memory_table(plan), time_table(plan))
    console.print(EAGER + second_model(plan), soft_wrap=True)
    if len(plan.choice.tried) > 1:
        console.print(alternatives(plan))
    reach = ", ".join(f"{name} {T}" for name, T in plan.reach.items())
    console.print(f"longest context that fits, tokens: {reach}", soft_wrap=True)
    limit = getattr(plan.shape.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and plan.context > limit:
        console.print(f"the model was made for at most {limit} tokens", soft_wrap=True)
    if plan.choice.best is None:
        console.print(
            f"nothing fits at {plan.context} tokens: the least found is {plan.chosen.prediction.peak / 1e9:.2f} GB",
            soft_wrap=True,
        )
        return
    console.print(f"\n{visible(plan.command)}", soft_wrap=True, markup=False)


def second_model(plan: Plan) -> str:
    return ", and a second model for the reference" if "second model" in plan.eager.parts else ""


def columns(plan: Plan) -> list[tuple[str, Prediction]]:
    """Who is compared; ours without options is left out where nothing was needed."""
    shown = [("ours", plan.chosen.prediction)]
    if plan.chosen.levers:
        shown.append(("ours, no options", plan.plain))
    return [*shown, ("eager", plan.eager)]


def memory_table(plan: Plan) -> Table:
    """GB of each part at the moment of the peak."""
    shown = columns(plan)
    table = Table("GB at the peak", title="peak memory", title_justify="left")
    for name, _ in shown:
        table.add_column(name, justify="right")
    for part in PARTS:
        if any(prediction.parts.get(part, 0) >= SHOWN_BYTES for _, prediction in shown):
            table.add_row(part, *(_gb(prediction.parts.get(part, 0)) for _, prediction in shown))
    table.add_section()
    table.add_row("all", *(_gb(prediction.peak) for _, prediction in shown))
    table.add_row("fits", *("yes" if p.peak <= plan.machine.budget else "no" for _, p in shown))
    table.add_row("reached in", *(prediction.moment for _, prediction in shown))
    if any(prediction.host_bytes for _, prediction in shown):
        table.add_row("in the host's memory", *(_gb(prediction.host_bytes) for _, prediction in shown))
    return table


def time_table(plan: Plan) -> Table:
    """Time of an optimizer step at the machine's rates."""
    shown, machine = columns(plan), plan.machine
    rates = f"{machine.gemm_flops / 1e12:.3g} Tflop/s and {machine.bandwidth / 1e9:.3g} GB/s"
    table = Table("an optimizer step", title=f"time at {rates} ({machine.source})", title_justify="left")
    for name, _ in shown:
        table.add_column(name, justify="right")
    for part in TIMES:
        if any(prediction.seconds.get(part) for _, prediction in shown):
            table.add_row(part, *(rounded_time(prediction.seconds.get(part, 0)) for _, prediction in shown))
    table.add_section()
    table.add_row("all", *(rounded_time(prediction.step_seconds) for _, prediction in shown))
    return table


def alternatives(plan: Plan) -> Table:
    """What else was predicted, from the fastest to the slowest."""
    table = Table("settings", title="settings tried", title_justify="left")
    for name in ("GB", "a step", "fits"):
        table.add_column(name, justify="right")
    ordered = sorted(plan.choice.tried, key=lambda one: (one.prediction.step_seconds, one.prediction.peak))
    keep = ordered if len(ordered) <= SHOWN else _around(ordered, plan.chosen)
    for one in keep:
        words = ", ".join(name if value is True else f"{name} {value}" for name, value in one.levers.items())
        mark = "-> " if one is plan.chosen else ""
        fits = "yes" if one.prediction.peak <= plan.machine.budget else "no"
        table.add_row(
            mark + (words or "none"), _gb(one.prediction.peak), rounded_time(one.prediction.step_seconds), fits
        )
    return table


def _around(ordered: list[Candidate], chosen: Candidate) -> list[Candidate]:
    """The neighbours of the chosen one: what is just faster and does not fit, and what the next options would give."""
    place = next(i for i, one in enumerate(ordered) if one is chosen)
    first = min(max(0, place - SHOWN // 2), len(ordered) - SHOWN)
    return ordered[first : first + SHOWN]


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3f}" if nbytes < 1e9 else f"{nbytes / 1e9:.2f}"
