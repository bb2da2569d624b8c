"""What evaluation asks of the head about each target: its log-probability, and whether it is the most probable token.

    logps[n]       as in `linear_logps`
    is_greedy[n]   z[n, targets[n]] >= z[n, v] for every v

One product with the head, a chunk of logits at a time; no gradient.

Dimension key, here and in the test:
    N  tokens that count      D  hidden size      V  vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simnpo.kernels.backend import IGNORE_INDEX, Impl, uncompiled
from simnpo.kernels.checks import check_head, read_layout
from simnpo.kernels.chunks import even_chunks
from simnpo.kernels.head import float_dtype
from simnpo.kernels.linear_logps import head_chunk, head_options, linear_logps_torch


class TargetStats(NamedTuple):
    """logps: float32 nats, 0 where ignored.   is_greedy: bool, False where ignored.   Both shaped as the targets."""

    logps: Tensor
    is_greedy: Tensor


@uncompiled
@torch.no_grad()
def linear_target_stats(
    hidden_states: Tensor, lm_head_weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, logit_softcap: float | None = None, logits_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None, impl: Impl = "auto",
) -> TargetStats:  # fmt: skip
    """Log-probability of each target, and whether greedy decoding would have chosen it.

    A target that shares the largest logit with another token counts as chosen. With half-precision logits the target's
    own logit is exact and the others are rounded: a difference below their last digit may fall either way.

    Args:
        See `linear_logps`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a target is outside [0, V), or impl cannot run here.
    """
    check_head(hidden_states, lm_head_weight, targets, bias, logit_scale, logit_softcap)
    flat, flat_targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    bounds = torch.tensor([0, len(flat_targets)], device=targets.device)
    rows = read_layout(flat_targets, bounds, None, lm_head_weight.shape[0]).rows
    options = head_options(
        hidden_states, lm_head_weight, bias, logit_scale, logit_softcap, 0.0,
        logits_dtype, chunk_tokens, impl, head_is_trained=False,
    )  # fmt: skip
    with torch.autocast(hidden_states.device.type, enabled=False):
        weight = lm_head_weight.to(options.dtype)
        buffer = weight.new_empty(min(len(rows), options.chunk_tokens), len(weight), dtype=options.logits_dtype)
        logps = torch.zeros(len(flat), dtype=float_dtype(weight), device=flat.device)
        is_greedy = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        for start, stop in even_chunks(len(rows), options.chunk_tokens):
            chunk_rows = rows[start:stop]
            x = flat[chunk_rows].to(options.dtype)
            _, stats = head_chunk(x, weight, flat_targets[chunk_rows], buffer, options, write_gradient=False)
            logps[chunk_rows] = stats.logps
            # the largest of the row, the target's own included
            is_greedy[chunk_rows] = stats.target_logits >= stats.largest
    return TargetStats(logps.view(targets.shape), is_greedy.view(targets.shape))


def linear_target_stats_torch(hidden_states: Tensor, lm_head_weight: Tensor, targets: Tensor) -> TargetStats:
    """`linear_target_stats` of a plain head with all the logits: the definition the tests hold it to."""
    logits = torch.nn.functional.linear(hidden_states, lm_head_weight)
    counted = targets != IGNORE_INDEX
    target_logits = logits.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    is_greedy = (target_logits >= logits.amax(-1)) & counted
    return TargetStats(linear_logps_torch(hidden_states, lm_head_weight, targets), is_greedy)
