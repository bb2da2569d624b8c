import json
import logging
import os
from pathlib import Path

import pytest
from conftest import make_tokenizer, write_rows
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from simnpo.data import IGNORE_INDEX, encode, load_examples, warn_about_overlap
from simnpo.errors import UserError

CHAT, PLAIN = make_tokenizer(), make_tokenizer(chat=False)


def targets(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


# What is a target


@pytest.mark.parametrize("row", [{"prompt": "Hi?", "response": "Yo."}, {"question": "Hi?", "answer": "Yo."}])
def test_plain_pair_is_prompt_space_response_eos(row):
    example = encode(row, PLAIN, "f:1", 100)
    assert PLAIN.decode(example.input_ids) == "Hi? Yo.<|end|>"
    assert targets(example, PLAIN) == " Yo.<|end|>"
    assert PLAIN.decode(example.prompt_ids) == "Hi?"
    assert (example.id, example.prompt, example.response) == ("f:1", "Hi?", "Yo.")


def test_plain_pair_puts_no_second_space():
    assert PLAIN.decode(encode({"prompt": "Hi\n", "response": "Yo"}, PLAIN, "f:1", 99).input_ids) == "Hi\nYo<|end|>"
    assert PLAIN.decode(encode({"prompt": "", "response": "Yo"}, PLAIN, "f:1", 99).input_ids) == "Yo<|end|>"


def test_text_makes_every_token_a_target():
    example = encode({"text": "some words"}, PLAIN, "f:1", 100)
    assert example.labels == example.input_ids
    assert example.num_targets == len("some words")  # with the end of the sequence, without the first token
    assert example.prompt_ids == []


def test_chat_counts_assistant_turns_with_their_end_of_turn_token():
    turns = [("system", "Be brief."), ("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D.")]
    example = encode({"messages": [{"role": r, "content": c} for r, c in turns]}, CHAT, "f:1", 200)
    assert targets(example, CHAT) == "B.<|end|>D.<|end|>"
    assert CHAT.decode(example.input_ids).endswith("<|start|>user\nC?<|end|>\n<|start|>assistant\nD.<|end|>")
    assert CHAT.decode(example.prompt_ids).endswith("C?<|end|>\n<|start|>assistant\n")
    assert (example.prompt, example.response) == ("C?", "D.")


def test_prompt_ids_are_what_generate_would_be_given():
    example = encode({"prompt": "A?", "response": "B."}, CHAT, "f:1", 100)
    messages = [{"role": "user", "content": "A?"}]
    assert example.prompt_ids == CHAT.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_a_last_turn_of_the_user_is_left_out():
    turns = [("user", "A?"), ("assistant", "B."), ("user", "C?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert encode({"messages": messages}, CHAT, "f:1", 100) == encode({"messages": messages[:2]}, CHAT, "f:1", 100)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A sentencepiece-like tokenizer: it marks a word's start with ▁ and puts one before the text, and a BOS."""
    words = ["<s>", "</s>", "<unk>", "▁", "a", "b", "c", "▁a", "▁b", "▁c"]
    merges = [("▁", "a"), ("▁", "b"), ("▁", "c")]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_sentencepiece_gets_one_bos_and_no_second_word_mark():
    tokenizer = word_tokenizer()
    example = encode({"prompt": "a b", "response": "c"}, tokenizer, "f:1", 100)
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["<s>", "▁a", "▁b", "▁c", "</s>"]
    assert example.labels[:3] == [IGNORE_INDEX] * 3
    text = encode({"text": "a b"}, tokenizer, "f:1", 100)
    assert tokenizer.convert_ids_to_tokens(text.input_ids) == ["<s>", "▁a", "▁b", "</s>"]


def test_a_prompt_whose_end_would_merge_with_the_response_is_kept_as_it_is():
    tokenizer = word_tokenizer()
    example = encode({"prompt": "a ", "response": "b"}, tokenizer, "f:1", 100)
    # as a whole "a b" is ▁a ▁b, but the prompt alone ends in ▁
    assert tokenizer.convert_ids_to_tokens(example.prompt_ids) == ["<s>", "▁a", "▁"]
    assert tokenizer.convert_ids_to_tokens(example.input_ids[3:]) == ["▁b", "</s>"]


def test_truncation_keeps_the_start(caplog, tmp_path):
    path = write_rows(tmp_path / "f.jsonl", [{"prompt": "abc", "response": "d" * 20}, {"prompt": "a", "response": "b"}])
    with caplog.at_level(logging.WARNING):
        long, short = load_examples(path, PLAIN, 10)
    assert PLAIN.decode(long.input_ids) == "abc dddddd"
    assert PLAIN.decode(short.input_ids) == "a b<|end|>"
    assert "1 of 2 rows" in caplog.text
    assert "f.jsonl:1" in caplog.text
    assert "f.jsonl:2" not in caplog.text


def test_a_row_of_just_max_length_is_not_cut(caplog, tmp_path):
    path = write_rows(tmp_path / "f.jsonl", [{"prompt": "abc", "response": "def"}])
    (example,) = load_examples(path, PLAIN, len("abc def") + 1)
    assert (example.is_cut, caplog.text) == (False, "")
    (example,) = load_examples(path, PLAIN, len("abc def"))
    assert example.is_cut


def test_a_cut_response_is_what_is_left_of_it():
    example = encode({"prompt": "abc", "response": "def ghi jkl"}, PLAIN, "f:1", len("abc def ghi"))
    assert (example.response, example.prompt, example.is_cut) == ("def ghi", "abc", True)
    text = encode({"text": "some words"}, PLAIN, "f:1", 4)
    assert (text.response, text.prompt) == ("some", "")
    turns = [("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D.")]
    chat = {"messages": [{"role": r, "content": c} for r, c in turns]}
    whole = encode(chat, CHAT, "f:1", 200)
    cut = encode(chat, CHAT, "f:1", len(whole.prompt_ids))
    # the second turn is gone, so the first is the last
    assert (cut.prompt, cut.response, cut.is_cut) == ("A?", "B.", True)
    assert targets(cut, CHAT) == "B.<|end|>"


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT])
def test_only_the_start_of_a_huge_row_is_tokenised(tokenizer, monkeypatch):
    seen = []

    def counting(self, text, **options):
        seen.append(len(text))
        return call(self, text, **options)

    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    huge = "word " * 200_000
    example = encode({"prompt": "a", "response": huge}, tokenizer, "f:1", 100)
    assert encode({"prompt": "a", "response": huge[:200]}, tokenizer, "f:1", 100) == example
    assert len(example.input_ids) == 100
    assert encode({"text": huge}, tokenizer, "f:1", 100).response == huge[:100].strip()
    with pytest.raises(UserError, match="f:1: nothing of the response is left at max_length=100"):
        encode({"prompt": huge, "response": "a"}, tokenizer, "f:1", 100)
    assert max(seen) < 100_000


# What is refused, and how


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*gone\.jsonl"):
        load_examples(tmp_path / "gone.jsonl", CHAT, 100)


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "f.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"f\.jsonl is empty: expected JSON Lines with prompt and response"):
        load_examples(tmp_path / "f.jsonl", CHAT, 100)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", ', r"f\.jsonl:3: malformed JSON"),
        (b'["a"]', r"f\.jsonl:3: expected a JSON object"),
        (b"\xff\xfe", r"f\.jsonl:3: not UTF-8"),
        (b'{"prompt": "a", "answer": "b"}', r"f\.jsonl:3: found keys \['answer', 'prompt'\], expected prompt and"),
        (b'{"prompt": "a", "response": " "}', r"f\.jsonl:3: response is empty"),
        (b'{"prompt": "a", "response": "<|end|>"}', r"f\.jsonl:3: the tokenizer makes no token of '<\|end\|>'"),
        (b'{"text": "<|end|>"}', r"f\.jsonl:3: the tokenizer makes no token of '<\|end\|>'"),
        (b'{"text": "a"}', r"f\.jsonl:3: the only token of a has no token before it"),
        (b'{"question": "a", "answer": 7}', r"f\.jsonl:3: answer must be a string, got int"),
        (b'{"text": ""}', r"f\.jsonl:3: text is empty"),
        (b'{"messages": [{"role": "user"}]}', r"f\.jsonl:3: messages must be a list of objects with role and content"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', r"f\.jsonl:3: every target is ignored: messages has no"),
        (b'{"messages": [{"role": "assistant", "content": ""}]}', r"f\.jsonl:3: content is empty"),
        (b'{"messages": [{"role": 7, "content": "a"}]}', r"f\.jsonl:3: role must be one of system, .*, got 7"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', r"f\.jsonl:3: role must be one of .*, got 'robot'"),
        (b'{"text": "a\\ud800b"}', r"f\.jsonl:3: text holds \\ud800, a lone surrogate"),
        (b'{"messages": [{"role": "assistant", "content": "\\udc00"}]}', r"f\.jsonl:3: content holds \\udc00, a lone"),
        (b'{"text": ' + b"[" * 99999 + b"]" * 99999 + b"}", r"f\.jsonl:3: malformed JSON \(nested too deep\)"),
        (b'{"text": ' + b"9" * 5000 + b"}", r"f\.jsonl:3: malformed JSON \(a number of too many digits\)"),
        (b'{"text": "ab", "answer": "c"}', r"f\.jsonl:3: ambiguous, found keys \['answer', 'text'\]"),
        (b'{"prompt": "a", "response": "b", "question": "c", "answer": "d"}', r"f\.jsonl:3: ambiguous, found keys"),
        (b'{"prompt": "a", "response": "b", "completion": "c"}', r"f\.jsonl:3: ambiguous, found keys"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    (tmp_path / "f.jsonl").write_bytes(b'{"prompt": "a", "response": "b"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        load_examples(tmp_path / "f.jsonl", CHAT, 100)


def test_response_truncated_to_nothing():
    with pytest.raises(
        UserError, match="f:9: nothing of the response is left at max_length=8: the prompt alone takes 20 "
    ):
        encode({"prompt": "a" * 20, "response": "b"}, PLAIN, "f:9", 8)


def test_every_target_ignored():
    tokenizer = make_tokenizer(chat=False)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"f:9: every target is ignored: no token of a has a token before it"):
        encode({"text": "a"}, tokenizer, "f:9", 8)


def test_conversation_without_a_chat_template():
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(UserError, match=r"f:9: the tokenizer has no chat template.*got 4 messages"):
        encode({"messages": messages}, PLAIN, "f:9", 100)


def test_template_that_rewrites_earlier_turns():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(UserError, match="f:9: the chat template rewrites earlier turns"):
        encode({"messages": messages}, tokenizer, "f:9", 100)


def test_template_that_refuses_the_row():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="f:9: the tokenizer's chat template refuses the conversation: roles must"):
        encode({"prompt": "a", "response": "b"}, tokenizer, "f:9", 100)


def test_template_that_breaks():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content / 0 }}"
    with pytest.raises(UserError, match="f:9: the tokenizer's chat template refuses the conversation: "):
        encode({"prompt": "a", "response": "b"}, tokenizer, "f:9", 100)


def test_template_that_asks_for_the_time_is_told_a_fixed_date():
    tokenizer = make_tokenizer()
    body = "\n  {% if True %}{{ strftime_now('%d %b %Y') }} {% endif %}\n" + tokenizer.chat_template
    tokenizer.chat_template = body
    fixed = encode({"prompt": "a", "response": "b"}, tokenizer, "f:1", 200)
    tokenizer.chat_template = body.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    assert encode({"prompt": "a", "response": "b"}, tokenizer, "f:1", 200) == fixed
    tokenizer.chat_template = body.replace("%d %b %Y", "%A, %-d %B %y %H:%M %q")
    assert "Friday, 26 July 24 00:00 %q" in tokenizer.decode(
        encode({"prompt": "a", "response": "b"}, tokenizer, "f:1", 200).input_ids
    )


@pytest.mark.parametrize(("make", "kind"), [(Path.mkdir, "a folder"), (os.mkfifo, "a pipe")])
def test_data_that_is_no_regular_file(tmp_path, make, kind):
    make(tmp_path / "f.jsonl")
    with pytest.raises(UserError, match=rf"f\.jsonl is {kind}: expected a regular file"):
        load_examples(tmp_path / "f.jsonl", CHAT, 100)
    with pytest.raises(UserError, match="/dev/zero is a device: expected a regular file"):
        load_examples("/dev/zero", CHAT, 100)


def test_overlap_names_the_rows(caplog):
    def example(where, prompt, response):
        return encode({"prompt": prompt, "response": response}, PLAIN, where, 100)

    forget = [example("f:1", "Who?", "Me"), example("f:2", "What?", "That")]
    retain = [example("r:1", "When?", "Now"), example("r:2", " who? ", "You"), example("r:3", "Who?", "Me")]
    with caplog.at_level(logging.WARNING):
        assert warn_about_overlap(forget, retain) == [("f:1", "r:2"), ("f:1", "r:3")]
    assert "forget and retain overlap in 2 rows" in caplog.text
    assert "f:1 = r:2, f:1 = r:3" in caplog.text
    caplog.clear()
    assert warn_about_overlap(forget, retain[:1]) == []
    assert caplog.text == ""


def test_byte_order_mark_is_not_malformed(tmp_path):
    (tmp_path / "f.jsonl").write_text(json.dumps({"text": "abc"}), encoding="utf-8-sig")
    assert load_examples(tmp_path / "f.jsonl", PLAIN, 100)[0].response == "abc"


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT])
def test_alternate_answer_of_the_row_or_the_default(tmp_path, tokenizer):
    turns = [("user", "A?"), ("assistant", "first"), ("user", "C?"), ("assistant", "D.")]
    rows = [{"question": "A?", "answer": "B.", "alternate": "No idea."}, {"prompt": "A?", "response": "B."}]
    rows.append({"prompt": "A?", "completion": " B."})
    if tokenizer is CHAT:
        rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
        question, answer = ([{"role": role, "content": "text"}] for role in ("user", "assistant"))
        rows.append({"prompt": question, "completion": answer})
    own, default, *chat = load_examples(write_rows(tmp_path / "f.jsonl", rows), tokenizer, 200, alternate="Who knows?")
    for example, answer in ((own, "No idea."), (default, "Who knows?"), *((e, "Who knows?") for e in chat)):
        other = example.alternate
        assert other.id == f"{example.id} (alternate)"
        assert other.prompt_ids == example.prompt_ids
        targets = [i for i in other.labels if i != IGNORE_INDEX]
        # of a conversation only the last answer is another one
        assert tokenizer.decode(targets).strip().removesuffix("<|end|>") == answer
    assert load_examples(tmp_path / "f.jsonl", tokenizer, 200)[0].alternate is None


def test_text_has_no_alternate(tmp_path):
    path = write_rows(tmp_path / "f.jsonl", [{"text": "some words"}])
    with pytest.raises(UserError, match=r"f\.jsonl:1: a text row has no prompt that another answer could follow"):
        load_examples(path, PLAIN, 100, alternate="No.")
