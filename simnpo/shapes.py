"""What a JSON value must look like, and JSON files that are read to be looked at.

A shape is written like the value: `str`, `bool`, `int`, `float` (any number), `object` (anything), `[shape]` a list,
`{"key": shape}` an object with that key and maybe others, `{"key?": shape}` one that may lack it, `{str: shape}` one
with any keys, and `(shape, None)` a value or null. A number is finite, and small enough to compute with.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simnpo.config import LARGEST
from simnpo.errors import UserError
from simnpo.rows import check_file, parse
from simnpo.text import shorten

NAMES = {str: "a string", bool: "true or false", int: "an integer", float: "a finite number"}


def read_json(path: Path, shape: Any) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: it is no JSON, or of another shape; names the file and what is wrong with it.
    """
    value = parse(read_text(path), str(path))
    check(value, shape, str(path))
    return value


def read_lines(path: Path, shape: Any) -> list[Any]:
    """The values of a JSON Lines file that may end in half a line, which a killed run leaves.

    Raises:
        UserError: as `read_json`; names the line too.
    """
    values = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        values.append(parse(line, f"{path}:{number}"))
        check(values[-1], shape, f"{path}:{number}")
    return values


def read_text(path: Path) -> str:
    """A regular file's text.

    Raises:
        UserError: it is no regular file, or not UTF-8.
    """
    check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error


def check(value: Any, shape: Any, where: str) -> None:
    """Raises `UserError` at the first place where a value is not of a shape, named after `where`."""
    for place, part, expected in _misfits(value, shape, ()):
        name = ".".join(map(str, place))
        raise UserError(f"{where}: {f'{name} ' if name else ''}must be {expected}, got {shorten(_shown(part))}")


def _misfits(value: Any, shape: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any, str]]:
    if isinstance(shape, tuple):
        if value is not None:
            yield from _misfits(value, shape[0], place)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield place, value, "a list"
            return
        for i, part in enumerate(value):
            yield from _misfits(part, shape[0], (*place, i))
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield place, value, "an object"
            return
        for key, inner in shape.items():
            if key is str:
                for name, part in value.items():
                    yield from _misfits(part, inner, (*place, name))
            elif key.removesuffix("?") in value:
                yield from _misfits(value[key.removesuffix("?")], inner, (*place, key.removesuffix("?")))
            elif not key.endswith("?"):
                yield (*place, key), None, "there"
    elif shape is not object and not _is(value, shape):
        yield place, value, NAMES[shape]


def _is(value: Any, kind: type) -> bool:
    if kind in (int, float):
        number = (int,) if kind is int else (int, float)
        # NaN is not smaller than anything
        return isinstance(value, number) and not isinstance(value, bool) and abs(value) <= LARGEST
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    return type(value).__name__ if isinstance(value, (dict, list)) else repr(value)
