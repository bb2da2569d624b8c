"""SHA-256 digests that tell whether files are still what was written: of a checkpoint, and of what a run hands over."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from simnpo.errors import UserError
from simnpo.shapes import read_json

# written last by a run: the digests of what it hands over
COMPLETE = "complete.json"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder and its subfolders, by its path relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def damaged_file(folder: Path, digests: Mapping[str, str]) -> str | None:
    """What is wrong with the first file of `digests` that is missing in `folder` or has changed; None if none has."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_digest(path) != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def promised_digests(run: Path) -> dict[str, str] | None:
    """The digests of what a complete run hands over, by path relative to its folder; None where it is not complete.

    Raises:
        UserError: complete.json is damaged.
    """
    path = run / COMPLETE
    if not path.exists():
        return None
    try:
        return read_json(path, {"files": {str: str}})["files"]
    except UserError as error:
        raise UserError(f"{error}: once it is removed, the run writes it again with --resume") from error


def check_report_inputs(run: Path) -> None:
    """Refuses files of a run that are not what it wrote: those of a complete one, and the logs of one that is not.

    Raises:
        UserError: names the file.
    """
    promised = promised_digests(run)
    if promised is not None:
        own = {name: digest for name, digest in promised.items() if "/" not in name}
        if damage := damaged_file(run, own):
            raise UserError(
                f"{run}: {damage}: once {COMPLETE} is removed, the run writes it again with --resume from its last "
                "checkpoint"
            )
        return
    # the newest checkpoint knows what the files were when it was written; since then they have only grown
    for checkpoint in sorted(run.glob("checkpoints/step-[0-9]*"))[-1:]:
        try:
            known = {"config.json": read_json(checkpoint / "state.json", {"config": {str: object}})["config"]}
            known |= {path.name: read_json(path, {str: object}) for path in checkpoint.glob("run/evaluation.json")}
            wrong = [name for name in known if not read_json(run / name, {str: object}).items() >= known[name].items()]
            for path in checkpoint.glob("run/*.jsonl"):
                wrong += [] if (run / path.name).read_bytes().startswith(path.read_bytes()) else [path.name]
        except (UserError, OSError) as error:
            raise UserError(f"{error}: --resume puts the files of a run right that has not ended") from error
        if wrong:
            raise UserError(f"{run / wrong[0]} is not what the run wrote: --resume puts it right")


def check_written_model(folder: Path) -> None:
    """Refuses a model in the folder of a complete run that is no longer what the run wrote.

    Args:
        folder: of any model; nothing is checked if no complete run wrote it.

    Raises:
        UserError: a file of it is missing or has changed; names it.
    """
    folder = folder.resolve()
    promised = (promised_digests(folder.parent) if folder.name in ("model", "adapter") else None) or {}
    name = f"{folder.name}/"
    own = {file.removeprefix(name): digest for file, digest in promised.items() if file.startswith(name)}
    if own and (damage := damaged_file(folder, own)):
        raise UserError(
            f"model: {folder}: {damage}. The run in {folder.parent} writes it again with --resume once {COMPLETE} is "
            "removed; a model that was changed on purpose belongs into a folder of its own"
        )
