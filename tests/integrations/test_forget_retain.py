import json

import pytest
import torch
from conftest import make_model, make_tokenizer
from steps import FORGET, RETAIN, row_logps
from torch.utils.data import DataLoader

import simnpo
from simnpo import NPO
from simnpo.errors import UserError
from simnpo.integrations.forget_retain import ForgetRetainCollator, ForgetRetainDataset, join
from simnpo.integrations.reference import ReferenceLogps


def draws(data: ForgetRetainDataset, epoch: int) -> list[int]:
    data.start_epoch(epoch)
    return [RETAIN.index(data[i]["retain"]) for i in range(len(data))]


def test_every_retain_row_comes_up_once_before_any_comes_up_twice():
    data = ForgetRetainDataset(FORGET, RETAIN)
    stream = [row for epoch in range(8) for row in draws(data, epoch)]
    for turn in range(0, 88, 8):
        assert sorted(stream[turn : turn + 8]) == list(range(8))


def test_draws_depend_on_seed_epoch_and_index_alone():
    data, again = ForgetRetainDataset(FORGET, RETAIN, seed=5), ForgetRetainDataset(FORGET, RETAIN, seed=5)
    later = draws(data, 4)
    assert draws(data, 3) != later
    assert draws(again, 4) == later
    assert draws(ForgetRetainDataset(FORGET, RETAIN, seed=6), 4) != later


def test_workers_that_stay_alive_follow_the_epoch():
    data = ForgetRetainDataset(FORGET, RETAIN)
    loader = DataLoader(data, 4, collate_fn=list, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        expected = draws(data, epoch)
        assert [RETAIN.index(row["retain"]) for batch in loader for row in batch] == expected


def test_rows_of_text_and_files(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"prompt": "Who?", "response": "Ada."}, {"question": "Where?", "answer": "London."}, {"text": "A fact."}]
    file = tmp_path / "forget.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_rows, from_file = (ForgetRetainDataset(source, None, tokenizer) for source in (rows, file))
    assert [from_rows[i] for i in range(3)] == [from_file[i] for i in range(3)]
    assert set(from_rows[0]) == {"forget"}
    forget = from_rows[0]["forget"]
    assert tokenizer.decode([i for i, label in zip(*forget.values()) if label != -100]) == "Ada.<|end|>"
    assert len(ForgetRetainDataset(rows[2:], None, tokenizer, max_length=6)[0]["forget"]["input_ids"]) == 6


def test_join_is_what_one_collator_makes():
    pairs = [{"forget": f, "retain": r} for f, r in zip(FORGET, RETAIN)]
    pad = ForgetRetainCollator()
    sides = {side: pad([pair[side] for pair in pairs]) for side in ("forget", "retain")}
    assert sides["forget"]["input_ids"].shape[1] != sides["retain"]["input_ids"].shape[1]
    joined, expected = join(sides), pad(pairs)
    assert set(joined) == set(expected)
    for name, value in expected.items():
        assert torch.equal(joined[name], value), name
    alone = join({"forget": sides["forget"], "retain": None})
    assert torch.equal(alone["input_ids"], sides["forget"]["input_ids"])
    assert not alone["retain_mask"].any()


# The reference


def test_references_are_found_in_any_order_batch_and_padding(tmp_path):
    model, pad = simnpo.attach(make_model()), ForgetRetainCollator()
    data = ForgetRetainDataset(FORGET, RETAIN)
    measured = ReferenceLogps.measure(model, (pad([data[i]]) for i in range(len(data))))
    assert len(measured.logps) == len(FORGET)  # and none of a retain row
    measured.save(tmp_path / "reference.json")
    batch = pad([data[i] for i in (7, 3, 10)])
    found = ReferenceLogps.load(tmp_path / "reference.json").of(batch)
    expected = [row_logps(model, FORGET[i]).sum().item() for i in (7, 3, 10)]
    assert found == pytest.approx([*expected, 0.0, 0.0, 0.0], rel=1e-5)
    # so the policy is its own reference
    out = model(**batch, objective=NPO(0.2), ref_logps=found)
    assert out.weights[:3].tolist() == pytest.approx([1.0] * 3, abs=1e-4)


def test_measuring_leaves_the_model_as_it_was():
    model = simnpo.attach(make_model(attention_dropout=0.5)).train()
    batch = ForgetRetainCollator()(FORGET)
    first, second = (ReferenceLogps.measure(model, [batch]).logps for _ in range(2))
    assert first == second
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_tokens_with_other_labels_are_another_sequence():
    model, pad = simnpo.attach(make_model()), ForgetRetainCollator()
    other = {"input_ids": FORGET[1]["input_ids"], "labels": [-100] * 5 + FORGET[1]["input_ids"][5:]}
    measured = ReferenceLogps.measure(model, [pad([FORGET[1], other])])
    a, b = measured.of(pad([FORGET[1], other]))
    assert a < b


# What is refused


@pytest.mark.parametrize(
    ("rows", "tokenizer", "message"),
    [
        ([], None, "forget: there are no rows"),
        ([{"prompt": "a", "response": "b"}], None, "forget: rows of text need a tokenizer, got None"),
        ([{"input_ids": [1, 2]}], None, r"forget: rows have input_ids and no labels, got \['input_ids'\]: add labels"),
        (
            [{"prompt": "a", "response": "b"}, {"prompt": "a"}],
            make_tokenizer(),
            r"forget\[1\]: found keys \['prompt'\]",
        ),
    ],
)
def test_rows_that_cannot_be_used(rows, tokenizer, message):
    with pytest.raises((ValueError, UserError), match=message):
        ForgetRetainDataset(rows, None, tokenizer)


def test_a_collator_that_packs():
    def pack(rows):
        return {name: torch.tensor([[i for row in rows for i in row[name]]]) for name in ("input_ids", "labels")}

    with pytest.raises(ValueError, match=r"made 1 rows of 2 sequences.*turn packing and padding_free off"):
        ForgetRetainCollator(pack)([{"forget": FORGET[0], "retain": RETAIN[0]}])


def test_a_collator_that_makes_labels_of_its_own():
    def relabel(rows):
        batch = ForgetRetainCollator()(rows)
        return batch | {"labels": batch["input_ids"].clone()}

    with pytest.raises(ValueError, match=r"made \d+ labels of the 8 in the rows.*DataCollatorForSeq2Seq"):
        ForgetRetainCollator(relabel)([{"forget": FORGET[0], "retain": RETAIN[0]}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(1)}, "the retain batch must hold input_ids and labels.*pixel_values"),
        ({"position_ids": torch.zeros(8, 25).long()}, "position_ids must be in both"),
        ({"labels": None}, "the retain batch must hold input_ids and labels"),
    ],
)
def test_batches_that_cannot_be_joined(change, message):
    sides = {"forget": ForgetRetainCollator()(FORGET), "retain": ForgetRetainCollator()(RETAIN) | change}
    sides["retain"] = {name: value for name, value in sides["retain"].items() if value is not None}
    with pytest.raises(ValueError, match=message):
        join(sides)
