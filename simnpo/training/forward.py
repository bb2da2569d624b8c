"""How a run calls its model: in batches, in its arithmetic, and for the log-probabilities that it has as it is."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from simnpo.batch import Alternates, Batch, collate
from simnpo.config import UnlearnConfig
from simnpo.data import Example
from simnpo.objectives import GradAscent
from simnpo.pieces import pieces
from simnpo.upcast import float32_arithmetic

# of one forward without a gradient, unless a single sequence has more; attention that packs with a dense mask costs
# their square
MAX_TOKENS = 4096
# what is not an argument of `collate`
NOT_OF_BATCHES = ("device", "logits_dtype", "exact_ratio")


def arithmetic(config: UnlearnConfig) -> torch.dtype:
    """The dtype of the run's matrix products."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]


def autocast(config: UnlearnConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic of the run, on weights that are kept in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


class Collator(NamedTuple):
    """How this run makes batches, and in which arithmetic it reads them.

    logits_dtype: of the loss; None: that of the arithmetic.
    exact_ratio: the log-probabilities of which the objective takes a ratio to the reference are read in float32.
    """

    packed: bool
    pad_token_id: int
    device: torch.device
    ref_logps: dict[str, float] | None
    ref_token_logps: dict[str, list[float]] | None = None
    alternates: Alternates = "none"
    logits_dtype: torch.dtype | None = None
    share_prefix: bool = False
    exact_ratio: bool = False

    def __call__(self, forget: Sequence[Example], retain: Sequence[Example]) -> Batch:
        options = {name: value for name, value in self._asdict().items() if name not in NOT_OF_BATCHES}
        return collate(forget, retain, **options).to(self.device)

    def head_options(self, config: UnlearnConfig) -> dict[str, Any]:
        """How the loss multiplies with the head."""
        return {"chunk_tokens": config.chunk_tokens, "logits_dtype": self.logits_dtype}

    def without_objective(self) -> "Collator":
        """One that leaves out what only the objective wants."""
        return self._replace(ref_logps=None, ref_token_logps=None, alternates="none")


@torch.no_grad()
def sequence_logps(
    model: nn.Module,
    config: UnlearnConfig,
    collator: Collator,
    batches: Iterable[Sequence[Example]],
    *,
    exact: bool = False,
) -> list[float]:
    """Log-probability of the targets of each example under the attached model as it is, nats.

    Args:
        batches: what goes through the model together; the results stand in the same order, one after another.
        exact: in float32, whatever the run's arithmetic and the dtype of the weights.
    """
    was_training = model.training
    model.eval()
    plain, logps = collator.without_objective(), [torch.empty(0, device=collator.device)]
    for some in batches:
        batch = plain(some, [])
        with float32_arithmetic(model) if exact else autocast(config, collator.device):
            # gradient ascent is the objective that needs nothing but these
            out = model(**batch.inputs(), objective=GradAscent(), **collator.head_options(config))
        logps.append(out.logps)
    model.train(was_training)
    return torch.cat(logps).tolist()


def exact_logps(
    model: nn.Module, config: UnlearnConfig, collator: Collator, examples: Sequence[Example]
) -> dict[str, float]:
    """Log-probability of each example's targets in float32, by id, nats; a document goes through piece by piece.

    Args:
        model: attached, as `float32_arithmetic` takes it.
    """
    # a batch may have drawn one twice
    examples = list({example.id: example for example in examples}.values())
    parts, batches = in_pieces(examples, packed=collator.packed)
    values = sequence_logps(model, config, collator, batches, exact=True)
    of_piece = {piece.id: value for piece, value in zip(chain.from_iterable(batches), values, strict=True)}
    return {e.id: math.fsum(of_piece[piece.id] for piece in some) for e, some in zip(examples, parts, strict=True)}


def with_exact_logps(
    model: nn.Module, config: UnlearnConfig, collator: Collator, forget: Sequence[Example], batch: Batch
) -> Batch:
    """The batch of `forget` and whatever else, with their exact log-probabilities if the run takes them.

    Args:
        model: not wrapped by DistributedDataParallel: how many forwards it takes differs from rank to rank.
    """
    if not collator.exact_ratio or not forget:
        return batch
    beside = [e.alternate for e in forget if e.alternate is not None] if collator.alternates == "beside" else []
    known = exact_logps(model, config, collator, [*forget, *beside])
    # in the order of `collate`; a retain sequence needs none
    num_retain = len(batch.ids) - len(forget) - len(beside)
    values = [*(known[e.id] for e in forget), *[0.0] * num_retain, *(known[e.id] for e in beside)]
    return replace(batch, exact_logps=torch.tensor(values, device=collator.device))


def in_pieces(examples: Sequence[Example], *, packed: bool) -> tuple[list[list[Example]], list[list[Example]]]:
    """The pieces of each example, and all of them in the batches in which they go through the model."""
    parts = [pieces(example) for example in examples]
    sequences = list(chain.from_iterable(parts))
    batches = token_batches([len(piece.input_ids) for piece in sequences], MAX_TOKENS, packed=packed)
    return parts, [[sequences[i] for i in batch] for batch in batches]


def token_batches(lengths: Sequence[int], max_tokens: int, *, packed: bool) -> list[list[int]]:
    """Which sequences go through the model together: at most `max_tokens`, padding included, or a longer one alone.

    The longest come first, so that the pass needs at its start what it needs at most, and padding is short.
    """
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # a row of a padded batch is as long as its first
        cost = lengths[i] if packed or not batches else lengths[batches[-1][0]]
        if not batches or cost > room:
            batches.append([])
            room, cost = max_tokens, lengths[i]
        batches[-1].append(i)
        room -= cost
    return batches


@torch.no_grad()
def token_logps(
    model: nn.Module, config: UnlearnConfig, collator: Collator, batches: Iterable[Sequence[Example]]
) -> list[list[float]]:
    """Log-probability of each target of each example under the attached model as it is, nats, 0 where ignored.

    Args:
        batches: see `sequence_logps`.
    """
    was_training = model.training
    model.eval()
    # a row for each token of each example
    plain, rows = collator.without_objective()._replace(share_prefix=False), []
    for some in batches:
        batch = plain(some, [])
        with autocast(config, collator.device):
            logps = model(**batch.inputs(), token_logps=True, **collator.head_options(config)).cpu()
        if batch.cu_seqlens is not None:
            rows += [row.tolist() for row in logps[0].split(batch.num_inputs)]
        else:
            rows += [row[:n].tolist() for row, n in zip(logps, batch.num_inputs)]
    model.train(was_training)
    return rows
