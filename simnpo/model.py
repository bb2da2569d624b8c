"""The model as this package sees it: a body that ends in hidden states, and a head only the fused loss multiplies."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from simnpo.batch import Batch
from simnpo.errors import UserError
from simnpo.kernels.parallel import whole

logger = logging.getLogger(__name__)

# names under which configurations keep a factor of the logits, and whether the model divides by it
LOGIT_FACTORS = {
    "logit_scale": False,  # Cohere
    "lm_head_multiplier": False,  # Falcon-H1
    "output_multiplier": False,  # Muse
    "logits_scaling": True,  # Granite
}
MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
# how many tokens at the beginning of a packed row all its sequences begin with, for the attention of a running forward
SHARED_PREFIX: ContextVar[int] = ContextVar("SHARED_PREFIX", default=0)
# what two ways of computing the same hidden states may differ by, relative, in the dtype of the arithmetic
# (transformers takes the softmax of eager attention in float32, whatever the dtype)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# how allocators say that there is no room, where they have no exception of their own
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns whatever other packages raise about a model into a `UserError` that begins with `what`.

    Memory that runs out stays what it is: the model may be right and the machine too small.
    """
    try:
        yield
    except UserError:
        raise
    # a file or configuration that is wrong makes readers and models raise anything, from KeyError to RuntimeError
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        reason = (f"{first} {more[0]}" if more and first.endswith(":") else first)[:300]
        named = isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and reason
        raise UserError(f"{what}: {reason if named else f'{type(error).__name__} {reason}'.strip()}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no room for a tensor."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def add_lora(model: PreTrainedModel, rank: int, alpha: float) -> PeftModel:
    """Adapters of `rank`, in fp32, on every linear layer but the head; everything else is frozen.

    Raises:
        UserError: no layer is as large as `rank`: a product of that rank could be nothing it adapts, and may not fit.
    """
    largest = max((min(size) for size in _adapted_sizes(model)), default=0)
    if rank > largest:
        raise UserError(f"lora_rank must be at most {largest}, the rank of the largest layer it adapts, got {rank}")
    return get_peft_model(
        model,  # type: ignore[arg-type]
        LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"),  # type: ignore[arg-type]
    )


def _adapted_sizes(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """Inputs and outputs of every layer that PEFT's "all-linear" adapts."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if module is not head and isinstance(module, nn.Linear):
            yield module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            yield module.nx, module.nf


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


class OutputHead(NamedTuple):
    """logits = softcap(logit_scale * (hidden_states @ weight.T + bias)), softcap(z) = c tanh(z / c)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    logit_softcap: float | None

    def options(self) -> dict[str, Any]:
        """All but the weight, as the fused operations name it."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}


def output_head(model: nn.Module) -> OutputHead:
    """What turns the model's hidden states into logits.

    Raises:
        UserError: see `output_layer`.
    """
    head = output_layer(model)
    return OutputHead(head.weight, head.bias, *logit_transform(model))


def output_layer(model: nn.Module) -> nn.Linear:
    """The linear layer from hidden states to logits; with `modules_to_save`, the copy PEFT trains.

    Raises:
        UserError: it cannot be found, has a LoRA adapter, is quantised, or is not a plain linear layer.
    """
    lm = causal_lm(model)
    head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if head is None or body_of(lm) is None:
        raise UserError(f"model: cannot find the output head of {type(lm).__name__}; a causal language model is needed")
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]]
        _refuse_untied(lm, head)
    if isinstance(head, BaseTunerLayer):
        raise UserError(
            "model: the output head has an adapter, which the fused loss would leave untrained: take it out of "
            "target_modules, or train the whole head with modules_to_save"
        )
    weight = getattr(head, "weight", None)
    # a 4-bit weight is uint8; an 8-bit one is int8
    if not isinstance(head, nn.Linear) or weight is None or not weight.is_floating_point():
        kind = f"{type(head).__name__} with {getattr(weight, 'dtype', 'no')} weight"
        raise UserError(
            f"model: the output head must be a linear layer with floating point weights, got {kind}: load the model "
            "with its head left out of the quantisation (llm_int8_skip_modules, modules_to_not_convert)"
        )
    return head


def _refuse_untied(lm: Any, head: nn.Module) -> None:
    """A trained copy of a head that is the embedding in the saved file as well, and would be overwritten by it."""
    embedding = lm.get_input_embeddings()
    if isinstance(embedding, ModulesToSaveWrapper):
        embedding = embedding.modules_to_save[embedding.active_adapters[0]]
    if lm.config.get_text_config().tie_word_embeddings and head.weight is not embedding.weight:
        raise UserError(
            "model: its head and its embedding are one weight (tie_word_embeddings), and modules_to_save trains a copy "
            "of the head alone, which is lost when the model is merged and loaded: pass ensure_weight_tying=True to "
            "LoraConfig (peft 0.18 and later), or leave the head frozen"
        )


def logit_transform(model: nn.Module) -> tuple[float, float | None]:
    """Scale and soft-cap of the logits, from the configuration.

    Raises:
        UserError: one of them is no number that is neither zero nor infinite in float32.
    """
    config = causal_lm(model).config.get_text_config()
    scale = 1.0
    for name, divides in LOGIT_FACTORS.items():
        factor = _logit_factor(config, name)
        if factor is not None:
            divides = divides and not config.model_type.startswith(MULTIPLIES_BY_LOGITS_SCALING)
            scale = scale / factor if divides else scale * factor
    return scale, _logit_factor(config, "final_logit_softcapping")


def _logit_factor(config: Any, name: str) -> float | None:
    factor = getattr(config, name, None)
    if factor is None:
        return None
    # beyond these float32 has no such number, or no inverse of it
    if type(factor) not in (int, float) or not 2**-126 <= abs(factor) <= 2**126:
        got = f"{factor!r:.40}" if type(factor) is not int or abs(factor) < 2**126 else "an integer far above"
        raise UserError(
            f"model: {name} in the configuration must be a number between 1e-37 and 1e37 in size, got {got}"
        )
    return factor


def body_of(lm: nn.Module) -> nn.Module | None:
    """The model without its head."""
    body = getattr(lm, "base_model", None)
    return None if body is lm else body


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Runs the body, without the head, through LoRA adapters if there are any.

    Returns:
        (B, T, D) of a padded batch, (N, D) of a packed one.

    Raises:
        UserError: the body returns something else than hidden states.
    """
    body = body_of(causal_lm(model))
    assert body is not None, "output_layer refuses a model without a body"
    output = run_body(
        body,
        batch.shared_prefix,
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    )
    hidden = last_hidden_state(body, output)
    return hidden if batch.cu_seqlens is None else hidden.squeeze(0)


def run_body(body: nn.Module, shared_prefix: int, **inputs: Any) -> Any:
    """The body's forward, of a row whose sequences share their first tokens: see `simnpo.batch.Batch`."""
    token = SHARED_PREFIX.set(shared_prefix)
    try:
        return body(**inputs)
    finally:
        SHARED_PREFIX.reset(token)


def last_hidden_state(body: nn.Module, output: Any) -> Tensor:
    """What the head multiplies, from what the body returned.

    Raises:
        UserError: it is not there.
    """
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise UserError(
            f"model: {type(body).__name__} returned a {type(output).__name__} without last_hidden_state: a model whose "
            "body follows transformers' return_dict=True is needed (vision-language models need transformers 5)"
        )
    return hidden


@torch.no_grad()
def verify_head(model: nn.Module) -> None:
    """Measures that `output_head` applied to `hidden_states` gives the model's own logits.

    That catches what `output_head` cannot know: a factor under another name, a layer between body and head.

    Raises:
        UserError: they differ, are not finite, or the forward fails.
    """
    weight, bias, scale, softcap = output_head(model)
    weight, bias = whole(weight), None if bias is None else whole(bias)
    with refusing(f"model: {type(causal_lm(model)).__name__} cannot run"):
        batch = probe(model, [7])
        hidden = hidden_states(model, batch)[0]
        logits = scale * nn.functional.linear(hidden.to(weight.dtype), weight, bias).double()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        # with a cache where the model has one, as it will write answers
        expected = causal_lm(model)(input_ids=batch.input_ids).logits[0].double()
        if not expected.isfinite().all():
            raise UserError(f"model: {type(causal_lm(model)).__name__} gives logits that are NaN or infinite")
    error = relative_error(logits, expected)
    if not error <= TOLERANCE[weight.dtype]:
        raise UserError(
            f"model: {type(causal_lm(model)).__name__} computes its logits in a way this package does not know: "
            f"hidden states times head differ from them by {error:.1%}"
        )


@torch.no_grad()
def keeps_sequences_apart(model: nn.Module) -> bool:
    """Measures whether a sequence gets the same hidden states packed behind another one as it gets alone."""
    packed, alone = probe(model, [5, 7]), probe(model, [7])
    try:
        behind = hidden_states(model, packed)[5:]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        logger.info("a packed forward fails: %s", error)
        return False
    expected = hidden_states(model, alone)[0]
    return same_hidden_states(model, behind, expected)


@torch.no_grad()
def shares_prefix(model: nn.Module) -> bool:
    """Measures whether sequences that begin alike get the hidden states they get alone when that is computed once."""
    alone = probe(model, [12])
    first, shared = alone.input_ids[0], 5
    others = first[shared:].flip(0)
    ids = torch.cat([first[:9], others, first[shared:]])[None]
    positions = [*range(9), *range(shared, 12), *range(shared, 12)]
    packed = replace(
        alone, input_ids=ids, position_ids=ids.new_tensor([positions]), targets=ids, attention_mask=None,
        cu_seqlens=torch.tensor([0, 9, 16, 23], dtype=torch.int32), shared_prefix=shared,
    )  # fmt: skip
    try:
        hidden = hidden_states(model, packed)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        logger.info("a forward with a shared prefix fails: %s", error)
        return False
    expected = hidden_states(model, alone)[0]
    return same_hidden_states(model, torch.cat([hidden[:9], hidden[16:]]), torch.cat([expected[:9], expected[shared:]]))


def same_hidden_states(model: nn.Module, ours: Tensor, expected: Tensor) -> bool:
    """Whether two ways of computing the same hidden states agree to what the dtype of the arithmetic allows."""
    autocast = torch.is_autocast_enabled(expected.device.type)
    dtype = torch.get_autocast_dtype(expected.device.type) if autocast else next(model.parameters()).dtype
    return relative_error(ours.float(), expected.float()) <= TOLERANCE[dtype]


class _Lookups(TorchDispatchMode):
    """Records which rows of which tables are looked up, whatever the module that does it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.found.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def position_limit(model: nn.Module) -> int | None:
    """The longest sequence that a model with learned absolute positions can read; None if it has none.

    Measured: a table of positions is one that a short sequence looks up consecutive rows of, from the first one it uses
    (OPT leaves out two). A rotary or relative embedding has no such table.

    Raises:
        UserError: the model cannot run.
    """
    lm = causal_lm(model)
    tables = [module for module in lm.modules() if isinstance(module, nn.Embedding)]
    if all(table is lm.get_input_embeddings() for table in tables):
        # most models have no other, and need no forward
        return None
    batch = probe(model, [7])
    # rows that no counting of positions would give, so that the table of tokens is not taken for one of positions
    batch = replace(batch, input_ids=batch.input_ids.flip(1))
    was_training = model.training
    model.eval()
    try:
        with refusing(f"model: {type(lm).__name__} cannot run"), _Lookups() as lookups:
            hidden_states(model, batch)
    finally:
        model.train(was_training)
    limits = []
    for table, rows in lookups.found:
        first = rows.flatten()[:1]
        if rows.numel() == 7 and torch.equal(rows.flatten(), first + torch.arange(7, device=rows.device)):
            limits.append(len(table) - int(first))
    return min(limits, default=None)


def probe(model: nn.Module, lengths: list[int]) -> Batch:
    """Sequences of made-up tokens, the last one always the same; packed if there is more than one."""
    vocab_size = causal_lm(model).config.get_text_config().vocab_size
    device = next(model.parameters()).device
    tokens = [[(31 * i + 17 * n) % vocab_size for i in range(n)] for n in lengths]
    ids = torch.tensor([list(chain.from_iterable(tokens))], device=device)
    packed = len(lengths) > 1
    return Batch(
        input_ids=ids,
        position_ids=torch.tensor([[i for n in lengths for i in range(n)]], device=device),
        targets=ids,
        retain_mask=torch.zeros(len(lengths), dtype=torch.bool),
        attention_mask=None if packed else torch.ones_like(ids),
        cu_seqlens=torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32) if packed else None,
        ref_logps=None,
        ids=tuple(map(str, lengths)),
        num_targets=tuple(lengths),
        num_inputs=tuple(lengths),
    )


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm().clamp(min=1e-30)).item()
