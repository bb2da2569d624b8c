"""SHA-256 digests that tell whether files are still what was written: of a checkpoint, and of what a run hands over."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from simnpo.errors import UserError

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
    try:
        promised = json.loads(path.read_bytes())["files"]
        sound = all(isinstance(name, str) and isinstance(digest, str) for name, digest in promised.items())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsADirectoryError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged: remove it, and continue the run with --resume, which writes it anew")
    return promised


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
            known = {"config.json": json.loads((checkpoint / "state.json").read_bytes())["config"]}
            known |= {path.name: json.loads(path.read_bytes()) for path in (checkpoint / "run").glob("evaluation.json")}
            grown = {
                name for name, value in known.items() if json.loads((run / name).read_bytes()).items() >= value.items()
            }
            for path in (checkpoint / "run").glob("*.jsonl"):
                known[path.name] = path.read_bytes()
                grown |= {path.name} if (run / path.name).read_bytes().startswith(known[path.name]) else set()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{run}: a file of the run or of its newest checkpoint is damaged ({error}): --resume puts it right"
            ) from error
        if changed := sorted(known.keys() - grown):
            raise UserError(f"{run / changed[0]} is not what the run wrote: --resume puts it right")


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
