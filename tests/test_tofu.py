"""TOFU on a tiny random model: every number against the model's own logits, and what happens when a file is missing."""

import copy
import importlib.util
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, write_rows

from simnpo.attacks.relearn import Relearning, relearn
from simnpo.attention import use_packed_attention
from simnpo.cli import main
from simnpo.errors import UserError
from simnpo.evaluation.lengths import by_length
from simnpo.evaluation.measures import measure
from simnpo.evaluation.questions import encode_questions
from simnpo.evaluation.subject import Subject
from simnpo.evaluation.tofu import read_tofu
from simnpo.metrics import forget_quality, model_utility, rouge_l_recall

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tofu"
CHANGES = {"max_new_tokens": 6, "batch_size": 3, "precision": "fp32"}


def question(i: int, *, options: bool = False) -> dict:
    row = {"question": f"Who is {i}?", "answer": f"It is {'ab' * (i + 1)}."}
    if options:
        return row | {"perturbed_answer": [f"{c} {i}" for c in "xyz"]}
    wrong = [f"Number {i} is {'cd' * (j + 1)}." for j in range(5)]
    return row | {"paraphrased_answer": f"Number {i} is {'ab' * (i + 1)}.", "perturbed_answer": wrong}


def write_tofu(folder: Path, leave_out: tuple[str, ...] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    files = {"forget01": [{k: question(i)[k] for k in ("question", "answer")} for i in range(6)]}
    files["forget01_perturbed"] = [question(i) for i in range(6)]
    files["holdout01"] = [question(i) for i in range(20, 24)]
    files["retain_perturbed"] = [question(i) for i in range(10, 15)]
    files["real_authors_perturbed"] = [question(i, options=True) for i in range(4)]
    files["world_facts_perturbed"] = [question(i, options=True) for i in range(4, 7)]
    for name, rows in files.items():
        if name not in leave_out:
            write_rows(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny", make_model(), make_tokenizer(), batch_size=4)


@pytest.fixture(scope="module")
def taught():
    """A model that knows some of the answers, so that it writes them and greedy decoding hits some of their tokens."""
    subject = Subject("taught", make_model(), make_tokenizer(), batch_size=4)
    examples = encode_questions([(f"f:{i}", question(i)) for i in range(3)], subject.tokenizer, 200).answers
    for _ in relearn(subject, examples, Relearning(epochs=25, learning_rate=3e-3), seed=0, autocast=nullcontext()):
        pass
    return subject


def evaluate(model_dir: Path, data: Path, output: Path, *more: str) -> dict:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in CHANGES.items()]
    options = ["evaluate", "--benchmark=tofu", "--cpu", f"--model={model_dir}", f"--data={data}", f"--output={output}"]
    assert main([*options, *arguments, *more]) == 0
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def nlls_and_hits(subject: Subject, example) -> tuple[list[float], list[bool]]:
    """Of each target, from all the logits of one sequence."""
    logps = subject.model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
    targets = [(t, label) for t, label in enumerate(example.labels[1:]) if label != -100]
    return [-logps[t, label].item() for t, label in targets], [
        bool(logps[t].argmax().item() == label) for t, label in targets
    ]


def test_measures_are_those_of_the_models_own_logits(taught):
    subject = taught
    rows = [(f"f:{i}", question(i)) for i in range(5)]
    questions = encode_questions(rows, subject.tokenizer, 200)
    found = measure(subject, {"all": questions}, write=("all",), max_new_tokens=12)["all"]
    for i, example in enumerate(questions.answers):
        nll, hits = nlls_and_hits(subject, example)
        assert found.probability[i] == pytest.approx(math.exp(-np.mean(nll)), rel=1e-5)
        # the last target is the end-of-turn token
        assert found.exact_memorization[i] == pytest.approx(np.mean(hits[:-1]))
        lowest = sorted(-x for x in nll)[: int(0.4 * len(nll))]
        assert found.min_k[i] == pytest.approx(np.mean(lowest), rel=1e-5)
        right = np.mean(nlls_and_hits(subject, questions.paraphrased[i])[0])
        wrong = [np.mean(nlls_and_hits(subject, e)[0]) for e in questions.perturbed[i]]
        assert found.truth_ratio[i] == pytest.approx(math.exp(right - np.mean(wrong)), rel=1e-5)
        among = math.exp(-np.mean(nll)) / (math.exp(-np.mean(nll)) + sum(math.exp(-w) for w in wrong))
        assert found.probability_among_options[i] == pytest.approx(among, rel=1e-5)
    assert 0 < found.exact_memorization.min() < found.exact_memorization.max()
    assert found.rouge_l_recall.mean() > 0
    assert found.rouge_l_recall.tolist() == rouge_l_recall([e.response for e in questions.answers], found.written)


def test_answers_begun_with_what_scoring_knows_are_those_written_token_by_token(taught, monkeypatch):
    rows = [(f"f:{i}", question(i)) for i in range(5)]
    rows.append(("f:5", question(5) | {"answer": "Zed."}))
    questions = encode_questions(rows, taught.tokenizer, 200)
    prompts = [example.prompt_ids for example in questions.answers]
    plain = taught.answer(prompts, 12)
    known = []
    answer = Subject.answer

    def listened(self, *arguments, begun=None):
        known.extend(begun)
        return answer(self, *arguments, begun=begun)

    monkeypatch.setattr(Subject, "answer", listened)
    found = measure(taught, {"all": questions}, write=("all",), max_new_tokens=12)["all"]
    assert found.written == [text.strip() for text in plain]
    for example, tokens in zip(questions.answers, known, strict=True):
        _, hits = nlls_and_hits(taught, example)
        assert len(tokens) == (len(hits) if all(hits) else hits.index(False))
        assert example.input_ids[len(example.prompt_ids) :][: len(tokens)] == tokens
    whole = [len(tokens) == example.num_targets for example, tokens in zip(questions.answers, known)]
    assert len({*whole}) == 2
    assert [] in known
    monkeypatch.undo()
    for room in (1, 3, 7):
        assert taught.answer(prompts, room, begun=known) == taught.answer(prompts, room)


def test_what_a_model_that_knows_everything_scores(subject):
    """Targets that greedy decoding writes are extracted whole, up to the token before the first miss."""
    example = encode_questions([("f:1", question(3))], subject.tokenizer, 200).answers[0]
    prompt, n = list(example.prompt_ids), 6
    for _ in range(n):
        prompt.append(subject.model(torch.tensor([prompt])).logits[0, -1].argmax().item())
    labels = [-100] * len(example.prompt_ids) + prompt[-n:]
    known = example.__class__("known", "", "known", prompt, labels)
    (score,) = subject.score([known])
    assert score.is_greedy.all()
    wrong = list(prompt)
    wrong[-n + 2] = (wrong[-n + 2] + 1) % 256
    spoiled = example.__class__("spoiled", "", "spoiled", wrong, [-100] * len(example.prompt_ids) + wrong[-n:])
    assert not subject.score([spoiled])[0].is_greedy[2]


def test_the_order_and_size_of_batches_change_nothing(subject):
    questions = encode_questions([(f"f:{i}", question(i)) for i in range(6)], subject.tokenizer, 200)
    one = Subject("tiny", subject.model, subject.tokenizer, batch_size=1)
    sequences = questions.sequences()
    for a, b in zip(subject.score(sequences), one.score(sequences)):
        np.testing.assert_allclose(a.logps, b.logps, rtol=1e-4, atol=1e-4)
    prompts = [example.prompt_ids for example in questions.answers]
    assert subject.answer(prompts, 5) == one.answer(prompts, 5)


def test_a_question_is_read_once_for_all_its_answers(subject, monkeypatch):
    questions = encode_questions([(f"f:{i}", question(i)) for i in range(6)], subject.tokenizer, 200)
    sequences = questions.sequences()
    model, seen = copy.deepcopy(subject.model), []
    use_packed_attention(model)
    packing = Subject("tiny", model, subject.tokenizer, batch_size=8, packs=True)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    for a, b in zip(packing.score(sequences), subject.score(sequences), strict=True):
        np.testing.assert_allclose(a.logps, b.logps, rtol=1e-4, atol=1e-4)
        assert (a.is_greedy == b.is_greedy).all()
    prompts = {tuple(example.prompt_ids) for example in sequences}
    assert len(seen) == len(prompts) == 6
    answers = sum(len(example.input_ids) - len(example.prompt_ids) for example in sequences)
    # of a prompt the last token is each sequence's own, for it predicts the first of its answer; the last predicts none
    assert sum(seen) == sum(map(len, prompts)) - len(prompts) + answers


def test_all_of_it_from_the_command_line(model_dir, tmp_path, capsys):
    data = write_tofu(tmp_path / "tofu")
    first = evaluate(model_dir, data, tmp_path / "one", f"--retain-model={model_dir}")
    # the same model as its own retrained one, in other batches: only their rounding differs
    assert first["scores"]["forget_quality"] > 0.9
    assert first["scores"]["privacy_leak"] == pytest.approx(0, abs=20)
    kept = [first["sets"][name] for name in ("retain", "real_authors", "world_facts")]
    terms = [s[key] for s in kept for key in ("probability", "rouge_l_recall", "truth_ratio")]
    assert first["scores"]["model_utility"] == model_utility(terms)
    assert first["not_available"] == {}
    assert {name: s["questions"] for name, s in first["sets"].items()} == {
        "forget": 6, "retain": 5, "real_authors": 4, "world_facts": 3, "holdout": 4
    }  # fmt: skip
    answers = [json.loads(line) for line in (tmp_path / "one" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 22
    mean = np.mean([row["probability"] for row in answers if row["set"] == "forget"])
    assert first["sets"]["forget"]["probability"] == pytest.approx(mean)
    # of real authors the probability is that among the options, not the answer's own
    mean = np.mean([row["probability"] for row in answers if row["set"] == "real_authors"])
    assert first["sets"]["real_authors"]["probability"] > 3 * mean
    ratios = np.array(first["per_question"]["forget"]["truth_ratio"])
    assert first["sets"]["forget"]["truth_ratio"] == pytest.approx(np.minimum(ratios, 1 / ratios).mean())
    page = (tmp_path / "one" / "results.md").read_text()
    assert "| forget | 6 |" in page
    assert "forget quality" in capsys.readouterr().out

    # asked for the forget set alone, the retrained model has no utility
    assert first["retrained_scores"] == {"model_utility": None}

    # results of the retrained model instead of the model
    second = evaluate(model_dir, data, tmp_path / "two", f"--retain-model={tmp_path / 'one' / 'results.json'}")
    assert second["scores"] == first["scores"] | {"forget_quality": 1.0, "privacy_leak": 0.0}
    assert second["retrained_scores"] == {"model_utility": first["scores"]["model_utility"]}
    assert "| model utility of the retrained model |" in (tmp_path / "two" / "results.md").read_text()
    halves = second["forget_by_length"]
    assert [half["forget_quality"] for half in halves.values()] == [1.0, 1.0]
    for key in ("probability", "rouge_l_recall", "truth_ratio"):
        assert np.mean([half[key] for half in halves.values()]) == pytest.approx(second["sets"]["forget"][key])
    assert "| shorter half | 3 | " in (tmp_path / "two" / "results.md").read_text()


def test_halves_by_length_of_the_answer(subject):
    # the longest first, and one alone in the middle
    rows = [(f"f:{i}", question(i)) for i in (4, 3, 2, 1, 0)]
    questions = encode_questions(rows, subject.tokenizer, 200)
    found = measure(subject, {"f": questions}, write=(), max_new_tokens=3)["f"]
    assert found.num_tokens.tolist() == [len(row["answer"]) for _, row in rows]
    retrained = np.array([0.1, 0.2, 0.3, *found.truth_ratio[3:]])
    halves = by_length(found, retrained)
    assert halves["shorter"]["tokens"] == [9, 11]
    assert halves["longer"]["tokens"] == [13, 17]
    assert halves["shorter"]["probability"] == pytest.approx(found.probability[3:].mean())
    assert halves["longer"]["probability"] == pytest.approx(found.probability[:3].mean())
    assert halves["shorter"]["forget_quality"] == 1.0
    assert halves["longer"]["forget_quality"] == forget_quality(found.truth_ratio[:3], retrained[:3]) < 1
    assert halves["longer"]["rouge_l_recall"] is None
    assert by_length(found)["longer"]["forget_quality"] is None


def test_one_answer_has_no_halves(subject):
    questions = encode_questions([("f:0", question(0))], subject.tokenizer, 200)
    assert by_length(measure(subject, {"f": questions}, write=(), max_new_tokens=3)["f"]) is None


def test_without_a_retrained_model_quality_is_not_available(model_dir, tmp_path):
    results = evaluate(model_dir, write_tofu(tmp_path / "tofu"), tmp_path / "out")
    assert results["scores"]["forget_quality"] is None
    assert results["scores"]["privacy_leak"] is None
    assert 0 <= results["scores"]["membership_auc"] <= 1
    assert "--retain-model" in results["not_available"]["forget_quality"]
    assert "not available: it compares with a retrained model" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("file", "lost", "kept"),
    [
        ("retain_perturbed", "model_utility", "forget_quality"),
        ("world_facts_perturbed", "model_utility", "forget_quality"),
        ("forget01_perturbed", "forget_quality", "model_utility"),
        ("holdout01", "privacy_leak", "forget_quality"),
    ],
)
def test_what_can_be_computed_without_a_file_is(model_dir, tmp_path, file, lost, kept):
    data = write_tofu(tmp_path / "tofu", leave_out=(file,))
    results = evaluate(model_dir, data, tmp_path / "out", f"--retain-model={model_dir}")
    assert results["scores"][lost] is None
    assert f"{file} is not in {data}" in results["not_available"][lost]
    assert results["scores"][kept] is not None
    assert results["sets"]["forget"]["probability"] > 0


def test_the_perturbed_file_alone_is_enough(model_dir, tmp_path):
    data = write_tofu(tmp_path / "tofu", leave_out=("forget01",))
    results = evaluate(model_dir, data, tmp_path / "out", "--max-examples=2")
    assert results["sets"]["forget"]["questions"] == 2
    assert results["sets"]["forget"]["truth_ratio"] is not None


def broken(**changes: object) -> list[dict]:
    return [question(0), question(1) | changes]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (broken(perturbed_answer=["a", "b"]), r"perturbed.jsonl:2: perturbed_answer has 2 answers, expected 5"),
        (broken(perturbed_answer="a"), r"perturbed.jsonl:2: perturbed_answer must be a list of strings, got str"),
        (
            broken(perturbed_answer=["a", "", "b", "c", "d"]),
            r"perturbed.jsonl:2, perturbed_answer\[1\]: answer is empty",
        ),
        (broken(perturbed_answer=["a", 3, "b", "c", "d"]), r"perturbed_answer\[1\]: answer must be a string, got int"),
        (broken(paraphrased_answer="<|end|>"), r"2, paraphrased_answer: the tokenizer makes no token of '<|end|>'"),
        (
            [question(0), {"question": "?", "answer": "a", "perturbed_answer": list("abcde")}],
            "jsonl:2: paraphrased_ans",
        ),
        (
            [{"question": "?", "answer": "a", "perturbed_answer": list("abcde")}, question(0)],
            "jsonl:1: paraphrased_ans",
        ),
        ([question(0), question(1), question(2)], "forget01 has 2 rows and forget01_perturbed 3"),
        ([], "forget01_perturbed.jsonl is empty"),
    ],
)
def test_bad_rows_are_refused_before_work_starts(tmp_path, rows, message):
    write_rows(tmp_path / "forget01_perturbed.jsonl", rows)
    write_rows(tmp_path / "forget01.jsonl", [question(0), question(1)])
    with pytest.raises(UserError, match=message):
        read_tofu(str(tmp_path), "forget01", make_tokenizer(), 200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split=retain99"], "split must be forget01"),
        (["--split=forget05"], "has neither forget05 nor forget05_perturbed"),
        (["--data=no/such/folder"], "no such folder: no/such/folder"),
        (["--batch-size=0"], "batch_size must be at least 1, got 0"),
        (["--retain-model=nowhere.json"], "nowhere.json is not results.json"),
    ],
)
def test_wrong_arguments_are_one_line(model_dir, tmp_path, options, message, capsys):
    data = write_tofu(tmp_path / "tofu")
    base = ["--benchmark=tofu", f"--model={model_dir}", f"--data={data}", f"--output={tmp_path / 'out'}", "--cpu"]
    assert main(["evaluate", *base, *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_results_of_other_questions_are_refused(model_dir, tmp_path, capsys):
    data = write_tofu(tmp_path / "tofu")
    evaluate(model_dir, data, tmp_path / "few", "--max-examples=2")
    base = ["--benchmark=tofu", f"--model={model_dir}", f"--data={data}", f"--output={tmp_path / 'out'}", "--cpu"]
    assert main(["evaluate", *base, f"--retain-model={tmp_path / 'few' / 'results.json'}"]) == 2
    assert "has 2 questions of forget01 (tofu), expected 6 of forget01" in capsys.readouterr().err


def test_the_hub_needs_its_library(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "datasets" else real(name, *a))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install simnpo\[hub\]"):
        read_tofu("locuslab/TOFU", "forget01", make_tokenizer(), 200)


def test_the_hub_is_read_through_its_library(monkeypatch):
    rows = {"forget01": [question(0)], "forget01_perturbed": [question(0)], "world_facts_perturbed": [question(1)]}
    library = SimpleNamespace(
        get_dataset_config_names=lambda data: list(rows), load_dataset=lambda data, name, split: rows[name]
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    tofu = read_tofu("locuslab/TOFU", "forget01", make_tokenizer(), 200)
    assert list(tofu.sets) == ["forget", "world_facts"]
    assert tofu.sets["forget"].answers[0].id == "locuslab/TOFU/forget01_perturbed:1"
    assert tofu.missing["retain"] == "retain_perturbed is not in locuslab/TOFU"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"TOFU's files are not in {REAL}")
def test_the_real_files_are_read():
    tofu = read_tofu(str(REAL), "forget05", make_tokenizer(), 2048)
    sizes = {name: (len(s.answers), len(s.perturbed or [[]][0])) for name, s in tofu.sets.items()}
    assert sizes == {
        "forget": (200, 200), "retain": (400, 400), "real_authors": (100, 100), "world_facts": (117, 117)
    }  # fmt: skip
    assert len(tofu.sets["forget"].sequences()) == 200 * 7
    assert len(tofu.sets["world_facts"].sequences()) == 117 * 4
    assert list(tofu.missing) == ["holdout"]


def test_answers_that_are_cut_are_warned_about(tmp_path, caplog):
    write_rows(tmp_path / "forget01.jsonl", [question(0), question(9)])
    length = len(encode_questions([("f:1", question(0))], make_tokenizer(), 200).answers[0].input_ids)
    read_tofu(str(tmp_path), "forget01", make_tokenizer(), length + 1)
    assert "are cut at max_length" in caplog.text
    assert "forget01.jsonl:2" in caplog.text
