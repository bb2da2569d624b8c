"""Checkpoints: what the next step needs beyond the configuration and the data."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from simnpo.errors import UserError
from simnpo.training.disk import remove_folder, whole_folder, write_json
from simnpo.training.optimizer import Optimizer


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], *, keep: int
) -> None:
    """Writes checkpoint `folder`/step-00000012 with what step 13 needs, then removes all but the newest `keep`.

    Args:
        model: only its trained parameters are saved: with LoRA the adapters.
        state: goes into state.json beside the step.

    Raises:
        RunError: it could not be written; the checkpoints there are intact.
    """
    with whole_folder(folder / f"step-{step:08d}") as new:
        save_file({name: p.detach() for name, p in _trained(model).items()}, new / "weights.safetensors")
        torch.save(optimizer.state_dict(), new / "optimizer.pt")
        write_json(new / "state.json", {"step": step, **state})
    keep_newest(folder, keep)


def keep_newest(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        remove_folder(old)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Puts a checkpoint's weights and optimizer state in place.

    Raises:
        UserError: it belongs to another model.
    """
    saved, trained = load_file(path / "weights.safetensors"), _trained(model)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: p.shape for name, p in trained.items()}:
        raise UserError(
            f"{path} does not hold the {len(trained)} trained parameters of this model: has the model changed?"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
