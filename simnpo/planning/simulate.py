"""One forward and backward of a model that has no weights, on tensors that have no data, and what it took.

The operations are the real ones, so any architecture of transformers, LoRA, autocast and checkpointing cost what they
cost. Of a model with equal layers four and five are run: every peak is a line in the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simnpo.batch import Batch
from simnpo.errors import UserError
from simnpo.memory.checkpoints import AHEAD, checkpoint_layers
from simnpo.model import add_lora, causal_lm, hidden_states, output_head
from simnpo.planning.attention import NAME, AttentionKind, simulated_attention
from simnpo.planning.ledger import Ledger, Work
from simnpo.planning.levers import quantise_body, tile_layers
from simnpo.planning.loss import Sequences, eager_loss, simulated_loss
from simnpo.planning.model_shape import ModelShape, layers_of
from simnpo.upcast import float32_products

FEW_LAYERS = (4, 5)
# between the last layer's forward and its backward, when the inputs of all layers are alive
AFTER_ALL_LAYERS = ("forward of the body's end", "loss", "backward of the loss", "backward of the body's end")


@dataclass(frozen=True)
class Recipe:
    """What decides the memory and the work of one forward and backward, beside the model and the batch.

    loss: ours or the published loops'; or none, the log-ratio of forget sequences read in float32 without a gradient.
    chunk_tokens: rows of logits alive at once in ours.
    gradients_exist: an earlier backward of the step has left its gradients.
    on_gpu: whose kernels are meant; the simulation itself needs none.
    """

    loss: Literal["ours", "eager", "ratio"] = "ours"
    chunk_tokens: int = 1024
    packed: bool = True
    attention: AttentionKind = "sdpa"
    on_gpu: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    lora_rank: int | None = None
    load_in_4bit: bool = False
    weights: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    tile_tokens: int | None = None
    optimizer: str = "adamw"
    gradient_release: bool = False
    gradients_exist: bool = False


@dataclass
class Simulation:
    """What the recipe took with a batch.

    Attributes:
        segments: name -> part -> bytes at that segment's peak, in the order they ran.
        work: "forward", "recompute", "backward", "loss", or "ratio" -> what was computed.
        checkpoint_bytes: what a layer keeps between forward and backward; the mean where layers differ.
        trained: shapes of the parameters that train.
        frozen: parameters that do not.
    """

    segments: dict[str, dict[str, int]]
    work: dict[str, Work]
    checkpoint_bytes: int
    trained: list[torch.Size] = field(default_factory=list)
    frozen: int = 0


@lru_cache(maxsize=512)
def simulate(shape: ModelShape, recipe: Recipe, sequences: Sequences) -> Simulation:
    """Runs `sequences` through a model of this shape.

    Raises:
        UserError: the model's forward cannot run without data.
    """
    whole = _whole_model(shape, recipe, sequences)
    if recipe.offload_activations:
        alive = _checkpoints_alive(shape.num_layers)
        for name in alive.keys() & whole.segments.keys():
            if alive[name] > AHEAD:
                whole.segments[name]["activations"] -= (alive[name] - AHEAD) * whole.checkpoint_bytes
    return whole


def _checkpoints_alive(num_layers: int) -> dict[str, int]:
    """Segment -> how many inputs of layers are kept for backward in it: a layer's own and those of all before it.

    With offloading AHEAD of them are on the GPU at most: the layer's own and, in forward, the one before it on its way
    out, in backward the one before it on its way back; after all layers the last ones, which may still be leaving.
    """
    alive: dict[str, int] = dict.fromkeys(AFTER_ALL_LAYERS, num_layers)
    for i in range(num_layers):
        for direction in ("forward", "backward"):
            alive[f"{direction} of {_place(i, num_layers)}"] = i + 1
    return alive


def _whole_model(shape: ModelShape, recipe: Recipe, sequences: Sequences) -> Simulation:
    if not shape.is_uniform or shape.num_layers <= FEW_LAYERS[1]:
        return _run(shape, recipe, sequences, shape.num_layers)
    few, more = (_run(shape, recipe, sequences, n) for n in FEW_LAYERS)
    further = shape.num_layers - FEW_LAYERS[0]
    segments = {}
    for name, parts in few.segments.items():
        other = more.segments[name]
        known = {part: parts.get(part, 0) for part in {**parts, **other}}
        segments[name] = {part: n + further * (other.get(part, 0) - n) for part, n in known.items()}
    work = {kind: value + (more.work[kind] + value.times(-1)).times(further) for kind, value in few.work.items()}
    layer_shapes = _added(few.trained, more.trained)
    return Simulation(
        segments, work, few.checkpoint_bytes, few.trained + layer_shapes * further,
        few.frozen + further * (more.frozen - few.frozen),
    )  # fmt: skip


def _added(few: list[torch.Size], more: list[torch.Size]) -> list[torch.Size]:
    """The shapes that `more` has beyond those of `few`."""
    rest = list(few)
    added = []
    for shape in more:
        if shape in rest:
            rest.remove(shape)
        else:
            added.append(shape)
    return added


def _run(shape: ModelShape, recipe: Recipe, sequences: Sequences, num_layers: int) -> Simulation:
    ledger = Ledger()
    attended = list(chain.from_iterable(sequences.pieces))
    with ExitStack() as stack:
        stack.enter_context(
            simulated_attention(
                recipe.attention, attended, packed=recipe.packed, on_gpu=recipe.on_gpu, count=ledger.count_attention

            )
        )  # fmt: skip
        with torch.device("meta"):
            model = _build(shape, recipe, num_layers)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _put_on_cpu(model)
        # made once and kept: what the step itself makes is counted from here on
        ledger.adopt([*model.parameters(), *model.buffers()], "weights", are_parameters=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        _watch_gradients(ledger, trained, recipe)
        _watch_layers(ledger, layers_of(causal_lm(model)))
        stack.enter_context(ledger)
        try:
            _step(ledger, model, recipe, sequences)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"model: the forward of {type(causal_lm(model)).__name__} cannot be simulated: {lines[0]}"
            ) from error
        ledger.enter("update", "update")
    segments = {name: segment.parts for name, segment in ledger.segments.items()}
    return Simulation(
        segments, {kind: work for kind, work in ledger.work.items() if kind != "update"},
        ledger.kept_by_layers // num_layers, [p.shape for p in trained],
        sum(p.numel() for p in model.parameters() if not p.requires_grad),
    )  # fmt: skip


def _build(shape: ModelShape, recipe: Recipe, num_layers: int) -> nn.Module:
    """As `training.setup.build_model` does, without weights to load."""
    low = recipe.weights == "bf16" or (recipe.lora_rank is not None and recipe.precision == "bf16")
    model: Any = shape.build(num_layers, torch.bfloat16 if low else torch.float32, NAME)
    if recipe.gradient_checkpointing:
        # offloading is a matter of where they are, not of what is computed
        checkpoint_layers(model, offload=False, device=torch.device("cpu"))
    if recipe.lora_rank is not None:
        model = add_lora(model, recipe.lora_rank, 1.0)
    if recipe.load_in_4bit:
        quantise_body(model, torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    if recipe.tile_tokens is not None:
        tile_layers(model, recipe.tile_tokens)
    return model.train()


def _put_on_cpu(model: nn.Module) -> None:
    """Tensors of the mode in force instead of those on the meta device, which autocast does not know."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                module._parameters[name] = made[id(p)]  # type: ignore[assignment]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = made.setdefault(id(b), torch.empty(b.shape, dtype=b.dtype))


def _step(ledger: Ledger, model: nn.Module, recipe: Recipe, sequences: Sequences) -> None:
    batch = _batch(sequences, recipe.packed)
    if recipe.gradients_exist:
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.empty_like(p)
                ledger.adopt([p.grad], "gradients")
    if recipe.loss == "ratio":
        _read_ratio(ledger, model, recipe, batch, sequences)
        return
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
        hidden = hidden_states(model, batch)
        head = output_head(model)
        V, D = head.weight.shape
        ledger.enter("loss", "loss")
        ledger.part_of = loss_part(V, D)
        if recipe.loss == "ours":
            loss, factor = simulated_loss(hidden, head, sequences, recipe.chunk_tokens, on_gpu=recipe.on_gpu)
            ledger.work["loss"] = ledger.work["loss"].times(factor)
        else:
            loss = eager_loss(hidden, head, sequences)
    # the step multiplies it by the number of ranks
    loss = loss * 1
    hidden.register_hook(lambda gradient: _enter_backward(ledger, "backward of the body's end"))
    ledger.enter("backward of the loss", "loss backward")
    del hidden
    loss.backward()


def _read_ratio(ledger: Ledger, model: nn.Module, recipe: Recipe, batch: Batch, sequences: Sequences) -> None:
    """As `training.forward.exact_logps` does."""
    ledger.enter("reading the log-ratio", "ratio")
    # on a GPU the linear layers' float32 products are made of bf16 ones
    with float32_products(model.eval(), lambda weight: recipe.on_gpu and weight.is_floating_point()):
        hidden = hidden_states(model, batch)
        head = output_head(model)
        ledger.part_of = loss_part(*head.weight.shape)
        head = head._replace(weight=head.weight.float())
        simulated_loss(hidden, head, sequences, recipe.chunk_tokens, on_gpu=recipe.on_gpu)
    ledger.part_of = None


def _enter_backward(ledger: Ledger, segment: str) -> None:
    ledger.part, ledger.part_of = "backward", None
    ledger.enter(segment, "backward")


def loss_part(V: int, D: int) -> Callable[[Tensor], str]:
    """Parts of the loss by their shapes."""

    def part(x: Tensor) -> str:
        if x.shape == (V, D):
            return "dW"
        return "loss chunk" if V in x.shape else "dH and rows of the loss"

    return part


def _watch_gradients(ledger: Ledger, trained: list[nn.Parameter], recipe: Recipe) -> None:
    """Gradients that arrived are no longer in flight; with gradient_release they are gone at once."""

    def arrived(p: Tensor) -> None:
        if recipe.gradient_release:
            # the update happens here, and with it its own tensors
            updating = torch.empty(p.numel() * update_bytes(recipe.optimizer, p.dtype), dtype=torch.uint8)
            del updating
            p.grad = None
        elif p.grad is not None:
            ledger.adopt([p.grad], "gradients")

    for p in trained:
        p.register_post_accumulate_grad_hook(arrived)


def update_bytes(optimizer: str, dtype: torch.dtype) -> int:
    """Bytes for each element of a parameter that is being updated: a bf16 one and its gradient in float32, and
    Adafactor's squares and their root.
    """
    return (8 if dtype == torch.bfloat16 else 0) + (8 if optimizer == "adafactor" else 0)


def _place(i: int, num_layers: int) -> str:
    """What layer `i` is called: the first and last two of a few layers stand for those of many."""
    known = {0: "the first layer", 1: "the second layer"}
    known |= {num_layers - 1: "the last layer", num_layers - 2: "the last but one layer"}
    return known.get(i, f"layer {i + 1}")


def _watch_layers(ledger: Ledger, layers: nn.ModuleList) -> None:
    """A segment for each layer, forward and backward; and what they keep."""
    last = len(layers) - 1

    def starts(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if ledger.is_forward:
                if i == 0:
                    ledger.kept_by_layers -= ledger.bytes_of("activations")
                ledger.enter(f"forward of {_place(i, len(layers))}", "forward")

        return hook

    def ends(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            x = out[0] if isinstance(out, tuple) else out
            if ledger.is_forward and x.requires_grad:
                x.register_hook(lambda gradient: _enter_backward(ledger, f"backward of {_place(i, len(layers))}"))
            if ledger.is_forward and i == last:
                ledger.kept_by_layers += ledger.bytes_of("activations")
                ledger.enter("forward of the body's end", "forward")

        return hook

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(starts(i))
        layer.register_forward_hook(ends(i))


def _batch(sequences: Sequences, packed: bool) -> Batch:
    """The batch the collator would make, without its contents."""
    B = len(sequences.tokens)
    size = (1, sequences.num_tokens) if packed else (B, max(sequences.tokens))
    ids = torch.zeros(size, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        position_ids=torch.zeros(size, dtype=torch.int64),
        targets=torch.zeros(size, dtype=torch.int64),
        retain_mask=torch.zeros(B, dtype=torch.bool),
        attention_mask=None,
        cu_seqlens=torch.zeros(B + 1, dtype=torch.int32) if packed else None,
        ref_logps=None,
        ids=("",) * B,
        num_targets=sequences.targets,
        num_inputs=sequences.tokens,
    )
