"""What the loops train on: TOFU's own rows, made-up ones of the same lengths, or made-up documents of T tokens.

Made-up tokens take the time and the memory of real ones; only what a model would learn from them differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simnpo.batch import random_stream
from simnpo.data import IGNORE_INDEX, Example, load_examples
from simnpo.errors import UserError

MAX_LENGTH = 500  # of the published TOFU loop, which also pads to it
# TOFU's prompts, and the shortest, the usual and the longest of its answers, in tokens of Llama 2
PROMPT_TOKENS = (25, 30)
ANSWER_TOKENS = (13, 42, 82)
NUM_FORGET, NUM_RETAIN = 200, 3800
NUM_DOCUMENTS = 8


class Workload(NamedTuple):
    """Examples to forget and to retain, and what to call them in a table."""

    name: str
    forget: list[Example]
    retain: list[Example]


def tofu(folder: Path, tokenizer: Any) -> Workload:
    """forget05 and retain95 of a folder with TOFU's files.

    Raises:
        UserError: one of them is not there.
    """
    sets = []
    for name in ("forget05", "retain95"):
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            raise UserError(f"data: {folder} has no {path.name}; TOFU's files are at hf.co/datasets/locuslab/TOFU")
        sets.append(load_examples(path, tokenizer, MAX_LENGTH))
    return Workload("TOFU forget05", *sets)


def tofu_sized(vocab_size: int) -> Workload:
    """As many rows as TOFU's forget05 and retain95 have, as long as those, of random tokens."""
    rng = random_stream(0)

    def row(name: str) -> Example:
        prompt = int(rng.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1))
        return _made_up(rng, vocab_size, name, prompt, round(rng.triangular(*ANSWER_TOKENS)))

    return Workload(
        "rows of TOFU's lengths",
        [row(f"forget:{i}") for i in range(NUM_FORGET)],
        [row(f"retain:{i}") for i in range(NUM_RETAIN)],
    )


def documents(T: int, vocab_size: int) -> Workload:
    """Documents of T random tokens, every one but the first a target.

    Raises:
        UserError: T is less than 2.
    """
    if T < 2:
        raise UserError(f"context must be at least 2, one token to read and one to predict, got {T}")
    rng = random_stream(T)
    forget, retain = (
        [_made_up(rng, vocab_size, f"{name}:{i}", 0, T) for i in range(NUM_DOCUMENTS)] for name in ("forget", "retain")
    )
    return Workload(f"documents of {T} tokens", forget, retain)


def _made_up(rng: np.random.Generator, vocab_size: int, name: str, prompt: int, answer: int) -> Example:
    ids = rng.integers(vocab_size, size=prompt + answer).tolist()
    return Example(name, "", "", ids, [IGNORE_INDEX] * prompt + ids[prompt:])


def every_row_a_target(workload: Workload) -> Workload:
    """The same sequences with their prompts among the targets: what a loss does that leaves no row out."""
    forget, retain = (
        [replace(example, labels=list(example.input_ids)) for example in examples]
        for examples in (workload.forget, workload.retain)
    )
    return Workload(workload.name, forget, retain)


def shortened(examples: Sequence[Example], T: int) -> list[Example]:
    """The examples, cut to their last T tokens: there every one of them has a target."""
    return [replace(example, input_ids=example.input_ids[-T:], labels=example.labels[-T:]) for example in examples]
