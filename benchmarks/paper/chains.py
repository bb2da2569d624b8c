"""The synthetic data of the SimNPO paper (arXiv 2410.07163, appendix H): sequences of three Markov chains.

Ten states. Each chain has three of its own and stays among them but for a leak of 0.2:

    initial[j]         (1 - 0.2) / 3 for its own states, 0.2 / 7 for the others
    transitions[i, j]  initial[j] from its own states i, 1 / 10 from the others

Which chain a sequence is of shows after a few of its states, so a model of the mixture knows each chain by itself: that
is what it can forget of one chain and keep of another, and the truth is known exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STATES = 10
LEAK = 0.2
OWN_STATES = {"retain": (0, 1, 2), "forget1": (3, 4, 5), "forget2": (6, 7, 8)}


class Chain(NamedTuple):
    """initial (S,), transitions (S, S): probabilities of the first and of the next state."""

    initial: Tensor
    transitions: Tensor

    def sample(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """(count, length) int64 states."""
        states = torch.multinomial(self.initial, count, replacement=True, generator=generator)
        columns = [states]
        for _ in range(length - 1):
            states = torch.multinomial(self.transitions[states], 1, generator=generator)[:, 0]
            columns.append(states)
        return torch.stack(columns, 1)


def chain(name: str) -> Chain:
    """The chain of a key of OWN_STATES."""
    own = torch.zeros(STATES, dtype=torch.bool)
    own[list(OWN_STATES[name])] = True
    initial = torch.where(own, (1 - LEAK) / own.sum(), LEAK / (~own).sum())
    transitions = torch.where(own[:, None], initial, 1 / STATES)
    return Chain(initial, transitions)


def kl_to_truth(logits: Tensor, sequences: Tensor, truth: Chain) -> float:
    """KL(true next state || model), nats, mean over the positions of all sequences.

    Args:
        logits: (n, T - 1, S) the model's after each state but the last.
        sequences: (n, T) states.
    """
    p = truth.transitions[sequences[:, :-1]]
    return (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean().item()
