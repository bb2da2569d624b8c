"""Peak memory and time of an optimizer step, by part, from a configuration: ours and the published loops'."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch

from simnpo.batch import forward_passes
from simnpo.config import UnlearnConfig
from simnpo.errors import UserError
from simnpo.kernels.chunks import FROZEN_CHUNK_BYTES, TRAINED_CHUNK_BYTES, default_chunk_tokens
from simnpo.planning.attention import AttentionKind
from simnpo.planning.ledger import Work
from simnpo.planning.loss import Sequences
from simnpo.planning.machine import Machine
from simnpo.planning.model_shape import ModelShape
from simnpo.planning.simulate import Recipe, Simulation, simulate, update_bytes
from simnpo.training.forward import MAX_TOKENS, token_batches

# two states in 8 bits with a float32 scale for each block of 256; small tensors keep theirs in float32
ADAMW8BIT_BLOCK, ADAMW8BIT_SMALL = 256, 4096
# bytes read and written for each trained parameter by an optimizer step: gradient, weight, states
OPTIMIZER_TRAFFIC = {"adamw": 28.0, "adamw8bit": 16.0, "adafactor": 16.0}
# by clipping: the norm reads the gradients, the scaling reads and writes them
CLIP_TRAFFIC = 12.0

PARTS = (
    *("weights", "second model", "weight copies", "gradients", "gradients in flight", "optimizer"),
    *(
        "saved activations",
        "recomputed layer",
        "loss chunk",
        "dW",
        "dH and rows of the loss",
        "update",
        "gradient buckets",
    ),
)
NAMES = {"activations": "saved activations", "backward": "gradients in flight"}


class Workload(NamedTuple):
    """What one process sees of one optimizer step: the largest there can be. forget with its alternates."""

    forget: Sequences
    retain: Sequences


@dataclass(frozen=True)
class Prediction:
    """Attributes:
    peak: bytes of tensors alive at once at the worst moment.
    parts: part -> bytes at that moment; their sum is `peak`.
    moment: what is running then.
    host_bytes: activations in the host's memory.
    seconds: part -> seconds of one optimizer step.
    """

    peak: int
    parts: dict[str, int]
    moment: str
    host_bytes: int
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def predict(
    shape: ModelShape, config: UnlearnConfig, workload: Workload, machine: Machine, *, packed: bool = True,
    ranks: int = 1,
) -> Prediction:  # fmt: skip
    """Of the second and every later step, when the optimizer has its states.

    Args:
        packed: whether sequences stand in one row.
        ranks: processes that average their gradients, each with this workload.

    Raises:
        UserError: the model cannot be simulated.
    """
    passes = passes_of(config, workload)
    recipe = recipe_of(shape, config, machine, packed=packed)

    def size(some: Sequences) -> tuple[int, int]:
        # of equal passes the one whose weights are known late has more to keep
        return some.num_tokens, some.is_retain.count(False)

    largest = max(range(len(passes)), key=lambda k: size(passes[k]))
    later = max(passes[1:], key=size, default=None)
    runs = []
    if later is None or size(later) < size(passes[largest]):
        runs.append(simulate(shape, recipe, passes[largest]))
    if later is not None:
        # the first pass finds no gradients, and every other does
        runs.append(simulate(shape, replace(recipe, gradients_exist=True), later))
    static = _static(config, runs[0], ranks)
    peak, parts, moment = max((_peak(run, static, _updating(config, run)) for run in runs), key=lambda found: found[0])
    ratio = _reading(shape, config, recipe, workload, len(passes))
    if ratio is not None:
        peak, parts, moment = max((peak, parts, moment), _peak(ratio[0], static, {}), key=lambda found: found[0])
    tokens = passes[largest] if later is None or len(runs) == 2 else later
    share = sum(some.num_tokens for some in passes) / tokens.num_tokens
    host = 0
    if config.offload_activations:
        host = shape.num_layers * runs[0].checkpoint_bytes
    seconds = _seconds(config, runs[0], machine, share, host)
    if ratio is not None:
        seconds["log-ratio"] = ratio[1] * _time(ratio[0].work["ratio"], machine)
    return Prediction(peak, parts, moment, host, seconds)


def _reading(
    shape: ModelShape, config: UnlearnConfig, recipe: Recipe, workload: Workload, num_passes: int
) -> tuple[Simulation, float] | None:
    """The float32 pass over as many pieces of forget sequences as go through the model at once, and how often a step
    takes it; None where the run takes none.
    """
    forget = workload.forget
    if not forget or not config.reads_exact_ratio(max(forget.targets)):
        return None
    lengths = list(chain.from_iterable(forget.pieces))
    batches = token_batches(lengths, MAX_TOKENS, packed=recipe.packed)
    largest = max((tuple(lengths[i] for i in batch) for batch in batches), key=sum)
    some = Sequences(largest, tuple(n - 1 for n in largest), (False,) * len(largest), tuple((n,) for n in largest))
    # the readings of a later pass find the gradients of the one before
    reading = replace(recipe, loss="ratio", gradients_exist=num_passes > 1, offload_activations=False)
    return simulate(shape, reading, some), sum(lengths) / sum(largest)


def predict_eager(shape: ModelShape, config: UnlearnConfig, workload: Workload, machine: Machine) -> Prediction:
    """The published loops: one padded batch, all logits, AdamW on what trains, no memory option; a second model
    for objectives with a reference.
    """
    plain = replace(config, **dict.fromkeys(("gradient_checkpointing", "offload_activations"), False))
    plain = replace(
        plain, tile_tokens=None, load_in_4bit=False, gradient_release=False, weights="fp32", optimizer="adamw",
        gradient_accumulation_steps=1, separate_terms=False,
    )  # fmt: skip
    everything = workload.forget + workload.retain
    recipe = Recipe(
        loss="eager", packed=False, attention="linear" if _is_flash(config) else "sdpa", on_gpu=machine.on_gpu,
        precision=config.precision, lora_rank=config.lora_rank if config.lora else None,
    )  # fmt: skip
    run = simulate(shape, recipe, everything)
    static = _static(plain, run, 1)
    objective = config.objective()
    seconds = _seconds(plain, run, machine, 1.0, 0)
    if objective.needs_ref_logps or objective.needs_ref_token_logps:
        static["second model"] = run.segments["start"]["weights"]
        seconds["second model"] = seconds["forward"] + _time(run.work["loss"], machine)
    peak, parts, moment = _peak(run, static, {})
    return Prediction(peak, parts, moment, 0, seconds)


def passes_of(config: UnlearnConfig, workload: Workload) -> list[Sequences]:
    """The batches of a step that go through the model one after another, each with a backward."""
    forget, retain = (range(len(of.tokens)) for of in workload)
    passes = forward_passes(forget, retain, config.gradient_accumulation_steps, separate=config.separate_terms)
    return [workload.forget.some(forget) + workload.retain.some(retain) for forget, retain in passes]


def recipe_of(shape: ModelShape, config: UnlearnConfig, machine: Machine, *, packed: bool) -> Recipe:
    """What the simulation needs to know of a configuration."""
    return Recipe(
        chunk_tokens=config.chunk_tokens or chunk_tokens(shape, config, machine),
        packed=packed,
        attention=attention_kind(config, packed=packed, on_gpu=machine.on_gpu),
        on_gpu=machine.on_gpu,
        precision=config.precision,
        lora_rank=config.lora_rank if config.lora else None,
        load_in_4bit=config.load_in_4bit,
        weights=config.weights,
        gradient_checkpointing=config.gradient_checkpointing,
        offload_activations=config.offload_activations,
        tile_tokens=config.tile_tokens,
        optimizer=config.optimizer,
        gradient_release=config.gradient_release,
    )


def chunk_tokens(shape: ModelShape, config: UnlearnConfig, machine: Machine) -> int:
    """The loss's own choice: a GPU's is bounded by a quarter of what is free."""
    nbytes = FROZEN_CHUNK_BYTES if config.lora else TRAINED_CHUNK_BYTES
    if machine.on_gpu:
        nbytes = min(nbytes, int(machine.budget // 4))
    return default_chunk_tokens(
        shape.vocab_size, 2 if config.precision == "bf16" else 4, torch.device("cpu"),
        head_is_trained=not config.lora, chunk_bytes=nbytes,
    )  # fmt: skip


def attention_kind(config: UnlearnConfig, *, packed: bool, on_gpu: bool) -> AttentionKind:
    """Which kernel a run with this configuration attends with.

    Raises:
        UserError: one whose memory is not known here.
    """
    name = config.attention
    if name == "eager":
        raise UserError("attention: the planner knows fused kernels, sdpa and simnpo_varlen, got 'eager'")
    if _is_flash(config):
        return "linear"
    if (name is None and packed) or name == "simnpo_varlen":
        return "linear" if on_gpu else "varlen"
    return "sdpa"


def _is_flash(config: UnlearnConfig) -> bool:
    return config.attention is not None and any(word in config.attention for word in ("flash", "flex"))


def optimizer_bytes(optimizer: str, shapes: list[torch.Size]) -> int:
    """States of an optimizer over parameters of these shapes."""
    total = 0.0
    for shape in shapes:
        n = shape.numel()
        if optimizer == "adamw8bit" and n >= ADAMW8BIT_SMALL:
            total += 2 * n + 2 * 4 * -(-n // ADAMW8BIT_BLOCK)
        elif optimizer == "adafactor":
            total += 4 * (n // shape[-1] + n // shape[-2]) if len(shape) > 1 else 4 * n
        else:
            total += 8 * n
    return int(total)


def _static(config: UnlearnConfig, run: Simulation, ranks: int) -> dict[str, int]:
    """What is there all through the step beside the model."""
    trained = sum(shape.numel() for shape in run.trained)
    states = optimizer_bytes(config.optimizer, run.trained)
    # what rounding left out of each weight, in bf16
    states += 2 * trained if config.weights == "bf16" else 0
    buckets = (2 if config.weights == "bf16" else 4) * trained if ranks > 1 else 0
    return {"optimizer": states, "gradient buckets": buckets}


def _updating(config: UnlearnConfig, run: Simulation) -> dict[str, int]:
    """What the update of the largest parameter needs for itself, where it is not part of the backward."""
    if config.gradient_release:
        return {}
    dtype = torch.bfloat16 if config.weights == "bf16" else torch.float32
    return {"update": max(shape.numel() for shape in run.trained) * update_bytes(config.optimizer, dtype)}


def _peak(run: Simulation, static: dict[str, int], update: dict[str, int]) -> tuple[int, dict[str, int], str]:
    """Bytes, parts and name of the worst moment of a run."""
    segments = run.segments | {"update": run.segments["update"] | update}
    moment, parts = max(segments.items(), key=lambda item: sum(item[1].values()))
    named = {NAMES.get(part, part): n for part, n in parts.items()} | static
    ordered = {part: named[part] for part in PARTS if named.get(part)}
    return sum(ordered.values()), ordered, moment


def _time(work: Work, machine: Machine) -> float:
    return (work.gemm_flops + work.attention_flops) / machine.gemm_flops + work.moved_bytes / machine.bandwidth


def _seconds(
    config: UnlearnConfig, run: Simulation, machine: Machine, share: float, host_bytes: int
) -> dict[str, float]:
    """Seconds by part; `share`: the step's tokens over those of the run."""
    work = run.work
    attention = sum((w.attention_flops for w in work.values()), 0.0) / machine.gemm_flops
    seconds = {
        kind: share * _time(replace(work[kind], attention_flops=0.0), machine)
        for kind in ("forward", "recompute", "backward")
        if kind in work
    }
    seconds["attention"] = share * attention
    seconds["loss"] = share * _time(work["loss"] + work["loss backward"], machine)
    trained = sum(shape.numel() for shape in run.trained)
    traffic = OPTIMIZER_TRAFFIC[config.optimizer] + (CLIP_TRAFFIC if config.max_grad_norm else 0.0)
    seconds["optimizer"] = trained * traffic / machine.bandwidth
    if host_bytes:
        # out beside the forward and back beside the backward; what the arithmetic does not hide is added
        once = host_bytes / machine.host_bandwidth
        forward = _time(work["forward"], machine)
        backward = _time(work["backward"] + work.get("recompute", Work()), machine)
        seconds["offloading"] = share * (max(0.0, once - forward) + max(0.0, once - backward))
    return seconds
