"""Which examples a step sees, and the tensors they become.

Sampling is a pure function of (seed, step): there is no state to save, every rank knows what the others see, and the
sequences of a step are the same on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import chain, takewhile
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from simnpo.data import IGNORE_INDEX, Example

# of forget examples, in a batch: left out, after the retain sequences, or in their place
Alternates = Literal["none", "beside", "instead"]

# share of a row's tokens that a shared prefix has to save
WORTH_SHARING = 0.05

FORGET_ORDER, RETAIN_DRAW, TORCH_SEED = range(3)  # separate random streams of one seed


@dataclass(frozen=True)
class Batch:
    """Forget and retain sequences of one forward.

    Attributes:
        input_ids: (B, T) padded on the right, or (1, N) packed.
        position_ids: as input_ids, restarting at 0 with every sequence, and with every piece of a document.
        targets: as input_ids: the labels shifted once, IGNORE_INDEX where not a target.
        retain_mask: (B,) bool, True for a retain sequence.
        attention_mask: (B, T) 1 where not padding; None when packed.
        cu_seqlens: (B+1,) int32 start of every packed sequence and the end of the last; None when padded.
        ref_logps: (B,) float32, the reference policy's, 0 for retain sequences; None unless the objective needs it.
        ids: id of each example.
        num_targets: targets that count in each sequence, on the host.
        num_inputs: tokens of each sequence, on the host.
        ref_token_logps: as targets, the reference policy's, 0 where ignored and for all but forget sequences; None
            unless the objective needs it.
        alternates: (B,) int64, where the alternate of each forget sequence is, -1 for the others; likewise.
        exact_logps: (B,) float32, log-probabilities of the forget sequences and alternates in float32 arithmetic, 0 for
            retain sequences; None unless the run takes them.
        shared_prefix: tokens that every sequence begins with and that stand once, at the beginning of the packed row:
            the sequences but the first leave them out, and their position_ids start after them. No target is predicted
            from them.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    retain_mask: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    ref_logps: Tensor | None
    ids: tuple[str, ...]
    num_targets: tuple[int, ...]
    num_inputs: tuple[int, ...]
    ref_token_logps: Tensor | None = None
    alternates: Tensor | None = None
    shared_prefix: int = 0
    exact_logps: Tensor | None = None

    def inputs(self) -> dict[str, Any]:
        """What an attached model takes of it, beside what the objective needs."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
            "shift_labels": self.targets,
            "cu_seqlens": self.cu_seqlens,
            "shared_prefix": self.shared_prefix or None,
        }

    def for_objective(self) -> dict[str, Tensor | None]:
        """What the objective takes of it."""
        names = ("retain_mask", "ref_logps", "exact_logps", "ref_token_logps", "alternates")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(
    forget: Sequence[Example],
    retain: Sequence[Example] = (),
    *,
    packed: bool,
    pad_token_id: int = 0,
    ref_logps: dict[str, float] | None = None,
    ref_token_logps: dict[str, list[float]] | None = None,
    alternates: Alternates = "none",
    share_prefix: bool = False,
) -> Batch:
    """Puts forget and retain sequences into one batch, packed or padded.

    Args:
        forget, retain: examples; forget comes first in the batch.
        packed: one row of N tokens instead of B rows of T.
        pad_token_id: fills padded rows; never attended to.
        ref_logps: log-probability of each forget example and alternate under the reference policy, nats, by id.
        ref_token_logps: of each of a forget example's targets, 0 where ignored, by id.
        alternates: whether those of the forget examples stand beside them, at the end of the batch, or instead of them.
        share_prefix: what all sequences of a packed row begin with, a system prompt, stands in it once, if that makes
            the row shorter by a twentieth; and what follows the last target of each is left out.

    Raises:
        ValueError: there is no sequence at all, or a document in pieces is to be padded.
    """
    others = [] if alternates == "none" else [_alternate(example) for example in forget]
    if alternates == "instead":
        forget, others = others, []
    examples = [*forget, *retain, *others]
    if not examples:
        raise ValueError("a batch needs at least one sequence, got none")
    columns: dict[str, list[list[Any]]] = {
        "input_ids": [example.input_ids for example in examples],
        "position_ids": [_position_ids(example, packed) for example in examples],
        "targets": [[*example.labels[1:], IGNORE_INDEX] for example in examples],
    }
    lengths, B = [len(example.input_ids) for example in examples], len(examples)
    if ref_token_logps is not None:
        columns["ref_token_logps"] = [ref_token_logps[example.id] for example in forget] + [
            [0.0] * len(example.input_ids) for example in (*retain, *others)
        ]
    prefix = 0
    if packed and share_prefix:
        prefix = _shared_prefix(examples)
        # what follows the last token that predicts a target is seen by nothing that counts
        ends = [_after_the_last_target(row) for row in columns["targets"]]
        for name, rows in columns.items():
            columns[name] = [row[prefix if b else 0 : end] for b, (row, end) in enumerate(zip(rows, ends))]
    if packed:
        tensors = {name: torch.tensor([list(chain.from_iterable(rows))]) for name, rows in columns.items()}
    else:
        columns["attention_mask"] = [[1] * length for length in lengths]
        fill = {"input_ids": pad_token_id, "targets": IGNORE_INDEX}
        tensors = {name: _pad(rows, fill.get(name, 0)) for name, rows in columns.items()}
    return Batch(
        input_ids=tensors["input_ids"],
        position_ids=tensors["position_ids"],
        targets=tensors["targets"],
        retain_mask=torch.tensor([False] * len(forget) + [True] * len(retain) + [False] * len(others)),
        attention_mask=tensors.get("attention_mask"),
        cu_seqlens=torch.tensor([0, *np.cumsum([len(row) for row in columns["targets"]])], dtype=torch.int32)
        if packed
        else None,
        ref_logps=None
        if ref_logps is None
        else torch.tensor(
            [*(ref_logps[e.id] for e in forget), *[0.0] * len(retain), *(ref_logps[e.id] for e in others)]
        ),
        ref_token_logps=tensors.get("ref_token_logps"),
        alternates=torch.tensor([*range(B - len(others), B), *[-1] * (B - len(others))]) if others else None,
        ids=tuple(example.id for example in examples),
        num_targets=tuple(example.num_targets for example in examples),
        num_inputs=tuple(lengths),
        shared_prefix=prefix,
    )


def _after_the_last_target(targets: list[int]) -> int:
    """How many tokens a sequence needs; all, if it has no target."""
    return max((t + 1 for t, target in enumerate(targets) if target != IGNORE_INDEX), default=len(targets))


def _shared_prefix(examples: Sequence[Example]) -> int:
    """Tokens that all examples begin with, none of them the last before a target; 0 where it is not worth it."""
    if any(len(example.piece_lengths) > 1 for example in examples):
        return 0
    before_targets = [
        next((t for t, label in enumerate(example.labels) if label != IGNORE_INDEX), len(example.labels)) - 1
        for example in examples
    ]
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*(example.input_ids for example in examples)))
    prefix = min(sum(1 for _ in alike), *before_targets)
    saved, tokens = prefix * (len(examples) - 1), sum(len(example.input_ids) for example in examples)
    return prefix if saved >= WORTH_SHARING * tokens else 0


def _position_ids(example: Example, packed: bool) -> list[int]:
    lengths = example.piece_lengths or (len(example.input_ids),)
    if len(lengths) > 1 and not packed:
        raise ValueError(f"{example.id} is {len(lengths)} pieces, which only a packed batch keeps apart")
    return [position for length in lengths for position in range(length)]


def _alternate(example: Example) -> Example:
    if example.alternate is None:
        raise ValueError(f"{example.id} has no alternate: load the examples with one")
    return example.alternate


def _pad(rows: list[list[Any]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])  # (B, T)


@dataclass(frozen=True)
class Sampler:
    """Draws the examples of a step and deals them out to the ranks.

    Forget examples go through shuffled epochs, one after another without a break. Retain examples are drawn at random,
    anew in every step, whatever the forget examples are.
    """

    forget: Sequence[Example]
    retain: Sequence[Example]
    batch_size: int
    retain_batch_size: int
    seed: int
    world_size: int = 1

    def step(self, step: int, rank: int) -> tuple[list[Example], list[Example]]:
        """Forget and retain examples that `rank` sees in step `step`, counted from 0."""
        num_forget = len(self.forget)
        positions = range(step * self.batch_size + rank, (step + 1) * self.batch_size, self.world_size)
        forget = [self.forget[_order(self.seed, p // num_forget, num_forget)[p % num_forget]] for p in positions]
        # from the other end: the rank with a forget example more gets no retain example more
        return forget, self._retain(step)[self.world_size - 1 - rank :: self.world_size]

    def totals(self, step: int) -> tuple[int, int]:
        """Forget sequences and retain targets of a step, over all ranks: what its two means divide by."""
        return self.batch_size, sum(example.num_targets for example in self._retain(step))

    def _retain(self, step: int) -> list[Example]:
        """The retain examples of a step, over all ranks."""
        count = self.retain_batch_size
        if not count:
            return []
        rng = random_stream(self.seed, RETAIN_DRAW, step)
        return [self.retain[i] for i in rng.choice(len(self.retain), size=count, replace=count > len(self.retain))]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return random_stream(seed, FORGET_ORDER, epoch).permutation(size)


def random_stream(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def seed_torch(seed: int, step: int, rank: int) -> None:
    """Seeds torch for one step, so that dropout does not depend on what ran before."""
    torch.manual_seed(int(random_stream(seed, TORCH_SEED, step, rank).integers(2**63)))


def micro_batches(examples: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Deals examples out to `count` micro-batches."""
    return [examples[i::count] for i in range(count)]


def forward_passes(
    forget: Sequence[Any], retain: Sequence[Any], count: int, *, separate: bool
) -> list[tuple[Sequence[Any], Sequence[Any]]]:
    """What goes through the model together in a step, none of it empty.

    Args:
        forget, retain: the step's, of one rank.
        count: micro-batches.
        separate: forget and retain examples of a micro-batch one after the other.

    Returns:
        (forget, retain) of each forward.
    """
    passes = list(zip(micro_batches(forget, count), micro_batches(retain, count), strict=True))
    if separate:
        passes = [one for some, others in passes for one in ((some, others[:0]), (some[:0], others))]
    return [(some, others) for some, others in passes if len(some) or len(others)]
