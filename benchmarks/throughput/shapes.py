"""Models of well-known shapes with random weights, written where the run's own code can load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from simnpo.model import DTYPE
from simnpo.training.disk import whole_folder

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip


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
