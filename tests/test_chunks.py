"""The plan decides memory and arithmetic: every token in exactly one product, none larger than a chunk."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from simnpo.kernels.chunks import aligned_spans, default_chunk_tokens, even_chunks


@given(st.integers(0, 5000), st.integers(1, 700))
def test_even_chunks_cover_the_rows(N, chunk_tokens):
    chunks = even_chunks(N, chunk_tokens)
    assert [row for start, stop in chunks for row in range(start, stop)] == list(range(N))
    assert all(0 < stop - start <= chunk_tokens for start, stop in chunks)
    assert len(chunks) == -(-N // chunk_tokens)


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=30), st.integers(1, 40))
def test_aligned_spans(sequences, chunk_tokens):
    lengths, is_retain = [n for n, _ in sequences], [retain for _, retain in sequences]
    order, spans = aligned_spans(lengths, is_retain, chunk_tokens)
    assert sorted(order) == [b for b, n in enumerate(lengths) if n]

    row, sequence = 0, 0
    for pieces, (first, last), late in spans:
        assert first == sequence
        members = order[first:last]
        assert sum(lengths[b] for b in members) == sum(stop - start for start, stop in pieces)
        for start, stop in pieces:
            assert start == row
            assert stop - start <= chunk_tokens
            row = stop
        # only a single sequence longer than a chunk is cut, and only a forget sequence's weight comes late
        assert len(pieces) == 1 or (len(members) == 1 and lengths[members[0]] > chunk_tokens)
        assert late == (len(pieces) > 1 and not is_retain[members[0]])
        sequence = last
    assert (row, sequence) == (sum(lengths), len(order))
    late_spans = [late for _, _, late in spans]
    assert late_spans == sorted(late_spans, reverse=True)


def test_sequences_fill_the_chunks():
    order, spans = aligned_spans([60, 40, 50, 50, 30], [False] * 5, 100)
    assert [sum(stop - start for start, stop in span.pieces) for span in spans] == [100, 100, 30]
    assert order == [0, 1, 2, 3, 4]


def test_default_chunk_follows_the_bytes():
    cpu = torch.device("cpu")
    assert default_chunk_tokens(128_256, 2, cpu, head_is_trained=True) == 4096
    assert default_chunk_tokens(128_256, 2, cpu, head_is_trained=False) == 2048
    assert default_chunk_tokens(256_000, 4, cpu, head_is_trained=False) == 512
    assert default_chunk_tokens(10**7, 4, cpu, head_is_trained=False) == 256
    assert default_chunk_tokens(1000, 2, cpu, head_is_trained=True, chunk_bytes=2_000_000) == 896
