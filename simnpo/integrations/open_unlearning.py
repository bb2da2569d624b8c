"""open-unlearning's SimNPO and NPO without the logits, and NPO without its second model; same steps, same results.

In that repository, in a file beside src/trainer/unlearn/simnpo.py:

    from simnpo.integrations import open_unlearning as fused
    from trainer.unlearn.npo import NPO
    from trainer.unlearn.simnpo import SimNPO

    class FusedSimNPO(fused.FusedSimNPO, SimNPO): ...
    class FusedNPO(fused.FusedNPO, NPO): ...

Its method arguments keep their names. What they are here:

    beta   beta            delta  gamma / beta of `simnpo.SimNPO`
    gamma  forget_coef     alpha  retain_coef

The two terms of a micro-batch are its own means, and Trainer scales them as it scales open-unlearning's.
"""

from typing import TYPE_CHECKING, Any

import torch

from simnpo.attached_model import attach
from simnpo.integrations.forget_retain import join
from simnpo.integrations.reference import ReferenceLogps
from simnpo.objectives import NPO, Objective, SimNPO

KEPT = ("input_ids", "attention_mask", "labels")  # of a sub-batch; a collator may add an index

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # it stands before a trainer of open-unlearning in the list of bases


class _Fused(Trainer):
    """Overrides the loss of a trainer of open-unlearning; `model` must be given by name, as its `load_trainer` does."""

    gamma: float
    alpha: float
    beta: float

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        retain_loss_type = kwargs.get("retain_loss_type", "NLL")
        if retain_loss_type != "NLL":
            raise ValueError(
                f"retain_loss_type must be NLL, got {retain_loss_type}: a divergence needs the whole distribution of "
                "two models, so use open-unlearning's own trainer for it"
            )
        super().__init__(*args, model=attach(model), **kwargs)

    def fused_objective(self) -> Objective:
        raise NotImplementedError

    def fused_ref_logps(self, model: Any, batch: dict[str, Any]) -> list[float] | None:
        """Log-probabilities of the batch's sequences under the reference policy, if the objective needs them."""
        return None

    def compute_unlearn_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The hook of open-unlearning since it requires transformers 4.51."""
        batch = join({side: {name: inputs[side][name] for name in KEPT} for side in ("forget", "retain")})
        out = model(
            **batch,
            objective=self.fused_objective(),
            ref_logps=self.fused_ref_logps(model, batch),
            forget_coef=self.gamma,
            retain_coef=self.alpha,
        )
        return (out.loss, out) if return_outputs else out.loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The hook of open-unlearning before that; since then, its base class decides what to evaluate."""
        if hasattr(super(), "compute_unlearn_loss"):
            return super().compute_loss(model, inputs, *args, **kwargs)
        return self.compute_unlearn_loss(model, inputs, *args, **kwargs)


class FusedSimNPO(_Fused):
    """For open-unlearning's SimNPO."""

    delta: float

    def fused_objective(self) -> Objective:
        return SimNPO(beta=self.beta, gamma=self.beta * self.delta)


class FusedNPO(_Fused):
    """For open-unlearning's NPO; one pass over the forget set before the first step stands in for its second model."""

    _reference: ReferenceLogps | None = None

    def _prepare_ref_model(self, model: Any) -> None:
        """No deep copy of the model."""

    def fused_objective(self) -> Objective:
        return NPO(beta=self.beta)

    def fused_ref_logps(self, model: Any, batch: dict[str, Any]) -> list[float]:
        if self._reference is None:
            # the retain rows of a step must be those they would have been without this pass
            with torch.random.fork_rng():
                self._reference = ReferenceLogps.measure(model, self._forget_batches())
        return self._reference.of(batch)

    def _forget_batches(self) -> Any:
        dataset: Any = self.train_dataset
        size = self.args.eval_batch_size
        for start in range(0, len(dataset), size):
            rows = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
            forget = self._prepare_inputs(self.data_collator(rows)["forget"])
            yield {name: forget[name] for name in KEPT}
