"""The files of a model folder, read just far enough to say which one is damaged and how."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from simnpo.errors import UserError
from simnpo.model import refusing

Shapes = dict[str, torch.Size]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# names under which configurations keep the number of layers: some of them make lists of that length
NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# what transformers looks for, in this order, each also cut into several files that an index lists
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json",
)  # fmt: skip


def check_json(path: Path) -> None:
    """Raises `UserError` naming the first JSON file of a folder that holds no JSON object, and the place."""
    for file in [path / name for name in JSON_FILES] if path.is_dir() else [path] if path.suffix == ".json" else []:
        if file.is_file():
            read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: there is none; names the line.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"model: {file}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model: {file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"model: {file} must hold a JSON object, got {type(value).__name__}")
    return value


def check_sizes(config: Any, name: str, num_tensors: int | None) -> None:
    """Raises `UserError` where a number of config.json would make transformers count without end.

    Args:
        config: the JSON object, or a part of it.
        name: what to call it.
        num_tensors: in the weight files; None: unknown.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, name, num_tensors)
        elif type(value) is int and abs(value) >= 2**63:
            # the number itself may have more digits than Python writes out
            raise UserError(f"model: {name}: {key} must be below 2**63, got one far above")
        elif key in NUM_LAYERS and type(value) in (int, float) and num_tensors is not None and value > num_tensors:
            raise UserError(f"model: {name}: {key} is {value}, and the weight files hold {num_tensors} tensors")


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of a folder from; none if it has none that is known.

    Raises:
        UserError: an index is wrong, or a file it lists is not there.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            listed = read_object(index).get("weight_map")
            if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
                raise UserError(f"model: {index}: weight_map must be an object of file names by weight")
            files = [folder / file for file in sorted({*listed.values()})]
            for file in files:
                if not file.is_file():
                    raise UserError(f"model: {index} lists {file.name}, which is not there")
            return files
    return []


def read_shapes(file: Path) -> Shapes:
    """The shapes of the weights in a file, by name, without their values.

    Raises:
        UserError: it is damaged, or holds something else than weights.
    """
    if file.suffix == ".safetensors":
        with refusing(f"model: {file} is damaged"), safe_open(file, framework="pt") as opened:
            return {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    with refusing(f"model: {file} is damaged, or holds something else than weights"):
        weights = torch.load(file, map_location="meta", weights_only=True)
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise UserError(f"model: {file} must hold weights by name")
    return {name: weight.shape for name, weight in weights.items()}


def check_finite(file: Path) -> None:
    """Raises `UserError` naming the first weight of a file that has NaN or an infinity."""
    with refusing(f"model: {file} is damaged"):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                wrong = [name for name in opened.keys() if not is_finite(opened.get_tensor(name))]  # noqa: SIM118
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
            wrong = [name for name, weight in weights.items() if not is_finite(weight)]
    if wrong:
        raise UserError(f"model: {file}: {wrong[0]} has weights that are NaN or infinite")


def is_finite(weight: Any) -> bool:
    """Whether a tensor of floats has neither NaN nor infinities; one pass without a mask of its size."""
    known = isinstance(weight, Tensor) and weight.dtype in FLOATS and weight.numel() > 0 and not weight.is_meta
    if not known:
        return True
    return all(bound.isfinite() for bound in torch.aminmax(weight))
