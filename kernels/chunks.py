"""Which rows are multiplied together: chunks of a bounded number of tokens, cut where the schedule allows it.

A frozen head scales its rows afterwards, so its chunks may end anywhere (`even_chunks`). A trained head must know the
weight of a sequence before the sequence's rows reach dW, so its chunks end where sequences end (`aligned_spans`).
"""

from __future__ import annotations

from typing import NamedTuple

MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 256, 4096

# bytes of logits alive at once by default: what keeps the two GEMMs that read the head at their rate (frozen), and the
# float32 read-modify-write of dW hidden behind the third (trained)
FROZEN_CHUNK_BYTES, TRAINED_CHUNK_BYTES = 512 << 20, 1 << 30


class Span(NamedTuple):
    """Sequences whose weights become known together.

    pieces: (start, stop) rows of each matrix product; one, unless a sequence is longer than a chunk.
    sequences: (first, last) of the sequences, in the order of the plan, that end with the last piece.
    weight_known_late: the pieces reach dW before the weight is known: a forget sequence longer than a chunk.
    """

    pieces: list[tuple[int, int]]
    sequences: tuple[int, int]
    weight_known_late: bool


def default_chunk_tokens(V: int, itemsize: int, *, head_is_trained: bool) -> int:
    """Tokens whose logits (`itemsize` bytes each) fit the default budget, a multiple of 128 in [256, 4096]."""
    chunk_bytes = TRAINED_CHUNK_BYTES if head_is_trained else FROZEN_CHUNK_BYTES
    tokens = chunk_bytes // (V * itemsize) // 128 * 128
    return min(max(tokens, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)


def even_chunks(N: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """N rows in as few chunks as `chunk_tokens` allows, all about the same size, so that no chunk is a ragged tail."""
    if N == 0:
        return []
    size = -(-N // -(-N // chunk_tokens))
    size = min(chunk_tokens, -(-size // 128) * 128)
    return [(start, min(start + size, N)) for start in range(0, N, size)]


def aligned_spans(lengths: list[int], is_retain: list[bool], chunk_tokens: int) -> tuple[list[int], list[Span]]:
    """Pack whole sequences into chunks, longest first into the first chunk with room.

    Args:
        lengths: (B,) tokens that count in each sequence; empty sequences are left out of the plan.
        is_retain: (B,) whose weight is known beforehand.

    Returns:
        order: the sequences of the plan, as they follow each other in its rows.
        spans: the products to run, in this order.
    """
    by_length = sorted((b for b in range(len(lengths)) if lengths[b]), key=lambda b: -lengths[b])
    long_forget = [b for b in by_length if lengths[b] > chunk_tokens and not is_retain[b]]
    long_retain = [b for b in by_length if lengths[b] > chunk_tokens and is_retain[b]]
    bins: list[list[int]] = []
    room: list[int] = []
    for b in by_length[len(long_forget) + len(long_retain) :]:
        k = next((k for k, free in enumerate(room) if free >= lengths[b]), len(bins))
        if k == len(bins):
            bins.append([])
            room.append(chunk_tokens)
        bins[k].append(b)
        room[k] -= lengths[b]

    order: list[int] = []
    spans: list[Span] = []
    row = 0
    # a late weight comes first: the first such sequence may use dW itself while it is still empty
    for group in [*([b] for b in long_forget), *bins, *([b] for b in long_retain)]:
        tokens = sum(lengths[b] for b in group)
        pieces = [(row + start, row + stop) for start, stop in even_chunks(tokens, chunk_tokens)]
        late = len(pieces) > 1 and not is_retain[group[0]]
        spans.append(Span(pieces, (len(order), len(order) + len(group)), late))
        order += group
        row += tokens
    return order, spans
