"""JSON Lines in, tokenised examples out. Every mistake in a file is reported with its line.

A row holds one of: `prompt` and `response`; `question` and `answer`; `messages` (role/content, loss on every assistant
turn, its end-of-turn token included); `text` (every token is a target); TRL's `prompt` and `completion` (strings or
lists of messages, tokenised as its SFTTrainer does, loss on the completion). Beside them `alternate`, another last
answer, is read where a method wants one.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from simnpo.errors import UserError
from simnpo.rows import EXPECTED_KEYS, PAIRS, check_format, read_rows, string, turns
from simnpo.text import shorten

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
# Llama 3's template prints today's date; a run that is resumed tomorrow must see the same tokens
TEMPLATE_DATE = "26 Jul 2024"
# what a template's own call for the time may ask of that day, a Friday
DATE_PARTS = {
    "-d": "26", "-m": "7", "d": "26", "e": "26", "b": "Jul", "h": "Jul", "B": "July", "m": "07", "Y": "2024", "y": "24",
    "a": "Fri", "A": "Friday", "F": "2024-07-26", "D": "07/26/24", "j": "208", "H": "00", "I": "12", "M": "00",
    "S": "00", "p": "AM", "T": "00:00:00", "Z": "", "z": "",
}  # fmt: skip
# a text of more characters than this for each token that is kept is first tokenised without its end
CHARACTERS_PER_TOKEN, SPARE_TOKENS = 64, 1024


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
        is_cut: tokens beyond max_length were left out; `response` is then what is left of it.
    """

    id: str
    prompt: str
    response: str
    input_ids: list[int]
    labels: list[int]
    alternate: "Example | None" = None
    piece_lengths: tuple[int, ...] = ()
    is_cut: bool = False

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
    examples, cut = [], []
    for where, row in read_rows(path):
        example = encode(row, tokenizer, where, max_length)
        if alternate is not None:
            answer = string(row, "alternate", where) if "alternate" in row else alternate
            other = _encode_alternate(row, answer, tokenizer, where, max_length)
            example = replace(example, alternate=other, is_cut=example.is_cut or other.is_cut)
        examples.append(example)
        if example.is_cut:
            cut.append(where)
    if not examples:
        raise UserError(f"{path} is empty: expected JSON Lines with {EXPECTED_KEYS}")
    if cut:
        logger.warning("%d of %d rows of %s are cut at max_length=%d: %s",
                       len(cut), len(examples), path, max_length, _some(cut))  # fmt: skip
    return examples


def encode(row: dict[str, Any], tokenizer: Any, where: str, max_length: int | None) -> Example:
    """Tokenises one row. `where` ("file:line") becomes the example's id and stands in every error.

    Args:
        max_length: tokens kept, from the start; None: all.

    Raises:
        UserError: keys are missing, a response is empty, without a token or lost to max_length, or no token would be a
            target.
    """
    check_format(row, where)
    if "text" in row:
        text = string(row, "text", where)
        ids = [*_bos(tokenizer), *_tokenize(tokenizer, text, max_length), *_eos(tokenizer)]
        spoken, segments = [("", text)], [(ids, True)]
    elif "completion" in row:
        prompt, response, segments = _prompt_completion(row, tokenizer, where, max_length)
        spoken = [(prompt, response)]
    else:
        messages = _messages(row, where)
        spoken = _spoken(messages)
        if getattr(tokenizer, "chat_template", None):
            segments = _tokenize_pieces(_chat_pieces(messages, tokenizer, where), tokenizer, max_length)
        elif len(messages) == 2:
            segments = _plain_segments(*spoken[-1], tokenizer, max_length)
        else:
            raise UserError(
                f"{where}: the tokenizer has no chat template, so a row can hold one prompt and one response, "
                f"got {len(messages)} messages"
            )
    example = _kept(spoken, segments, tokenizer, where, max_length)
    if example.num_targets == 0:
        if example.is_cut:
            starts = [start for start, is_target in _starts(segments) if is_target]
            takes = f"{starts[0]}" if starts else f"more than {max_length}"
            raise UserError(
                f"{where}: nothing of the response is left at max_length={max_length}: the prompt alone takes {takes} "
                "tokens; raise max_length or shorten the prompt"
            )
        response = shorten(spoken[-1][1])
        raise UserError(f"{where}: every target is ignored: no token of {response} has a token before it")
    if num_own_targets(example, tokenizer) == 0:
        if example.labels[0] not in (IGNORE_INDEX, *tokenizer.all_special_ids):
            raise UserError(f"{where}: the only token of {shorten(spoken[-1][1])} has no token before it")
        raise UserError(f"{where}: the tokenizer makes no token of {shorten(repr(spoken[-1][1]))}")
    return example


Segment = tuple[list[int], bool]  # token ids, and whether they are targets


def _kept(
    spoken: list[tuple[str, str]], segments: list[Segment], tokenizer: Any, where: str, max_length: int | None
) -> Example:
    """The first max_length tokens, with the last prompt and answer that are among them.

    Args:
        spoken: prompt and answer of every assistant turn, one for each segment of targets.
    """
    input_ids = [i for ids, _ in segments for i in ids]
    labels = [i if is_target else IGNORE_INDEX for ids, is_target in segments for i in ids]
    is_cut = max_length is not None and len(input_ids) > max_length
    turns_left = [
        start for start, is_target in _starts(segments) if is_target and (max_length is None or start < max_length)
    ]
    prompt, response = spoken[: max(1, len(turns_left))][-1]
    if is_cut:
        labels = labels[:max_length]
        last = [label for label in labels[turns_left[-1] if turns_left else max_length :] if label != IGNORE_INDEX]
        # scores compare with what was read, not with what the file goes on with
        response = tokenizer.decode(last, skip_special_tokens=True).strip()
    return Example(where, prompt, response, input_ids[:max_length], labels, is_cut=is_cut)


def _starts(segments: list[Segment]) -> Iterator[tuple[int, bool]]:
    """Where each segment starts, and whether it is one of targets."""
    return zip(accumulate((len(ids) for ids, _ in segments), initial=0), (is_target for _, is_target in segments))


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
                prompt, response = string(row, prompt_key, where, may_be_empty=True), string(row, response_key, where)
                return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        raise UserError(f"{where}: found keys {sorted(row)}, expected {EXPECTED_KEYS}")
    messages = turns(row["messages"], where)
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{where}: every target is ignored: messages has no assistant turn")
    return messages


def _prompt_completion(
    row: dict[str, Any], tokenizer: Any, where: str, max_length: int | None
) -> tuple[str, str, list[Segment]]:
    """TRL's row: plain text without a chat template, or messages with one; a target is what the completion adds."""
    prompt, completion = row.get("prompt", ""), row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list) and completion:
        messages = turns([*prompt, *completion], where)
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"{where}: the tokenizer has no chat template, so prompt and completion must be strings")
        before, whole = (
            _tokenize(tokenizer, _render(some, tokenizer, where, add_generation_prompt=is_prompt), max_length)
            for some, is_prompt in ((messages[: len(prompt)], True), (messages, False))
        )
        prompt, completion = prompt[-1]["content"] if prompt else "", completion[-1]["content"]
    else:
        prompt, completion = (
            string({"prompt": prompt}, "prompt", where, may_be_empty=True),
            string(row, "completion", where),
        )
        end = tokenizer.eos_token or ""
        text = prompt + completion + ("" if completion.endswith(end) else end)
        before, whole = (_tokenize(tokenizer, some, max_length, special=True) for some in (prompt, text))
    # tokens can merge across the boundary; a merged one belongs to the completion
    start = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), min(len(before), len(whole)))
    return prompt, completion, [(whole[:start], False), (whole[start:], True)]


def _spoken(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    """What every assistant turn answers, the last message of the user before it, and the turn."""
    spoken, prompt = [], ""
    for message in messages:
        if message["role"] == "assistant":
            spoken.append((prompt, message["content"]))
        elif message["role"] == "user":
            prompt = message["content"]
    return spoken


# Tokens


def _plain_segments(prompt: str, response: str, tokenizer: Any, max_length: int | None) -> list[Segment]:
    """prompt, one space unless there is white space already, response, end of sequence."""
    glue = "" if not prompt or prompt[-1].isspace() or response[0].isspace() else " "
    return [
        (_bos(tokenizer), False),
        *_tokenize_pieces([(prompt, False), (glue + response, True)], tokenizer, max_length),
        (_eos(tokenizer), True),
    ]


def _chat_pieces(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Iterator[tuple[str, bool]]:
    """The conversation through the chat template, cut where an assistant turn starts and where it ends.

    A turn ends with its last mark that is not white space: what a template writes after the end-of-turn token, often a
    line break, is never the model's to write.
    """
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
            yield text[len(done) :], is_target
            done = text


def _render(messages: list[dict[str, str]], tokenizer: Any, where: str, *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=_timeless_template(tokenizer), tokenize=False,
            add_generation_prompt=add_generation_prompt, date_string=TEMPLATE_DATE,
        )  # fmt: skip
    except Exception as error:  # a template is a program: it may divide by zero, or call what is not there
        raise UserError(f"{where}: the tokenizer's chat template refuses the conversation: {error}") from error


def _timeless_template(tokenizer: Any) -> str | None:
    """The chat template with a clock of its own that has stopped, where it asks for the time; None: the template as it
    is. transformers hands a template no function that a caller passes, so this one is written in the template.
    """
    if "strftime_now" not in str(tokenizer.chat_template):
        return None
    parts = "".join(f"|replace('%{part}', '{value}')" for part, value in DATE_PARTS.items())
    # the line break belongs to the tag: transformers trims it
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}\n{tokenizer.get_chat_template()}"


def _tokenize_pieces(pieces: Iterable[tuple[str, bool]], tokenizer: Any, max_length: int | None) -> list[Segment]:
    """Token ids of each piece, such that the ids of a prompt are those `generate` would be given.

    Tokenising a piece by itself would put a sentencepiece tokenizer's word mark at its start, so the text is tokenised
    as a whole, and the piece by itself only where the whole would merge it with the one before. What is longer than
    max_length may be left out.
    """
    segments: list[Segment] = []
    text, before = "", []
    for piece, is_target in pieces:
        if max_length is not None and len(before) > max_length:
            break
        text += piece
        whole = _tokenize(tokenizer, text, max_length)
        ids = whole[len(before) :] if whole[: len(before)] == before else _tokenize(tokenizer, piece, max_length)
        segments.append((ids, is_target))
        before = before + ids
    return segments


def _tokenize(tokenizer: Any, text: str, max_length: int | None, *, special: bool = False) -> list[int]:
    """Token ids of a text; of one far longer than max_length those of its start, more than max_length of them.

    Args:
        special: with special tokens around it. A chat template writes its own, and plain text gets them from _bos and
            _eos.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    if max_length is not None:
        # a line of 50 MB would take minutes and GBs
        start = text[: CHARACTERS_PER_TOKEN * (max_length + SPARE_TOKENS)]
        if len(start) < len(text) and len(found := ids(start)) > max_length + SPARE_TOKENS:
            return found
    return ids(text)


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
