"""One run of the paper's synthetic experiment: train on the chains, then forget two of them with nothing to retain.

    train on a mixture  ->  SimNPO or NPO, a few sequences a step  ->  after every step, the KL of each chain

Part 1: one forget chain has short sequences. Part 2: one forget chain was never trained on, the other is well known.
Settings are the paper's and those of its published code; what we do without is named in `synthetic.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import simnpo
from simnpo.benchmarks.paper.chains import OWN_STATES, STATES, chain, kl_to_truth
from simnpo.benchmarks.paper.model import ChainModel

LEARNING_RATE, ADAM_EPS = 5e-4, 1e-6
TRAIN_SHARE = 0.8

KL = dict[str, float]  # of each chain, nats


@dataclass(frozen=True)
class Part:
    """One of the two experiments.

    Attributes:
        lengths: of the sequences of each chain.
        trained_on: chains of the mixture the model is trained on before it has to forget.
        decided_on: the forget chain whose KL says when to compare.
        npo_beta, simnpo_beta: the paper's.
        published_start, published_retrained: KL of each chain before unlearning, and under a model trained on the
            retain chain alone, read off the paper's figure 5.
    """

    title: str
    lengths: dict[str, int]
    trained_on: tuple[str, ...]
    decided_on: str
    npo_beta: float
    simnpo_beta: float
    published_start: KL
    published_retrained: KL

    def objectives(self) -> dict[str, simnpo.NPO | simnpo.SimNPO]:
        return {"NPO": simnpo.NPO(self.npo_beta), "SimNPO": simnpo.SimNPO(self.simnpo_beta)}


PARTS = {
    "lengths": Part(
        title="Part 1: forget set 2 is short",
        lengths={"retain": 20, "forget1": 20, "forget2": 5},
        trained_on=("retain", "forget1", "forget2"),
        decided_on="forget2",
        npo_beta=0.2,
        simnpo_beta=4.0,
        published_start={"retain": 0.0224, "forget1": 0.0375, "forget2": 0.1005},
        published_retrained={"retain": 0.0035, "forget1": 0.4182, "forget2": 0.4374},
    ),
    "memorisation": Part(
        title="Part 2: forget set 2 was never learned",
        lengths={"retain": 20, "forget1": 20, "forget2": 20},
        trained_on=("retain", "forget1"),
        decided_on="forget1",
        npo_beta=1.0,
        simnpo_beta=4.0,
        published_start={"retain": 0.0170, "forget1": 0.0442, "forget2": 0.419},
        published_retrained={"retain": 0.0035, "forget1": 0.4182, "forget2": 0.4255},
    ),
}


@dataclass(frozen=True)
class Size:
    """How much of everything; the defaults are the paper's but for `test_sequences`, which bounds the time."""

    sequences: int = 20_000  # half of the retain chain, a quarter of each forget chain
    epochs: int = 5
    batch_size: int = 128
    hidden: int = 128
    blocks: int = 4
    unlearn_steps: int = 50
    unlearn_batch_size: int = 4
    test_sequences: int = 256  # of each chain


class Data(NamedTuple):
    """Sequences (n, T) of each chain."""

    train: dict[str, Tensor]
    test: dict[str, Tensor]


def make_data(part: Part, size: Size, generator: torch.Generator) -> Data:
    counts = {"retain": size.sequences // 2, "forget1": size.sequences // 4, "forget2": size.sequences // 4}
    train, test = {}, {}
    for name in OWN_STATES:
        sequences = chain(name).sample(counts[name], part.lengths[name], generator)
        cut = round(TRAIN_SHARE * len(sequences))
        train[name], test[name] = sequences[:cut], sequences[cut:][: size.test_sequences]
    return Data(train, test)


def training_rows(train: dict[str, Tensor], names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (n, T - 1) with T the longest; -100 after the end of a shorter sequence."""
    width = max(train[name].shape[1] for name in names)
    inputs, targets = [], []
    for name in names:
        padding = (0, width - train[name].shape[1])
        inputs.append(F.pad(train[name][:, :-1], padding))
        targets.append(F.pad(train[name][:, 1:], padding, value=-100))
    return torch.cat(inputs), torch.cat(targets)


def train(rows: tuple[Tensor, Tensor], size: Size, generator: torch.Generator) -> ChainModel:
    """A fresh model after `size.epochs` epochs of next-state prediction."""
    inputs, targets = rows
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    model = ChainModel(STATES, inputs.shape[1], size.hidden, size.blocks)
    optimizer = _optimizer(model)
    for _ in range(size.epochs):
        for batch in torch.randperm(len(inputs), generator=generator).split(size.batch_size):
            loss = F.cross_entropy(model(inputs[batch]).transpose(1, 2), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def unlearn(
    model: ChainModel,
    objective: simnpo.NPO | simnpo.SimNPO,
    rows: tuple[Tensor, Tensor],
    test: dict[str, Tensor],
    size: Size,
    generator: torch.Generator,
) -> list[KL]:
    """KL of each chain before the first step and after each of them. `model` is trained in place."""
    inputs, targets = rows
    optimizer = _optimizer(model)
    drawn = torch.randperm(len(inputs), generator=generator)[: size.unlearn_steps * size.unlearn_batch_size]
    with torch.no_grad():
        logits = model(inputs[drawn])
        ref_logps = -F.cross_entropy(logits.transpose(1, 2), targets[drawn], reduction="none").sum(-1)
    curve = [measure(model, test)]
    for batch, reference in zip(drawn.split(size.unlearn_batch_size), ref_logps.split(size.unlearn_batch_size)):
        loss = simnpo.unlearn_loss(
            model(inputs[batch]),
            targets[batch],
            objective,
            ref_logps=reference if objective.needs_ref_logps else None,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(measure(model, test))
    return curve


@torch.no_grad()
def measure(model: nn.Module, test: dict[str, Tensor]) -> KL:
    return {name: kl_to_truth(model(rows[:, :-1]), rows, chain(name)) for name, rows in test.items()}


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=ADAM_EPS, weight_decay=0.0)
