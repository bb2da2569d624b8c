"""AdamW on fp32 master weights, and the learning rate as a function of the step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from simnpo.errors import UserError


def make_optimizer(parameters: Iterable[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the parameters that train; vectors (norms, biases) do not decay.

    The learning rate is set before every step by `set_learning_rate`.
    """
    trained = [p for p in parameters if p.requires_grad]
    wrong = {str(p.dtype) for p in trained if p.dtype not in (torch.float32, torch.float64)}
    if wrong:
        # at learning rate 1e-5 an update of a bf16 weight is less than half its last digit and would be lost
        raise UserError(f"trained weights must be float32, got {', '.join(sorted(wrong))}")
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def learning_rate(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear rise to `peak` over the first warmup_ratio of the steps, then linear fall to 0 just after the last one."""
    warmup = round(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (num_steps - step) / (num_steps - warmup)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients to a global L2 norm of at most `max_norm` (0: leaves them); returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
