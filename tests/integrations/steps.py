"""Rows of ragged length, and the loss of a whole optimizer step by the formula on the model's own logits."""

import torch
from torch import nn
from torch.nn import functional as F

from simnpo import NPO, SimNPO

BETA, GAMMA, FORGET_COEF, RETAIN_COEF = 0.3, 0.4, 0.6, 1.7


def make_rows(lengths: list[int], seed: int) -> list[dict[str, list[int]]]:
    """Tokenised rows with `lengths` targets, behind prompts of four, one, two or three tokens.

    Where the prompt is one token that token is a label too, as in a row of plain text; nothing predicts it.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, length in enumerate(lengths):
        prompt = 1 + (i + 3) % 4
        ids = torch.randint(0, 256, (prompt + length,), generator=generator).tolist()
        ignored = 0 if prompt == 1 else prompt
        rows.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return rows


FORGET = make_rows([1, 9, 4, 17, 2, 6, 30, 3, 12, 5, 8], seed=1)
RETAIN = make_rows([7, 1, 22, 3, 10, 5, 2, 14], seed=2)


def row_logps(model: nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
    """Log-probability of each target of a row, alone and without padding, through the model's logits."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    counted = labels[1:] != -100
    return logps[counted].gather(-1, labels[1:][counted][:, None])[:, 0]


def step_loss(model: nn.Module, forget: list, retain: list, objective=None, ref_logps=None) -> dict[str, torch.Tensor]:
    """Every term of an optimizer step as one big batch, by the formula."""
    objective = SimNPO(BETA, GAMMA) if objective is None else objective
    losses = []
    for i, row in enumerate(forget):
        logps = row_logps(model, row)
        beta = objective.beta
        if isinstance(objective, NPO):
            losses.append(-2 / beta * F.logsigmoid(-beta * (logps.sum() - ref_logps[i])))
        else:
            losses.append(-2 / beta * F.logsigmoid(-beta * logps.mean() - objective.gamma))
    forget_loss = torch.stack(losses).mean()
    retain_loss = -torch.cat([row_logps(model, row) for row in retain]).mean() if retain else torch.zeros(())
    loss = FORGET_COEF * forget_loss + RETAIN_COEF * retain_loss
    return {"loss": loss, "forget_loss": forget_loss, "retain_loss": retain_loss}


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    return dict(zip(names, torch.autograd.grad(loss, parameters)))
