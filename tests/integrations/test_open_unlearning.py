"""open-unlearning cannot be installed: its classes are written here from its formulas, in the shape of its hierarchy.

    Trainer -> FinetuneTrainer -> UnlearnTrainer -> GradDiff -> SimNPO, NPO

with the hook of before its move to transformers 4.51 (`compute_loss`) and the one since (`compute_unlearn_loss`).
"""

import copy

import pytest
import torch
from conftest import make_model
from steps import FORGET, RETAIN
from test_huggingface import fresh_accelerate, make_arguments
from torch.nn import functional as F
from transformers import Trainer

from simnpo.integrations import open_unlearning as fused

__all__ = ["fresh_accelerate"]  # a fixture of every test here too


class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)


def sequence_nlls(model, inputs):
    """Negative log-likelihood of each sequence, from the logits."""
    logits = model(**inputs).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    return F.cross_entropy(logits.transpose(-1, -2), labels, reduction="none").sum(-1)


def make_classes(hook: str):
    """SimNPO and NPO that override `hook`."""

    class UnlearnTrainer(FinetuneTrainer):
        pass

    if hook == "compute_unlearn_loss":

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = self.compute_unlearn_loss if model.training else super(UnlearnTrainer, self).compute_loss
            return loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

        UnlearnTrainer.compute_loss = compute_loss

    class GradDiff(UnlearnTrainer):
        def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.gamma, self.alpha, self.retain_loss_type, self.ref_model = gamma, alpha, retain_loss_type, None

        def _prepare_ref_model(self, model):
            return copy.deepcopy(model).eval()

        def total(self, model, inputs, forget_loss, return_outputs):
            loss = self.gamma * forget_loss + self.alpha * model(**inputs["retain"]).loss
            return (loss, None) if return_outputs else loss

    class SimNPO(GradDiff):
        def __init__(self, delta=0.0, beta=1.0, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.delta, self.beta = delta, beta

        def loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            lengths = (inputs["forget"]["labels"] != -100).sum(-1)
            margins = self.beta * (sequence_nlls(model, inputs["forget"]) / lengths - self.delta)
            return self.total(model, inputs, -2 / self.beta * F.logsigmoid(margins).mean(), return_outputs)

    class NPO(GradDiff):
        def __init__(self, beta=1.0, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.beta = beta
            if self.ref_model is None:
                self.ref_model = self._prepare_ref_model(self.model)

        def loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.no_grad():
                reference = sequence_nlls(self.ref_model, inputs["forget"])
            ratios = sequence_nlls(model, inputs["forget"]) - reference
            return self.total(model, inputs, -2 / self.beta * F.logsigmoid(self.beta * ratios).mean(), return_outputs)

    for trainer in (SimNPO, NPO):
        setattr(trainer, hook, trainer.loss)
    return SimNPO, NPO


class Pairs(torch.utils.data.Dataset):
    """Draws its retain rows from torch's generator, and numbers its forget rows, as open-unlearning's do."""

    def __init__(self):
        # position 0 is never a label there
        rows = ([row | {"labels": [-100, *row["labels"][1:]]} for row in some] for some in (FORGET, RETAIN))
        self.forget, self.retain = rows

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, index):
        drawn = int(torch.randint(0, len(self.retain), ()))
        return {"forget": self.forget[index] | {"index": index}, "retain": self.retain[drawn] | {"index": drawn}}


def collate(rows):
    if "input_ids" not in rows[0]:
        return {side: collate([row[side] for row in rows]) for side in rows[0]}
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = (
        pad([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=fill)
        for name, fill in (("input_ids", 256), ("labels", -100))
    )
    index = torch.tensor([row["index"] for row in rows])
    return {"input_ids": ids, "attention_mask": ids.ne(256), "labels": labels, "index": index}


def without_index(rows):
    return {side: {k: v for k, v in part.items() if k != "index"} for side, part in collate(rows).items()}


def trained(trainer_class, folder, accumulation, collator, **method_args):
    # plain descent, such that a difference in the gradient is one of the same size in the parameters
    arguments = make_arguments(
        folder, max_steps=10, gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=0.1,
        max_grad_norm=1.0, remove_unused_columns=False,
    )  # fmt: skip
    trainer = trainer_class(
        model=make_model(), args=arguments, train_dataset=Pairs(), data_collator=collator, evaluators=None,
        template_args=None, **method_args,
    )  # fmt: skip
    trainer.train()
    return trainer


METHODS = {
    "simnpo": {"beta": 0.4, "delta": 0.7, "gamma": 0.6, "alpha": 1.3},
    "npo": {"beta": 0.1, "gamma": 0.6, "alpha": 1.3},
}


@pytest.mark.parametrize("hook", ["compute_loss", "compute_unlearn_loss"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_end_at_the_same_parameters(tmp_path, hook, accumulation, method):
    simnpo, npo = make_classes(hook)
    base, mixin = (simnpo, fused.FusedSimNPO) if method == "simnpo" else (npo, fused.FusedNPO)
    theirs = trained(base, tmp_path, accumulation, without_index, **METHODS[method])
    ours = trained(type("Fused", (mixin, base), {}), tmp_path, accumulation, collate, **METHODS[method])
    start, moved = make_model(), 0.0
    for (name, a), b, c in zip(ours.model.named_parameters(), theirs.model.parameters(), start.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=name)
        moved = max(moved, (b - c).abs().max().item())
    assert moved > 1e-2
    assert [r["loss"] for r in ours.state.log_history if "loss" in r] == pytest.approx(
        [r["loss"] for r in theirs.state.log_history if "loss" in r], rel=1e-4, abs=1e-4
    )


def test_npo_has_no_second_model(tmp_path):
    _, npo = make_classes("compute_unlearn_loss")
    ours = trained(type("Fused", (fused.FusedNPO, npo), {}), tmp_path, 1, collate, **METHODS["npo"])
    assert ours.ref_model is None
    assert len(ours._reference.logps) == len(FORGET)


def test_evaluation_stays_theirs(tmp_path):
    simnpo, _ = make_classes("compute_unlearn_loss")
    trainer = type("Fused", (fused.FusedSimNPO, simnpo), {})(
        model=make_model(), args=make_arguments(tmp_path), data_collator=collate, eval_dataset=FORGET
    )
    trainer.model.eval()
    inputs = without_index([Pairs()[0]])["forget"]
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(make_model()(**inputs).loss.item())


def test_divergence_on_the_retain_set(tmp_path):
    simnpo, _ = make_classes("compute_unlearn_loss")
    with pytest.raises(ValueError, match="retain_loss_type must be NLL, got KL"):
        trained(type("Fused", (fused.FusedSimNPO, simnpo), {}), tmp_path, 1, collate, retain_loss_type="KL")
