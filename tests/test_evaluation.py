"""Scores of a tiny random model against the model's own logits and its own unpadded generation."""

import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from simnpo.data import encode
from simnpo.errors import UserError
from simnpo.evaluation.examples import evaluate
from simnpo.evaluation.generation import greedy_answers, greedy_continuations, greedy_tokens
from simnpo.evaluation.results import markdown_table, open_folder
from simnpo.evaluation.subject import Subject
from simnpo.model import add_lora

ROWS = [
    {"prompt": "Who is it?", "response": "It is I."},
    {"prompt": "A much longer question, to be padded against?", "response": "Yes"},
    {"prompt": "?", "response": "A much longer answer than the others have."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def examples(tokenizer):
    return [encode(row, tokenizer, f"rows.jsonl:{i}", 200) for i, row in enumerate(ROWS, start=1)]


def test_probability_is_the_geometric_mean_over_the_targets(tokenizer, examples):
    model = make_model()
    scores = evaluate(model, tokenizer, {"all": examples}, max_new_tokens=4)["all"]
    for example, score in zip(examples, scores.examples):
        logps = model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
        targets = [(t, label) for t, label in enumerate(example.labels[1:]) if label != -100]
        nll = -sum(logps[t, label].item() for t, label in targets) / len(targets)
        assert score.nll == pytest.approx(nll, rel=1e-5)
        assert score.probability == pytest.approx(math.exp(-nll), rel=1e-5)
    assert scores.probability == pytest.approx(sum(s.probability for s in scores.examples) / 3)
    assert scores.nll == pytest.approx(sum(s.nll for s in scores.examples) / 3)
    assert scores.rouge_l_recall == pytest.approx(sum(s.rouge_l_recall or 0 for s in scores.examples) / 3)


def test_batch_size_changes_nothing(tokenizer, examples):
    model = make_model()
    together, alone = (evaluate(model, tokenizer, {"all": examples}, batch_size=size)["all"] for size in (32, 1))
    assert [s.answer for s in together.examples] != ["", "", ""]
    for a, b in zip(together.examples, alone.examples):
        assert a.nll == pytest.approx(b.nll, rel=1e-5)
    # the room for an answer is the batch's, so compare what both had room for
    for a, b in zip(together.examples, alone.examples):
        assert (a.answer or "").startswith(b.answer or "")


def test_greedy_answers_are_the_most_probable_tokens(tokenizer, examples):
    model = make_model()
    answers = greedy_answers(model, tokenizer, examples, max_new_tokens=5)
    for example, answer in zip(examples, answers):
        ids = list(example.prompt_ids)
        for _ in range(5):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        written = ids[len(example.prompt_ids) :]
        ends = [i for i, token in enumerate(written) if token in (tokenizer.eos_token_id, model.config.eos_token_id)]
        written = written[: ends[0]] if ends else written
        assert answer == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_answers_stop_at_the_end_of_turn(tokenizer, examples):
    model = make_model()
    with torch.no_grad():
        # every state points at the end-of-turn token
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.eye(260)[tokenizer.eos_token_id])
    assert greedy_answers(model, tokenizer, examples) == ["", "", ""]


def gpt2(positions: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=4, n_positions=positions, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("room", [0, 1, 3])
def test_answers_end_with_the_learned_positions(tokenizer, room):
    prompts = [[40, 41, 42], list(range(50, 60)), list(range(60, 71))]
    model = gpt2(10 + room)
    written = greedy_tokens(model, tokenizer, prompts[:2], 6)
    assert [len(tokens) for tokens in written] == [6, room]
    # the same tokens as with all the positions there are, and each row as if it were alone
    alone = greedy_tokens(model, tokenizer, prompts[:1], 6)[0]
    assert written[0] == alone
    if room == 0:
        assert greedy_tokens(model, tokenizer, prompts[1:], 6) == [[], []]
        assert greedy_continuations(model, tokenizer, prompts[1:], 6) == ["", ""]


def test_a_subject_says_once_which_answers_are_cut(tokenizer, caplog):
    subject = Subject("tiny", gpt2(12), tokenizer, batch_size=2)
    prompts = [[40], list(range(50, 60)), list(range(60, 72))]
    with caplog.at_level(logging.WARNING):
        assert subject.answer(prompts[:1], 6)[0] is not None
        assert not caplog.records
        assert subject.answer(prompts, 6)[2] == ""
    (record,) = caplog.records
    assert "2 of 3 answers may be cut short, 1 of them to nothing" in record.getMessage()
    with pytest.raises(UserError, match="prompt 2 of 2: 13 tokens are more than the 12 positions"):
        subject.answer([[40], [41] * 13], 6)
    row = encode({"prompt": "a" * 9, "response": "b" * 9}, tokenizer, "rows.jsonl:7", 200)
    with pytest.raises(UserError, match=r"rows\.jsonl:7: \d+ tokens are more than the 12 positions"):
        subject.score([row])


def test_text_rows_have_no_answer(tokenizer, examples):
    text = encode({"text": "Once upon a time."}, tokenizer, "text.jsonl:1", 200)
    model = make_model()
    scores = evaluate(model, tokenizer, {"text": [text], "mixed": [examples[0], text, examples[1]]})
    assert scores["text"].rouge_l_recall is None
    assert [s.answer is None for s in scores["mixed"].examples] == [False, True, False]
    assert scores["mixed"].examples[2].prompt == examples[1].prompt
    assert scores["mixed"].rouge_l_recall is not None


def test_no_warnings_and_the_model_is_put_back(tokenizer, examples, caplog):
    model = make_model().train()
    # a model whose configuration samples, as most instruction-tuned ones do
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, max_length=20)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        first, second = (evaluate(model, tokenizer, {"all": examples}) for _ in range(2))
    assert first == second
    assert not caplog.records
    assert model.training
    assert model.generation_config.temperature == 0.6


def test_adapters_count(tokenizer, examples):
    model = add_lora(make_model(), rank=4, alpha=8)
    before = evaluate(model, tokenizer, {"all": examples})["all"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    after = evaluate(model, tokenizer, {"all": examples})["all"]
    assert after.nll != pytest.approx(before.nll, rel=1e-3)
    assert [s.answer for s in after.examples] != [s.answer for s in before.examples]


def test_an_empty_set_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"sets\['retain'\] has no examples"):
        evaluate(make_model(), tokenizer, {"retain": []})


def test_a_cell_of_a_table_stays_one_cell():
    table = markdown_table(["a|b", "c"], [["x | y\nz\u202e", None], [0.12345, 7]])
    assert table == "| a\\|b | c |\n| --- | --- |\n| x \\| y z\\u202e | - |\n| 0.123 | 7 |\n"


def test_a_folder_with_results_of_ours_is_used_again(tmp_path):
    (tmp_path / "results.md").write_text("mine")
    with pytest.raises(UserError, match=r"results\.md was not written by simnpo"):
        open_folder(str(tmp_path))
    for ours in ('{"benchmark": "tofu"}', '{"attack": "prefix"}'):
        (tmp_path / "results.json").write_text(ours)
        assert open_folder(str(tmp_path)) == tmp_path
    (tmp_path / "results.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match=r"results\.json was not written by simnpo"):
        open_folder(str(tmp_path))


@pytest.mark.parametrize(("output", "message"), [(" ", "empty name"), ("f", "f is a file"), ("f/x", "cannot make the")])
def test_outputs_that_are_no_folder(tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    Path("f").touch()
    with pytest.raises(UserError, match=message):
        open_folder(output)


def test_a_cut_answer_is_scored_against_what_was_read(tokenizer, monkeypatch):
    from simnpo.evaluation import examples as scored

    row = {"prompt": "a", "response": "b c " + "unread words " * 9}
    prompt = encode(row, tokenizer, "f:1", None).prompt_ids
    cut = encode(row, tokenizer, "f:1", len(prompt) + len("b c"))
    monkeypatch.setattr(scored, "greedy_answers", lambda *_: ["b c"])
    (score,) = evaluate(make_model(), tokenizer, {"forget": [cut]})["forget"].examples
    assert (score.response, score.rouge_l_recall) == ("b c", 1.0)
