"""Log-probabilities under the reference policy: computed once, before the first step, from the model itself.

They are kept by the content of a sequence, so it does not matter in which order, batch or padding it comes again. With
them there is no second model in memory, and no second forward in a step.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simnpo.data import IGNORE_INDEX
from simnpo.training.disk import write_json


class ReferenceLogps:
    """Log-probability of each forget sequence under a model as it was, nats.

    Args:
        logps: by `sequence_key`.
    """

    def __init__(self, logps: Mapping[str, float] | None = None) -> None:
        self.logps = dict(logps or {})

    @classmethod
    def measure(cls, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> "ReferenceLogps":
        """One pass without gradients over batches of forget sequences; retain sequences among them are left out.

        Args:
            model: attached, as it is before training, with its adapters: to have the model beneath them as the
                reference, call this inside `with model.disable_adapter()`.
            batches: on the model's device: input_ids, attention_mask, labels, and retain_mask if there are any.
        """
        known = cls()
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for batch in batches:
                forget = _forget_rows(batch)
                per_token_logps = model(**forget, token_logps=True)  # (B, T)
                known.logps |= zip(sequence_keys(forget), per_token_logps.double().sum(-1).tolist())
        model.train(was_training)
        return known

    def of(self, batch: Mapping[str, Any]) -> list[float]:
        """`ref_logps` of a batch: one float a sequence, 0 for retain sequences.

        Raises:
            ValueError: a forget sequence was not there when the reference was measured.
        """
        is_retain = batch["retain_mask"].tolist() if "retain_mask" in batch else [False] * len(batch["input_ids"])
        keys = sequence_keys(batch)
        unknown = [i for i, key in enumerate(keys) if not is_retain[i] and key not in self.logps]
        if unknown:
            raise ValueError(
                f"{len(unknown)} forget sequences of a batch, the first in row {unknown[0]}, were not in the data when "
                f"the reference was measured over {len(self.logps)} sequences: a row must be the same every time it is "
                "read (no random answers, crops or masks), and a resumed run needs the data it began with"
            )
        return [0.0 if retained else self.logps[key] for key, retained in zip(keys, is_retain)]

    def save(self, path: Path) -> None:
        """Writes them as JSON, whole or not at all."""
        write_json(path, self.logps)

    @classmethod
    def load(cls, path: Path) -> "ReferenceLogps":
        return cls(json.loads(path.read_text(encoding="utf-8")))


def sequence_keys(batch: Mapping[str, Any]) -> list[str]:
    """A name for each sequence of a batch by its tokens and labels, whatever its padding."""
    input_ids = batch["input_ids"].cpu()
    mask = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else torch.ones_like(input_ids).bool()
    labels = batch["labels"].cpu()
    mask = mask | (labels != IGNORE_INDEX)
    return [_digest(ids[kept], some[kept]) for ids, some, kept in zip(input_ids, labels, mask)]


def _digest(input_ids: Tensor, labels: Tensor) -> str:
    return hashlib.blake2b(torch.stack([input_ids, labels]).numpy().tobytes(), digest_size=12).hexdigest()


def _forget_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    batch = dict(batch)
    retain_mask = batch.pop("retain_mask", None)
    return batch if retain_mask is None else {name: rows[~retain_mask] for name, rows in batch.items()}
