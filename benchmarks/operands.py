"""Batches for the suite, hidden states and a head with a language model's softmax, and their exact gradient.

    logit[n, v] = common[v] + row[n, v] + boost at the target        common ~ N(0, c^2), row ~ N(0, r^2)

Several rivals are faster or less exact on some spectra than on others, so every result states which one it was.

Dimension key:
    B  sequences      T  tokens of each      N  B T      D  hidden size      V  vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from simnpo import SimNPO

OBJECTIVE = SimNPO(beta=2.5, gamma=0.3)
FORGET_COEF, RETAIN_COEF = 0.5, 1.0


class Shape(NamedTuple):
    """Hidden size and vocabulary of a model's head."""

    D: int
    V: int


SHAPES = {
    "llama-3.2-1b": Shape(2048, 128256),
    "llama-3.1-8b": Shape(4096, 128256),
    "gemma-2-2b": Shape(2304, 256000),
    "smollm2": Shape(576, 49152),
    "cpu": Shape(2048, 49152),
    "tiny": Shape(64, 512),
}

# (spread of the common logit, of the row's own, boost of the target); every result states the mean NLL they gave
SPECTRA = {"peaked": (3.0, 1.0, 15.0), "text": (3.0, 1.0, 6.0), "flat": (0.5, 0.3, 0.0)}


@dataclass
class Batch:
    """B sequences of T counted tokens each, packed: the first half retain, the second half forget.

    hidden_states: (N, D).   weight: (V, D).   targets: (N,) int64.
    """

    hidden_states: Tensor
    weight: Tensor
    targets: Tensor
    T: int

    @property
    def B(self) -> int:
        return len(self.targets) // self.T

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.arange(self.B + 1, device=self.targets.device) * self.T

    @property
    def retain_mask(self) -> Tensor:
        return torch.arange(self.B, device=self.targets.device) < self.B // 2

    def require_grad(self, mode: str) -> list[Tensor]:
        """Mark who takes a gradient: both ("trained"), the hidden states ("frozen"), nobody ("logps")."""
        self.hidden_states.requires_grad_(mode != "logps")
        self.weight.requires_grad_(mode == "trained")
        return [x for x in (self.hidden_states, self.weight) if x.requires_grad]

    def first(self, tokens: int) -> Batch:
        """A smaller batch of about `tokens` tokens: whole sequences, half of each kind."""
        half = min(self.B, max(2, tokens // self.T)) // 2
        sequences = torch.cat([torch.arange(half), self.B // 2 + torch.arange(half)]).to(self.targets.device)
        rows = (sequences[:, None] * self.T + torch.arange(self.T, device=self.targets.device)).flatten()
        return Batch(self.hidden_states.detach()[rows], self.weight.detach(), self.targets[rows], self.T)


def make_batch(shape: Shape, N: int, T: int, spectrum: str, dtype: torch.dtype, device: torch.device) -> Batch:
    """Operands with a stated spectrum. Column 0 of the head is the common logit; column 0 of the hidden states is 1."""
    common, row, boost = SPECTRA[spectrum]
    D, V = shape
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    weight = normal(V, D).div_(D**0.5)
    weight[:, 0] = common * normal(V)
    targets = torch.multinomial(weight[:, 0].softmax(0), N, replacement=True, generator=g)
    hidden_states = torch.empty(N, D, dtype=dtype, device=device)
    for rows in torch.arange(N, device=device).split(8192):
        h = row * normal(len(rows), D)
        h[:, 0] = 0
        own = weight[targets[rows]]
        own[:, 0] = 0
        h += boost * own / own.norm(dim=-1, keepdim=True)
        h[:, 0] = 1
        hidden_states[rows] = h.to(dtype)
    return Batch(hidden_states, weight.to(dtype), targets, T)


def real_batch(model: str, data: str, N: int, T: int, dtype: torch.dtype, device: torch.device) -> Batch:
    """Hidden states of a language model at the response tokens of a JSON Lines file, cut into sequences of T.

    Raises:
        UserError: the model or the file cannot be read, or the file has fewer than 2 T response tokens.
    """
    from simnpo.batch import collate
    from simnpo.data import load_examples
    from simnpo.errors import UserError
    from simnpo.loading import load_model
    from simnpo.model import hidden_states, output_head

    lm, tokenizer = load_model(model)
    head = output_head(lm)
    if head.bias is not None or head.logit_scale != 1.0 or head.logit_softcap is not None:
        raise UserError(f"--real {model}: its head has a bias, a scale or a soft-cap, which not every rival can do")
    states, targets = [], []
    for example in load_examples(data, tokenizer, max_length=512):
        batch = collate([example], [], pad_token_id=tokenizer.pad_token_id, packed=False)
        with torch.no_grad():
            h = hidden_states(lm, batch)
        counted = batch.targets != -100
        states.append(h[counted].to(dtype))
        targets.append(batch.targets[counted])
        if sum(map(len, targets)) >= N:
            break
    found = sum(map(len, targets))
    tokens = min(N, found) // (2 * T) * (2 * T)
    if not tokens:
        raise UserError(f"--real needs at least {2 * T} response tokens, {data} has {found}")
    return Batch(
        torch.cat(states)[:tokens].to(device), head.weight.detach().to(device, dtype),
        torch.cat(targets)[:tokens].to(device), T,
    )  # fmt: skip


class Exact(NamedTuple):
    """The loss, its gradients and what the softmax looks like, in float64. nll, entropy: mean nats a token."""

    loss: Tensor
    dhidden: Tensor
    dweight: Tensor
    logps: Tensor
    nll: float
    entropy: float


def exact(batch: Batch) -> Exact:
    """SimNPO and the retain term by their formulas, one sequence at a time, from the operands as they are rounded."""
    w = batch.weight.detach().double()
    h_all = batch.hidden_states.detach().double()
    dhidden, dweight = torch.zeros_like(h_all), torch.zeros_like(w)
    logps = h_all.new_empty(len(batch.targets))
    num_forget, num_retain = batch.B - batch.B // 2, batch.B // 2
    loss, entropy = h_all.new_zeros(()), 0.0
    for i in range(batch.B):
        rows = slice(i * batch.T, (i + 1) * batch.T)
        h, targets = h_all[rows], batch.targets[rows, None]
        z = (h @ w.T).log_softmax(-1)
        logps[rows] = z.gather(1, targets)[:, 0]
        s = logps[rows].sum()
        p = z.exp()
        entropy -= (p * z).sum().item()
        if i < num_retain:
            loss -= RETAIN_COEF * s / (num_retain * batch.T)
            coef = torch.full_like(s, -RETAIN_COEF / (num_retain * batch.T))
        else:
            x = OBJECTIVE.beta / batch.T * s + OBJECTIVE.gamma
            loss += FORGET_COEF / num_forget * 2 / OBJECTIVE.beta * torch.logaddexp(x, torch.zeros_like(x))
            coef = FORGET_COEF / num_forget * 2 / batch.T * torch.sigmoid(x)
        dz = p.neg_().scatter_add_(1, targets, torch.ones_like(targets, dtype=p.dtype)).mul_(coef)
        dhidden[rows] = dz @ w
        dweight.addmm_(dz.T, h)
    N = len(batch.targets)
    return Exact(loss, dhidden, dweight, logps, -logps.mean().item(), entropy / N)
