"""Forget and retain rows as the batches that an attached model takes, for any loop that draws from a DataLoader.

ForgetRetainDataset  ->  {"forget": row, "retain": row}  ->  ForgetRetainCollator  ->  model(**batch, objective=...)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from simnpo.data import IGNORE_INDEX, encode, load_examples

# what stands where a shorter sequence has ended
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX, "position_ids": 0}

Rows = str | Path | Sequence[Mapping[str, Any]] | Dataset


class ForgetRetainDataset(Dataset):
    """Pairs each forget row with a retain row, another one every epoch.

    Which retain row is a function of (seed, epoch, index): the same on a resumed run, never the same on two ranks, and
    every retain row comes up once before any comes up twice.

    Args:
        forget: what to forget: the path of a JSON Lines file, or rows. A row holds `input_ids` and `labels` (unshifted,
            -100 where ignored), or text in one of the forms of `simnpo.data` or in TRL's `prompt` and `completion`.
        retain: what to keep, in the same forms; None for no retain term.
        tokenizer: of transformers, for rows of text.
        max_length: tokens a row of text is cut to.
        seed: of the retain draws.

    Raises:
        ValueError: there are no rows, or they are text and there is no tokenizer, or ids without labels.
        simnpo.errors.UserError: a row of text is malformed; names it.
    """

    def __init__(
        self, forget: Rows, retain: Rows | None = None, tokenizer: Any = None, *, max_length: int = 512, seed: int = 0
    ) -> None:
        self.forget = tokenize("forget", forget, tokenizer, max_length)
        self.retain = None if retain is None else tokenize("retain", retain, tokenizer, max_length)
        self.seed = seed
        # shared, because the workers of a DataLoader keep the copy of the dataset that they started with
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    # not set_epoch: Accelerate calls that with counts of its own, which start again at 0 in a resumed run
    def start_epoch(self, epoch: int) -> None:
        """Chooses the retain draws of an epoch, counted from 0. Call it before iterating; `UnlearnTrainer` does."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, Mapping[str, Any]]:
        pair = {"forget": self.forget[index]}
        if self.retain is not None:
            drawn, size = int(self._epoch) * len(self) + index, len(self.retain)
            pair["retain"] = self.retain[int(_order(self.seed, drawn // size, size)[drawn % size])]
        return pair


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, turn)).permutation(size)


def tokenize(name: str, rows: Rows, tokenizer: Any, max_length: int) -> Any:
    """Rows of `input_ids` and `labels`; rows that are tokenised already come back as they are, unread but the first.

    Args:
        name: what errors call the rows.
        rows, tokenizer, max_length: see `ForgetRetainDataset`.
    """
    if isinstance(rows, str | Path):
        return [
            {"input_ids": example.input_ids, "labels": example.labels}
            for example in load_examples(rows, _needed(tokenizer, name), max_length)
        ]
    if not len(rows):  # type: ignore[arg-type]
        raise ValueError(f"{name}: there are no rows")
    first = rows[0]
    if "input_ids" in first:
        if "labels" not in first:
            raise ValueError(
                f"{name}: rows have input_ids and no labels, got {sorted(first)}: add labels, a copy of input_ids with "
                f"{IGNORE_INDEX} where a token (of a prompt) does not count"
            )
        return rows
    _needed(tokenizer, name)
    examples = (encode(dict(rows[i]), tokenizer, f"{name}[{i}]", max_length) for i in range(len(rows)))  # type: ignore[arg-type]
    return [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]


def _needed(tokenizer: Any, name: str) -> Any:
    if tokenizer is None:
        raise ValueError(f"{name}: rows of text need a tokenizer, got None")
    return tokenizer


class ForgetRetainCollator:
    """Puts the forget rows and the retain rows of some pairs into one batch, so that one forward serves both.

    Args:
        collator: makes a padded batch of rows, as it does in the trainer it comes from; None pads on the right. Rows
            that are no pairs are handed to it as they are.
        pad_token_id: fills `input_ids` where there is no `collator`; never attended to.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]] | None = None, pad_token_id: int = 0) -> None:
        self.collator = collator or _Pad(pad_token_id)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """The batch, with `retain_mask` (B,) if the rows are pairs: forget rows come first."""
        if "forget" not in rows[0]:
            return dict(self.collator(rows))
        forget = [row["forget"] for row in rows]
        retain = [row["retain"] for row in rows if "retain" in row]
        batch = dict(self.collator([*forget, *retain]))
        if len(batch["input_ids"]) != len(forget) + len(retain):
            raise ValueError(
                f"the collator made {len(batch['input_ids'])} rows of {len(forget) + len(retain)} sequences: the loss "
                "is a mean over sequences, so each needs a row of its own: turn packing and padding_free off"
            )
        marked = sum(label != IGNORE_INDEX for row in [*forget, *retain] for label in row["labels"])
        counted = int((batch["labels"] != IGNORE_INDEX).sum())
        if counted > marked:
            raise ValueError(
                f"the collator made {counted} labels of the {marked} in the rows, so prompts or padding would count: "
                "use one that keeps the rows' labels (DataCollatorForSeq2Seq), or none"
            )
        batch["retain_mask"] = torch.tensor([False] * len(forget) + [True] * len(retain))
        return _without_first_labels(batch)


class _Pad:
    def __init__(self, pad_token_id: int) -> None:
        self.padding = PADDING | {"input_ids": pad_token_id}

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str) -> Tensor:
            columns = (torch.as_tensor(row[name]) if name in row else torch.ones(len(row["input_ids"])) for row in rows)
            return torch.stack([_fit(column.long(), width, self.padding[name]) for column in columns])

        return {name: padded(name) for name in ("input_ids", "attention_mask", "labels")}


def join(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The sub-batches {"forget": {...}, "retain": {...}} as one batch; `retain` may be missing, or empty, or None.

    Raises:
        ValueError: a sub-batch has no labels, or holds what this function does not know how to join.
    """
    parts = {name: batch[name] for name in ("forget", "retain") if batch.get(name)}
    for name, part in parts.items():
        missing, unknown = {"input_ids", "labels"} - set(part), set(part) - set(PADDING)
        if missing or unknown:
            raise ValueError(
                f"the {name} batch must hold input_ids and labels, and may hold attention_mask and position_ids, "
                f"got {sorted(part)}"
            )
    width = max(part["input_ids"].shape[1] for part in parts.values())

    def joined(name: str) -> Tensor:
        pieces = (part[name] if name in part else torch.ones_like(part["input_ids"]) for part in parts.values())
        return torch.cat([_fit(piece, width, PADDING[name]) for piece in pieces])

    names = ["input_ids", "attention_mask", "labels"]
    if all("position_ids" in part for part in parts.values()):
        names.append("position_ids")
    elif any("position_ids" in part for part in parts.values()):
        raise ValueError("position_ids must be in both of the forget and the retain batch, or in neither")
    is_retain = [name == "retain" for name, part in parts.items() for _ in part["input_ids"]]
    device = parts["forget"]["input_ids"].device
    batch = {name: joined(name) for name in names} | {"retain_mask": torch.tensor(is_retain, device=device)}
    return _without_first_labels(batch)


def _without_first_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """Ignores the label of the first token of each row, which nothing predicts: behind padding it would count."""
    if "attention_mask" not in batch:
        return batch
    labels, first = batch["labels"].clone(), batch["attention_mask"].long().argmax(-1, keepdim=True)
    return batch | {"labels": labels.scatter(-1, first, IGNORE_INDEX)}


def _fit(values: Tensor, width: int, fill: int) -> Tensor:
    """Pads the last dimension on the right."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]), value=fill)
