"""What a piece of work allocates and multiplies, counted operation by operation: exact on any device, no GPU needed.

It works on fake tensors as on real ones: what counts is when a storage is made and when the last tensor on it is gone.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """Counts storages from the operation that makes them until the last tensor on them is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self._seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                self.adopt(x)
        self.peak = max(self.peak, self.live)
        return out

    def adopt(self, x: Tensor) -> None:
        """Counts the storage of a tensor that was made elsewhere; does nothing if it is counted already."""
        storage = x.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


@dataclass
class Work:
    """What was computed.

    gemm_flops: of matrix products.   attention_flops: of fused attention.   moved_bytes: read and written by all other
    operations.
    """

    gemm_flops: float = 0.0
    attention_flops: float = 0.0
    moved_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.numbers(), other.numbers())))

    def times(self, factor: float) -> Work:
        return Work(*(factor * a for a in self.numbers()))

    def numbers(self) -> tuple[float, float, float]:
        return self.gemm_flops, self.attention_flops, self.moved_bytes


@dataclass
class Segment:
    """A stretch of a step: the most bytes alive at once, by part, at the moment when their sum was largest."""

    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Ledger(TorchDispatchMode):
    """`LiveBytes` that also says of what, when, and after how much work.

    Attributes:
        part: what storages made from now on are for; part_of, if given, tells it of each tensor.
        kept_by_layers: bytes that the layers keep for their backward, set by who runs them.
        segments: name -> the peak of what ran under that name; see `enter`.
        work: name -> what was computed; see `enter`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"
        self.part_of: Callable[[Tensor], str] | None = None
        self.kept_by_layers = 0
        self.segments: dict[str, Segment] = {}
        self.work: dict[str, Work] = {}
        self.total = 0
        self._bytes: Counter[str] = Counter()
        self._owners: dict[int, list[Any]] = {}  # address of a storage -> [part, bytes]
        self._parameters: set[int] = set()
        self._segment = self._kind = ""
        self.enter("start", "forward")

    def enter(self, segment: str, kind: str) -> None:
        """From now on peaks belong to `segment`, work to `kind`."""
        self._segment, self._kind = segment, kind
        self.segments.setdefault(segment, Segment())
        self.work.setdefault(kind, Work())
        self._note_peak()

    def count_attention(self, flops: float) -> None:
        """Adds what a kernel computed that is not there."""
        self._current_work().attention_flops += flops

    def bytes_of(self, part: str) -> int:
        """Of a part, alive now."""
        return self._bytes[part]

    @property
    def is_forward(self) -> bool:
        """Whether the first forward is running."""
        return self._kind == "forward"

    @property
    def recomputes(self) -> bool:
        """Whether autograd's backward is running a forward again: it runs its own operations without a gradient."""
        return self._kind.startswith("backward") and torch.is_grad_enabled()

    def adopt(self, tensors: Iterable[Tensor], part: str, *, are_parameters: bool = False) -> None:
        """Counts storages that were made elsewhere, or moves those it knows to another part."""
        for x in tensors:
            storage = x.untyped_storage()
            owner = self._owners.get(storage._cdata)
            if owner is None:
                self._own(storage, part)
            else:
                self._bytes[owner[0]] -= owner[1]
                self._bytes[part] += owner[1]
                owner[0] = part
            if are_parameters:
                self._parameters.add(storage._cdata)
        self._note_peak()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # fake tensors asking each other for their device
            return func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in inputs}
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        made = [x for x in outputs if x.untyped_storage()._cdata not in known]
        for x in made:
            storage = x.untyped_storage()
            if storage._cdata not in self._owners:
                self._own(storage, self._choose_part(func, inputs, x))
        if made:
            self._note_peak()
        if made or func._schema.is_mutable:
            self._count_work(func, args, kwargs, out, inputs, outputs)
        return out

    def _choose_part(self, func: Any, inputs: list[Tensor], made: Tensor) -> str:
        if func is torch.ops.aten._to_copy.default and inputs[0].untyped_storage()._cdata in self._parameters:
            return "weight copies"
        if self.part_of is not None:
            return self.part_of(made)
        return "recomputed layer" if self.recomputes and self.part == "backward" else self.part

    def _count_work(
        self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        work = self._current_work()
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            work.attention_flops += attention_flops(name, func, args, kwargs)
        elif func.overloadpacket in flop_registry:
            work.gemm_flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        elif not name.startswith(("empty", "new_empty")):
            work.moved_bytes += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))

    def _current_work(self) -> Work:
        return self.work.setdefault("recompute", Work()) if self.recomputes else self.work[self._kind]

    def _own(self, storage: Any, part: str) -> None:
        owner = [part, storage.nbytes()]
        self._owners[storage._cdata] = owner
        self._bytes[part] += owner[1]
        self.total += owner[1]
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, address: int) -> None:
        part, nbytes = self._owners.pop(address)
        self._parameters.discard(address)
        self._bytes[part] -= nbytes
        self.total -= nbytes

    def _note_peak(self) -> None:
        segment = self.segments[self._segment]
        if self.total > segment.peak:
            segment.peak, segment.parts = self.total, {part: n for part, n in self._bytes.items() if n}


def attention_flops(name: str, func: Any, args: Any, kwargs: Any) -> float:
    """Of two products forward and five backward, half of each where a token sees only those before it."""
    backward = "backward" in name
    tensors = [x for x in args if isinstance(x, Tensor)]
    query, key = tensors[1:3] if backward else tensors[:2]
    bound = {a.name: value for a, value in zip(func._schema.arguments, args)} | kwargs
    B, H, T, d = query.shape
    products = 5 if backward else 2
    return products * 2.0 * B * H * T * key.shape[2] * d * (0.5 if bound.get("is_causal") else 1.0)
