"""SimNPO and NPO unlearning with a loss that never materialises the logits."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simnpo import metrics as metrics
    from simnpo.attached_model import attach as attach
    from simnpo.kernels.linear_kl import linear_kl as linear_kl
    from simnpo.kernels.linear_logps import linear_logps as linear_logps
    from simnpo.kernels.linear_unlearn_loss import UnlearnLoss as UnlearnLoss
    from simnpo.kernels.linear_unlearn_loss import linear_unlearn_loss as linear_unlearn_loss
    from simnpo.kernels.unlearn_loss import unlearn_loss as unlearn_loss
    from simnpo.objectives import NPO as NPO
    from simnpo.objectives import GradAscent as GradAscent
    from simnpo.objectives import SimNPO as SimNPO
    from simnpo.objectives import npo_loss as npo_loss
    from simnpo.objectives import simnpo_loss as simnpo_loss

__version__ = "0.1.0"

# torch is imported when the first of these is asked for: `simnpo --help` needs none
_HOME = {
    "NPO": "simnpo.objectives",
    "GradAscent": "simnpo.objectives",
    "SimNPO": "simnpo.objectives",
    "UnlearnLoss": "simnpo.kernels.linear_unlearn_loss",
    "attach": "simnpo.attached_model",
    "linear_kl": "simnpo.kernels.linear_kl",
    "linear_logps": "simnpo.kernels.linear_logps",
    "linear_unlearn_loss": "simnpo.kernels.linear_unlearn_loss",
    "npo_loss": "simnpo.objectives",
    "simnpo_loss": "simnpo.objectives",
    "unlearn_loss": "simnpo.kernels.unlearn_loss",
}

__all__ = sorted([*_HOME, "metrics"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return importlib.import_module("simnpo.metrics")
    if name not in _HOME:
        raise AttributeError(f"module 'simnpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
