"""`attach`: a causal language model whose own forward computes the loss, so that its logits never exist.

    model(input_ids, attention_mask, labels=labels, objective=SimNPO(), retain_mask=mask)  ->  UnlearnLoss
    model(input_ids, attention_mask, labels=labels, token_logps=True)                      ->  (B, T) log-probabilities
    model(input_ids, attention_mask)                                                       ->  what it always returned

The loss is computed inside the model's forward, and its product with the head inside the head's: that is where
DistributedDataParallel listens, where FSDP and ZeRO-3 have the weights gathered and reduce their gradients, and where
PEFT swaps in the copy it trains.
"""

import copyreg
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from simnpo.errors import UserError
from simnpo.kernels.backend import IGNORE_INDEX
from simnpo.kernels.checks import check_objective
from simnpo.kernels.linear_logps import linear_logps
from simnpo.kernels.linear_unlearn_loss import UnlearnLoss, linear_unlearn_loss
from simnpo.model import (
    body_of,
    causal_lm,
    keeps_sequences_apart,
    last_hidden_state,
    logit_transform,
    output_layer,
    run_body,
    shares_prefix,
    verify_head,
)
from simnpo.objectives import Objective

# arguments of the loss, in the forward of an attached model; without `objective` or `token_logps` they mean nothing
LOSS_ARGUMENTS = (
    "shift_labels", "retain_mask", "ref_logps", "exact_logps", "ref_token_logps", "token_weights", "alternates",
    "forget_coef", "retain_coef", "num_forget", "num_retain_tokens", "cu_seqlens", "gradient_error", "logits_dtype",
    "chunk_tokens", "impl", "sequence_group", "shared_prefix",
)  # fmt: skip
TOKEN_LOGPS_ARGUMENTS = ("cu_seqlens", "gradient_error", "logits_dtype", "chunk_tokens", "impl", "shared_prefix")
# arguments of the model's own forward that a loss without logits cannot honour
REFUSED = {
    "num_items_in_batch": "it counts tokens of forget and retain sequences alike: pass num_forget and "
    "num_retain_tokens, what the two means divide by",
    "past_key_values": "a loss needs the whole sequences: leave the cache, or the prefix-tuning adapter, out",
    "logits_to_keep": "there are no logits to keep: mark what counts in labels",
}


def attach(model: nn.Module, *, verify: bool = True) -> Any:
    """Teach a model to compute the unlearning loss in its own forward.

    Call it before PEFT, Accelerate, DDP, FSDP or DeepSpeed wrap the model; a `PeftModel` may also be attached as it is.
    Without `objective` or `token_logps` the model behaves as before: `generate`, `save_pretrained`, `copy.deepcopy`,
    pickling, gradient checkpointing and LoRA see the model they know.

    With one of them the forward takes, beside the model's own arguments:

        labels: (B, T) Hugging Face's, unshifted, -100 where ignored; or shift_labels: (B, T), shifted already.
        objective: `SimNPO`, `NPO`, ...; the call returns an `UnlearnLoss`.
        token_logps: True; the call returns (B, T) float32 nats, [b, t] of labels[b, t + 1], 0 where ignored,
            differentiable for any loss.
        retain_mask: (B,) bool, True for a retain sequence.
        ref_logps, exact_logps: (B,) log-probabilities under the reference policy, and under this one where more exact
            arithmetic than the forward's has given them (`linear_unlearn_loss`), nats: a float32 tensor, or a list of
            floats, which no mixed-precision wrapper can round.
        num_forget, num_retain_tokens: what the two means divide by, if not the batch's own: the forget sequences and
            retain tokens of all ranks and micro-batches of a step. Where gradients are averaged over ranks (DDP, FSDP,
            ZeRO) the loss is to be multiplied by their number.
        cu_seqlens: (B + 1,) bounds of the sequences of a packed (1, N) row, whose position_ids restart with each.
        shared_prefix: tokens that every sequence of the packed row begins with and that stand in it once: the first
            sequence has them, the others leave them out and their position_ids start at this number. What they predict
            is not to be a target. Needs the attention of `simnpo.attention.use_packed_attention`.
        ref_token_logps, token_weights: (B, T) like shift_labels: [b, t] belongs to labels[b, t + 1].
        sequence_group: the ranks that share every sequence (context parallel), each with a slice of it and of
            shift_labels; the body is the one to have them attend to each other.
        alternates, forget_coef, retain_coef, gradient_error, logits_dtype, chunk_tokens, impl: see
            `linear_unlearn_loss`.

    Logit scale, soft-cap, bias and text configuration are taken from the model's configuration. A mixture of experts
    whose configuration asks for router logits gets its load-balancing loss added, as in its own forward.

    Args:
        model: causal language model of transformers, with or without a PEFT adapter.
        verify: measure on a few made-up tokens that head times hidden states are the model's logits. Turn it off only
            for weights that are not there yet (a meta device), or not in one piece (ZeRO-3 while it loads a model).

    Returns:
        `model`, the same object.

    Raises:
        UserError: the head cannot be found, has an adapter, is quantised or not a linear layer; the logits are made in
            an unknown way; the adapter is a prompt-learning one.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise UserError(
            f"model: {model.active_peft_config.peft_type} prepends virtual tokens, which the loss would take for the "
            "sequence's own: use LoRA, or train the whole model"
        )
    lm = causal_lm(model)
    if lm.config.is_encoder_decoder:
        raise UserError(f"model: {type(lm).__name__} is an encoder-decoder; a causal language model is needed")
    _attach_head(lm)
    _keep_4bit_weights(lm)
    if not isinstance(lm, AttachedModel):
        lm.__class__ = _attached_class(type(lm))
        _refresh_forward(lm)
    if verify:
        if any(parameter.is_meta for parameter in lm.parameters()):
            raise UserError("model: its weights are on the meta device and cannot be checked: pass verify=False")
        if _is_in_parts(lm):
            raise UserError(
                "model: FSDP or DeepSpeed ZeRO-3 has cut its weights into parts, which cannot be checked here: call "
                "simnpo.attach before that, or pass verify=False"
            )
        was_training = lm.training
        lm.eval()
        verify_head(lm)
        lm.train(was_training)
    return model


def _keep_4bit_weights(lm: nn.Module) -> None:
    """Forbids bitsandbytes to repack 4-bit weights for inference on a CPU, which it does in the first forward without a
    gradient: a product with repacked weights has none ever after, and says nothing.
    """
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _is_in_parts(lm: nn.Module) -> bool:
    """Whether only the forward of the whole model puts its weights together."""
    by_fsdp = any(base.__name__ == "FSDPModule" for base in type(lm).__mro__)
    return by_fsdp or any(hasattr(parameter, "ds_id") for parameter in lm.parameters())


class AttachedHead(nn.Linear):
    """A linear layer that can hand its weight to a loss instead of multiplying."""

    def forward(  # type: ignore[override]
        self, input: Tensor, loss: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None
    ) -> Any:
        return super().forward(input) if loss is None else loss(input, self.weight, self.bias)


class _ForwardOrLoss:
    """The forward of a head whose own is wrapped: the loss gets the weight as it is, sharded, and not the wrapper's."""

    def __init__(self, head: AttachedHead, wrapper: Callable[..., Any]) -> None:
        self.head, self.wrapper = head, wrapper

    def __call__(self, input: Tensor, loss: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None) -> Any:
        return self.wrapper(input) if loss is None else AttachedHead.forward(self.head, input, loss)


class AttachedModel:
    """Mixed into the class of a model by `attach`; see there."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the mixed class has no name to be imported by: a copy is made from the model's own class
        rebuild, _, *state = super().__reduce_ex__(protocol)
        assert rebuild is copyreg.__newobj__, rebuild  # type: ignore[attr-defined]
        return (_new_attached, (type(self).__mro__[2],), *state)


def _new_attached(base: type[nn.Module]) -> Any:
    return object.__new__(_attached_class(base))


@cache
def _attached_class(base: type[nn.Module]) -> type:
    """`base` with the loss in its forward; it keeps its name, which transformers writes into saved configurations."""
    own = inspect.signature(base.forward)

    def forward(self: Any, *args: Any, objective: Objective | None = None, token_logps: bool = False, **kwargs: Any):
        if objective is None and not token_logps:
            given = [name for name in LOSS_ARGUMENTS if kwargs.get(name) is not None and name not in own.parameters]
            if given:
                raise ValueError(f"{', '.join(given)} belong to a loss: pass objective or token_logps=True as well")
            return base.forward(self, *args, **kwargs)
        # parameters[0] is self
        return _loss_forward(self, objective, token_logps, kwargs | dict(zip(list(own.parameters)[1:], args)))

    # transformers reads the names of the arguments off the signature: what to keep of a batch, what generate may pass
    ours = ("objective", "token_logps", *LOSS_ARGUMENTS)
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ours]
    named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    added = [parameter for parameter in added if parameter.name not in own.parameters]
    forward.__signature__ = inspect.Signature([*named, *added, rest])  # type: ignore[attr-defined]
    forward.__doc__ = f"The forward of {base.__name__}; with `objective` or `token_logps` a loss: see `simnpo.attach`."
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (AttachedModel, base), {**members, "forward": forward})


def _attach_head(lm: Any) -> nn.Module:
    """The head, able to take a loss; at every call, for resize_token_embeddings and PEFT put another in its place."""
    layer, head = output_layer(lm), lm.get_output_embeddings()
    # with modules_to_save there are two: the copy that is trained and, for a disabled adapter, the original
    for module in head.modules():
        # exactly nn.Linear: `output_layer` has refused everything that multiplies in another way
        if type(module) is nn.Linear:
            module.__class__ = AttachedHead
        # transformers' tensor parallelism wraps the forward of the object, and its wrapper knows of no loss
        wrapper = vars(module).get("forward")
        if "_old_forward" in vars(module):
            _refresh_forward(module)
        elif isinstance(module, AttachedHead) and wrapper is not None and not isinstance(wrapper, _ForwardOrLoss):
            module.forward = _ForwardOrLoss(module, wrapper)
    if not isinstance(layer, AttachedHead):
        raise UserError(
            f"model: the output head has become a {type(layer).__name__} since the model was made: call simnpo.attach "
            "before the model is sharded or wrapped"
        )
    return head


def _refresh_forward(module: nn.Module) -> None:
    """Lets a forward that was put on the object itself find the one of its new class.

    Accelerate does that to spread a model over devices (device_map="auto") and keeps the forward it calls.
    """
    if "forward" not in vars(module):
        return
    if "_old_forward" not in vars(module):
        raise UserError(
            f"model: the forward of this {type(module).__name__} has been replaced on the object (by Accelerate's "
            "prepare, TRL's fused head, or a patch), which would hide the loss: call simnpo.attach before that"
        )
    module._old_forward = MethodType(type(module).forward, module)  # type: ignore[assignment]


def _loss_forward(lm: Any, objective: Objective | None, token_logps: bool, inputs: dict[str, Any]) -> Any:
    """The body on the model's own arguments, then the loss inside the head's forward."""
    if objective is not None and token_logps:
        raise ValueError("objective and token_logps=True ask for two different results: pass one of them")
    if objective is not None:
        check_objective(objective)  # before the model runs
    for name, reason in REFUSED.items():
        if inputs.pop(name, None) is not None:
            raise ValueError(f"{name} has no meaning in a loss without logits: {reason}")
    given = {name: inputs.pop(name, None) for name in LOSS_ARGUMENTS}
    options = {name: value for name, value in given.items() if value is not None}
    allowed = TOKEN_LOGPS_ARGUMENTS if token_logps else LOSS_ARGUMENTS
    extra = [name for name in options if name not in (*allowed, "shift_labels")]
    if extra:
        raise ValueError(f"token_logps=True returns log-probabilities, which have no {', '.join(extra)}")
    if options.get("sequence_group") is not None and "shift_labels" not in options:
        raise ValueError(
            "sequence_group needs shift_labels: the label of a slice's last token is on another rank, so shift the "
            "labels before they are cut"
        )
    targets = _targets(lm, inputs, options)
    for name in ("ref_logps", "exact_logps"):
        logps = options.get(name)
        if isinstance(logps, Sequence):
            options[name] = torch.tensor(logps, device=targets.device)
        elif logps is not None and logps.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} came in {logps.dtype}, too coarse for the log-probability of a sequence; a mixed-precision "
                "wrapper casts tensors: pass a list of floats, which it leaves alone"
            )

    shared_prefix = options.pop("shared_prefix", 0)
    output = _run_body(lm, inputs, shared_prefix)
    packed = options.get("cu_seqlens") is not None
    if shared_prefix and not (packed and _measured(lm, shares_prefix)):
        raise ValueError(
            f"shared_prefix={shared_prefix} needs a packed row with cu_seqlens and a model whose sequences can share "
            f"tokens, which {lm.config._attn_implementation!r} attention cannot: call "
            "simnpo.attention.use_packed_attention(model), or repeat the tokens in every sequence"
        )
    hidden = output.last_hidden_state
    if packed:
        if inputs.get("position_ids") is None or len(hidden) != 1 or not _measured(lm, keeps_sequences_apart):
            raise ValueError(
                "cu_seqlens marks the sequences of one packed row, (1, N), whose position_ids restart with each, and "
                f"needs a model that keeps them apart: got rows {tuple(hidden.shape[:2])}, position_ids "
                f"{'given' if inputs.get('position_ids') is not None else 'missing'}; or pad the sequences instead"
            )
        hidden, targets = hidden[0], targets[0]
        options |= {name: options[name][0] for name in ("ref_token_logps", "token_weights") if name in options}
    scale, softcap = logit_transform(lm)
    options |= {"logit_scale": scale, "logit_softcap": softcap}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        if objective is not None:
            return linear_unlearn_loss(hidden, weight, targets, objective, bias=bias, **options)
        options.pop("cu_seqlens", None)
        logps = linear_logps(hidden, weight, targets, bias=bias, **options)
        return logps.unsqueeze(0) if packed else logps

    result = _attach_head(lm)(hidden, loss=loss)
    return _with_router_loss(lm, result, output, inputs, options) if objective is not None else result


def _run_body(lm: Any, inputs: dict[str, Any], shared_prefix: int) -> Any:
    body: Any = body_of(lm)
    inputs |= {"use_cache": False, "return_dict": True}
    if _balances_experts(lm, inputs):
        inputs["output_router_logits"] = True
    output = run_body(body, shared_prefix, **inputs)
    last_hidden_state(body, output)
    return output


def _targets(lm: Any, inputs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """The labels shifted once, (B, T); the last position of a sequence, which predicts nothing, is ignored."""
    labels, shifted = inputs.pop("labels", None), options.pop("shift_labels", None)
    if (labels is None) == (shifted is None):
        raise ValueError("a loss needs either labels, unshifted as Hugging Face has them, or shift_labels")
    if shifted is not None:
        return shifted
    input_ids = inputs.get("input_ids")
    if input_ids is not None and not getattr(lm, "_labels_were_checked", False):
        _refuse_shifted(labels, input_ids)
        lm._labels_were_checked = True
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if options.get("cu_seqlens") is not None:
        last = options["cu_seqlens"][1:].to(targets.device, torch.int64) - 1
        targets[0, last[last >= 0]] = IGNORE_INDEX
    return targets


def _refuse_shifted(labels: Tensor, input_ids: Tensor) -> None:
    """Looks at the first batch only: the answer costs a wait for the device."""
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels must be {tuple(input_ids.shape)} like input_ids, got {tuple(labels.shape)}")
    counted = labels != IGNORE_INDEX
    as_they_are = ((labels == input_ids) | ~counted).all(1)
    shifted = ((labels[:, :-1] == input_ids[:, 1:]) | ~counted[:, :-1]).all(1)
    # row by row: forget rows may come from one place and retain rows from another
    if (shifted & ~as_they_are).any():
        raise ValueError(
            "labels look shifted already: in some rows each is the token after its own position. Pass them as "
            "shift_labels, or pass labels as Hugging Face has them: a copy of input_ids with -100 where ignored"
        )


def _measured(lm: Any, ability: Callable[[nn.Module], bool]) -> bool:
    """What a model can do with packed rows, measured once for each way of computing attention."""
    known = lm.__dict__.setdefault("_packing_abilities", {})
    key = ability.__name__, lm.config._attn_implementation
    if key not in known:
        was_training = lm.training
        lm.eval()
        known[key] = ability(lm)
        lm.train(was_training)
    return known[key]


def _balances_experts(lm: Any, inputs: dict[str, Any]) -> bool:
    asked = inputs.pop("output_router_logits", None)
    return bool(getattr(lm.config.get_text_config(), "output_router_logits", False) if asked is None else asked)


def _with_router_loss(
    lm: Any, result: UnlearnLoss, output: Any, inputs: dict[str, Any], options: dict[str, Any]
) -> UnlearnLoss:
    """Adds the load-balancing loss of a mixture of experts where the body was asked for its router logits.

    With num_forget it is the batch's share: weighted, like the forget term, by its part of the step's forget sequences.
    """
    if not inputs.get("output_router_logits"):
        return result
    balance = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
    if balance is None or not hasattr(lm, "router_aux_loss_coef"):
        raise UserError(
            f"model: how {type(lm).__name__} balances its experts is not known here: set "
            "model.config.output_router_logits = False to train without that loss"
        )
    mask = inputs.get("attention_mask")
    auxiliary = balance(output.router_logits, lm.num_experts, lm.num_experts_per_tok, mask)
    share: Any = 1.0
    if options.get("num_forget") is not None:
        retain_mask = options.get("retain_mask")
        num_retain = 0 if retain_mask is None else retain_mask.sum()
        share = (len(result.logps) - num_retain) / options["num_forget"]
    return result._replace(loss=result.loss + lm.router_aux_loss_coef * share * auxiliary.to(result.loss))
