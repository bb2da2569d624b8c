"""From token log-probabilities to the loss and weight of each sequence, in one launch and without asking the host.

    logps[i]  = sum of token_logps over the n_i tokens of sequence i
    x         = beta / n_i logps[i] + gamma              SimNPO        (arXiv 2410.07163, equation 4)
              = beta (logps[i] - ref_logps[i])           NPO           (arXiv 2404.05868, equation 3)
    loss[i]   = 2 / beta softplus(x)                     weight[i] = d loss[i] / d logps[i]
    coefs[t]  = forget_scale weight[i]                   for the tokens t of sequence i

Gradient ascent has loss logps[i] (over n_i) and a constant weight. A retain sequence reports its negative
log-likelihood and weight 0, and leaves the coefficients of its tokens alone.

Dimension key, here and in the test:
    S  sequences of the launch      B  sequences of the batch      N  tokens
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simnpo.kernels.backend import LAUNCH_OPTIONS, tl, triton
from simnpo.kernels.launch import SEQUENCE_PASS
from simnpo.kernels.segment_sums import segment_sums
from simnpo.kernels.special import softplus
from simnpo.objectives import NPO, GradAscent, Objective, SimNPO


class SequenceResults(NamedTuple):
    """What the pass writes: one number per sequence of the batch, all (B,), float32 (float64 for float64 input)."""

    logps: Tensor
    losses: Tensor
    weights: Tensor

    @staticmethod
    def zeros(B: int, like: Tensor) -> SequenceResults:
        """Results of a batch none of whose sequences has been seen."""
        return SequenceResults(*like.new_zeros(3, B))


@triton.jit
def _sequence_pass_kernel(
    # data: per token, per sequence of the launch, per sequence of the batch
    token_logps_ptr, coefs_ptr, offsets_ptr, sequences_ptr, is_retain_ptr, ref_logps_ptr,
    logps_ptr, losses_ptr, weights_ptr,
    # shapes
    beta, gamma, forget_scale,
    # constants
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, HAS_REF: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    start = tl.load(offsets_ptr + i)
    stop = tl.load(offsets_ptr + i + 1)
    b = tl.load(sequences_ptr + i)
    is_retain = tl.load(is_retain_ptr + b).to(tl.int1)

    sums = tl.zeros([BLOCK_T], dtype=tl.float32)
    for t in range(start, stop, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        sums += tl.load(token_logps_ptr + offs_t, mask=offs_t < stop, other=0.0)
    logp = tl.sum(sums, axis=0)

    slope = 1.0 + 0.0 * logp
    if NORMALIZE:
        slope /= tl.maximum(stop - start, 1).to(tl.float32)
    if SIGMOID:
        ratio = slope * logp
        if HAS_REF:
            ratio -= tl.load(ref_logps_ptr + b)
        x = beta * ratio + gamma
        loss = 2.0 / beta * softplus(x)
        weight = 2.0 * slope / (1.0 + tl.exp(-x))
    else:
        loss = slope * logp
        weight = slope

    empty = stop == start
    loss = tl.where(is_retain, -logp, tl.where(empty, 0.0, loss))
    weight = tl.where(is_retain | empty, 0.0, weight)
    tl.store(logps_ptr + b, logp)
    tl.store(losses_ptr + b, loss)
    tl.store(weights_ptr + b, weight)
    # a retain token's coefficient was known before: its sequence writes nothing
    write_stop = tl.where(is_retain, start, stop)
    for t in range(start, write_stop, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        coefs = tl.zeros([BLOCK_T], dtype=tl.float32) + forget_scale * weight
        tl.store(coefs_ptr + offs_t, coefs, mask=offs_t < stop)


def sequence_pass(
    token_logps: Tensor, coefs: Tensor, offsets: Tensor, sequences: Tensor, is_retain: Tensor, results: SequenceResults,
    objective: Objective, ref_logps: Tensor | None, forget_scale: float,
) -> None:  # fmt: skip
    """Reduce whole sequences; write `results` at their places in the batch and the coefficients of their tokens.

    Args:
        token_logps, coefs: (N,) float32; `coefs` is written for the tokens of forget sequences.
        offsets: (S + 1,) int64, where the sequences of this launch start and end in them.
        sequences: (S,) int64, their places in the batch.
        is_retain: (B,) bool.   ref_logps: (B,) float32, for NPO.
        forget_scale: forget_coef / number of forget sequences.
    """
    if len(sequences):
        _sequence_pass_kernel[(len(sequences),)](
            token_logps, coefs, offsets, sequences, is_retain, ref_logps, *results,
            getattr(objective, "beta", 1.0), getattr(objective, "gamma", 0.0), forget_scale,
            SIGMOID=not isinstance(objective, GradAscent),
            NORMALIZE=isinstance(objective, SimNPO) or (isinstance(objective, GradAscent) and objective.normalize),
            HAS_REF=isinstance(objective, NPO),
            BLOCK_T=SEQUENCE_PASS.block, num_warps=SEQUENCE_PASS.num_warps, **LAUNCH_OPTIONS,
        )  # fmt: skip


def sequence_pass_torch(
    token_logps: Tensor, coefs: Tensor, offsets: Tensor, sequences: Tensor, is_retain: Tensor, results: SequenceResults,
    objective: Objective, ref_logps: Tensor | None, forget_scale: float,
) -> None:  # fmt: skip
    """`sequence_pass` in plain PyTorch: the objective's own formula."""
    lengths = offsets.diff()
    first, last = int(offsets[0]), int(offsets[-1])
    logps = segment_sums(token_logps[first:last], lengths)
    retain = is_retain[sequences]
    ref = None if ref_logps is None else ref_logps[sequences].to(logps.dtype)
    loss, weight = objective.loss_and_weight(logps, lengths, ref)
    weight = torch.where(retain, 0, weight)
    results.logps[sequences] = logps
    results.losses[sequences] = torch.where(retain, -logps, loss)
    results.weights[sequences] = weight
    per_token = torch.repeat_interleave(weight * forget_scale, lengths, output_size=last - first)
    is_retain_token = torch.repeat_interleave(retain, lengths, output_size=last - first)
    coefs[first:last] = torch.where(is_retain_token, coefs[first:last], per_token)
