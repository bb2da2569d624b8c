"""The language model of the paper's synthetic experiment: four blocks with one head of attention, normalised after."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x)). The attention projects its input and not its output."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(hidden, 3 * hidden, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.after_attention = nn.LayerNorm(hidden)
        self.after_mlp = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(x).chunk(3, dim=-1)
        x = self.after_attention(x + F.scaled_dot_product_attention(query, key, value, is_causal=True))
        return self.after_mlp(x + self.mlp(x))


class ChainModel(nn.Module):
    """States (n, T) -> logits (n, T, S) of the next; about 0.34 million parameters at the paper's size."""

    def __init__(self, states: int, length: int, hidden: int = 128, blocks: int = 4) -> None:
        super().__init__()
        self.states = nn.Embedding(states, hidden)
        self.positions = nn.Parameter(0.02 * torch.randn(length, hidden))
        self.blocks = nn.Sequential(*(Block(hidden) for _ in range(blocks)))
        self.head = nn.Linear(hidden, states)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.states(x) + self.positions[: x.shape[1]]))
