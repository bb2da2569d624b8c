"""MLPs and norms that see a tile of the tokens at a time, and see it again in backward: their wide activations, and the
float32 ones of norms, never exist for the whole sequence.

Both treat every token by itself, so cutting their input along the tokens changes nothing but the order in which their
weights' gradients are summed. That they do is measured for each one.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simnpo.errors import UserError
from simnpo.model import TOLERANCE, body_of, causal_lm, relative_error

logger = logging.getLogger(__name__)

MLP_NAMES = ("mlp", "feed_forward")  # what transformers calls the MLP of a layer
MEASURED_TOKENS = 7


class TiledForward:
    """The forward of an MLP or a norm, tile by tile.

    Args:
        forward: the module's own, (B, T, D) -> (B, T, D).
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


class Tileable(NamedTuple):
    """Modules of a body by name; none is part of another."""

    mlps: dict[str, nn.Module]
    norms: dict[str, nn.Module]


def tileable(lm: Any) -> Tileable:
    """The MLPs of a causal language model and the norms of its hidden states, those of heads left out."""
    D = lm.config.get_text_config().hidden_size
    found = Tileable({}, {})
    for name, module in (body_of(lm) or lm).named_modules():
        if name.startswith(tuple(f"{mlp}." for mlp in found.mlps)):
            continue
        if name.rpartition(".")[2] in MLP_NAMES:
            found.mlps[name] = module
        elif _is_norm(module, D):
            found.norms[name] = module
    return found


def _is_norm(module: nn.Module, D: int) -> bool:
    """Of hidden states (B, T, D) and nothing else: a gated norm gets a second tensor."""
    if "Norm" not in type(module).__name__ or getattr(getattr(module, "weight", None), "shape", None) != (D,):
        return False
    return len(inspect.signature(module.forward).parameters) == 1


def tile_layers(model: nn.Module, tile_tokens: int) -> int:
    """Has MLPs and norms work on `tile_tokens` tokens at a time.

    A norm that does not treat every token by itself is left whole and a warning names it: it takes a little more memory
    than was asked for, and that is no reason to do without the tiles of the MLPs, which are most of what there is to
    save. Without those the option would do next to nothing, so an MLP that does not is refused.

    Args:
        model: causal language model of transformers, on its device; before or after adapters are added.

    Returns:
        How many modules work on tiles.

    Raises:
        UserError: the model has no MLP under a known name, or one that does not treat every token by itself.
    """
    lm = causal_lm(model)
    if getattr(lm.config.get_text_config(), "output_router_logits", False):
        raise UserError("tile_tokens: the router's loss of a mixture of experts needs all its tokens at once")
    mlps, norms = tileable(lm)
    if not mlps:
        raise UserError(f"tile_tokens: {type(lm).__name__} has no modules called {' or '.join(MLP_NAMES)}")
    tiled = []
    for name, module in (mlps | norms).items():
        if _treats_tokens_alone(module, lm):
            tiled.append(module)
            continue
        what = f"tile_tokens: {name} ({type(module).__name__}) does not treat every token by itself"
        if name in mlps:
            raise UserError(what)
        logger.warning("%s and sees all of them at once", what)
    for module in tiled:
        module.forward = TiledForward(module.forward, tile_tokens)
    return len(tiled)


@torch.no_grad()
def _treats_tokens_alone(module: nn.Module, lm: Any) -> bool:
    # all of the module's own weights may be in 4 bits, which are no dtype of tokens
    device, dtype, D = next(module.parameters()).device, lm.dtype, lm.config.get_text_config().hidden_size
    tokens = torch.linspace(-1, 1, MEASURED_TOKENS * D, device=device, dtype=dtype)
    tokens = tokens.view(1, MEASURED_TOKENS, D)
    try:
        whole = module(tokens)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        logger.info("%s alone fails: %s", type(module).__name__, error)
        return False
    if not isinstance(whole, Tensor) or whole.shape != tokens.shape:
        return False
    tiled = TiledForward(module.forward, 3)(tokens)
    return relative_error(tiled.float(), whole.float()) <= TOLERANCE[dtype]
