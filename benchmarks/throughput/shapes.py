"""Models of well-known shapes with random weights, written where the run's own code can load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from simnpo.loading import DTYPE
from simnpo.training.disk import whole_folder

FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings"),
)
SHAPES: dict[str, dict[str, Any]] = {
    name: dict(zip(FIELDS, values, strict=True))
    for name, values in {
        "tiny": (64, 128, 2, 4, 2, 512, True),
        "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
        "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
        "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, False),
    }.items()
}


def random_model(shape: str, folder: Path, device: torch.device) -> str:
    """Path of a model of `shape` in `folder`, made there unless it is there; bf16 on the disk, 2 bytes a weight."""
    path = folder / shape
    if not path.is_dir():
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, bos_token_id=None, eos_token_id=None)
        torch.manual_seed(0)
        # made on the GPU where there is one: 8B normal numbers take minutes on a CPU
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, **{DTYPE: torch.bfloat16})
        with whole_folder(path) as unfinished:
            model.save_pretrained(str(unfinished))
        del model
    return str(path)


def vocab_size(shape: str) -> int:
    return SHAPES[shape]["vocab_size"]
