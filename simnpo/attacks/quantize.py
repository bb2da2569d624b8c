"""Quantisation: unlearning moves weights less than a rounding step, and rounding moves them back (arXiv 2410.16454).

The weight of every linear layer but the head is rounded to nearest, symmetrically, in groups of neighbours along a row:

    scale = max |w| / ((2^bits - 1) / 2)        w -> scale * clamp(round(w / scale), -2^(bits-1), 2^(bits-1) - 1)

which in float32 gives torchao's integer weights to the bit. The model then runs on the rounded weights: what a deployed
one computes, but for the arithmetic of its kernels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from simnpo.attacks.curves import Curves, Row, forget_scores, measure_sets
from simnpo.errors import UserError
from simnpo.evaluation.questions import QuestionSet
from simnpo.evaluation.subject import Subject
from simnpo.model import causal_lm

SCORES = {
    "probability": "probability of the answers",
    "rouge_l_recall": "ROUGE-L recall",
    "extraction_strength": "extraction strength",
    "forget_quality": "forget quality (p-value)",
    "retain_probability": "probability of the retain answers",
    "retain_rouge_l_recall": "ROUGE-L recall of the retain answers",
}


@torch.no_grad()
def round_weights(model: nn.Module, bits: int, group_size: int) -> dict[str, torch.Tensor]:
    """Rounds the linear layers of a model in place, all but its head.

    Args:
        bits: of a weight, 2 to 8.
        group_size: neighbours along a row that share a scale.

    Returns:
        The weights as they were, by the name of their layer, for `restore_weights`.

    Raises:
        UserError: group_size does not divide the width of a layer.
    """
    head = causal_lm(model).get_output_embeddings()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for name, layer in layers.items():
        if layer.in_features % group_size:
            raise UserError(
                f"group_size must divide the width of every linear layer, and {group_size} does not divide the "
                f"{layer.in_features} of {name}"
            )
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.copy_(round_to_nearest(layer.weight, bits, group_size))
    return before


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """weight (V, D), each `group_size` neighbours of a row on a scale of their own; float32."""
    groups = weight.float().reshape(-1, group_size)
    scale = groups.abs().amax(1).clamp(min=1e-12) / ((2**bits - 1) / 2)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return torch.fake_quantize_per_channel_affine(groups, scale, zero, 0, lowest, highest).view_as(weight)


@torch.no_grad()
def restore_weights(model: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Undoes `round_weights`."""
    for name, weight in before.items():
        model.get_submodule(name).weight.copy_(weight)  # type: ignore[operator, union-attr]


def quantize_rows(
    subject: Subject,
    sets: Mapping[str, QuestionSet],
    *,
    name: str,
    bits: Sequence[int],
    group_size: int,
    max_new_tokens: int,
    retrained_truth_ratio: Any = None,
) -> tuple[list[Row], Any]:
    """Rows of one model: as it is, and with its weights rounded to each number of bits.

    Args:
        sets: "forget", and "retain" where there is one.
        name: of the model in the rows.
        retrained_truth_ratio: (n,) of the retrained model before any attack, for the forget quality.

    Returns:
        The rows, and the (n,) truth ratios before the attack or None.
    """
    rows: list[Row] = []
    truth_ratio = None
    for width in (None, *bits):
        before = {} if width is None else round_weights(subject.model, width, group_size)
        measures = measure_sets(subject, sets, max_new_tokens)
        restore_weights(subject.model, before)
        truth_ratio = measures["forget"].truth_ratio if width is None else truth_ratio
        row = {"model": name, "bits": "none" if width is None else str(width)}
        row |= forget_scores(measures["forget"], retrained_truth_ratio)
        if "retain" in measures:
            kept = measures["retain"].means()
            row |= {f"retain_{key}": kept[key] for key in ("probability", "rouge_l_recall")}
        rows.append(row)
    return rows, truth_ratio


def quantize_curves(rows: Sequence[Row], group_size: int) -> Curves:
    title = f"Quantisation of the weights, groups of {group_size}, round to nearest"
    return Curves(title, ("bits", "bits"), SCORES, (), rows)
