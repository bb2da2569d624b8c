"""SimNPO and NPO unlearning with a loss that never materialises the logits."""

from simnpo.kernels.linear_logps import linear_logps
from simnpo.kernels.linear_unlearn_loss import UnlearnLoss, linear_unlearn_loss
from simnpo.kernels.unlearn_loss import unlearn_loss
from simnpo.objectives import NPO, GradAscent, SimNPO, npo_loss, simnpo_loss

__version__ = "0.1.0"

__all__ = [
    "NPO",
    "GradAscent",
    "SimNPO",
    "UnlearnLoss",
    "linear_logps",
    "linear_unlearn_loss",
    "npo_loss",
    "simnpo_loss",
    "unlearn_loss",
]
