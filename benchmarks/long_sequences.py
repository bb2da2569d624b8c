"""How exact the log-probability of a long sequence is, and the log-ratio of two models that NPO is made of.

python -m simnpo.benchmarks.long_sequences [--tokens 32768] [--data TOFU/retain99.jsonl] [--output benchmarks/results]

head    the same bf16 hidden states and weights in bf16 and in float32 logits against float64, in four regimes; the
        ratio is to a head that a little training has moved
model   a small random Llama whose body is bf16 against itself in float64, on the same bf16 weights; the ratio is to the
        model before a gradient step. "eager" takes the logits of the same body in float32, all of them, so that nothing
        but the body is inexact; "a token" is the root mean square of the ratio's error per token: errors of tokens are
        independent, and that of N of them is about sqrt(N) times as large
real    SmolLM2-135M in bf16 under LoRA adapters, on the text of --data in pieces of 4096 tokens that share one reward;
        the ratio is to the model without the adapters, after one step of SimNPO at a learning rate of 1e-4. Against a
        float32 copy of the model, float64 being too slow; the last row has that copy's own error in the first 1024.
        What an adapter adds to an output of a bf16 layer is lost where it is less than half a unit in the last place

"read in float32" is what `simnpo unlearn` does with such sequences (simnpo/upcast.py): float32 arithmetic on the bf16
weights, in a pass of its own without a gradient.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from simnpo.attached_model import attach
from simnpo.attention import use_packed_attention
from simnpo.benchmarks.measure import environment
from simnpo.demo import model_file
from simnpo.evaluation.results import markdown_table
from simnpo.kernels.linear_logps import linear_logps
from simnpo.loading import load_model
from simnpo.model import add_lora
from simnpo.objectives import SimNPO
from simnpo.training.disk import write_text
from simnpo.upcast import float32_arithmetic

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

ABOUT_REAL = """Against a float32 copy of the model, whose own error the last row has. "Read in float32" is what that
copy gives, from the bf16 weights. The ratio is that of one step of SimNPO at a learning rate of 1e-4: what the adapters
add to an output of a bf16 layer is lost there where it is less than half a unit in the last place.
"""
MOVED = 1e-3  # relative size of the step between the two models
PIECE, IN_FLOAT64, LEARNING_RATE = 4096, 1024, 1e-4  # of the real model


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

    def upcast(model: Any) -> Tensor:
        with float32_arithmetic(model):
            return fused(model)

    def eager(model: Any) -> Tensor:
        hidden, weight = model.model(ids).last_hidden_state[0, :-1], model.lm_head.weight
        return -cross_entropy(hidden.float() @ weight.float().T, ids[0, 1:], reduction="none")

    with torch.no_grad():
        exact = [fused(copy.deepcopy(model).double()) for model in (policy, reference)]
        ways = {
            ("bf16 body", "bf16"): [fused(model) for model in (policy, reference)],
            ("bf16 body", "float32"): [fused(model, torch.float32) for model in (policy, reference)],
            ("bf16 body, eager", "float32"): [eager(model) for model in (policy, reference)],
            ("bf16 body, read in float32", "float32"): [upcast(model) for model in (policy, reference)],
            ("float32 arithmetic", "float32"): [fused(copy.deepcopy(model).float()) for model in (policy, reference)],
        }
    return [model_row(name, logits, logps, exact) for (name, logits), logps in ways.items()]


def model_row(name: str, logits: str, logps: list[Tensor], exact: list[Tensor]) -> list[Any]:
    """Log-probabilities of the tokens, (N,), under policy and reference."""
    ours, theirs = (Sums(*(x.double().sum().item() for x in some)) for some in (logps, exact))
    of_a_token = ((logps[0].double() - logps[1].double()) - (exact[0] - exact[1])).square().mean().sqrt().item()
    return [*row(name, logits, ours, theirs), f"{of_a_token:.1e}"]


def real_rows(N: int, data: Path) -> list[list[Any]]:
    """Errors of SmolLM2-135M with a frozen bf16 body."""
    model, tokenizer = load_model(str(model_file()), dtype=torch.bfloat16)
    texts = (" ".join(map(str, json.loads(line).values())) for line in data.read_text(encoding="utf-8").splitlines())
    ids = torch.tensor(tokenizer(" ".join(texts))["input_ids"][:N]).view(-1, PIECE)
    use_packed_attention(attach(model))
    torch.manual_seed(0)
    policy = add_lora(model, 16, 32.0)
    policy(ids[:1, :512], labels=ids[:1, :512], objective=SimNPO()).loss.backward()

    def adapters(model: Any) -> list[Any]:
        return [p for name, p in model.named_parameters() if "lora_B" in name]

    # AdamW's first step
    steps = [LEARNING_RATE * p.grad.sign() for p in adapters(policy)]

    @torch.no_grad()
    def read(model: Any, arithmetic: Callable[[], Any], ids: Tensor = ids) -> list[Tensor]:
        found = []
        for scale in (-1.0, 0.0):
            for p, step in zip(adapters(model), steps, strict=True):
                p.copy_(scale * step)
            with arithmetic():
                pieces = [model(some[None], labels=some[None], token_logps=True) for some in ids]
            found.append(torch.cat(pieces)[:, :-1].flatten())
        return found

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    float32_copy = copy.deepcopy(policy).float()
    exact = read(float32_copy, nullcontext)
    ways = {
        ("bf16 body", "bf16"): lambda: read(policy, autocast),
        ("bf16 body, read in float32", "float32"): lambda: read(policy, lambda: float32_arithmetic(policy)),
    }
    rows = [model_row(name, logits, way(), exact) for (name, logits), way in ways.items()]
    start = ids[:1, :IN_FLOAT64]
    float64 = read(float32_copy.double(), nullcontext, ids=start)
    name = f"a float32 copy, {IN_FLOAT64} tokens"
    return [*rows, model_row(name, "float32", [x[: IN_FLOAT64 - 1] for x in exact], float64)]


def main() -> None:
    parser = argparse.ArgumentParser("simnpo.benchmarks.long_sequences", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--data", type=Path, help="JSON Lines whose text the real model reads (default: no real model)")
    parser.add_argument("--output", type=Path, help="folder for long.md (default: print only)")
    options = parser.parse_args()
    N = options.tokens
    command = f"python -m simnpo.benchmarks.long_sequences --tokens {N} --dim {options.dim} --vocab {options.vocab}"
    command += f" --data {options.data}" if options.data else ""
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
    if options.data is not None:
        table = markdown_table([*columns, "of a token"], real_rows(N, options.data))
        page += f"\n## SmolLM2-135M under LoRA, {N // PIECE} pieces of {PIECE} tokens\n\n{ABOUT_REAL}\n{table}"
    print(page)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        write_text(options.output / "long.md", page)


if __name__ == "__main__":
    main()
