"""One optimizer step: the module whose forward is the loss, and its gradient over micro-batches and ranks."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simnpo.batch import Batch, Sampler, collate, micro_batches
from simnpo.config import UnlearnConfig
from simnpo.data import Example
from simnpo.errors import RunError
from simnpo.kernels.linear_logps import linear_logps
from simnpo.kernels.linear_unlearn_loss import UnlearnLoss, linear_unlearn_loss
from simnpo.model import hidden_states, output_head


class UnlearnModule(nn.Module):
    """Body, head and loss in one forward.

    The loss is inside because DistributedDataParallel averages only gradients of what its own forward returned.
    """

    def __init__(self, model: nn.Module, config: UnlearnConfig) -> None:
        super().__init__()
        self.model = model
        self.objective = config.objective()
        self.chunk_tokens = config.chunk_tokens
        self.bf16 = config.precision == "bf16"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def forward(self, batch: Batch, forget_coef: float = 1.0, retain_coef: float = 1.0) -> UnlearnLoss:
        with self.autocast(batch.input_ids.device):
            hidden = hidden_states(self.model, batch)
            head = output_head(self.model)
            return linear_unlearn_loss(
                hidden,
                head.weight,
                batch.targets.view(hidden.shape[:-1]),
                self.objective,
                cu_seqlens=batch.cu_seqlens,
                retain_mask=batch.retain_mask,
                ref_logps=batch.ref_logps,
                forget_coef=forget_coef,
                retain_coef=retain_coef,
                chunk_tokens=self.chunk_tokens,
                **head.options(),
            )

    def logps(self, batch: Batch) -> Tensor:
        """Log-probability of each sequence's targets, (B,) nats."""
        with self.autocast(batch.input_ids.device):
            hidden = hidden_states(self.model, batch)
            head = output_head(self.model)
            targets = batch.targets.view(hidden.shape[:-1])
            per_token_logps = linear_logps(
                hidden, head.weight, targets, chunk_tokens=self.chunk_tokens, **head.options()
            )
        if batch.cu_seqlens is None:
            return per_token_logps.sum(-1)
        return torch.stack([piece.sum() for piece in per_token_logps.split(batch.cu_seqlens.diff().tolist())])


class Collator(NamedTuple):
    """How this run makes batches."""

    packed: bool
    pad_token_id: int
    device: torch.device
    ref_logps: dict[str, float] | None

    def __call__(self, forget: Sequence[Example], retain: Sequence[Example]) -> Batch:
        batch = collate(forget, retain, packed=self.packed, pad_token_id=self.pad_token_id, ref_logps=self.ref_logps)
        return batch.to(self.device)


class StepTotals(NamedTuple):
    """Sums over the micro-batches and ranks of a step."""

    loss: float
    forget_loss: float
    retain_loss: float
    forget_nll: float
    forget_tokens: float
    tokens: float


def accumulate(
    accelerator: Accelerator, module: nn.Module, collator: Collator, sampler: Sampler, config: UnlearnConfig, step: int
) -> StepTotals:
    """Adds the gradient of step `step` to the parameters.

    The forget term is the mean over all forget sequences of the step and the retain term the mean over all its retain
    tokens, however the step is cut into micro-batches and ranks: every micro-batch is weighted by its share of both.
    """
    world, K = accelerator.num_processes, config.gradient_accumulation_steps
    forget, retain = sampler.step(step, accelerator.process_index)
    num_forget, num_retain_tokens = sampler.totals(step)
    sums = torch.zeros(len(StepTotals._fields), device=accelerator.device)
    for k, (some_forget, some_retain) in enumerate(zip(micro_batches(forget, K), micro_batches(retain, K))):
        batch = collator(some_forget, some_retain)
        B = len(some_forget)
        forget_share = B / num_forget
        retain_share = sum(batch.num_targets[B:]) / max(num_retain_tokens, 1)
        with accelerator.no_sync(module) if k < K - 1 else nullcontext():
            # times world: DistributedDataParallel averages over ranks, and the shares already add up to 1
            out: UnlearnLoss = module(
                batch, config.forget_coef * forget_share * world, config.retain_coef * retain_share * world
            )
            accelerator.backward(out.loss)
        forget_loss, retain_loss = out.forget_loss * forget_share, out.retain_loss * retain_share
        values = torch.stack([out.loss.detach() / world, forget_loss, retain_loss, -out.logps[:B].sum()])
        tokens = sum(len(example.input_ids) for example in (*some_forget, *some_retain))
        sums += torch.cat([values, values.new_tensor([sum(batch.num_targets[:B]), tokens])])
    total: Any = accelerator.reduce(sums, "sum")
    return StepTotals(*total.tolist())


def not_finite(
    what: str, module: UnlearnModule, collator: Collator, drawn: tuple[list[Example], list[Example]]
) -> RunError:
    """The error of a step whose loss or gradient is NaN or infinite.

    It names the examples that have no finite log-probability when each is run alone, or else all of the step.
    """
    examples = [example for some in drawn for example in some]
    logps = sequence_logps(module, collator, examples, batch_size=1).tolist()
    guilty = [example for example, logp in zip(examples, logps) if not math.isfinite(logp)]
    return RunError(
        f"{what}, so the run stopped before the update; examples: {', '.join(e.id for e in guilty or examples)}. "
        "The checkpoints are from before. A lower learning_rate or max_grad_norm may help"
    )


@torch.no_grad()
def sequence_logps(module: UnlearnModule, collator: Collator, examples: list[Example], batch_size: int) -> Tensor:
    """Log-probability of each example's targets under the model as it is, without a gradient.

    Returns:
        (len(examples),) float32 on the CPU, nats.
    """
    was_training = module.training
    module.eval()
    batches = (examples[i : i + batch_size] for i in range(0, len(examples), batch_size))
    logps = [module.logps(collator(batch, [])).cpu() for batch in batches]
    module.train(was_training)
    return torch.cat(logps)
