"""Results on the disk: results.json for programs, results.md for people, answers.jsonl with every answer."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import simnpo
from simnpo.errors import UserError, reason
from simnpo.text import one_line
from simnpo.training.disk import write_json, write_text

WRITTEN = ("results.json", "results.md", "answers.jsonl", "curves.png")


def open_folder(output: str) -> Path:
    """Makes the folder of the results, before any work.

    Raises:
        UserError: it cannot be made, or holds files of these names that are not an earlier evaluation's or attack's.
    """
    if not output.strip():
        raise UserError("output must be a folder, got an empty name")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output must be a folder, and {output} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot make the folder {output}: {reason(error)}") from error
    found = [name for name in WRITTEN if (folder / name).exists()]
    if found and not _is_ours(folder / "results.json"):
        raise UserError(f"output: {folder / found[0]} was not written by simnpo: choose another --output, or remove it")
    return folder


def _is_ours(path: Path) -> bool:
    """Whether a results.json is one of an evaluation or an attack."""
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError):
        return False
    return isinstance(results, dict) and ("benchmark" in results or "attack" in results)


def versions(*more: str) -> dict[str, str]:
    """Of this package and those that decide the numbers."""
    names = ("torch", "transformers", "rouge-score", "scipy", *more)
    return {"simnpo": simnpo.__version__, **{name: importlib.metadata.version(name) for name in names}}


def write_results(folder: Path, results: dict[str, Any], page: str, answers: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes results.json, results.md and, if there are any, answers.jsonl; each whole or not at all.

    Raises:
        RunError: the disk is full or not writable.
    """
    if answers:
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        write_text(folder / "answers.jsonl", "".join(lines))
    write_text(folder / "results.md", page)
    write_json(folder / "results.json", results)


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Numbers with three digits that count, "-" for None."""
    rows = [list(map(cell, columns)), ["---"] * len(columns), *([cell(value) for value in line] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(value: Any) -> str:
    """A value on one line, in which nothing ends the cell."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else one_line(value).replace("|", "\\|")


def facts(results: Mapping[str, Any], *names: str) -> str:
    """A list of what the results were measured on and with."""
    named = {name: results[name] for name in names if results.get(name) is not None}
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    listed = {**named, "settings": settings, "versions": ", ".join(f"{k} {v}" for k, v in results["versions"].items())}
    return "".join(f"* {name.replace('_', ' ')}: {one_line(value)}\n" for name, value in listed.items())
