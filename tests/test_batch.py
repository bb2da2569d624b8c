from dataclasses import replace

import pytest
import torch
from conftest import make_tokenizer

from simnpo.batch import Sampler, collate, micro_batches
from simnpo.data import IGNORE_INDEX, Example, encode

TOKENIZER = make_tokenizer()


def examples(name: str, count: int) -> list[Example]:
    rows = [{"prompt": "?" * (i + 1), "response": f"{name}{i}" * (i + 1)} for i in range(count)]
    return [encode(row, TOKENIZER, f"{name}:{i}", 200) for i, row in enumerate(rows)]


FORGET, RETAIN = examples("f", 10), examples("r", 30)


def test_padded_and_packed_hold_the_same_sequences():
    forget, retain = FORGET[:2], RETAIN[4:7]
    padded, packed = collate(forget, retain, packed=False, pad_token_id=7), collate(forget, retain, packed=True)
    assert padded.ids == packed.ids == ("f:0", "f:1", "r:4", "r:5", "r:6")
    assert packed.attention_mask is None
    assert padded.cu_seqlens is None
    for i, example in enumerate(forget + retain):
        row, start, end = padded.attention_mask[i].bool(), packed.cu_seqlens[i], packed.cu_seqlens[i + 1]
        shifted = [*example.labels[1:], IGNORE_INDEX]
        for name, expected in (
            ("input_ids", example.input_ids),
            ("targets", shifted),
            ("position_ids", list(range(len(shifted)))),
        ):
            assert getattr(padded, name)[i][row].tolist() == expected
            assert getattr(packed, name)[0, start:end].tolist() == expected
        assert padded.num_targets[i] == (padded.targets[i] != IGNORE_INDEX).sum()
        assert padded.input_ids[i][~row].tolist() == [7] * int((~row).sum())
        assert (padded.targets[i][~row] == IGNORE_INDEX).all()
    assert padded.retain_mask.tolist() == packed.retain_mask.tolist() == [False] * 2 + [True] * 3


def test_reference_log_probabilities_follow_their_example():
    reference = {example.id: -float(i) for i, example in enumerate(FORGET)}
    batch = collate([FORGET[3], FORGET[1]], RETAIN[:1], packed=True, ref_logps=reference)
    assert batch.ref_logps.tolist() == [-3.0, -1.0, 0.0]


def test_alternates_stand_at_the_end_or_instead():
    forget = [replace(example, alternate=other) for example, other in zip(FORGET, examples("a", 2))]
    reference = {example.id: -float(i) for i, example in enumerate([*FORGET, *examples("a", 2)])}
    beside = collate(forget, RETAIN[:1], packed=True, ref_logps=reference, alternates="beside")
    assert beside.ids == ("f:0", "f:1", "r:0", "a:0", "a:1")
    assert beside.alternates.tolist() == [3, 4, -1, -1, -1]
    assert beside.ref_logps.tolist() == [0.0, -1.0, 0.0, -10.0, -11.0]
    assert beside.retain_mask.tolist() == [False, False, True, False, False]
    instead = collate(forget, RETAIN[:1], packed=True, alternates="instead")
    assert (instead.ids, instead.alternates) == (("a:0", "a:1", "r:0"), None)
    with pytest.raises(ValueError, match="f:0 has no alternate"):
        collate(FORGET[:1], packed=True, alternates="beside")


def test_reference_of_tokens_lies_on_their_targets():
    reference = {example.id: [-1.0 - i] * len(example.input_ids) for i, example in enumerate(FORGET)}
    for packed in (True, False):
        batch = collate(FORGET[1:3], RETAIN[:1], packed=packed, ref_token_logps=reference)
        assert batch.ref_token_logps.shape == batch.targets.shape
        assert batch.ref_token_logps[batch.targets != IGNORE_INDEX].unique().tolist() == [-3.0, -2.0, 0.0]


def test_a_batch_of_zero_sequences():
    with pytest.raises(ValueError, match="a batch needs at least one sequence, got none"):
        collate([], [], packed=True)


def sampler(world_size: int = 1, **changes: object) -> Sampler:
    options = {"batch_size": 4, "retain_batch_size": 6, "seed": 3} | changes
    return Sampler(FORGET, RETAIN, world_size=world_size, **options)


def ids(drawn: list[Example]) -> list[str]:
    return [example.id for example in drawn]


def test_an_epoch_sees_every_forget_example_once_in_a_new_order():
    order = [i for step in range(5) for i in ids(sampler().step(step, 0)[0])]  # 5 steps of 4 are 2 epochs of 10
    first, second = order[:10], order[10:]
    assert sorted(first) == sorted(second) == sorted(ids(FORGET))
    assert first != second


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_step_sees_the_same_sequences_on_any_number_of_ranks(world_size):
    for step in range(3):
        alone, ranks = sampler().step(step, 0), [sampler(world_size).step(step, rank) for rank in range(world_size)]
        for kind in (0, 1):
            shares = [ids(rank[kind]) for rank in ranks]
            assert sorted(i for share in shares for i in share) == sorted(ids(alone[kind]))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert sampler(world_size).totals(step) == (4, sum(example.num_targets for example in alone[1]))


def test_retain_draws_are_not_tied_to_the_forget_examples():
    partners = {}
    for step in range(100):
        forget, retain = sampler().step(step, 0)
        for example in forget:
            partners.setdefault(example.id, set()).update(ids(retain))
    assert all(seen == set(ids(RETAIN)) for seen in partners.values())


def test_a_step_depends_on_seed_and_step_alone():
    later = sampler()
    later.step(7, 0)
    assert ids(later.step(2, 0)[1]) == ids(sampler().step(2, 0)[1])
    assert ids(sampler(seed=4).step(2, 0)[1]) != ids(sampler().step(2, 0)[1])
    assert len(sampler(retain_batch_size=40).step(0, 0)[1]) == 40
    assert sampler(retain_batch_size=0).step(0, 0)[1] == []


def test_micro_batches_lose_nothing():
    assert [list(part) for part in micro_batches(range(7), 3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_to_moves_tensors_and_leaves_the_rest():
    batch = collate(FORGET[:2], [], packed=True).to(torch.device("meta"))
    assert batch.input_ids.device.type == batch.cu_seqlens.device.type == "meta"
    assert batch.attention_mask is None
