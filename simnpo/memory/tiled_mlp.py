"""MLPs that see a tile of the tokens at a time, and see it again in backward: their wide activations never exist for
the whole sequence.

An MLP treats every token by itself, so cutting its input along the tokens changes nothing but the order in which its
weights' gradients are summed. That it does is measured for each one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simnpo.errors import UserError
from simnpo.model import TOLERANCE, body_of, causal_lm, relative_error

NAMES = ("mlp", "feed_forward")  # what transformers calls the MLP of a layer
MEASURED_TOKENS = 7


class TiledForward:
    """The forward of an MLP, tile by tile.

    Args:
        forward: the MLP's own, (B, T, D) -> (B, T, D).
        tile_tokens: tokens of a tile, over all sequences.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], tile_tokens: int) -> None:
        self.forward, self.tile_tokens = forward, tile_tokens

    def __call__(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(1, -1, hidden_states.shape[-1])
        if rows.shape[1] <= self.tile_tokens:
            return self.forward(hidden_states)
        tiles = rows.split(self.tile_tokens, dim=1)
        if torch.is_grad_enabled():
            outputs = [checkpoint(self.forward, tile, use_reentrant=False) for tile in tiles]
        else:
            outputs = [self.forward(tile) for tile in tiles]
        return torch.cat(outputs, dim=1).view(hidden_states.shape)  # type: ignore[arg-type]


def tile_mlps(model: nn.Module, tile_tokens: int) -> int:
    """Has the MLP of every layer work on `tile_tokens` tokens at a time.

    Args:
        model: causal language model of transformers, on its device; before or after adapters are added.

    Returns:
        How many MLPs there are.

    Raises:
        UserError: the model has none under a known name, or one that does not treat every token by itself.
    """
    lm = causal_lm(model)
    if getattr(lm.config.get_text_config(), "output_router_logits", False):
        raise UserError("mlp_tile_tokens: the router's loss of a mixture of experts needs all its tokens at once")
    body: Any = body_of(lm)
    mlps = [(name, module) for name, module in body.named_modules() if name.rpartition(".")[2] in NAMES]
    if not mlps:
        raise UserError(f"mlp_tile_tokens: {type(lm).__name__} has no modules called {' or '.join(NAMES)}")
    for name, module in mlps:
        _check_treats_tokens_alone(name, module, lm.config.get_text_config().hidden_size, lm.dtype)
    for _, module in mlps:
        module.forward = TiledForward(module.forward, tile_tokens)
    return len(mlps)


@torch.no_grad()
def _check_treats_tokens_alone(name: str, module: nn.Module, D: int, dtype: torch.dtype) -> None:
    # all of the module's own weights may be in 4 bits, which are no dtype of tokens
    device = next(module.parameters()).device
    tokens = torch.linspace(-1, 1, MEASURED_TOKENS * D, device=device, dtype=dtype)
    tokens = tokens.view(1, MEASURED_TOKENS, D)
    whole = module(tokens)
    if isinstance(whole, Tensor) and whole.shape == tokens.shape:
        tiled = TiledForward(module.forward, 3)(tokens)
        if relative_error(tiled.float(), whole.float()) <= TOLERANCE[dtype]:
            return
    raise UserError(f"mlp_tile_tokens: {name} ({type(module).__name__}) does not treat every token by itself")
