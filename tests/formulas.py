"""Every objective once more, as its paper has it, on all the logits of a sequence and for autograd to differentiate."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from simnpo.objectives import (
    CATNIP,
    DPO,
    KTO,
    NNPO,
    NPO,
    PDU,
    TNPO,
    WGA,
    WTNPO,
    GradAscent,
    InvertedHinge,
    JensUn,
    MaxEntropy,
    PairObjective,
    RowObjective,
    SatImp,
    SimNPO,
    SimPO,
    SmoothedGradAscent,
    TokenObjective,
    Unlikelihood,
)

SEQUENCE = (SimNPO(2.5, 0.7), NPO(0.2), GradAscent(), GradAscent(normalize=True), NNPO(1.5))
PAIRS = (DPO(0.2), SimPO(2.0, 0.3))
TOKENWISE = (
    *(WGA(1.5), TNPO(3.0), WTNPO(3.0, 1.5), SatImp(2.0, 0.5)),
    *(Unlikelihood(), CATNIP(1.0), CATNIP(0.4), JensUn()),
)
ROWS = (MaxEntropy(), SmoothedGradAscent(0.2), InvertedHinge(), PDU())
EVERY = (*SEQUENCE, KTO(0.3), *PAIRS, *TOKENWISE, *ROWS)


def token_loss(objective, z: Tensor, y: Tensor, ref: Tensor | None = None) -> Tensor:
    """(n,) loss of each token of a tokenwise or row objective; logits z (n, V), targets y, reference ref (n,)."""
    log_p = z.log_softmax(-1)
    logp = log_p.gather(-1, y[:, None])[:, 0]
    p = logp.exp()
    if isinstance(objective, WGA):
        return (p**objective.beta).detach() * logp
    if isinstance(objective, (TNPO, WTNPO)):
        q, alpha = ref.exp(), getattr(objective, "alpha", 0.0)
        return (2 * p ** (objective.beta + alpha) / (p**objective.beta + q**objective.beta)).detach() * logp
    if isinstance(objective, SatImp):
        return (p**objective.beta1 * (1 - p) ** objective.beta2).detach() * logp
    if isinstance(objective, Unlikelihood):
        return -torch.log1p(-p)
    if isinstance(objective, CATNIP):
        odds = p / (1 - p)
        return 2 / objective.beta * torch.log1p(odds**objective.beta)
    if isinstance(objective, JensUn):
        return 0.5 * ((1 - p) * math.log(2) + p * torch.log(2 * p / (1 + p)) + torch.log(2 / (1 + p)))
    if isinstance(objective, MaxEntropy):
        return z.logsumexp(-1) - z.mean(-1)
    if isinstance(objective, SmoothedGradAscent):
        return (1 - objective.smoothing) * logp + objective.smoothing * log_p.mean(-1)
    if isinstance(objective, InvertedHinge):
        return 1 + p - log_p.exp().scatter(-1, y[:, None], -1.0).max(-1).values
    assert isinstance(objective, PDU)
    return (z.max(-1).values - z.mean(-1)) ** 2


def sequence_loss(objective, s: Tensor, n: int, ref: Tensor | None = None, kl: float | Tensor = 0.0) -> Tensor:
    """Loss of a sequence objective from s = sum of log-probabilities."""
    if isinstance(objective, SimNPO):
        return -2 / objective.beta * F.logsigmoid(-objective.beta / n * s - objective.gamma)
    if isinstance(objective, NPO):
        return -2 / objective.beta * F.logsigmoid(-objective.beta * (s - ref))
    if isinstance(objective, NNPO):
        return -2 / objective.beta * F.logsigmoid(-objective.beta / n * (s - ref))
    if isinstance(objective, KTO):
        return 1 - 2 / objective.beta * torch.sigmoid(kl - objective.beta * (s - ref))
    assert isinstance(objective, GradAscent)
    return s / n if objective.normalize else s


def pair_loss(objective, s, n, ref, s_alt, n_alt, ref_alt) -> Tensor:
    """Loss of a pair."""
    if isinstance(objective, DPO):
        return -2 / objective.beta * F.logsigmoid(objective.beta * ((s_alt - ref_alt) - (s - ref)))
    assert isinstance(objective, SimPO)
    return -F.logsigmoid(objective.beta / n_alt * s_alt - objective.beta / n * s - objective.gamma)


def batch_loss(
    objective, logits: Tensor, targets: Tensor, *, retain_mask: Tensor, ref_logps: Tensor, ref_token_logps: Tensor,
    alternates: Tensor | None = None, token_weights: Tensor | None = None, exact_logps: Tensor | None = None,
    forget_coef: float = 1.0, retain_coef: float = 1.0,
) -> Tensor:  # fmt: skip
    """forget_coef * mean over the forget sequences + retain_coef * mean NLL of the retain tokens; logits (B, T, V)."""
    B = len(targets)
    weights = torch.ones_like(ref_token_logps) if token_weights is None else token_weights
    log_p = logits.log_softmax(-1)
    counted = targets != -100
    logp = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    n = counted.sum(1).tolist()
    s = (logp * weights * counted).sum(1)
    if exact_logps is not None:
        s = s + (exact_logps - s).detach()
    alternates = torch.full((B,), -1) if alternates is None else alternates
    forget, retain, kls = [], [], [torch.zeros((), dtype=logp.dtype)]
    taken = alternates[alternates >= 0].tolist()
    if taken:
        kls = [(s[b] - ref_logps[b]).detach() for b in taken]
    kl = torch.stack(kls).mean()
    for b in range(B):
        rows = counted[b]
        if retain_mask[b]:
            retain.append(logp[b][rows])
        elif b in taken:
            continue
        elif n[b] == 0 or (isinstance(objective, PairObjective) and n[alternates[b]] == 0):
            forget.append(s[b] * 0)
        elif isinstance(objective, PairObjective):
            a = int(alternates[b])
            forget.append(pair_loss(objective, s[b], n[b], ref_logps[b], s[a], n[a], ref_logps[a]))
        elif isinstance(objective, (TokenObjective, RowObjective)):
            losses = token_loss(objective, logits[b][rows], targets[b][rows], ref_token_logps[b][rows])
            forget.append((losses * weights[b][rows]).sum() / n[b])
        else:
            forget.append(sequence_loss(objective, s[b], n[b], ref_logps[b], kl))
    forget_loss = torch.stack(forget).mean() if forget else logits.new_zeros(())
    retain_loss = -torch.cat(retain).mean() if retain and sum(map(len, retain)) else logits.new_zeros(())
    return forget_coef * forget_loss + retain_coef * retain_loss
