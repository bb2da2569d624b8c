"""How exact the log-probability of a long sequence is, and the log-ratio of two models that NPO is made of.

python -m simnpo.benchmarks.long_sequences [--tokens 32768] [--output benchmarks/results]

head    the same bf16 hidden states and weights in bf16 and in float32 logits against float64, in four regimes; the
        ratio is to a head that a little training has moved
model   a small random Llama whose body is bf16 against itself in float64, on the same bf16 weights; the ratio is to the
        model before a gradient step. "eager" takes the logits of the same body in float32, all of them, so that nothing
        but the body is inexact; "a token" is the root mean square of the ratio's error per token: errors of tokens are
        independent, and that of N of them is about sqrt(N) times as large
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from simnpo.attached_model import attach
from simnpo.attention import use_packed_attention
from simnpo.benchmarks.measure import environment
from simnpo.evaluation.results import markdown_table
from simnpo.kernels.linear_logps import linear_logps
from simnpo.objectives import SimNPO
from simnpo.training.disk import write_text

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

MOVED = 1e-3  # relative size of the step between the two models


class Sums(NamedTuple):
    """Log-probability of a sequence under a model and under its reference, nats."""

    policy: float
    reference: float

    @property
    def ratio(self) -> float:
        return self.policy - self.reference


def row(name: str, logits: str, ours: Sums, exact: Sums) -> list[Any]:
    error = abs(ours.policy - exact.policy)
    relative = error / abs(exact.policy)
    return [name, logits, f"{exact.policy:.1f}", f"{error:.2g}", f"{relative:.1e}", f"{exact.ratio:.3f}",
            f"{abs(ours.ratio - exact.ratio):.2g}"]  # fmt: skip


def moved(weight: Tensor, seed: int = 1) -> Tensor:
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype)
    return weight + MOVED * weight.abs().mean() * noise


def head_rows(N: int, D: int, V: int) -> list[list[Any]]:
    """Errors of the head alone, on the same bf16 operands."""
    from numerics import REGIMES, regime_operands  # type: ignore[import-not-found]

    rows = []
    for regime in REGIMES:
        hidden, weight, targets = regime_operands(regime, N, D, V)
        operands = [(hidden.bfloat16(), w.bfloat16()) for w in (weight, moved(weight))]
        exact = Sums(*(linear_logps(h.double(), w.double(), targets).sum().item() for h, w in operands))
        for name, dtype in (("bf16", None), ("float32", torch.float32)):
            ours = Sums(*(linear_logps(h, w, targets, logits_dtype=dtype).double().sum().item() for h, w in operands))
            rows.append(row(regime, name, ours, exact))
    return rows


def model_rows(N: int) -> list[list[Any]]:
    """Errors of a whole model whose body computes in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=4096,
        max_position_embeddings=N, initializer_range=0.1,
    )  # fmt: skip
    reference = attach(LlamaForCausalLM(config)).bfloat16().eval()
    use_packed_attention(reference)
    ids = torch.randint(0, 4096, (1, N), generator=torch.Generator().manual_seed(2))
    policy = copy.deepcopy(reference)
    short = ids[:, :512]
    policy(short, labels=short, objective=SimNPO(), chunk_tokens=512).loss.backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            assert parameter.grad is not None
            step = parameter.abs().mean() * parameter.grad / parameter.grad.norm() * parameter.numel() ** 0.5
            parameter.sub_(MOVED * step)

    def fused(model: Any, logits_dtype: torch.dtype | None = None) -> Tensor:
        return model(ids, labels=ids, token_logps=True, logits_dtype=logits_dtype)[0, :-1]

    def eager(model: Any) -> Tensor:
        hidden, weight = model.model(ids).last_hidden_state[0, :-1], model.lm_head.weight
        return -cross_entropy(hidden.float() @ weight.float().T, ids[0, 1:], reduction="none")

    with torch.no_grad():
        exact = [fused(copy.deepcopy(model).double()) for model in (policy, reference)]
        ways = {
            ("bf16 body", "bf16"): [fused(model) for model in (policy, reference)],
            ("bf16 body", "float32"): [fused(model, torch.float32) for model in (policy, reference)],
            ("bf16 body, eager", "float32"): [eager(model) for model in (policy, reference)],
            ("float32 arithmetic", "float32"): [fused(copy.deepcopy(model).float()) for model in (policy, reference)],
        }
    rows = []
    for (name, logits), logps in ways.items():
        ours, theirs = (Sums(*(x.double().sum().item() for x in some)) for some in (logps, exact))
        of_a_token = ((logps[0].double() - logps[1].double()) - (exact[0] - exact[1])).square().mean().sqrt().item()
        rows.append([*row(name, logits, ours, theirs), f"{of_a_token:.1e}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser("simnpo.benchmarks.long_sequences", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--output", type=Path, help="folder for long.md (default: print only)")
    options = parser.parse_args()
    N = options.tokens
    command = f"python -m simnpo.benchmarks.long_sequences --tokens {N} --dim {options.dim} --vocab {options.vocab}"
    facts = environment(torch.device("cpu"), torch.bfloat16, command)
    columns = ["operands", "logits", "log-probability", "error, nats", "relative", "log-ratio", "error of it, nats"]
    page = "\n".join(
        [
            f"# One sequence of {N} tokens\n",
            "".join(f"* {key}: {value}\n" for key, value in facts.items()),
            f"{(__doc__ or '').strip().splitlines()[0]}\n",
            f"## The head alone, D = {options.dim}, V = {options.vocab}\n",
            markdown_table(columns, head_rows(N, options.dim, options.vocab)),
            "## A whole model, two layers, D = 64, V = 4096\n",
            markdown_table([*columns, "of a token"], model_rows(N)),
        ]
    )
    print(page)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        write_text(options.output / "long.md", page)


if __name__ == "__main__":
    main()
