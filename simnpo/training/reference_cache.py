"""Reference log-probabilities on disk, found again by what they depend on: weights, data, arithmetic, versions.

One file a key, `<sha256>.safetensors`, written whole or not at all, with a checksum: several runs may share the folder,
and any file may be deleted at any time.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

import simnpo
from simnpo.config import UnlearnConfig
from simnpo.data import Example
from simnpo.errors import RunError
from simnpo.model import causal_lm
from simnpo.training.disk import remove_leftovers, write_bytes
from simnpo.training.forward import Collator
from simnpo.training.setup import fingerprint

logger = logging.getLogger(__name__)

BLOCK = 2**24  # elements of another device's weight that are on the CPU at once
ABANDONED = 3600  # seconds after which a half-written file is nobody's
NAMES = ("_name_or_path", "transformers_version")  # in a model's configuration, but not of its arithmetic


def cache_folder(config: UnlearnConfig) -> Path:
    """`reference_cache`, or the user's cache folder as the XDG specification has it."""
    if config.reference_cache is not None:
        return Path(config.reference_cache)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "simnpo" / "references"


def cache_key(
    config: UnlearnConfig, model: nn.Module, digest: str, collator: Collator, forget: list[Example], *, per_token: bool
) -> str:
    """Changes with everything that changes the numbers by more than the rounding of another `chunk_tokens`.

    Args:
        digest: the model's, see `model_digest`.
    """
    facts = {
        "model": digest,
        "attention": causal_lm(model).config._attn_implementation,
        "precision": config.precision,
        "logits": str(collator.logits_dtype),
        "exact_ratio": collator.exact_ratio,
        "load_in_4bit": config.load_in_4bit,
        "packed": collator.packed,
        "device": collator.device.type,
        "data": fingerprint(forget),
        "kind": "token" if per_token else "sequence",
        "simnpo": simnpo.__version__,
        "versions": [importlib.metadata.version(name) for name in ("torch", "transformers")],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def model_digest(model: nn.Module) -> str:
    """SHA-256 over the weights and the configuration of a model."""
    settings = json.loads(causal_lm(model).config.to_json_string(use_diff=False))
    facts = {name: value for name, value in settings.items() if name not in NAMES}
    return hashlib.sha256(json.dumps([weights_digest(model), facts], sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and content of every parameter and buffer, in the model's order.

    A weight under two names is read once, and the CPU holds BLOCK elements of another device's weights at a time.
    """
    digest, first_names = hashlib.sha256(), {}
    # the state also has what belongs to a quantised weight, and the buffers those that are never saved
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | model.state_dict()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor!r}\n".encode())
            continue
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        first = first_names.setdefault(place, name) if tensor.numel() else name
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {first}\n".encode())
        if first != name:
            continue
        for block in tensor.detach().reshape(-1).split(BLOCK):
            digest.update(block.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_references(path: Path, sizes: Sequence[int] | None, num_examples: int) -> list[Any] | None:
    """What `write_references` wrote; None, with a warning if it is there, where it cannot be used.

    Args:
        path: its name is the key.
        sizes: tokens of each example, for log-probabilities per token; None: one number an example.
        num_examples: how many there are.
    """
    try:
        logps = _checked(path, num_examples if sizes is None else sum(sizes))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, ValueError) as error:
        logger.warning("reference_cache: %s cannot be used and is computed again: %s", path, error)
        return None
    return logps.tolist() if sizes is None else [row.tolist() for row in logps.split(list(sizes))]


def _checked(path: Path, size: int) -> Tensor:
    # in one read: another run may put a new file in its place at any moment
    tensors = load(path.read_bytes())
    if tensors.keys() != {"logps", "key", "checksum"} or not torch.equal(tensors["key"], _digest(path.stem.encode())):
        raise ValueError(f"it holds {sorted(tensors)}, which are not this run's")
    logps = tensors["logps"]
    if logps.shape != (size,) or not torch.equal(tensors["checksum"], _digest(logps)):
        raise ValueError(f"its numbers, {tuple(logps.shape)}, are damaged or not the {size} expected")
    return logps


def write_references(path: Path, values: Sequence[Any], *, per_token: bool) -> None:
    """Writes a list of numbers, or of lists of numbers; a warning where the folder cannot be written to.

    Args:
        path: `cache_folder` / `<cache_key>.safetensors`.
        values: nats; those of tokens came from float32 and stay in it, those of sequences may be sums of such.
    """
    if per_token:
        logps = torch.cat([torch.empty(0), *(torch.tensor(row, dtype=torch.float32) for row in values)])
    else:
        logps = torch.tensor(values, dtype=torch.float64)
    data = save({"logps": logps, "key": _digest(path.stem.encode()), "checksum": _digest(logps)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        remove_leftovers(path.parent, older_than=ABANDONED)
    except (OSError, RunError) as error:
        logger.warning("reference_cache: the reference log-probabilities are not kept for other runs: %s", error)


def _digest(value: bytes | Tensor) -> Tensor:
    data = value.view(torch.uint8).numpy().data if isinstance(value, Tensor) else value
    return torch.tensor(list(hashlib.sha256(data).digest()), dtype=torch.uint8)
