"""Checkpoints: what the next step needs, with the files that the run had written by then, and digests of it all.

    checkpoints/step-00000012/
        weights.safetensors  optimizer.pt  state.json    the trained weights, the optimizer's state, the run's facts
        run/                                             metrics.jsonl and the like, as they were after step 12
        manifest.json                                    SHA-256 of every file above

A resumed run puts the files of `run/` back: whatever happened to those in its folder meanwhile, it goes on from what
was there after step 12.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simnpo.digests import damaged_file, folder_digests
from simnpo.errors import RunError, UserError
from simnpo.training.disk import remove_folder, whole_folder, write_bytes, write_json
from simnpo.training.optimizer import Optimizer

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# files of a run that grow or are made while it runs
RUN_FILES = ("metrics.jsonl", "weights.jsonl", "evaluation.json", "reference.json")
NAME = re.compile(r"step-(\d{8,})")


def save_checkpoint(
    output: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], *, keep: int
) -> None:
    """Writes checkpoints/step-00000012 with what step 13 needs, then removes all but the newest `keep`.

    Args:
        output: folder of the run.
        model: only its trained parameters are saved: with LoRA the adapters.
        state: goes into state.json beside the step.

    Raises:
        RunError: a weight or a state of the optimizer is not finite, or it could not be written; the checkpoints there
            are intact.
    """
    weights, states = {name: p.detach() for name, p in _trained(model).items()}, optimizer.state_dict()
    if name := not_finite(weights) or not_finite(dict(_tensors(states))):
        raise RunError(
            f"step {step}: {name} is no longer finite after the update, so it is not saved; checkpoints written before "
            "are intact. A lower learning_rate may help"
        )
    folder = output / "checkpoints"
    with whole_folder(folder / f"step-{step:08d}") as new:
        save_file(weights, new / "weights.safetensors")
        torch.save(states, new / "optimizer.pt")
        write_json(new / "state.json", {"step": step, **state})
        (new / "run").mkdir()
        for file in (output / name for name in RUN_FILES):
            if file.exists():
                shutil.copyfile(file, new / "run" / file.name)
        write_json(new / MANIFEST, {"files": folder_digests(new)})
    for old in checkpoints(folder)[:-keep]:
        _remove(old)


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor with a NaN or an infinity in it; None if there is none. Waits for the device once."""
    named = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not named:
        return None
    device = next(iter(named.values())).device
    are = torch.stack([tensor.isfinite().all().to(device, non_blocking=True) for tensor in named.values()]).tolist()
    return next((name for name, is_finite in zip(named, are) if not is_finite), None)


def _tensors(value: Any, name: str = "the optimizer's state") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries and lists, by the keys that lead to it."""
    if isinstance(value, Tensor):
        yield name, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, one in items:
        yield from _tensors(one, f"{name}, {key}")


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint, unless somebody has put something of their own into it."""
    known = written_files(checkpoint)
    strange = [p for p in checkpoint.rglob("*") if p.is_file() and p.relative_to(checkpoint).as_posix() not in known]
    if strange:
        logger.warning("%s is kept: it holds %s, which this run did not write", checkpoint, strange[0].name)
    else:
        remove_folder(checkpoint)


def written_files(checkpoint: Path) -> set[str]:
    """The files that make up a checkpoint, by path relative to it; none where that cannot be read any more."""
    try:
        return {MANIFEST, *json.loads((checkpoint / MANIFEST).read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint, None if there is none at all; names those that are damaged.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        damage = _damage(path)
        if damage is None:
            return path
        logger.warning("checkpoint %s is damaged and is not used: %s", path, damage)
    if found:
        raise UserError(
            f"--resume: no checkpoint in {folder} is intact, {found[-1].name}: {_damage(found[-1])}. Once that folder "
            "is removed, --resume begins with the first step again"
        )
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint."""
    try:
        digests = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        if not {"weights.safetensors", "optimizer.pt", "state.json"} <= digests.keys():
            return f"{MANIFEST} does not name all of its files"
        damage = damaged_file(checkpoint, digests)
        if damage is None and read_state(checkpoint)["step"] != _step(checkpoint):
            damage = f"it is of step {read_state(checkpoint)['step']}"
        return damage
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"


def set_aside(folder: Path, *, newer_than: Path | None) -> None:
    """Renames the damaged checkpoints after the one that the run continues from, which writes these steps again."""
    for path in checkpoints(folder):
        if newer_than is not None and _step(path) > _step(newer_than):
            number = next(i for i in range(1, 10**6) if not (folder / f"damaged-{i}-{path.name}").exists())
            path.rename(folder / f"damaged-{number}-{path.name}")


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Puts a checkpoint's weights and optimizer state in place.

    Raises:
        UserError: it belongs to another model or optimizer.
    """
    saved, trained = load_file(path / "weights.safetensors"), _trained(model)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: p.shape for name, p in trained.items()}:
        raise UserError(
            f"{path} does not hold the {len(trained)} trained parameters of this model: has the model changed?"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    try:
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path / 'optimizer.pt'} is not the state of this optimizer: {error}") from error


def restore_run_files(checkpoint: Path | None, output: Path) -> None:
    """Puts the files of a run back to what they were at a checkpoint; None: before the first step, without any."""
    for name in RUN_FILES:
        saved = None if checkpoint is None else checkpoint / "run" / name
        if saved is not None and saved.exists():
            write_bytes(output / name, saved.read_bytes())
        else:
            (output / name).unlink(missing_ok=True)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints, damaged ones among them, oldest first."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
