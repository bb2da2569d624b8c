"""Files and folders that appear on the disk whole or not at all.

A folder is written under a temporary name, flushed to the disk and renamed: whoever sees the final name sees
everything, whatever moment the process or the machine died at.
"""

import json
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

TEMPORARY = ".incomplete-"


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`, replacing it, when the block ends, and is removed when the block fails.

    Raises:
        RunError: the disk is full or not writable; `path` is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
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


def write_bytes(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Writes a file whole or not at all.

    Args:
        shared: another process may write it at the same time; what one leaves that is killed is then not written over.

    Raises:
        RunError: the disk is full or not writable; `path` is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid4().hex if shared else ''}{path.name}")
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
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
