"""Documents in pieces: each target once, and a reward of the document or of the piece."""

import json
import logging

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, make_tokenizer, write_rows
from hypothesis import given
from hypothesis import strategies as st
from test_training import CPU, config, rows  # noqa: F401, the fixture

from simnpo.attached_model import attach
from simnpo.batch import Sampler, collate
from simnpo.data import IGNORE_INDEX, Example, encode, load_examples
from simnpo.errors import UserError
from simnpo.evaluation.examples import evaluate
from simnpo.pieces import piece_bounds, pieces, separate, split
from simnpo.training import setup
from simnpo.training.forward import Collator
from simnpo.training.loop import unlearn
from simnpo.training.step import accumulate

TOKENIZER = make_tokenizer()


def document(num_tokens: int, first_target: int = 0, name: str = "d:1") -> Example:
    """A token's id is its place, so that a piece shows where it was cut."""
    ids = list(range(num_tokens))
    labels = [IGNORE_INDEX] * first_target + ids[first_target:]
    return Example(name, "", "x", ids, labels)


lengths = st.integers(2, 40).flatmap(lambda max_length: st.tuples(st.just(max_length), st.integers(1, max_length - 1)))


@given(lengths, st.integers(2, 200), st.data())
def test_every_target_is_a_target_once_in_the_first_piece_that_can_predict_it(lengths, num_tokens, data):
    max_length, stride = lengths
    whole = document(num_tokens, data.draw(st.integers(0, num_tokens - 1)))
    cut = split(whole, max_length, stride)
    parts = pieces(cut)
    targets = [label for piece in parts for label in piece.labels[1:] if label != IGNORE_INDEX]
    assert targets == [label for label in whole.labels[1:] if label != IGNORE_INDEX]  # in order, each once
    assert cut.num_targets == sum(piece.num_targets for piece in parts) == whole.num_targets
    for piece in parts:
        start, length = piece.input_ids[0], len(piece.input_ids)
        assert piece.input_ids == list(range(start, start + length))
        assert length <= max_length
        assert start % stride == 0
        assert piece.num_targets or not cut.piece_lengths
        for t, label in enumerate(piece.labels[1:], start=1):
            # an earlier piece would hold the token behind another one
            if label != IGNORE_INDEX and start:
                assert t > max_length - stride - 1
    assert cut.piece_lengths == (tuple(len(p.input_ids) for p in parts) if num_tokens > max_length else ())


def test_bounds_by_hand():
    assert piece_bounds(10, 4, 3) == [(0, 0, 4), (3, 4, 7), (6, 7, 10)]
    assert piece_bounds(9, 6, 2) == [(0, 0, 6), (2, 6, 8), (4, 8, 9)]
    assert piece_bounds(4, 4, 1) == [(0, 0, 4)]
    for stride in (0, 4):
        with pytest.raises(ValueError, match=f"stride must be between 1 and max_length - 1 = 3, got {stride}"):
            piece_bounds(10, 4, stride)


def test_a_long_prompt_is_cut_like_the_rest_and_pieces_without_targets_are_left_out():
    cut = split(document(12, first_target=9), 4, 3)
    assert cut.piece_lengths == (4, 3)
    assert cut.input_ids == [6, 7, 8, 9, 9, 10, 11]
    assert cut.labels == [IGNORE_INDEX] * 3 + [9, IGNORE_INDEX, 10, 11]
    assert cut.prompt_ids == []
    assert [piece.id for piece in pieces(cut)] == ["d:1#1", "d:1#2"]


def test_pieces_read_as_what_they_hold():
    whole = encode({"prompt": "Who?", "response": "abcdefghij"}, make_tokenizer(chat=False), "d:1", None)
    first, *_, last = separate([split(whole, 8, 6)], TOKENIZER)
    assert (first.id, first.prompt, first.response) == ("d:1#1", "Who?", " abc")
    assert (last.id, last.prompt, last.response) == ("d:1#3", "hi", "j")
    short = encode({"prompt": "Who?", "response": "I"}, TOKENIZER, "d:2", None)
    assert separate([split(short, 100, 50)], TOKENIZER) == [short]


def test_positions_restart_and_the_loss_sees_one_sequence():
    long, short = split(document(10), 4, 3), document(3, name="d:2")
    batch = collate([long, short], packed=True)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3] * 3 + [0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 12, 15]
    # the last token of a piece predicts nothing
    assert batch.targets[0, [3, 7, 11]].tolist() == [IGNORE_INDEX] * 3
    assert batch.num_targets == (9, 2)
    with pytest.raises(ValueError, match="d:1 is 3 pieces, which only a packed batch keeps apart"):
        collate([long, short], packed=False)


# Against the model's own logits


def sums_by_hand(model, example: Example) -> list[torch.Tensor]:
    """Log-probability of each piece's targets, every piece alone in the model."""
    sums = []
    for piece in pieces(example):
        logps = model(torch.tensor([piece.input_ids])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(piece.labels[1:])
        sums.append(logps[labels != IGNORE_INDEX].gather(1, labels[labels != IGNORE_INDEX, None]).sum())
    return sums


def documents() -> list[Example]:
    return [split(document(n, name=f"d:{n}"), 24, 16) for n in (70, 20, 41)]


@pytest.mark.parametrize("reward_per", ["document", "piece"])
def test_step_is_the_formula_on_pieces(config, reward_per):  # noqa: F811
    """s and n are sums over the pieces of a document, or each piece's own."""
    forget = documents() if reward_per == "document" else separate(documents(), TOKENIZER)
    retain = separate([split(document(60, name="r:1"), 24, 16)], TOKENIZER)
    settings = config(batch_size=len(forget), retain_batch_size=len(retain), beta=0.1, gamma=0.4, retain_coef=1.7)
    sampler = Sampler(forget, retain, len(forget), len(retain), seed=0)
    trained, model = attach(make_model()), make_model()
    totals = accumulate(Accelerator(cpu=True), trained, Collator(True, 256, CPU, None), sampler, settings, 0)

    losses = []
    for example in forget:
        x = -0.1 / example.num_targets * torch.stack(sums_by_hand(model, example)).sum() - 0.4
        losses.append(-2 / 0.1 * torch.nn.functional.logsigmoid(x))
    kept = torch.stack([s for example in retain for s in sums_by_hand(model, example)]).sum() / 59
    loss = torch.stack(losses).mean() - 1.7 * kept
    loss.backward()
    assert len(losses) == (3 if reward_per == "document" else 8)
    assert totals.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_weights_of_a_document_and_of_its_pieces(config):  # noqa: F811
    """The document's tokens weigh (2/n) sigmoid((beta/n) s + gamma) each; a piece's by its own n and s."""
    settings = config(beta=0.1)
    model, [long] = attach(make_model()), documents()[:1]

    def weights(examples):
        batch = collate(examples, packed=True)
        return model(**batch.inputs(), objective=settings.objective()).weights.tolist()

    with torch.no_grad():
        sums = torch.stack(sums_by_hand(make_model(), long))
    n = torch.tensor([float(piece.num_targets) for piece in pieces(long)])
    assert n.sum() == 69
    shared = 2 / 69 * torch.sigmoid(0.1 / 69 * sums.sum())
    assert weights([long]) == pytest.approx([shared.item()], rel=1e-4)
    assert weights(pieces(long)) == pytest.approx((2 / n * torch.sigmoid(0.1 / n * sums)).tolist(), rel=1e-4)


def test_evaluation_scores_a_document_over_all_its_pieces():
    model, examples = make_model(), [*documents(), encode({"prompt": "A?", "response": "B."}, TOKENIZER, "d:0", 100)]
    for batch_size in (32, 2):
        scored = evaluate(model, TOKENIZER, {"all": examples}, batch_size=batch_size)["all"].examples
        with torch.no_grad():
            expected = [-sum(sums_by_hand(model, e)).item() / e.num_targets for e in examples]
        assert [one.nll for one in scored] == pytest.approx(expected, rel=1e-5)
        assert [one.answer is None for one in scored] == [True, True, True, False]


# Whole runs


@pytest.fixture
def long_files(tmp_path):
    """Forget and retain rows, the long ones of more than 64 tokens."""
    words = [{"text": f"{i}: " + "the quick brown fox " * n} for i, n in enumerate((8, 1, 5))]
    pair = [{"prompt": "Tell me of the sea.", "response": "It is wide. " * 12}, {"prompt": "Sky?", "response": "Blue."}]
    return {
        "forget": str(write_rows(tmp_path / "long.jsonl", [*words, *pair])),
        "retain": str(write_rows(tmp_path / "kept.jsonl", [{"text": "a lazy dog sleeps " * 9}, {"text": "so it is"}])),
    }


@pytest.mark.parametrize("reward_per", ["document", "piece"])
def test_a_run_on_long_documents(config, long_files, caplog, reward_per):  # noqa: F811
    with caplog.at_level(logging.WARNING):
        output = unlearn(
            config(**long_files, max_length=64, stride=48, reward_per=reward_per, max_steps=2, eval_examples=4)
        )
    assert "max_length" not in caplog.text
    probes = rows(output / "weights.jsonl")[0]
    counted = dict(zip(probes["ids"], probes["num_tokens"]))
    whole = load_examples(long_files["forget"], TOKENIZER, None)
    if reward_per == "document":
        assert counted == {example.id: example.num_targets for example in whole}
    else:
        assert {"long.jsonl:1#1", "long.jsonl:1#2", "long.jsonl:1#3", "long.jsonl:2"} <= counted.keys()
        assert max(counted.values()) <= 64
        assert sum(counted.values()) == sum(example.num_targets for example in whole)
    scores = json.loads((output / "evaluation.json").read_text())["before"]
    assert [one["id"] for one in scores["retain"]["examples"]][:2] == ["kept.jsonl:1#1", "kept.jsonl:1#2"]
    assert (output / "report.html").exists()


@pytest.mark.parametrize("method", ["npo", "tnpo", "dpo", "jensun"])
def test_methods_with_references_and_alternates_take_documents(config, long_files, method):  # noqa: F811
    forget = write_rows(
        config().output_dir().parent / "pairs.jsonl", [{"prompt": "Sea? " * 15, "response": "It is wide. " * 9}] * 4
    )
    output = unlearn(config(forget=str(forget), max_length=64, stride=48, method=method, max_steps=1))
    assert rows(output / "metrics.jsonl")[0]["grad_norm"] > 0


def test_documents_that_share_a_reward_need_packing(config, long_files, monkeypatch):  # noqa: F811
    options = {**long_files, "max_length": 64, "stride": 48}
    expected = r"reward_per: long\.jsonl:1 is a document of 4 pieces that share one reward, .* --reward_per piece"
    with pytest.raises(UserError, match=expected):
        unlearn(config(**options, packing="off"))
    monkeypatch.setattr("simnpo.training.setup.keeps_sequences_apart", lambda model: False)
    with pytest.raises(UserError, match=expected):
        unlearn(config(**options))
    assert not config().output_dir().exists()
    unlearn(config(**options, reward_per="piece", max_steps=1))


def test_what_does_not_go_together_is_refused(config):  # noqa: F811
    with pytest.raises(UserError, match="stride must be less than max_length, got 64"):
        config(max_length=64, stride=64)
    with pytest.raises(UserError, match="reward_per piece does not go with method 'dpo'"):
        config(max_length=64, stride=48, reward_per="piece", method="dpo")


def test_overlap_is_found_on_whole_documents(config, tmp_path, caplog):  # noqa: F811
    same = write_rows(tmp_path / "same.jsonl", [{"text": "word " * 60}])
    settings = config(forget=str(same), retain=str(same), max_length=64, stride=48)
    with caplog.at_level(logging.WARNING):
        setup.read_data(settings, TOKENIZER)
    assert "overlap in 1 rows" in caplog.text


def test_fingerprint_and_resume_see_the_split(config, long_files, monkeypatch):  # noqa: F811
    prints = set()
    for options in ({}, {"stride": 48}, {"stride": 32}, {"stride": 48, "reward_per": "piece"}):
        settings = config(**long_files, max_length=64, **options)
        forget, retain, _ = setup.read_data(settings, TOKENIZER)
        prints.add(setup.fingerprint(forget, retain))
    assert len(prints) == 4
    with monkeypatch.context() as patched:
        patched.setattr("simnpo.training.loop.train", lambda *args: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            unlearn(config(**long_files, max_length=64, stride=48))
    with pytest.raises(UserError, match=r"stride \(was 48, now 32\)"):
        unlearn(config(**long_files, max_length=64, stride=32, resume=True))
