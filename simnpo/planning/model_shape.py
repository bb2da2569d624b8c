"""A model as its configuration describes it: built on fake tensors, with as many layers as are asked for."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from simnpo import loading
from simnpo.errors import UserError
from simnpo.loading import DTYPE
from simnpo.model import body_of, refusing


def read_config(name_or_path: str) -> Any:
    """The configuration of a Hugging Face id, folder, config.json or .gguf file; its weights are not read.

    Raises:
        UserError: there is none, or transformers cannot read it.
    """
    config = loading.read_config(name_or_path)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    return config


class ModelShape:
    """A causal language model without its weights.

    Attributes:
        config: transformers' own.
        num_layers: of the model.
        is_uniform: whether all layers have parameters of the same shapes, so that a few of them stand for all.

    Raises:
        UserError: transformers knows no causal language model of this configuration.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        text = config.get_text_config()
        self.num_layers: int = text.num_hidden_layers
        if type(self.num_layers) is not int or self.num_layers < 1:
            raise UserError(f"model: num_hidden_layers must be a positive number, got {self.num_layers!r}")
        with torch.device("meta"):
            self._whole = self._from_config(config, torch.float32)
        layers = [[(name, p.shape) for name, p in layer.named_parameters()] for layer in layers_of(self._whole)]
        self.is_uniform = len(layers) == self.num_layers and all(shapes == layers[0] for shapes in layers)
        self.vocab_size, self.hidden_size = self._whole.get_output_embeddings().weight.shape  # type: ignore[union-attr]

    def build(self, num_layers: int, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        """The model with its first layers only, on whatever tensors the caller's mode makes."""
        config = copy.deepcopy(self.config)
        if num_layers != self.num_layers:
            for part in {id(c): c for c in (config, config.get_text_config())}.values():
                for name, value in list(vars(part).items()):
                    # layer_types and the like
                    if isinstance(value, list) and len(value) == self.num_layers:
                        setattr(part, name, value[:num_layers])
            config.get_text_config().num_hidden_layers = num_layers
        return self._from_config(config, dtype, attn_implementation=attention)

    @cached_property
    def trained_shapes(self) -> list[torch.Size]:
        """Of every parameter of the whole model, a tied one once."""
        return [p.shape for p in self._whole.parameters()]

    @property
    def num_parameters(self) -> int:
        return sum(shape.numel() for shape in self.trained_shapes)

    def _from_config(self, config: Any, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        with refusing(f"model: transformers cannot make a {config.model_type!r} model"):
            return AutoModelForCausalLM.from_config(config, **{DTYPE: dtype}, **options)


def layers_of(lm: nn.Module) -> nn.ModuleList:
    """The layers of a transformers model: the longest list of modules in its body.

    Raises:
        UserError: there is none.
    """
    lists = [module for module in (body_of(lm) or lm).modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(f"model: cannot find the layers of {type(lm).__name__}")
    return max(lists, key=len)
