"""Teach a model the answers of some JSON Lines files: what TOFU unlearns from, and what it compares with.

python -m simnpo.benchmarks.tofu.finetune --model MODEL --data full.jsonl --output full

Packed sequences, the mean NLL of the answers' tokens, AdamW on float32 weights, bf16 arithmetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

from simnpo.attached_model import attach
from simnpo.attention import use_packed_attention
from simnpo.batch import collate, random_stream
from simnpo.data import load_examples
from simnpo.errors import UserError
from simnpo.loading import load_tokenizer, load_weights
from simnpo.model import keeps_sequences_apart, shares_prefix
from simnpo.objectives import SimNPO
from simnpo.training.disk import whole_folder
from simnpo.training.optimizer import clip_gradients, learning_rate, make_optimizer, set_learning_rate


def finetune(
    model_name: str, data: Sequence[Path], output: Path, *, epochs: int, batch_size: int, peak_rate: float, seed: int
) -> None:
    """Trains and saves model and tokenizer to `output`.

    Raises:
        UserError: the model or the data cannot be read, or there is less data than one batch.
    """
    tokenizer = load_tokenizer(model_name)
    examples = [example for path in data for example in load_examples(str(path), tokenizer, 512)]
    steps_per_epoch = len(examples) // batch_size
    if steps_per_epoch == 0:
        raise UserError(f"data: {len(examples)} examples are less than one batch of {batch_size}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    model = attach(load_weights(model_name, dtype=torch.float32)).to(device)
    use_packed_attention(model)
    packed, shares = keeps_sequences_apart(model), shares_prefix(model)
    model.train()
    optimizer = make_optimizer(model.parameters(), weight_decay=0.01)
    num_steps = epochs * steps_per_epoch
    for step in track(range(num_steps), description=f"learning {output.name}"):
        order = random_stream(seed, step // steps_per_epoch).permutation(len(examples))
        first = step % steps_per_epoch * batch_size
        drawn = [examples[i] for i in order[first : first + batch_size]]
        batch = collate([], drawn, packed=packed, share_prefix=shares, pad_token_id=tokenizer.pad_token_id).to(device)
        set_learning_rate(optimizer, learning_rate(step, num_steps, peak_rate, warmup_ratio=0.1))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            # every sequence is one to keep: the loss is their NLL per token, whatever the objective
            loss = model(**batch.inputs(), objective=SimNPO(), retain_mask=batch.retain_mask).loss
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with whole_folder(output) as folder:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser("simnpo.benchmarks.tofu.finetune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    finetune(
        options.model, options.data, options.output, epochs=options.epochs, batch_size=options.batch_size,
        peak_rate=options.learning_rate, seed=options.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
