"""Attacks on tiny random models: what they do to the weights, and that their rows are about what they say."""

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, write_rows

from simnpo.attacks.curves import Curves, forget_scores
from simnpo.attacks.prefix import prefix_rows
from simnpo.attacks.quantize import quantize_rows, restore_weights, round_to_nearest, round_weights
from simnpo.attacks.relearn import Relearning, nll, picked, relearn, relearn_rows
from simnpo.cli import main
from simnpo.errors import UserError
from simnpo.evaluation.measures import measure
from simnpo.evaluation.questions import encode_questions
from simnpo.evaluation.subject import Subject, TargetScores
from simnpo.metrics import forget_quality, rouge_l_recall

ROWS = [{"question": f"Who is {i}?", "answer": f"It is {'abc' * (7 - i)}."} for i in range(6)]
WRONG = [row | {"paraphrased_answer": row["answer"][3:], "perturbed_answer": ["x", "yz"]} for row in ROWS]


@pytest.fixture
def subject():
    return Subject("tiny", make_model(), make_tokenizer(), batch_size=8)


def questions(rows=ROWS):
    return encode_questions([(f"f:{i}", row) for i, row in enumerate(rows, 1)], make_tokenizer(), 200)


# Relearning


def test_the_shortest_answers_and_random_ones():
    answers = questions().answers
    assert sorted(picked(answers, "shortest", 0.34, 0)) == [4, 5]
    drawn = [tuple(picked(answers, "random", 0.34, repeat)) for repeat in range(8)]
    assert all(len(set(some)) == 2 for some in drawn)
    assert len(set(drawn)) > 3
    assert drawn[3] == tuple(picked(answers, "random", 0.34, 3))
    assert len(picked(answers, "random", 0.01, 0)) == 1


def test_its_loss_is_the_models_own(subject):
    examples = questions().answers[:1]
    ids, labels = torch.tensor([examples[0].input_ids]), torch.tensor([examples[0].labels])
    expected = subject.model(input_ids=ids, labels=labels).loss
    assert nll(subject, examples).item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_epoch_is_steps_over_every_picked_answer(subject):
    examples = questions().answers[:3]
    before = [nll(subject, [example]).item() for example in examples]
    relearning = Relearning(epochs=4, learning_rate=3e-3, batch_size=2)
    assert list(relearn(subject, examples, relearning, seed=0, autocast=nullcontext())) == [1, 2, 3, 4]
    after = [nll(subject, [example]).item() for example in examples]
    assert all(a < b - 0.3 for a, b in zip(after, before))
    assert not subject.model.training


def test_rows_of_both_subsets_and_the_model_put_back(subject):
    start = {name: p.clone() for name, p in subject.model.state_dict().items()}
    relearning = Relearning(share=0.34, epochs=2, learning_rate=3e-3, batch_size=2)
    baseline = np.array([0.5, 1, 1.5, 2, 2.5, 3])
    rows, truth_ratio = relearn_rows(
        subject, questions(WRONG), relearning, name="unlearned", repeats=2, max_new_tokens=3, autocast=nullcontext(),
        retrained_truth_ratio=baseline,
    )  # fmt: skip
    assert [(r["relearned"], r["repeat"], r["epoch"]) for r in rows] == [
        (which, repeat, epoch)
        for which, repeat in (("shortest", 0), ("random", 0), ("random", 1))
        for epoch in range(3)
    ]
    measures = measure(subject, {"f": questions(WRONG)}, write=("f",), max_new_tokens=3)["f"]
    for row in rows[::3]:
        assert row["probability"] == pytest.approx(measures.probability.mean())
        assert row["forget_quality"] == forget_quality(truth_ratio, baseline)
    assert rows[0]["probability_others"] == pytest.approx(measures.probability[:4].mean())
    for row, later in zip(rows[::3], rows[2::3]):
        assert later["probability"] > row["probability"]
    assert all(torch.equal(p, start[name]) for name, p in subject.model.state_dict().items())


# Prefilling


def test_prefixes_against_the_models_own_logits(subject):
    answers = questions().answers
    for _ in relearn(subject, answers, Relearning(epochs=15, learning_rate=3e-3), seed=0, autocast=nullcontext()):
        pass
    rows = prefix_rows(subject, answers, name="unlearned", given=[0, 3, 7], max_new_tokens=4)
    assert [row["given"] for row in rows] == [0, 3, 7]
    assert {row["answers"] for row in rows} == {6}
    for row in rows:
        k, probabilities, recalls = row["given"], [], []
        for example in answers:
            start = len(example.prompt_ids)
            logps = subject.model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
            rest = [logps[t - 1, example.input_ids[t]].item() for t in range(start + k, len(example.input_ids))]
            probabilities.append(math.exp(np.mean(rest)))
            ids = list(example.input_ids[: start + k])
            for _ in range(4):
                ids.append(subject.model(torch.tensor([ids])).logits[0, -1].argmax().item())
            written = subject.tokenizer.decode(ids[start + k :], skip_special_tokens=True)
            reference = subject.tokenizer.decode(example.input_ids[start + k : -1])
            recalls += rouge_l_recall([reference], [written])
        assert row["probability"] == pytest.approx(np.mean(probabilities), rel=1e-5)
        assert row["rouge_l_recall"] == pytest.approx(np.mean(recalls))
    assert rows[1]["rouge_l_recall"] > 0


def test_a_model_that_knows_the_rest_writes_it_word_for_word(subject):
    answers = questions(ROWS[5:]).answers
    fit = Relearning(epochs=150, learning_rate=3e-3)
    for _ in relearn(subject, answers, fit, seed=0, autocast=nullcontext()):
        pass
    rows = prefix_rows(subject, answers, name="m", given=[0, 2])
    assert [row["exact"] for row in rows] == [1.0, 1.0]
    assert rows[1]["probability"] > 0.8
    spoiled = questions([ROWS[5] | {"answer": "Nobody knows that"}]).answers
    assert prefix_rows(subject, spoiled, name="m", given=[2])[0]["exact"] == 0.0


def test_the_token_that_ends_an_answer_is_no_part_of_it(subject):
    answers = questions(ROWS[:2]).answers

    class EndsLate(Subject):
        """Writes both answers and goes on; one token of the second is missed."""

        def score(self, examples, label=""):
            hits = [np.ones(example.num_targets, dtype=bool) for example in examples]
            for hit in hits:
                hit[-1] = False
            hits[1][3] = False
            return [TargetScores(np.zeros(len(hit)), hit) for hit in hits]

    late = EndsLate("late", subject.model, subject.tokenizer)
    rows = prefix_rows(late, answers, name="m", given=[0, 3, 4], max_new_tokens=1)
    assert [row["exact"] for row in rows] == [0.5, 0.5, 1.0]


def test_of_several_turns_the_last_is_prefilled(subject):
    turns = [("user", "A?"), ("assistant", "It is a."), ("user", "B?"), ("assistant", "It is bb.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    several = questions([row]).answers
    alone = [several[0].__class__("x", "", "", several[0].input_ids, [-100] * len(several[0].prompt_ids)
             + several[0].labels[len(several[0].prompt_ids) :])]  # fmt: skip
    assert prefix_rows(subject, several, name="m", given=[1]) == prefix_rows(subject, alone, name="m", given=[1])


def test_no_answer_that_long(subject):
    with pytest.raises(UserError, match="no answer is longer than 99 tokens, the longest has 28"):
        prefix_rows(subject, questions().answers, name="m", given=[0, 99])


# Quantisation


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_rounded_to_few_levels_and_restored(bits):
    model = make_model()
    start = {name: p.clone() for name, p in model.state_dict().items()}
    before = round_weights(model, bits, 16)
    assert set(before) == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert torch.equal(model.lm_head.weight, start["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, start["model.embed_tokens.weight"])
    for name, weight in before.items():
        rounded = model.get_submodule(name).weight
        groups, exact = rounded.reshape(-1, 16), weight.reshape(-1, 16)
        largest = exact.abs().amax(1, keepdim=True)
        # half a step, also for the largest, which is clipped
        step = 2 * largest / (2**bits - 1)
        assert ((groups - exact).abs() <= 0.501 * step).all()
        assert (groups / step - (groups / step).round()).abs().max() < 1e-3
        assert max(len(group.unique()) for group in groups) <= min(16, 2**bits)
        assert not torch.equal(rounded, weight)
    restore_weights(model, before)
    assert all(torch.equal(p, start[name]) for name, p in model.state_dict().items())


def test_rows_of_every_width(subject):
    sets = {"forget": questions(WRONG), "retain": questions(ROWS[:2])}
    rows, truth_ratio = quantize_rows(
        subject, sets, name="unlearned", bits=[8, 3], group_size=32, max_new_tokens=3,
        retrained_truth_ratio=np.arange(1.0, 7),
    )  # fmt: skip
    assert [row["bits"] for row in rows] == ["none", "8", "3"]
    plain = rows[0]
    assert rows[1]["probability"] == pytest.approx(plain["probability"], rel=0.2)
    assert abs(rows[2]["probability"] / plain["probability"] - 1) > abs(
        rows[1]["probability"] / plain["probability"] - 1
    )
    measures = measure(subject, {"f": questions(WRONG)}, write=("f",), max_new_tokens=3)["f"]
    assert truth_ratio == pytest.approx(measures.truth_ratio)
    assert plain["probability"] == pytest.approx(measures.probability.mean())
    assert 0 < plain["retain_probability"] < 1


def test_a_group_that_does_not_fit_is_refused_before_anything_changes():
    model = make_model()
    start = model.model.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(UserError, match=r"group_size must divide .* 48 does not divide the 32 of model.layers.0"):
        round_weights(model, 4, 48)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, start)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_torchaos(bits):
    torchao = pytest.importorskip("torchao.quantization", reason="it compares with torchao where that is installed")
    granularity = torchao.granularity.PerGroup(16)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48))
    weight = model[0].weight.detach().clone()
    config = torchao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)
    torchao.quantize_(model, config)
    assert torch.equal(round_to_nearest(weight, bits, 16), model[0].weight.dequantize())


# The command line


@pytest.mark.parametrize("attack", ["relearn", "quantize", "prefix"])
def test_from_the_command_line(attack, model_dir, tmp_path, capsys):
    forget = write_rows(tmp_path / "forget.jsonl", WRONG)
    more = {
        "relearn": ["--epochs=1", "--repeats=2", "--learning-rate=1e-3"],
        "quantize": ["--bits=4", "--group-size=32", f"--retain={forget}"],
        "prefix": ["--prefix-tokens", "0", "2"],
    }[attack]
    options = ["attack", attack, f"--model={model_dir}", f"--forget={forget}", f"--output={tmp_path / 'out'}", "--cpu"]
    assert main([*options, "--precision=fp32", "--max-new-tokens=3", f"--retain-model={model_dir}", *more]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {name: [r for r in results["rows"] if r["model"] == name] for name in ("unlearned", "retrained")}
    assert len(rows["unlearned"]) == len(rows["retrained"]) == {"relearn": 6, "quantize": 2, "prefix": 2}[attack]
    # the same model twice
    assert [r["probability"] for r in rows["unlearned"]] == pytest.approx([r["probability"] for r in rows["retrained"]])
    if attack != "prefix":
        assert rows["unlearned"][0]["forget_quality"] == 1.0
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "results.md").read_text()
    assert "| unlearned |" in page
    assert "| retrained |" in page
    assert "results.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["relearn", "--share=0"], "share must be greater than 0 and at most 1, got 0.0"),
        (["relearn", "--epochs=0"], "epochs must be at least 1, got 0"),
        (["relearn", "--learning-rate=-1"], "learning_rate must be greater than 0"),
        (["prefix", "--prefix-tokens", "-1"], "prefix_tokens must be 0 or more, got -1"),
        (["prefix", "--forget=gone.jsonl"], "no such file: gone.jsonl"),
    ],
)
def test_wrong_arguments_are_one_line(options, message, model_dir, tmp_path, capsys):
    forget = write_rows(tmp_path / "forget.jsonl", ROWS)
    base = [f"--model={model_dir}", f"--forget={forget}", f"--output={tmp_path / 'out'}"]
    assert main(["attack", options[0], *base, *options[1:]]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_texts_cannot_be_prefilled(model_dir, tmp_path, capsys):
    forget = write_rows(tmp_path / "forget.jsonl", [{"text": "Once upon a time."}])
    base = [f"--model={model_dir}", f"--forget={forget}", f"--output={tmp_path / 'out'}"]
    assert main(["attack", "prefix", *base]) == 2
    assert "forget.jsonl:1: prefilling needs a prompt" in capsys.readouterr().err


def test_texts_are_relearned_without_answers(subject):
    texts = questions([{"text": "Once upon a time."}, {"text": "There was a king."}])
    rows, _ = relearn_rows(
        subject, texts, Relearning(share=0.5, epochs=1), name="m", repeats=1, max_new_tokens=3, autocast=nullcontext()
    )
    assert rows[0]["rouge_l_recall"] is None
    assert rows[0]["probability_others"] is not None


def test_repeats_are_averaged_on_the_page():
    rows = [{"model": "unlearned", "relearned": "random", "repeat": i, "epoch": 0, "score": i + 1.0} for i in range(2)]
    curves = Curves("Title", ("epoch", "epoch"), {"score": "the score", "other": "never there"}, ("relearned",), rows)
    page = curves.page({"model": "m", "forget": "f", "settings": {}, "versions": {}})
    assert "| unlearned | random | 0 | 1.5 |" in page
    assert "never there" not in page
    (axes,) = curves.figure().axes
    # two repeats and their mean
    assert [line.get_ydata()[0] for line in axes.lines] == [1.0, 2.0, 1.5]
    assert axes.get_legend_handles_labels()[1] == ["unlearned, random"]


def test_every_score_has_its_picture():
    scores = {f"score{i}": f"score {i}" for i in range(4)}
    rows = [
        {"model": m, "bits": b, **dict.fromkeys(scores, 0.5)} for m in ("unlearned", "retrained") for b in ("8", "4")
    ]
    figure = Curves("Title", ("bits", "bits"), scores, (), rows).figure()
    assert [axes.get_ylabel() for axes in figure.axes] == list(scores.values())
    assert all(len(axes.lines) == 4 for axes in figure.axes)


def test_without_wrong_answers_there_is_no_truth_ratio(subject):
    found = measure(subject, {"f": questions()}, write=(), max_new_tokens=3)["f"]
    assert "truth_ratio" not in forget_scores(found)
    assert forget_scores(found)["probability"] == pytest.approx(found.probability.mean())


def test_a_rest_without_words_has_no_recall(subject):
    answers = questions([{"question": "?", "answer": "Yes."}, {"question": "?", "answer": "Yes I do."}]).answers
    rows = prefix_rows(subject, answers, name="m", given=[0, 3], max_new_tokens=2)
    assert rows[1]["answers"] == 2
    ids = answers[1].input_ids[: len(answers[1].prompt_ids) + 3]
    written = subject.answer([ids], 2)
    assert rows[1]["rouge_l_recall"] == rouge_l_recall([" I do."], written)[0]
    alone = prefix_rows(subject, answers[:1], name="m", given=[3])
    assert alone[0]["rouge_l_recall"] is None
    assert alone[0]["exact"] in (0.0, 1.0)
