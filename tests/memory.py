"""Bytes of the tensors alive at once, counted as they are made: exact on any device, no GPU needed."""

from collections.abc import Callable

from simnpo.planning.ledger import LiveBytes


def peak_bytes(fn: Callable[[], object]) -> int:
    """The most bytes of tensors made by `fn` that are alive at once."""
    with LiveBytes() as counter:
        kept = fn()
    del kept
    return counter.peak
