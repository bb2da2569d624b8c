"""One optimizer step: the gradient of the loss over micro-batches and ranks."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from simnpo.batch import Sampler, forward_passes
from simnpo.config import UnlearnConfig
from simnpo.data import Example
from simnpo.errors import RunError
from simnpo.kernels.linear_unlearn_loss import UnlearnLoss
from simnpo.training.forward import Collator, autocast, sequence_logps, with_exact_logps


class StepTotals(NamedTuple):
    """Sums over the micro-batches and ranks of a step."""

    loss: float
    forget_loss: float
    retain_loss: float
    forget_nll: float
    forget_tokens: float
    tokens: float


def accumulate(
    accelerator: Accelerator, model: nn.Module, collator: Collator, sampler: Sampler, config: UnlearnConfig, step: int
) -> StepTotals:
    """Adds the gradient of step `step` to the parameters of an attached model.

    The forget term is the mean over all forget sequences of the step and the retain term the mean over all its retain
    tokens, however the step is cut into micro-batches and ranks: each of them divides by the same two totals. With
    `gradient_release` the parameters are updated on the way, unless the loss is not finite.
    """
    world = accelerator.num_processes
    forget, retain = sampler.step(step, accelerator.process_index)
    passes = forward_passes(forget, retain, config.gradient_accumulation_steps, separate=config.separate_terms)
    unwrapped: Any = accelerator.unwrap_model(model)
    num_forget, num_retain_tokens = sampler.totals(step)
    objective = config.objective()
    sums = torch.zeros(len(StepTotals._fields), device=accelerator.device)
    for k, (some_forget, some_retain) in enumerate(passes):
        batch = collator(some_forget, some_retain)
        batch = with_exact_logps(unwrapped, config, collator, some_forget, batch)
        with accelerator.no_sync(model) if k < len(passes) - 1 else nullcontext():
            with autocast(config, accelerator.device):
                out: UnlearnLoss = model(
                    **batch.inputs(),
                    **batch.for_objective(),
                    objective=objective,
                    forget_coef=config.forget_coef,
                    retain_coef=config.retain_coef,
                    num_forget=num_forget,
                    num_retain_tokens=max(num_retain_tokens, 1),
                    **collator.head_options(config),
                )
            # a backward that updates the weights must not start from a loss that would spoil them
            if not config.gradient_release or torch.isfinite(out.loss):
                # times world: DistributedDataParallel averages over ranks, and the totals are those of all of them
                accelerator.backward(out.loss * world)
        B = len(some_forget)
        values = torch.stack([out.loss.detach(), out.forget_loss, out.retain_loss, -out.logps[:B].sum()])
        sums += torch.cat([values, values.new_tensor([sum(batch.num_targets[:B]), sum(batch.num_inputs)])])
    total: Any = accelerator.reduce(sums, "sum")
    return StepTotals(*total.tolist())


def not_finite(
    what: str,
    model: nn.Module,
    config: UnlearnConfig,
    collator: Collator,
    drawn: tuple[list[Example], list[Example]],
) -> RunError:
    """The error of a step whose loss or gradient is NaN or infinite.

    It names the examples that have no finite log-probability when each is run alone, or else all of the step.
    """
    examples = [example for some in drawn for example in some]
    logps = sequence_logps(model, config, collator, [[example] for example in examples])
    guilty = [example for example, logp in zip(examples, logps) if not math.isfinite(logp)]
    return RunError(
        f"{what}, so the run stopped before the update; examples: {', '.join(e.id for e in guilty or examples)}. "
        "The checkpoints are from before. A lower learning_rate or max_grad_norm may help"
    )


@torch.no_grad()
def objective_weights(
    model: nn.Module, config: UnlearnConfig, collator: Collator, examples: list[Example], batch_size: int
) -> list[tuple[int, float, float]]:
    """Tokens, log-probability and weight that the objective sees of each forget example.

    An objective whose weights depend on the batch (KTO) is asked in batches of `batch_size`.
    """
    was_training = model.training
    model.eval()
    rows = []
    for i in range(0, len(examples), batch_size):
        some = examples[i : i + batch_size]
        batch = with_exact_logps(model, config, collator, some, collator(some, []))
        with autocast(config, collator.device):
            out: UnlearnLoss = model(
                **batch.inputs(),
                **batch.for_objective(),
                objective=config.objective(),
                **collator.head_options(config),
            )
        rows += zip(*(x[: len(some)].tolist() for x in (out.num_tokens, out.logps, out.weights)), strict=True)
    model.train(was_training)
    return rows


def dealt(
    accelerator: Accelerator,
    of_examples: Callable[[nn.Module, UnlearnConfig, Collator, list[Example], int], list[Any]],
    model: nn.Module,
    config: UnlearnConfig,
    collator: Collator,
    examples: list[Example],
) -> list[Any]:
    """`of_examples` (`objective_weights`), each rank running its share; all must call, and all get it of all."""
    rank, world = accelerator.process_index, accelerator.num_processes
    own = of_examples(model, config, collator, examples[rank::world], config.batch_size)
    values: list[Any] = [None] * len(examples)
    for i, share in enumerate(gather_object([own])):
        values[i::world] = share
    return values
