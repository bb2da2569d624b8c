"""A model with everything around it that a step needs, and one step of our loop and of the others on it.

A step is what a loop does between two batches: the batch made, loss, backward, clipping, AdamW, gradients dropped. All
loops share the model, the batches of a step, the optimizer and the arithmetic of the configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simnpo.batch import Sampler, seed_torch
from simnpo.benchmarks.throughput.loops import AS_PUBLISHED, Loop, Terms, Theirs
from simnpo.benchmarks.throughput.workload import Workload
from simnpo.config import UnlearnConfig
from simnpo.objectives import NPO, SimNPO
from simnpo.training import setup
from simnpo.training.forward import Collator, autocast
from simnpo.training.loop import start_accelerator
from simnpo.training.optimizer import Optimizer, clip_gradients, make_optimizer, set_learning_rate
from simnpo.training.reference import reference_logps
from simnpo.training.step import accumulate


@dataclass
class Subject:
    """What `simnpo.training.loop` puts together before its first step, and the reference model of other loops."""

    config: UnlearnConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: Optimizer
    collator: Collator
    workload: Workload
    theirs: Theirs
    reference: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def sampler(self) -> Sampler:
        config, work = self.config, self.workload
        return Sampler(work.forget, work.retain, config.batch_size, config.retain_sequences(), config.seed)

    @property
    def terms(self) -> Terms:
        config, objective = self.config, self.config.objective()
        assert isinstance(objective, SimNPO | NPO), "the command line offers no other"
        coefs = config.forget_coef, config.retain_coef
        return Terms(objective, *coefs, self.collator.pad_token_id, self.theirs.pad_to, self.collator.ref_logps)

    def on(self, workload: Workload, **changes: Any) -> Subject:
        """The same model on other data, or with other fields of the configuration that do not change the model."""
        return replace(self, workload=workload, config=replace(self.config, **changes))

    def useful_tokens(self, step: int) -> int:
        """Targets that count in a step."""
        return sum(example.num_targets for examples in self.sampler.step(step, 0) for example in examples)


def make_subject(
    config: UnlearnConfig, workload: Workload, pad_token_id: int, theirs: Theirs = AS_PUBLISHED
) -> Subject:
    """Builds what `config` asks for, as the run's own loop does.

    Raises:
        UserError: a lever that cannot work here, or a model that cannot be loaded.
    """
    accelerator = start_accelerator(config)
    model = setup.build_model(config, accelerator.device)
    tokenizer = SimpleNamespace(pad_token_id=pad_token_id)
    collator = setup.make_collator(config, model, tokenizer, accelerator.device)
    optimizer = make_optimizer(
        model.parameters(), config.weight_decay, name=config.optimizer, gradient_release=config.gradient_release
    )
    set_learning_rate(optimizer, config.learning_rate)
    model = accelerator.prepare(model).train()
    return Subject(config, accelerator, model, optimizer, collator, workload, theirs)


def with_reference(subject: Subject) -> Subject:
    """The subject with the reference's log-probabilities of all forget examples, NPO's pass before the first step."""
    forget, config = subject.workload.forget, subject.config
    unwrapped: Any = subject.accelerator.unwrap_model(subject.model)
    collator = setup.with_exact_ratio(config, unwrapped, subject.collator, forget)
    logps = reference_logps(config, subject.accelerator, subject.model, collator, forget, per_token=False)
    ref_logps = {example.id: logp for example, logp in zip(forget, logps, strict=True)}
    return replace(subject, collator=collator._replace(ref_logps=ref_logps))


def our_gradient(subject: Subject, step: int) -> float:
    """Adds the gradient of a step to the parameters; returns the loss."""
    return accumulate(subject.accelerator, subject.model, subject.collator, subject.sampler, subject.config, step).loss


def their_gradient(loop: Loop, subject: Subject, step: int) -> Tensor:
    """The same, by somebody else's loop; the loss is () and on the device.

    Of a batch in micro-batches it is the mean of theirs, as in all these loops: that of the retain tokens, too.
    """
    forget, retain = subject.sampler.step(step, 0)
    parts = len(forget) // (subject.theirs.micro_batch or len(forget))
    total = torch.zeros((), device=subject.device)
    for part in range(parts):
        pieces = forget[part::parts], retain[part::parts]
        with autocast(subject.config, subject.device):
            loss = loop.loss(subject.model, subject.reference, *pieces, subject.terms) / parts
        loss.backward()
        total += loss.detach()
    return total


def take_step(loop: Loop | None, subject: Subject, step: int) -> None:
    """A whole step of `loop`; None: of ours."""
    seed_torch(subject.config.seed, step, 0)
    if loop is None:
        our_gradient(subject, step)
    else:
        their_gradient(loop, subject, step)
    norm = clip_gradients(subject.parameters, subject.config.max_grad_norm)
    if loop is None:
        norm.item()  # our loop looks at it before every update
    subject.optimizer.step()
    subject.optimizer.zero_grad()


def prepare(loop: Loop | None, subject: Subject) -> None:
    """What differs around the loops: a reference model in memory; deterministic kernels, which only ours wants."""
    holds = loop is not None and loop.holds_reference(subject.terms.objective)
    if not holds:
        subject.reference = None
    elif subject.reference is None:
        subject.reference = copy.deepcopy(subject.model).eval().requires_grad_(False)
    if subject.device.type == "cuda":
        torch.use_deterministic_algorithms(loop is None, warn_only=True)


def steps_of(loop: Loop | None, subject: Subject) -> Callable[[], None]:
    """A function that takes the next step each time it is called, from the first on."""
    taken = iter(range(10**9))

    def run() -> None:
        take_step(loop, subject, next(taken))

    return run
