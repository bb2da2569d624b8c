"""What the public operations require of their arguments, and the one question they ask the device."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from simnpo.kernels.backend import IGNORE_INDEX
from simnpo.objectives import KTO, Objective, RowObjective, TokenObjective


class Layout(NamedTuple):
    """Where the tokens that count are, and whose they are.

    rows: (n,) int64, positions of the counted tokens in the flattened batch, in order.
    lengths: (B,) counted tokens of each sequence.   is_retain: (B,).
    alternates: (B,) place in the batch of each forget sequence's alternate answer, -1 for the others; empty without.
    """

    rows: Tensor
    lengths: list[int]
    is_retain: list[bool]
    alternates: list[int]


def check_head(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> None:
    """Shapes, dtypes and devices of what every operation on hidden states takes."""
    if hidden_states.dim() not in (2, 3):
        raise ValueError(f"hidden_states must be (B, T, D), or packed (N, D), got {tuple(hidden_states.shape)}")
    if weight.numel() == 0:
        raise ValueError(
            f"lm_head_weight is empty, {tuple(weight.shape)}: DeepSpeed ZeRO-3 leaves a weight so outside its module's "
            "forward. Compute the loss inside it with simnpo.attach(model); a frozen head may also be gathered around "
            "the call, deepspeed.zero.GatheredParameters([lm_head_weight])"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden_states.shape[-1]:
        raise ValueError(
            f"lm_head_weight must be (V, {hidden_states.shape[-1]}) to match hidden_states, got {tuple(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise ValueError(f"lm_head_weight must be floating point, got {weight.dtype}: dequantise the head first")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    autocast = torch.is_autocast_enabled(hidden_states.device.type)
    if hidden_states.dtype != weight.dtype and not autocast:
        raise ValueError(
            f"hidden_states and lm_head_weight must have one dtype, got {hidden_states.dtype} and {weight.dtype}: "
            "cast one of them or run under torch.autocast"
        )
    if not scale != 0 or (softcap is not None and not softcap > 0):
        raise ValueError(f"logit_scale must not be 0 and logit_softcap must be positive, got {scale} and {softcap}")
    check_targets(hidden_states, targets)
    for name, tensor in (("lm_head_weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden_states.device:
            raise ValueError(f"{name} must be on {hidden_states.device} like hidden_states, got {tensor.device}")


def check_targets(values: Tensor, targets: Tensor) -> None:
    """`targets` against the hidden states or logits they belong to."""
    if targets.shape != values.shape[:-1]:
        raise ValueError(f"targets must be {tuple(values.shape[:-1])}, got {tuple(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if targets.device != values.device:
        raise ValueError(f"targets must be on {values.device}, got {targets.device}")


def check_objective(objective: object) -> None:
    """Whether it is an objective, and not the class of one, whose settings nobody has chosen."""
    if isinstance(objective, type) and issubclass(objective, get_args(Objective)):
        raise TypeError(f"objective must be an instance: write {objective.__name__}(), got the class")
    if not isinstance(objective, get_args(Objective)):
        raise TypeError(f"objective must be one of simnpo.objectives, as SimNPO(), got {objective!r}")


def check_sequences(
    B: int, retain_mask: Tensor | None, ref_logps: Tensor | None, objective: Objective, num_forget: int | None,
    num_retain_tokens: int | None, alternates: Tensor | None,
) -> None:  # fmt: skip
    """The per-sequence arguments, and what the means over them divide by."""
    check_objective(objective)
    if B == 0:
        raise ValueError("the batch must hold at least one sequence, got none")
    name = type(objective).__name__
    if objective.needs_alternates and alternates is None:
        raise ValueError(
            f"{name} needs alternates, the (B,) places in the batch of each forget sequence's alternate answer, -1 for "
            "the others; SimNPO needs none"
        )
    if alternates is not None and not objective.needs_alternates:
        raise ValueError(f"alternates must be None: {name} has no use for alternate answers")
    if alternates is not None and (alternates.shape != (B,) or alternates.is_floating_point()):
        raise ValueError(f"alternates must be ({B},) int64, got {tuple(alternates.shape)} {alternates.dtype}")
    if objective.needs_ref_logps and ref_logps is None:
        raise ValueError(
            f"{name} needs ref_logps, the (B,) log-probabilities under the reference policy: "
            "compute them once with linear_logps before training, or use SimNPO, which needs none"
        )
    for name, tensor in (("retain_mask", retain_mask), ("ref_logps", ref_logps)):
        if tensor is not None and tensor.shape != (B,):
            raise ValueError(f"{name} must be ({B},), one per sequence, got {tuple(tensor.shape)}")
    if retain_mask is not None and retain_mask.dtype != torch.bool:
        raise ValueError(f"retain_mask must be bool, got {retain_mask.dtype}")
    for name, count in (("num_forget", num_forget), ("num_retain_tokens", num_retain_tokens)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be a positive integer, or None for this batch's own, got {count!r}")


def check_rows(objective: Objective, V: int, shared: bool) -> None:
    """Whether an objective of whole rows can see them: a vocabulary of V, `shared` by several ranks or not."""
    if isinstance(objective, RowObjective) and (V < 2 or shared):
        raise ValueError(
            f"{type(objective).__name__} needs rows of at least 2 logits, all of them on this rank, got V={V}"
            + (" shared by a vocab_group: pass the whole lm_head_weight" if shared else "")
        )


def check_tokens(
    targets: Tensor, objective: Objective, token_weights: Tensor | None, ref_token_logps: Tensor | None
) -> None:
    """The per-token arguments."""
    if isinstance(objective, KTO) and token_weights is not None:
        raise ValueError("KTO takes no token_weights: its KL is that of whole answers; DPO takes them")
    needs_ref = objective.needs_ref_token_logps
    if needs_ref and ref_token_logps is None:
        raise ValueError(
            f"{type(objective).__name__} needs ref_token_logps, the log-probability of each target under the reference "
            "policy: compute them once with linear_logps before training, or use WGA, which needs none"
        )
    for name, tensor in (("token_weights", token_weights), ("ref_token_logps", ref_token_logps)):
        if tensor is not None and (tensor.shape != targets.shape or not tensor.is_floating_point()):
            raise ValueError(
                f"{name} must be {tuple(targets.shape)} floats, one per target, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )


def check_exact(B: int, exact_logps: Tensor | None, objective: Objective, token_weights: Tensor | None) -> None:
    """Log-probabilities that are known from elsewhere."""
    if exact_logps is None:
        return
    name = type(objective).__name__
    if isinstance(objective, (TokenObjective, RowObjective)):
        raise ValueError(f"exact_logps must be None: {name} weighs single tokens, by nothing that adds up")
    if token_weights is not None:
        raise ValueError("exact_logps are sums of unweighted tokens: pass them or token_weights, not both")
    if exact_logps.shape != (B,) or exact_logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"exact_logps must be ({B},) float32 or float64, one per sequence, "
            f"got {tuple(exact_logps.shape)} {exact_logps.dtype}"
        )


def check_budget(gradient_error: float, objective: Objective, dtype: torch.dtype) -> None:
    """Whether the gradient budget fits the objective."""
    name = type(objective).__name__
    if gradient_error and isinstance(objective, RowObjective):
        raise ValueError(
            f"gradient_error must be 0 with {name}, whose gradient is spread over the whole vocabulary, "
            f"got {gradient_error}"
        )
    if gradient_error and isinstance(objective, TokenObjective) and dtype == torch.float16:
        raise ValueError(
            f"gradient_error must be 0 with {name} in float16, which cannot hold the slope of a memorised token, "
            f"got {gradient_error}: use bfloat16"
        )


def sequence_bounds(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B + 1,) int64, where each sequence of the flattened batch starts and ends."""
    if targets.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens goes with packed (N, D) hidden_states; in a (B, T, D) batch the rows are the sequences"
            )
        B, T = targets.shape
        return torch.arange(B + 1, device=targets.device) * T
    if cu_seqlens is None:
        raise ValueError("packed (N, D) hidden_states need cu_seqlens, the (B + 1,) bounds of the sequences")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be (B + 1,) integers, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    return cu_seqlens.to(targets.device, torch.int64)


def read_layout(
    targets: Tensor, bounds: Tensor, retain_mask: Tensor | None, V: int, alternates: Tensor | None = None
) -> Layout:
    """Count the tokens of each sequence and validate the targets: one wait for the device, whatever the batch.

    Args:
        targets: (N,) flattened.   bounds: (B + 1,) int64.   retain_mask: (B,) bool or None.   alternates: (B,) or None.

    Raises:
        ValueError: a target is neither IGNORE_INDEX nor in [0, V); the bounds do not run from 0 to N in order; the
            alternates do not pair the batch.
    """
    N, B = len(targets), len(bounds) - 1
    counted = targets != IGNORE_INDEX
    counts = torch.nn.functional.pad(counted.cumsum(0), (1, 0))
    lengths = counts[bounds.clamp(0, N)].diff()
    outside = counted & ((targets < 0) | (targets >= V))
    in_order = (bounds.diff() >= 0).all() & (bounds[0] == 0) & (bounds[-1] == N)
    retain = lengths.new_zeros(B) if retain_mask is None else retain_mask.to(lengths)
    places = lengths.new_empty(0) if alternates is None else alternates.to(lengths)
    facts = torch.cat([lengths, retain, places, outside.any()[None].to(lengths), in_order[None].to(lengths)]).tolist()
    if not facts[-1]:
        raise ValueError(f"cu_seqlens must rise from 0 to the {N} packed tokens, got {bounds.tolist()}")
    if facts[-2]:
        where = int(outside.nonzero()[0])
        raise ValueError(
            f"targets must be in [0, {V}) or {IGNORE_INDEX}, got {int(targets[where])} at flattened position {where}"
        )
    rows = torch.nonzero_static(counted, size=sum(facts[:B]))[:, 0]
    is_retain = [bool(retain) for retain in facts[B : 2 * B]]
    if alternates is not None:
        _check_pairs(facts[2 * B : 3 * B], is_retain)
    return Layout(rows, facts[:B], is_retain, facts[2 * B : -2])


def _check_pairs(alternates: list[int], is_retain: list[bool]) -> None:
    """Every sequence that is not retain must be a forget sequence with an alternate, or the alternate of one."""
    forget = [b for b, place in enumerate(alternates) if place != -1]
    taken = sorted(alternates[b] for b in forget)
    expected = [b for b, retain in enumerate(is_retain) if alternates[b] == -1 and not retain]
    if taken != expected or any(is_retain[b] for b in forget):
        raise ValueError(
            "alternates must give each forget sequence the place of one alternate of its own, neither retain nor "
            f"forget, and -1 to all the others; got {alternates} with retain_mask {is_retain}"
        )
