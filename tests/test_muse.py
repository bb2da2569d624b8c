"""MUSE on a folder of its format and a tiny random model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer

from simnpo.cli import main
from simnpo.errors import UserError
from simnpo.evaluation.muse import (
    Retrained,
    first_answer,
    measure_muse,
    muse_results,
    read_muse,
    retrained_from_results,
)
from simnpo.evaluation.subject import Subject
from simnpo.metrics import membership_auc, rouge_l_f1

FILES = {
    "verbmem/forget": [{"prompt": f"Once upon {i}", "gt": "a time, " * (40 if i else 2)} for i in range(3)],
    "knowmem/forget_qa": [{"question": f"Who {i}?", "answer": f"{i} did"} for i in range(4)],
    "knowmem/forget_qa_icl": [{"question": "Why?", "answer": "Because."}],
    "knowmem/retain_qa": [{"question": f"When {i}?", "answer": f"in {i}"} for i in range(2)],
    "knowmem/retain_qa_icl": [{"question": "How?", "answer": "So."}],
    "privleak/forget": [f"The forgotten text number {i}." for i in range(5)],
    "privleak/holdout": [f"A text that nobody saw, {i}!" for i in range(4)],
}


def write_muse(folder: Path, leave_out: tuple[str, ...] = (), **other: object) -> Path:
    for name, rows in FILES.items():
        if name not in leave_out:
            path = folder / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(other.get(path.stem, rows)))
    return folder


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny", make_model(max_position_embeddings=512), make_tokenizer(), batch_size=4)


def test_scores_are_those_of_the_models_own_logits_and_words(subject, tmp_path):
    muse = read_muse(str(write_muse(tmp_path)))
    scores, min_k, written = measure_muse(subject, muse)
    assert [one.task for one in written] == ["verbmem_forget"] * 3 + ["knowmem_forget"] * 4 + ["knowmem_retain"] * 2
    # bytes are tokens: the reference is cut to 128 of them
    assert [len(one.reference) for one in written[:3]] == [16, 128, 128]

    ids = subject.tokenizer("Question: Why?\nAnswer: Because.\n\nQuestion: Who 2?\nAnswer: ")["input_ids"]
    alone = list(ids)
    for _ in range(32):
        alone.append(subject.model(torch.tensor([alone])).logits[0, -1].argmax().item())
        if alone[-1] in (256, 257):
            break
    text = subject.tokenizer.decode(alone[len(ids) :], skip_special_tokens=True)
    assert written[5].prompt == "Who 2?"
    assert written[5].written == first_answer(text)
    answers = [one for one in written if one.task == "knowmem_forget"]
    f1 = rouge_l_f1([one.reference for one in answers], [one.written for one in answers])
    assert scores["knowmem_forget"] == pytest.approx(100 * np.mean(f1))

    logps = subject.model(torch.tensor([subject.tokenizer(FILES["privleak/forget"][1])["input_ids"]])).logits[0]
    ids = subject.tokenizer(FILES["privleak/forget"][1])["input_ids"]
    of_tokens = sorted(logps.double().log_softmax(-1)[t, i].item() for t, i in enumerate(ids[1:]))
    assert min_k["forget"][1] == pytest.approx(np.mean(of_tokens[: int(0.4 * (len(ids) - 1))]), rel=1e-5)
    assert scores["membership_auc"] == membership_auc(min_k["forget"], min_k["holdout"])


def test_an_answer_ends_where_the_next_question_begins():
    assert first_answer("Paris\nQuestion: and?") == "Paris"
    assert first_answer("Paris\n\nRome") == "Paris"
    assert first_answer("Paris Question: x\n\n") == "Paris "


def test_what_follows_an_answer_does_not_count(tmp_path):
    class Talks(Subject):
        """Answers right, and asks itself another question."""

        def answer(self, prompts, max_new_tokens, label=""):
            words = [self.tokenizer.decode(ids).split("Question: ")[-1] for ids in prompts]
            return [f"{text.split()[1][:-1]} did\nQuestion: What?\nAnswer: much more" for text in words]

    talks = Talks("talks", make_model(), make_tokenizer())
    muse = read_muse(str(write_muse(tmp_path)))._replace(verbmem=None, privleak=None)
    scores, _, written = measure_muse(talks, muse)
    assert [one.written for one in written[:4]] == ["0 did", "1 did", "2 did", "3 did"]
    assert scores["knowmem_forget"] == 100.0


def test_from_the_command_line(model_dir, tmp_path, capsys):
    data = write_muse(tmp_path / "news")
    base = ["evaluate", "--benchmark=muse", f"--model={model_dir}", f"--data={data}", "--cpu", "--precision=fp32"]
    assert main([*base, f"--output={tmp_path / 'one'}"]) == 0
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    assert one["scores"]["privleak"] is None
    assert "--retain-model" in one["not_available"]["privleak"]
    assert len((tmp_path / "one" / "answers.jsonl").read_text().splitlines()) == 9

    for name, retrained in (("two", tmp_path / "one" / "results.json"), ("three", model_dir)):
        assert main([*base, f"--output={tmp_path / name}", f"--retain-model={retrained}"]) == 0
        results = json.loads((tmp_path / name / "results.json").read_text())
        if one["scores"]["membership_auc"]:
            assert results["scores"]["privleak"] == 0
        assert results["retrained_scores"]["knowmem_retain"] == one["scores"]["knowmem_retain"]
    assert "KnowMem on retain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not results.json"),
        ('{"benchmark": "tofu", "scores": {}}', "has results of tofu, expected muse"),
        ("[]", "is not results.json"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        retrained_from_results(path)


def test_leakage_against_the_published_retrained_model():
    results = muse_results({"membership_auc": 0.0062}, {}, Retrained("MUSE News", {"membership_auc": 0.4772}))
    assert results["scores"]["privleak"] == pytest.approx(-98.7, abs=0.01)
    nothing = muse_results({"membership_auc": 0.5}, {}, Retrained("r", {"membership_auc": 0.0}))
    assert nothing["not_available"]["privleak"] == "r has no AUC above 0"


def test_what_can_be_computed_without_a_file_is(subject, tmp_path):
    data = write_muse(tmp_path, leave_out=("privleak/holdout", "knowmem/forget_qa_icl"))
    muse = read_muse(str(data), max_examples=1)
    scores, _, _ = measure_muse(subject, muse)
    assert set(scores) == {"verbmem_forget", "knowmem_retain"}
    reasons = muse_results(scores, muse.missing, None)["not_available"]
    assert reasons["knowmem_forget"] == f"knowmem/forget_qa_icl.json is not in {data}"
    assert reasons["privleak"] == f"privleak/holdout.json is not in {data}"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"holdout": [1]}, r"privleak/holdout.json, row 1: expected a text, got 1"),
        ({"holdout": {"text": []}}, "holdout.json: expected a JSON list that is not empty, got dict"),
        ({"retain_qa": [{"question": "a"}]}, "row 1: expected an object with the texts question and answer, got"),
        ({"retain_qa": [{"question": "a", "answer": " "}]}, "row 1: expected an object"),
    ],
)
def test_malformed_files_are_named(tmp_path, other, message):
    with pytest.raises(UserError, match=message):
        read_muse(str(write_muse(tmp_path, **other)))


def test_no_json_and_no_files(tmp_path):
    with pytest.raises(UserError, match=r"has none of MUSE's files: verbmem/forget\.json is not in"):
        read_muse(str(tmp_path))
    write_muse(tmp_path)
    (tmp_path / "verbmem/forget.json").write_text("[{")
    with pytest.raises(UserError, match=r"verbmem/forget.json: malformed JSON"):
        read_muse(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        read_muse(str(tmp_path / "nowhere"))


def test_a_text_of_one_token(subject, tmp_path):
    muse = read_muse(str(write_muse(tmp_path, holdout=["a"])))
    with pytest.raises(UserError, match=r"privleak/holdout.json, row 1: the tokenizer makes fewer than two tokens"):
        measure_muse(subject, muse)


def test_a_retrained_model_that_is_none_is_refused_before_work_starts(model_dir, tmp_path, capsys):
    base = ["evaluate", "--benchmark=muse", f"--model={model_dir}", f"--data={write_muse(tmp_path / 'news')}", "--cpu"]
    assert main([*base, f"--output={tmp_path / 'out'}", f"--retain-model={tmp_path / 'gone'}"]) == 2
    assert f"cannot load '{tmp_path / 'gone'}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_that_would_be_ignored_are_refused(model_dir, tmp_path, capsys):
    base = ["evaluate", f"--model={model_dir}", f"--data={write_muse(tmp_path)}", f"--output={tmp_path / 'out'}"]
    assert main([*base, "--benchmark=muse", "--split=forget05"]) == 2
    assert "--split has no meaning for --benchmark muse" in capsys.readouterr().err
