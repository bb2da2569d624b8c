"""Which rows are multiplied together: chunks of a bounded number of tokens, cut where the schedule allows it.

A frozen head scales its rows afterwards, so its chunks may end anywhere (`even_chunks`). A trained head must know the
weight of a sequence before the sequence's rows reach dW, so its chunks end where sequences end (`aligned_spans`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

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


def default_chunk_tokens(
    V: int, itemsize: int, device: torch.device, *, head_is_trained: bool, chunk_bytes: int | None = None
) -> int:
    """Tokens of a chunk: what `chunk_bytes` holds at V * itemsize bytes a token, a multiple of 128 in [256, 4096].

    The rules, for matrix units of F flop/s and memory of B bytes/s (ratios F / B: 266 on an H100, 76 on an RTX 3090):
    the two products that read the head want F / B rows, so that its bytes hide behind their arithmetic; the float32
    read-modify-write of dW moves four times as much and wants 4 F / B. More rows only cost memory. So the default is
    512 MiB of logits for a frozen head and 1 GiB for a trained one, and never more than a quarter of the free memory.
    """
    if chunk_bytes is None:
        chunk_bytes = TRAINED_CHUNK_BYTES if head_is_trained else FROZEN_CHUNK_BYTES
        if device.type == "cuda":
            chunk_bytes = min(chunk_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    tokens = chunk_bytes // (V * itemsize) // 128 * 128
    return min(max(tokens, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)


def loss_memory_bytes(
    N: int, D: int, V: int, chunk_tokens: int, itemsize: int, *, head_is_trained: bool, late_sequences: int = 0
) -> int:
    """The most bytes that `linear_unlearn_loss` and its backward hold at once beside their arguments.

    With exact gradients; a few numbers for each token and sequence, and cache-sized blocks, are left out.

    Args:
        N: tokens that count.   D: hidden size.   V: vocabulary.   itemsize: bytes of an operand's element.
        late_sequences: forget sequences longer than a chunk.
    """
    n = min(N, chunk_tokens)
    logits, dx, head = n * V * itemsize, N * D * itemsize, V * D * itemsize
    # a chunk's hidden states and their row scale
    rows = 2 * n * D * itemsize
    if not head_is_trained:
        return dx + max(logits + rows, dx)
    # one product writes dW once, in its own dtype; several add up in float32, a late sequence's beside the others'
    sums = head if chunk_tokens >= N else max(4, itemsize) * V * D
    late = sums if late_sequences > 1 else 0
    forward = max(logits + rows + sums + late, sums + head)
    # the backward scales dx and dW by the upstream gradient into new tensors: a second backward finds them unchanged
    return dx + max(forward, dx + 2 * head)


def even_chunks(N: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """N rows in as few chunks as `chunk_tokens` allows, all about the same size, so that no chunk is a ragged tail."""
    if N == 0:
        return []
    size = -(-N // -(-N // chunk_tokens))
    size = min(chunk_tokens, -(-size // 128) * 128)
    return [(start, min(start + size, N)) for start in range(0, N, size)]


def aligned_spans(
    lengths: list[int], is_retain: list[bool], chunk_tokens: int, own_lengths: list[int] | None = None
) -> tuple[list[int], list[Span]]:
    """Pack whole sequences into chunks, longest first into the first chunk with room.

    Args:
        lengths: (B,) tokens that count in each sequence; empty sequences are left out of the plan.
        is_retain: (B,) whose weight is known beforehand.
        own_lengths: (B,) at most `lengths`: the tokens that are here of sequences spread over ranks, which plan the
            same spans from the same lengths. None: all of them are here.

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

    own_lengths = lengths if own_lengths is None else own_lengths
    order: list[int] = []
    spans: list[Span] = []
    row = 0
    # a late weight comes first: the first such sequence may use dW itself while it is still empty
    for group in [*([b] for b in long_forget), *bins, *([b] for b in long_retain)]:
        tokens = sum(own_lengths[b] for b in group)
        pieces = [(row + start, row + stop) for start, stop in even_chunks(tokens, chunk_tokens)]
        late = lengths[group[0]] > chunk_tokens and not is_retain[group[0]]
        spans.append(Span(pieces, (len(order), len(order) + len(group)), late))
        order += group
        row += tokens
    return order, spans
