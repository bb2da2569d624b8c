"""The optimizer of a run, and the learning rate as a function of the step."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simnpo.errors import UserError
from simnpo.training.parameterwise import Group, ParameterwiseOptimizer

OptimizerName = Literal["adamw", "adamw8bit", "adafactor"]
Optimizer = torch.optim.Optimizer | ParameterwiseOptimizer


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    weight_decay: float,
    *,
    name: OptimizerName = "adamw",
    gradient_release: bool = False,
) -> Optimizer:
    """An optimizer over the parameters that train; vectors (norms, biases) do not decay.

    The learning rate is set before every step by `set_learning_rate`. bf16 parameters are updated in float32, and what
    is lost when they are rounded again is kept: see `ParameterwiseOptimizer`.

    Args:
        parameters: float32, float64 or bf16.
        weight_decay: decoupled.
        name: "adamw"; "adamw8bit", bitsandbytes' with its states in blocks of 8 bits; "adafactor", transformers' with
            an absolute learning rate, factored second moments and no first ones.
        gradient_release: update each parameter inside backward and free its gradient.

    Raises:
        UserError: parameters of another dtype, or bitsandbytes is not installed.
    """
    trained = [p for p in parameters if p.requires_grad]
    wrong = {str(p.dtype) for p in trained if p.dtype not in (torch.float32, torch.float64, torch.bfloat16)}
    if wrong:
        raise UserError(f"trained weights must be float32 or bfloat16, got {', '.join(sorted(wrong))}")
    groups: list[Group] = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    make = _maker(name)
    if gradient_release or any(p.dtype == torch.bfloat16 for p in trained):
        return ParameterwiseOptimizer(groups, make, release=gradient_release)
    return make(groups)


def _maker(name: OptimizerName) -> Callable[[list[Group]], torch.optim.Optimizer]:
    if name == "adamw":
        return lambda groups: torch.optim.AdamW(groups, fused=True)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        # the learning rate is the schedule's alone, as AdamW's is: not relative to a weight's size or to the step
        options: dict[str, Any] = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "lr": 0.0}
        return lambda groups: Adafactor(groups, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer adamw8bit needs bitsandbytes: pip install simnpo[bitsandbytes] ({error})"
        ) from error
    return lambda groups: AdamW8bit(groups)


def learning_rate(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear rise to `peak` over the first warmup_ratio of the steps, then linear fall to 0 just after the last one."""
    warmup = round(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (num_steps - step) / (num_steps - warmup)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients to a global L2 norm of at most `max_norm` (0: leaves them); returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
