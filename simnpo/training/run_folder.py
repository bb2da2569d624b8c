"""The folder of a run: whether it may be written to, by which process, and whether the run in it is complete."""

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from simnpo.config import UnlearnConfig
from simnpo.digests import COMPLETE, damaged_file, file_digest, folder_digests, promised_digests
from simnpo.errors import UserError
from simnpo.shapes import read_json
from simnpo.training.checkpoint import checkpoints, newest_checkpoint, read_state, set_aside, written_files
from simnpo.training.disk import TEMPORARY, remove_folder, remove_leftovers, write_json

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps two processes out of one folder
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = ".simnpo-lock"
# of a configuration, which tell a run's config.json from a model's
MARKS = ("model", "forget", "output", "method")
# what a run hands over, as far as it has written it; the report may be made again at any time
HANDED_OVER = (
    *("config.json", "metrics.jsonl", "weights.jsonl", "evaluation.json", "reference.json", "out_of_memory.json"),
    *("summary.json", "model", "adapter"),
)


# made again by `simnpo report`
REPORT = ("report.html", *(f"plots/{name}{dark}.png" for name in ("nll", "weights", "tofu") for dark in ("", "-dark")))


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps the folder of a run to this process while the block runs, and makes it if it is not there.

    A folder that was made and in which nothing was written is removed again.

    Raises:
        UserError: another process has it; names the process and since when. Or `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output must be a folder, and {output} is a file")
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    path = output / LOCK
    descriptor = _take_lock(path)
    try:
        yield
    finally:
        # removed while it is held: who has opened it by then sees that it is no longer the folder's
        path.unlink(missing_ok=True)
        for folder in made:
            if any(folder.iterdir()):
                break
            folder.rmdir()
        os.close(descriptor)


def _take_lock(path: Path) -> int:
    """The descriptor of the lock file, which the kernel lets go of when the process ends, however it ends."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # the process that made the folder has just removed it again
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"output: {path.parent} is being written to by {holder}: wait until it ends, or choose another --output"
            ) from None
        except OSError as error:
            logger.warning("output: %s is on a file system without locks (%s): start no second run there",
                           path.parent, error.strerror)  # fmt: skip
        if _is_same(descriptor, path):
            since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def check_output(config: UnlearnConfig) -> None:
    """Refuses an output folder that this run must not write to.

    Raises:
        UserError: the folder holds something that is no run, or a run and there is no `resume`, or one whose
            configuration differs in what matters; or it holds the model or the data of this run.
    """
    output = config.output_dir()
    for name in ("model", "forget", "retain", "heldout"):
        source = getattr(config, name)
        if source is not None and os.path.exists(source) and _is_inside(Path(source), output):
            raise UserError(f"output: {output} holds the {name} of this run, {source}: choose another --output")
    found = sorted(path.name for path in output.iterdir() if not path.name.startswith((LOCK, TEMPORARY)))
    if not found:
        return
    saved = read_config(output)
    if saved is None and not checkpoints(output / "checkpoints"):
        raise UserError(
            f"output: {output} is not empty and not the folder of a run, it holds {found[0]}: choose another --output"
        )
    if not config.resume:
        raise UserError(f"{output} already holds a run: continue it with --resume, or choose another --output")
    if saved is not None:
        config.refuse_changes(saved)


def _is_inside(path: Path, folder: Path) -> bool:
    path, folder = path.resolve(), folder.resolve()
    return path == folder or folder in path.parents


def read_config(output: Path) -> dict[str, Any] | None:
    """config.json of a run; None where there is none, or it is something else's.

    Raises:
        UserError: it is no JSON object.
    """
    path = output / "config.json"
    if not path.exists():
        return None
    try:
        saved = read_json(path, {str: object})
    except UserError as error:
        raise UserError(
            f"{error}: once it is removed, --resume goes by the configuration in the checkpoints"
        ) from error
    return saved if all(name in saved for name in MARKS) else None


def saved_config(output: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder, None where there is none.

    Raises:
        UserError: config.json is damaged, or it is not there and no checkpoint is intact.
    """
    saved = read_config(output)
    checkpoint = newest_checkpoint(output / "checkpoints") if saved is None else None
    return saved if checkpoint is None else read_state(checkpoint)["config"]


def open_output(config: UnlearnConfig, checkpoint: Path | None) -> None:
    """Writes the configuration, once everything that can be wrong with the input has been looked at.

    Args:
        checkpoint: that the run continues from; damaged ones that are newer are set aside.
    """
    output = config.output_dir()
    for folder in (output, output / "checkpoints", output / "plots"):
        remove_leftovers(folder)
    set_aside(output / "checkpoints", newer_than=checkpoint)
    write_json(output / "config.json", asdict(config))


def strange_files(output: Path) -> list[Path]:
    """The files in the folder of a run that no run has written."""
    known = {*HANDED_OVER, *REPORT, COMPLETE, *(promised_digests(output) or {})}
    for checkpoint in checkpoints(output / "checkpoints"):
        known |= {f"checkpoints/{checkpoint.name}/{file}" for file in written_files(checkpoint)}
    files = {path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if not path.is_dir()}
    return [path for name, path in files.items() if name not in known and not name.startswith((LOCK, TEMPORARY))]


def remove_run(output: Path) -> None:
    """Removes all that a run has written, and leaves an empty folder.

    Raises:
        UserError: another process is writing to it, or it holds something that no run has written.
    """
    with locked(output):
        if strange := strange_files(output):
            raise UserError(f"output: {output} holds {strange[0].relative_to(output)}, which no run has written: "
                            "choose another --output")  # fmt: skip
        for path in output.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()


def discard(output: Path, *names: str) -> None:
    """Removes folders of a complete run that are no longer wanted, unless they hold something that it did not write."""
    strange = strange_files(output)
    for folder in (output / name for name in names):
        if kept := [path for path in strange if folder in path.parents]:
            logger.warning("%s is kept: it holds %s, which no run has written", folder, kept[0].name)
        else:
            remove_folder(folder)


def is_complete(output: Path) -> bool:
    """Whether the run in a folder has ended, and all that it hands over is there as it was written.

    Raises:
        UserError: it has ended, and a file is missing or has changed; names it.
    """
    promised = promised_digests(output)
    if promised is None:
        return False
    if damage := damaged_file(output, promised):
        raise UserError(
            f"{output} holds a complete run, and {damage}: once {COMPLETE} is removed, --resume writes everything "
            "again from the last checkpoint"
        )
    return True


def write_complete(output: Path) -> None:
    """Writes complete.json, the last file of a run: the SHA-256 of everything that it hands over."""
    files: dict[str, str] = {}
    for name in HANDED_OVER:
        path = output / name
        if path.is_dir():
            files |= {f"{name}/{file}": digest for file, digest in folder_digests(path).items()}
        elif path.is_file():
            files |= {name: file_digest(path)}
    write_json(output / COMPLETE, {"files": files})
