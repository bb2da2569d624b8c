"""Files and folders that appear on the disk whole or not at all.

A folder is written under a temporary name, flushed to the disk and renamed: whoever sees the final name sees
everything, whatever moment the process or the machine died at.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from simnpo.errors import RunError

TEMPORARY = ".simnpo-incomplete-"


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`, replacing it, when the block ends, and is removed when the block fails.

    Raises:
        RunError: the disk is full or not writable, or `path` holds a file that the new folder does not have and that
            would be lost; `path` is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
        strange = sorted(_names(path) - _names(temporary))
        if strange:
            raise RunError(f"{path} would be replaced, and it holds {strange[0]}, which was not written by this run: "
                           "move it away, then continue with --resume")  # fmt: skip
        remove_folder(path)
        temporary.rename(path)
        _flush(path.parent)
    # torch and safetensors report a failed write in their own ways
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(f"cannot write {path}: {error}; checkpoints written before are intact") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder such that a half-removed one never has its name."""
    if path.exists():
        leaving = path.with_name(f"{TEMPORARY}removed-{path.name}")
        shutil.rmtree(leaving, ignore_errors=True)
        path.rename(leaving)
        shutil.rmtree(leaving)


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; several processes may write the same one, and the last of them wins.

    Raises:
        RunError: the disk is full or not writable; `path` is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid4().hex}")
    try:
        temporary.write_bytes(data)
        _flush(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON.

    Raises:
        RunError: a number in it is NaN or infinite, which JSON has no name for; or as `write_bytes`.
    """
    write_text(path, json_text(path, value, indent=2) + "\n")


def append_json(path: Path, value: Any) -> None:
    """Adds a line of JSON to a file.

    Raises:
        RunError: as `write_json`.
    """
    line = json_text(path, value) + "\n"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}; checkpoints written before are intact") from error


def json_text(path: Path, value: Any, indent: int | None = None) -> str:
    """A value as JSON, which `path` is to hold.

    Raises:
        RunError: a number in it is NaN or infinite; names where it stands.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        where = next(_not_finite(value, ""), None)
        if where is None:
            raise
        raise RunError(f"{path.name}: {where}, so it is not written: the model's numbers are not finite") from error


def _not_finite(value: Any, name: str) -> Iterator[str]:
    """The places of a JSON value that are NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name.removeprefix('.')} is {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, one in items:
        yield from _not_finite(one, f"{name}.{key}")


def remove_leftovers(folder: Path, older_than: float = 0.0) -> None:
    """Removes what a killed process left half-written.

    Args:
        older_than: seconds since it was last written to; in a folder that others write to, longer than a write takes.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        with suppress(FileNotFoundError):  # one that its writer has just finished
            if not older_than or time.time() - path.stat().st_mtime > older_than:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
