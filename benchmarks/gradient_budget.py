"""Which columns to keep and what stands in for the rest: error against columns kept, for the rules that were tried.

    python -m simnpo.benchmarks.gradient_budget [--real MODEL --data FILE.jsonl] [--output FILE.md]

Everything in float32 on one dense chunk, so that only the rule is measured; the last column is what bf16 does to the
whole gradient. The rules:

    no tail          columns by energy, the rest dropped
    rank one         the dropped part as row mass times a profile over the columns
    weighted         energies of coefs * dz, so that sequences without weight claim nothing (with the rank-one tail)
    tilted           weighted, and the profile leans with the hidden state: mean + covariance h of the dropped W rows

`weighted` is what the package does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from simnpo import linear_unlearn_loss
from simnpo.benchmarks.measure import environment, relative_error
from simnpo.benchmarks.operands import (
    FORGET_COEF,
    OBJECTIVE,
    RETAIN_COEF,
    SHAPES,
    SPECTRA,
    Batch,
    make_batch,
    real_batch,
)
from simnpo.kernels.gradient_budget import choose_columns

RULES = ("no tail", "rank one", "weighted", "tilted")
ERRORS = (0.002, 0.004, 0.01)


class Dense(NamedTuple):
    """dz (N, V) unscaled, coefs (N,), h (N, D), w (V, D) of one chunk, in float32."""

    dz: Tensor
    coefs: Tensor
    h: Tensor
    w: Tensor

    def gradients(self) -> tuple[Tensor, Tensor]:
        scaled = self.dz * self.coefs[:, None]
        return scaled @ self.w, scaled.T @ self.h


def dense_chunk(batch: Batch) -> Dense:
    """The gradient of the logits and the coefficient of every token."""
    h, w = batch.hidden_states.detach().float(), batch.weight.detach().float()
    logits = h @ w.T
    rows = torch.arange(len(h))
    logp = logits.log_softmax(-1)
    dz = -logp.exp()
    dz[rows, batch.targets] += 1
    s = logp[rows, batch.targets].view(batch.B, batch.T).sum(1)
    _, weights = OBJECTIVE.loss_and_weight(s, torch.full((batch.B,), batch.T))
    num_retain = int(batch.retain_mask.sum())
    coefs = torch.where(
        batch.retain_mask, -RETAIN_COEF / (num_retain * batch.T), FORGET_COEF / (batch.B - num_retain) * weights
    )
    return Dense(dz, coefs.repeat_interleave(batch.T), h, w)


def apply_rule(rule: str, chunk: Dense, gradient_error: float) -> tuple[float, float, float]:
    """Share of the columns kept, relative error of dH and of dW."""
    dz, coefs, h, w = chunk
    scaled = dz * coefs[:, None]
    weighted = rule in ("weighted", "tilted")
    columns, _ = choose_columns((scaled if weighted else dz).square().sum(0), gradient_error)
    rest = torch.ones(len(w), dtype=torch.bool).index_fill(0, columns, False)
    dh = scaled[:, columns] @ w[columns]
    dw = torch.zeros_like(w)
    dw[columns] = scaled[:, columns].T @ h
    if rule != "no tail":
        mass = ((dz * coefs.abs()[:, None]) if weighted else dz)[:, rest].sum(0)
        profile, tail = mass / mass.sum(), scaled[:, rest].sum(1)
        mean = profile @ w[rest]
        direction = mean.expand_as(h)
        if rule == "tilted":
            centred = w[rest] - mean
            direction = direction + h @ (centred.T @ (centred * profile[:, None]))
        dh += tail[:, None] * direction
        dw[rest] = profile[:, None] * (tail @ h)
    exact_dh, exact_dw = chunk.gradients()
    return len(columns) / len(w), relative_error(dh, exact_dh), relative_error(dw, exact_dw)


def bf16_errors(batch: Batch, exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """What computing the whole gradient from bf16 operands costs: our exact path, bf16 against float32."""
    h, w = (x.detach().bfloat16().requires_grad_() for x in (batch.hidden_states, batch.weight))
    out = linear_unlearn_loss(
        h, w, batch.targets, OBJECTIVE, cu_seqlens=batch.cu_seqlens, retain_mask=batch.retain_mask,
        forget_coef=FORGET_COEF, retain_coef=RETAIN_COEF,
    )  # fmt: skip
    dh, dw = torch.autograd.grad(out.loss, (h, w))
    return relative_error(dh, exact[0]), relative_error(dw, exact[1])


def table(name: str, batch: Batch) -> list[str]:
    chunk = dense_chunk(batch)
    exact = chunk.gradients()
    bf16 = bf16_errors(batch, exact)
    nll = -(1 - chunk.dz[torch.arange(len(chunk.h)), batch.targets]).log().mean().item()
    lines = [
        f"### {name}: N = {len(chunk.h)}, D = {chunk.h.shape[1]}, V = {len(chunk.w)}, mean NLL {nll:.3g} nats",
        "",
        f"bf16 operands, exact gradient: dH {bf16[0]:.4f}, dW {bf16[1]:.4f}",
        "",
        "| gradient_error | rule | columns kept | dH error | dW error |",
        "|---|---|---|---|---|",
    ]
    for gradient_error in ERRORS:
        for rule in RULES:
            kept, dh, dw = apply_rule(rule, chunk, gradient_error)
            lines.append(f"| {gradient_error} | {rule} | {kept:.2%} | {dh:.4f} | {dw:.4f} |")
    return [*lines, ""]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", metavar="MODEL", help="also hidden states of this model (id, folder or .gguf file)")
    parser.add_argument("--data", metavar="FILE", help="JSON Lines whose responses --real runs on")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gradient_budget.md"))
    options = parser.parse_args(argv)
    if bool(options.real) != bool(options.data):
        parser.error("--real and --data go together")

    cpu = torch.device("cpu")
    command = "python -m simnpo.benchmarks.gradient_budget" + (" --real MODEL --data FILE" if options.real else "")
    lines = ["# Gradient budget: error against columns kept", "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    lines += [f"- {key}: {value}" for key, value in environment(cpu, torch.float32, command).items()] + [""]
    for spectrum in SPECTRA:
        lines += table(spectrum, make_batch(SHAPES["cpu"], options.tokens, 32, spectrum, torch.float32, cpu))
    if options.real:
        batch = real_batch(options.real, options.data, options.tokens, 32, torch.float32, cpu)
        lines += table(f"hidden states of {Path(options.real).name} on {Path(options.data).name}", batch)
    options.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
