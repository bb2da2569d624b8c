"""Everybody who can turn hidden states into the SimNPO loss with its retain term, at their best setting.

Each works on the same packed batch. A peer that only knows token log-probabilities gets the formula put on top. Peers
are imported when they run, and one that is not installed is listed with the line that installs it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simnpo import linear_logps, linear_unlearn_loss, simnpo_loss
from simnpo.benchmarks.operands import FORGET_COEF, OBJECTIVE, RETAIN_COEF, Batch

# what trl.trainer.utils passes to its fused head
TRL_CHUNK_SIZE = 32768
# rows in a chunk of Liger's preference loss: pairs of whole sequences, which its default of one pair leaves too short
LIGER_CHUNK_ROWS = 2048


class Rival(NamedTuple):
    """A way to the loss.

    token_logps: Batch -> (N,) nats, or None if it has none of its own.
    loss: Batch -> (), differentiable.
    package, install: the module it needs, and the line that brings it.
    needs_cuda: its kernels run on a GPU only.
    bytes_per_logit: peak memory in units of N V, of those that materialise the logits.
    gradient_error: the relative error of dlogits it was asked to stay within.
    """

    name: str
    token_logps: Callable[[Batch], Tensor] | None
    loss: Callable[[Batch], Tensor]
    package: str = "torch"
    install: str = ""
    needs_cuda: bool = False
    bytes_per_logit: int = 0
    gradient_error: float = 0.0

    def missing(self, batch: Batch) -> str | None:
        """Why it cannot run here, or None."""
        device = batch.targets.device
        if importlib.util.find_spec(self.package) is None:
            return f"not installed: {self.install}"
        if self.needs_cuda and device.type != "cuda":
            return "needs a GPU"
        needed = self.bytes_per_logit * len(batch.targets) * len(batch.weight)
        if needed > free_bytes(device):
            return f"needs about {needed / 2**30:.0f} GiB"
        return None


def free_bytes(device: torch.device) -> int:
    """Memory that is free now; on a CPU as Linux estimates it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except OSError:
        return 8 << 30


def simnpo_of(token_logps: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """The loss by its formula, on somebody's log-probabilities."""

    def loss(batch: Batch) -> Tensor:
        logps = token_logps(batch).float().view(batch.B, batch.T).sum(1)
        retain, forget = logps.split([batch.B // 2, batch.B - batch.B // 2])
        num_tokens = torch.full_like(forget, batch.T)
        forget_loss = simnpo_loss(forget, num_tokens, beta=OBJECTIVE.beta, gamma=OBJECTIVE.gamma).mean()
        return FORGET_COEF * forget_loss - RETAIN_COEF * retain.mean() / batch.T

    return loss


def ours(batch: Batch, gradient_error: float = 0.0, logits_dtype: torch.dtype | None = None) -> Tensor:
    return linear_unlearn_loss(
        batch.hidden_states, batch.weight, batch.targets, OBJECTIVE, cu_seqlens=batch.cu_seqlens,
        retain_mask=batch.retain_mask, forget_coef=FORGET_COEF, retain_coef=RETAIN_COEF, gradient_error=gradient_error,
        logits_dtype=logits_dtype,
    ).loss  # fmt: skip


def ours_logps(batch: Batch) -> Tensor:
    return linear_logps(batch.hidden_states, batch.weight, batch.targets)


def published_logps(batch: Batch) -> Tensor:
    """As in the TOFU loops: all the logits in float32, cross entropy on them transposed to (B, V, T)."""
    logits = F.linear(batch.hidden_states, batch.weight).float().view(batch.B, batch.T, -1)
    targets = batch.targets.view(batch.B, batch.T)
    return -F.cross_entropy(logits.transpose(-1, -2), targets, reduction="none").flatten()


def flat_logps(batch: Batch) -> Tensor:
    """The same without the transposition, which torch's kernels like better."""
    logits = F.linear(batch.hidden_states, batch.weight).float()
    return -F.cross_entropy(logits, batch.targets, reduction="none")


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def token_nll(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden_states, weight).float(), targets, reduction="none")

    return torch.compile(token_nll)


def compiled_logps(batch: Batch) -> Tensor:
    return -_compiled()(batch.hidden_states, batch.weight, batch.targets)


def torch_chunked_logps(batch: Batch) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    h, w = batch.hidden_states, batch.weight
    return -F.linear_cross_entropy(h, w, batch.targets, reduction="none", options=options)


def liger_logps(batch: Batch) -> Tensor:
    peer = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    h, w = batch.hidden_states, batch.weight
    # float32 accumulation: what the gradient check asks for, and the faster of its two on recent GPUs
    return -peer(h, w, batch.targets, reduction="none", accum_dtype=torch.float32)


def liger_scaled_logps(batch: Batch) -> Tensor:
    peer = import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    return -peer.LigerFusedLinearScaledCrossEntropyFunction.apply(batch.hidden_states, batch.weight, batch.targets)


@functools.cache
def _liger_simnpo() -> Any:
    """Its SimPO loss with the chosen half as retain set (the likelihood term) and SimNPO on the rejected half."""
    Base: Any = import_module("liger_kernel.chunked_loss.fused_linear_preference").LigerFusedLinearPreferenceBase

    class LigerSimNPO(Base):
        @staticmethod
        def preference_loss_fn(chosen_logps, rejected_logps, full_target, beta=1.0, gamma=0.0):
            loss = -2 / beta * F.logsigmoid(-beta * rejected_logps - gamma)
            return FORGET_COEF * loss.sum() / (full_target.shape[0] // 2), chosen_logps, rejected_logps

        @classmethod
        def forward(cls, ctx, hidden_states, weight, targets):
            return Base.forward(
                cls=cls, ctx=ctx, _input=hidden_states, weight=weight, target=targets, alpha=RETAIN_COEF,
                beta=OBJECTIVE.beta, gamma=OBJECTIVE.gamma, compute_nll_loss=True, compiled=True,
                chunk_size=max(1, LIGER_CHUNK_ROWS // (2 * targets.shape[1])),
            )  # fmt: skip

        @staticmethod
        def backward(ctx, *grad_output):
            return Base.backward(ctx, grad_output)[:3]

    return LigerSimNPO


def liger_preference(batch: Batch) -> Tensor:
    hidden_states = batch.hidden_states.view(batch.B, batch.T, -1)
    return _liger_simnpo().apply(hidden_states, batch.weight, batch.targets.view(batch.B, batch.T))[0]


def cce_logps(batch: Batch, filter_eps: str | None = "auto") -> Tensor:
    peer = import_module("cut_cross_entropy").linear_cross_entropy
    h, w = batch.hidden_states, batch.weight
    return -peer(h, w, batch.targets, reduction="none", filter_eps=filter_eps)


def trl_logps(batch: Batch) -> Tensor:
    peer = import_module("trl.kernels").ChunkedLogProbFunction
    h, w = batch.hidden_states, batch.weight
    return peer.apply(h, w, None, batch.targets, 1.0, TRL_CHUNK_SIZE, None, 1.0, ())[0]


def _peer(name: str, token_logps: Callable[[Batch], Tensor], package: str = "torch", **options: bool | int) -> Rival:
    install = f"pip install --no-deps {package.replace('_', '-')}"
    return Rival(name, token_logps, simnpo_of(token_logps), package, install, **options)  # type: ignore[arg-type]


OURS = "simnpo"
BUDGET = 0.004
RIVALS = [
    Rival(OURS, ours_logps, ours),
    Rival(
        f"simnpo, gradient_error={BUDGET}", None, functools.partial(ours, gradient_error=BUDGET), gradient_error=BUDGET
    ),
    _peer("eager, as published", published_logps, bytes_per_logit=14),
    _peer("eager, flat rows", flat_logps, bytes_per_logit=14),
    _peer("torch.compile", compiled_logps, bytes_per_logit=14),
    _peer("torch linear_cross_entropy", torch_chunked_logps),
    _peer("Liger fused linear CE", liger_logps, "liger_kernel", needs_cuda=True),
    _peer("Liger scaled CE", liger_scaled_logps, "liger_kernel"),
    Rival("Liger preference loss", None, liger_preference, "liger_kernel", "pip install --no-deps liger-kernel"),
    _peer("cut-cross-entropy", cce_logps, "cut_cross_entropy", needs_cuda=True),
    _peer(
        "cut-cross-entropy, no filter", functools.partial(cce_logps, filter_eps=None), "cut_cross_entropy",
        needs_cuda=True,
    ),
    _peer("TRL fused head", trl_logps, "trl"),
]  # fmt: skip
