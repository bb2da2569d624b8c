"""Gradient weight of every forget sequence against its length, epoch by epoch (the paper's figures 3 and 4).

    python -m simnpo.benchmarks.paper.weights --model FULL --data forget01.jsonl

FULL has learned the answers of --data (`simnpo.benchmarks.tofu.finetune`). NPO and SimNPO forget them from there, in
the same order and with nothing to retain; before the first epoch and after each, every sequence is asked for its weight
d loss / d log p. NPO starts with 1 for all, so that long answers are pushed hardest; SimNPO divides by the length.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simnpo.batch import collate, random_stream
from simnpo.benchmarks.measure import environment
from simnpo.benchmarks.report import markdown_facts, markdown_table
from simnpo.data import Example, load_examples
from simnpo.evaluation.subject import Subject
from simnpo.kernels.linear_unlearn_loss import linear_unlearn_loss
from simnpo.loading import load_model
from simnpo.model import hidden_states, output_head
from simnpo.objectives import NPO, SimNPO
from simnpo.training.optimizer import clip_gradients, make_optimizer, set_learning_rate

OBJECTIVES: dict[str, NPO | SimNPO] = {"NPO": NPO(0.1), "SimNPO": SimNPO(2.5)}  # the paper's betas for forget05
COLOURS = {"NPO": "#d55e00", "SimNPO": "#0072b2"}
BATCH_SIZE = 4


def forget(
    subject: Subject,
    examples: list[Example],
    objective: NPO | SimNPO,
    epochs: int,
    rate: float,
    max_batches: int | None,
) -> list[dict[str, Any]]:
    """Weights and log-probabilities of all examples before the first epoch and after each."""
    num_tokens = torch.tensor([example.num_targets for example in examples])
    ref_logps = sequence_logps(subject, examples)
    optimizer = make_optimizer(subject.model.parameters(), weight_decay=0.01)
    set_learning_rate(optimizer, rate)
    rows = []
    for epoch in range(epochs + 1):
        if epoch:
            order = torch.from_numpy(random_stream(0, epoch).permutation(len(examples)))
            for indices in order.split(BATCH_SIZE)[:max_batches]:
                batch = collate(
                    [examples[i] for i in indices], packed=False, pad_token_id=subject.tokenizer.pad_token_id
                )
                head = output_head(subject.model)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = linear_unlearn_loss(
                        hidden_states(subject.model, batch), head.weight, batch.targets, objective,
                        ref_logps=ref_logps[indices] if objective.needs_ref_logps else None, **head.options(),
                    ).loss  # fmt: skip
                loss.backward()
                clip_gradients(subject.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        logps = sequence_logps(subject, examples)
        _, weights = objective.loss_and_weight(logps, num_tokens, ref_logps)
        rows.append(
            {
                "epoch": epoch,
                "num_tokens": num_tokens.tolist(),
                "weights": [float(f"{w:.4g}") for w in weights.tolist()],
                "probability": [float(f"{p:.4g}") for p in (logps / num_tokens).exp().tolist()],
            }
        )
    return rows


def sequence_logps(subject: Subject, examples: list[Example]) -> torch.Tensor:
    """(n,) float32 nats, in the arithmetic that trains."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = subject.score(examples)
    return torch.tensor([score.logps.sum() for score in scores], dtype=torch.float32)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--max-batches", type=int, help="of an epoch (default: all)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/paper"))
    options = parser.parse_args(argv)
    command = f"python -m simnpo.benchmarks.paper.weights --model FULL --data {Path(options.data).name}"
    facts = environment(torch.device("cpu"), torch.bfloat16, f"{command} --epochs {options.epochs}")
    facts["learning rate"] = f"{options.learning_rate:g}"
    curves = {}
    for name, objective in OBJECTIVES.items():
        model, tokenizer = load_model(options.model)
        examples = load_examples(options.data, tokenizer, 512)
        subject = Subject(options.model, model, tokenizer)
        curves[name] = forget(subject, examples, objective, options.epochs, options.learning_rate, options.max_batches)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "weights.json").write_text(
        json.dumps({"facts": facts, "curves": curves}) + "\n", encoding="utf-8"
    )
    (options.output / "weights.md").write_text(markdown(curves, facts), encoding="utf-8")
    draw(curves, options.output / "weights.png")
    print((options.output / "weights.md").read_text(encoding="utf-8"))


NOTES = """\
Correlation is Pearson's between a sequence's weight and its number of tokens n. Push is weight times n, the pull on the
whole answer: that of the longer half over that of the shorter half. Probability is length-normalised.

![weight against length](weights.png)
"""


def markdown(curves: dict[str, list[dict[str, Any]]], facts: dict[str, str]) -> str:
    columns = ["method", "epoch", "mean weight", "correlation with n", "push, long / short", "p short", "p long"]
    lines = [[name, *_cells(row)] for name, rows in curves.items() for row in rows]
    return "\n".join(
        ["# Gradient weight against length\n", markdown_facts(facts), NOTES, markdown_table(columns, lines)]
    )


def _cells(row: dict[str, Any]) -> list[str]:
    n, w, p = (np.array(row[key], dtype=np.float64) for key in ("num_tokens", "weights", "probability"))
    long = n > np.median(n)
    correlation = float(np.corrcoef(n, w)[0, 1]) if w.std() > 1e-6 * w.mean() else 0.0
    push = (w * n)[long].mean() / max((w * n)[~long].mean(), 1e-300)
    return [str(row["epoch"]), *(f"{x:.3g}" for x in (w.mean(), correlation, push, p[~long].mean(), p[long].mean()))]


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Weight against length, a row a method, a column an epoch."""
    from matplotlib.figure import Figure

    last = len(next(iter(curves.values()))) - 1
    shown = sorted({min(epoch, last) for epoch in (0, 1, 2, last)})
    figure = Figure(figsize=(2.6 * len(shown), 4.6), layout="constrained")
    for axes_row, (name, rows) in zip(figure.subplots(len(curves), len(shown), squeeze=False), curves.items()):
        for axes, epoch in zip(axes_row, shown):
            axes.scatter(rows[epoch]["num_tokens"], rows[epoch]["weights"], s=12, color=COLOURS[name], linewidths=0)
            axes.set_title(f"{name}, after epoch {epoch}" if epoch else f"{name}, before", fontsize=9)
            axes.set(xlabel="tokens", ylim=(0, None))
        axes_row[0].set_ylabel("weight of a token")
    figure.savefig(path, dpi=60)


if __name__ == "__main__":
    main()
