"""Rows of JSON Lines, read and checked. Every mistake is reported with its file and line."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simnpo.errors import UserError
from simnpo.text import shorten

PAIRS = (("prompt", "response"), ("question", "answer"))
EXPECTED_KEYS = "prompt and response (or completion), question and answer, messages, or text"
FORMAT_KEYS = {"text", "messages", "completion", *(key for pair in PAIRS for key in pair)}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("name:line", row) of each line that is not blank.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is no regular file, or a line is no JSON object; names file and line.
    """
    check_file(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error})") from error
            if not text:
                continue
            row = parse(text, f"{path}:{number}")
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, got {shorten(text)}")
            yield f"{path.name}:{number}", row


def check_file(path: Path) -> None:
    """Refuses what would not be read to an end, or not twice: a folder, a pipe, a device."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in KINDS.items() if is_kind(mode)), "something else")
        raise UserError(f"{path} is {kind}: expected a regular file")


def parse(text: str, where: str) -> Any:
    """Reads a JSON text; `where` stands in the error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: malformed JSON ({error}): {shorten(text)}") from error
    except RecursionError:
        raise UserError(f"{where}: malformed JSON (nested too deep): {shorten(text)}") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise UserError(f"{where}: malformed JSON (a number of too many digits): {shorten(text)}") from error


def check_format(row: dict[str, Any], where: str) -> None:
    """Refuses a row that two formats claim, for what is a target would be a guess."""
    found = sorted(FORMAT_KEYS & row.keys())
    complete = [pair for pair in PAIRS if set(pair) <= row.keys()]
    complete += [(key,) for key in ("messages", "completion") if key in row]
    if ("text" in row and len(found) > 1) or len(complete) > 1:
        raise UserError(f"{where}: ambiguous, found keys {found}, expected one of {EXPECTED_KEYS}")


def turns(messages: Any, where: str) -> list[dict[str, str]]:
    """A conversation: objects with a role and a content."""
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in messages
    ):
        got = shorten(str(messages))
        raise UserError(f"{where}: messages must be a list of objects with role and content, got {got}")
    for message in messages:
        role = message["role"]
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{where}: role must be one of {', '.join(ROLES)}, got {shorten(repr(role))}")
        string(message, "content", where, may_be_empty=role != "assistant")
    return messages


def string(row: dict[str, Any], key: str, where: str, *, may_be_empty: bool = False) -> str:
    """The text under a key, one that can be written as UTF-8."""
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be a string, got {type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise UserError(f"{where}: {key} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise UserError(f"{where}: {key} holds {half}, a lone surrogate, which is half of a character") from None
    return value
