"""JSON Lines in, tokenised examples out. Every mistake in a file is reported with its line.

A row holds one of: `prompt` and `response`; `question` and `answer`; `messages` (role/content, loss on every assistant
turn, its end-of-turn token included); `text` (every token is a target); TRL's `prompt` and `completion` (strings or
lists of messages, tokenised as its SFTTrainer does, loss on the completion). Beside them `alternate`, another last
answer, is read where a method wants one.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from simnpo.errors import UserError

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
PAIRS = (("prompt", "response"), ("question", "answer"))
EXPECTED_KEYS = "prompt and response (or completion), question and answer, messages, or text"
# Llama 3's template prints today's date; a run that is resumed tomorrow must see the same tokens
TEMPLATE_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Example:
    """One sequence.

    Attributes:
        id: file name and line, "forget.jsonl:12".
        prompt, response: what a person reads, of the last turn; `prompt` is empty for a `text` row.
        input_ids: token ids, at most max_length, or as many in each piece of a document.
        labels: unshifted, as long as input_ids, IGNORE_INDEX where not a target.
        alternate: the same with another answer, where a method wants one.
        piece_lengths: tokens of each piece of a document that was longer than the context: the pieces stand one after
            another, and none attends to another (`simnpo.pieces`). Empty: it was not split.
    """

    id: str
    prompt: str
    response: str
    input_ids: list[int]
    labels: list[int]
    alternate: "Example | None" = None
    piece_lengths: tuple[int, ...] = ()

    @property
    def num_targets(self) -> int:
        """Targets that count, after the shift (the first token has nothing before it)."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the last run of targets: what `generate` gets to write this example's response.

        None of a document that was split: its response may not fit into the context.
        """
        if self.piece_lengths:
            return []
        end = len(self.labels)
        while end and self.labels[end - 1] == IGNORE_INDEX:
            end -= 1
        while end and self.labels[end - 1] != IGNORE_INDEX:
            end -= 1
        return self.input_ids[:end]


def load_examples(
    path: str | Path, tokenizer: Any, max_length: int | None, alternate: str | None = None
) -> list[Example]:
    """Reads, checks and tokenises a JSON Lines file.

    Args:
        path: UTF-8, one JSON object per line; blank lines are skipped.
        tokenizer: of transformers; its chat template is used if it has one.
        max_length: tokens of a sequence; what is longer is cut at the end, with a warning. None: nothing is cut.
        alternate: gives every example an alternate: the row's own, or this answer. None: no example has one.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file is empty, or a row is malformed; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    examples, cut = [], []
    for where, row in read_rows(path):
        example = encode(row, tokenizer, where, max_length)
        if alternate is not None:
            answer = _string(row, "alternate", where) if "alternate" in row else alternate
            example = replace(example, alternate=_encode_alternate(row, answer, tokenizer, where, max_length))
        examples.append(example)
        if len(example.input_ids) == max_length:
            cut.append(where)
    if not examples:
        raise UserError(f"{path} is empty: expected JSON Lines with {EXPECTED_KEYS}")
    if cut:
        logger.warning("%d of %d rows of %s reach max_length=%d and may be cut: %s",
                       len(cut), len(examples), path, max_length, _some(cut))  # fmt: skip
    return examples


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("name:line", row) of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}:{number}"
            try:
                text = line.decode("utf-8-sig").strip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 ({error})") from error
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: malformed JSON ({error}): {_shorten(text)}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, got {_shorten(text)}")
            yield where, row


def encode(row: dict[str, Any], tokenizer: Any, where: str, max_length: int | None) -> Example:
    """Tokenises one row. `where` ("file:line") becomes the example's id and stands in every error.

    Args:
        max_length: tokens kept, from the start; None: all.

    Raises:
        UserError: keys are missing, a response is empty, without a token or lost to max_length, or no token would be a
            target.
    """
    if "text" in row:
        text = _string(row, "text", where)
        ids = [*_bos(tokenizer), *_tokenize(tokenizer, text), *_eos(tokenizer)]
        prompt, response, segments = "", text, [(ids, True)]
    elif "completion" in row:
        prompt, response, segments = _prompt_completion(row, tokenizer, where)
    else:
        messages = _messages(row, where)
        prompt = next((m["content"] for m in reversed(messages[:-1]) if m["role"] == "user"), "")
        response = messages[-1]["content"]
        if getattr(tokenizer, "chat_template", None):
            segments = _chat_segments(messages, tokenizer, where)
        elif len(messages) == 2:
            segments = _plain_segments(prompt, response, tokenizer)
        else:
            raise UserError(
                f"{where}: the tokenizer has no chat template, so a row can hold one prompt and one response, "
                f"got {len(messages)} messages"
            )
    input_ids = [i for ids, _ in segments for i in ids]
    labels = [i if is_target else IGNORE_INDEX for ids, is_target in segments for i in ids]
    example = Example(where, prompt, response, input_ids[:max_length], labels[:max_length])
    if example.num_targets == 0:
        if max_length is not None and len(input_ids) > max_length:
            first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
            raise UserError(
                f"{where}: nothing of the response is left at max_length={max_length}: the prompt alone takes {first} "
                "tokens; raise max_length or shorten the prompt"
            )
        raise UserError(f"{where}: every target is ignored: no token of {_shorten(response)} has a token before it")
    if num_own_targets(example, tokenizer) == 0:
        if example.labels[0] not in (IGNORE_INDEX, *tokenizer.all_special_ids):
            raise UserError(f"{where}: the only token of {_shorten(response)} has no token before it")
        raise UserError(f"{where}: the tokenizer makes no token of {response!r}")
    return example


def num_own_targets(example: Example, tokenizer: Any) -> int:
    """Targets that spell the response: all but the special tokens that end it."""
    targets = [label for label in example.labels[1:] if label != IGNORE_INDEX]
    special = set(tokenizer.all_special_ids)
    while targets and targets[-1] in special:
        targets.pop()
    return len(targets)


def _encode_alternate(row: dict[str, Any], answer: str, tokenizer: Any, where: str, max_length: int | None) -> Example:
    """The row with `answer` as its last one, and nothing but it as target."""
    if "text" in row:
        raise UserError(
            f"{where}: a text row has no prompt that another answer could follow; write prompt and response, or choose "
            "a method without alternate answers (simnpo unlearn --list-methods)"
        )
    if isinstance(completion := row.get("completion"), str):
        white_space = completion[: len(completion) - len(completion.lstrip())]
        other = row | {"completion": white_space + answer}
    elif completion is not None:
        other = row | {"completion": [{"role": "assistant", "content": answer}]}
    else:
        other = {"messages": [*_messages(row, where)[:-1], {"role": "assistant", "content": answer}]}
    example = encode(other, tokenizer, f"{where} (alternate)", max_length)
    start = len(example.prompt_ids)
    labels = [IGNORE_INDEX if i < start else label for i, label in enumerate(example.labels)]
    return replace(example, labels=labels)


def _messages(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The row as a conversation that ends with an assistant turn."""
    if "messages" not in row:
        for prompt_key, response_key in PAIRS:
            if prompt_key in row and response_key in row:
                prompt, response = _string(row, prompt_key, where, may_be_empty=True), _string(row, response_key, where)
                return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        raise UserError(f"{where}: found keys {sorted(row)}, expected {EXPECTED_KEYS}")
    messages = _turns(row["messages"], where)
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{where}: every target is ignored: messages has no assistant turn")
    return messages


def _prompt_completion(
    row: dict[str, Any], tokenizer: Any, where: str
) -> tuple[str, str, list[tuple[list[int], bool]]]:
    """TRL's row: plain text without a chat template, or messages with one; a target is what the completion adds."""
    prompt, completion = row.get("prompt", ""), row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list) and completion:
        turns = _turns([*prompt, *completion], where)
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"{where}: the tokenizer has no chat template, so prompt and completion must be strings")
        before = _tokenize(tokenizer, _render(turns[: len(prompt)], tokenizer, where, add_generation_prompt=True))
        whole = _tokenize(tokenizer, _render(turns, tokenizer, where, add_generation_prompt=False))
        prompt, completion = prompt[-1]["content"] if prompt else "", completion[-1]["content"]
    else:
        prompt, completion = (
            _string({"prompt": prompt}, "prompt", where, may_be_empty=True),
            _string(row, "completion", where),
        )
        end = tokenizer.eos_token or ""
        text = prompt + completion + ("" if completion.endswith(end) else end)
        before, whole = (tokenizer(text, verbose=False)["input_ids"] for text in (prompt, text))
    # tokens can merge across the boundary; a merged one belongs to the completion
    start = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), min(len(before), len(whole)))
    return prompt, completion, [(whole[:start], False), (whole[start:], True)]


def _turns(messages: Any, where: str) -> list[dict[str, str]]:
    turns = messages if isinstance(messages, list) else [None]
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
        got = _shorten(str(messages))
        raise UserError(f"{where}: messages must be a list of objects with role and content, got {got}")
    for message in messages:
        _string(message, "content", where, may_be_empty=message["role"] != "assistant")
    return messages


def _string(row: dict[str, Any], key: str, where: str, *, may_be_empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be a string, got {type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise UserError(f"{where}: {key} is empty")
    return value


# Tokens


def _plain_segments(prompt: str, response: str, tokenizer: Any) -> list[tuple[list[int], bool]]:
    """prompt, one space unless there is white space already, response, end of sequence."""
    glue = "" if not prompt or prompt[-1].isspace() or response[0].isspace() else " "
    return [
        (_bos(tokenizer), False),
        *_tokenize_pieces([(prompt, False), (glue + response, True)], tokenizer),
        (_eos(tokenizer), True),
    ]


def _chat_segments(messages: list[dict[str, str]], tokenizer: Any, where: str) -> list[tuple[list[int], bool]]:
    """The conversation through the chat template, cut where an assistant turn starts and where it ends.

    A turn ends with its last mark that is not white space: what a template writes after the end-of-turn token, often a
    line break, is never the model's to write.
    """
    pieces: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for upto, is_target in ((messages[:i], False), (messages[: i + 1], True)):
            text = _render(upto, tokenizer, where, add_generation_prompt=not is_target)
            if is_target:
                text = text.rstrip()
            if not text.startswith(done):
                raise UserError(
                    f"{where}: the chat template rewrites earlier turns of a conversation once message {i + 1} is "
                    "there: write one row per assistant turn"
                )
            pieces.append((text[len(done) :], is_target))
            done = text
    return _tokenize_pieces(pieces, tokenizer)


def _render(messages: list[dict[str, str]], tokenizer: Any, where: str, *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=TEMPLATE_DATE
        )
    except TemplateError as error:
        raise UserError(f"{where}: the tokenizer's chat template refuses the conversation: {error}") from error


def _tokenize_pieces(pieces: list[tuple[str, bool]], tokenizer: Any) -> list[tuple[list[int], bool]]:
    """Token ids of each piece, such that the ids of a prompt are those `generate` would be given.

    Tokenising a piece by itself would put a sentencepiece tokenizer's word mark at its start, so the text is tokenised
    as a whole, and the piece by itself only where the whole would merge it with the one before.
    """
    segments, text, before = [], "", []
    for piece, is_target in pieces:
        text += piece
        whole = _tokenize(tokenizer, text)
        ids = whole[len(before) :] if whole[: len(before)] == before else _tokenize(tokenizer, piece)
        segments.append((ids, is_target))
        before = before + ids
    return segments


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    # without special tokens: a chat template writes its own, and plain text gets them from _bos and _eos
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _bos(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, for tokenizers that put one."""
    return [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]


def _eos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


# Two sets


def warn_about_overlap(forget: list[Example], retain: list[Example]) -> list[tuple[str, str]]:
    """Warns about rows that stand in both sets, where the two terms pull against each other.

    Rows overlap when their prompts (for `text` rows: their texts) are equal but for case and white space.

    Returns:
        (forget id, retain id) of every overlap.
    """
    in_retain = defaultdict(list)
    for example in retain:
        in_retain[_key(example)].append(example.id)
    pairs = [(example.id, other) for example in forget for other in in_retain[_key(example)]]
    if pairs:
        named = _some([f"{forget_id} = {retain_id}" for forget_id, retain_id in pairs])
        logger.warning("forget and retain overlap in %d rows, which are pushed both ways: %s", len(pairs), named)
    return pairs


def _key(example: Example) -> str:
    return re.sub(r"\s+", " ", example.prompt or example.response).strip().casefold()


def _some(names: list[str], at_most: int = 10) -> str:
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def _shorten(text: str, at_most: int = 80) -> str:
    return text if len(text) <= at_most else text[: at_most - 1] + "…"
