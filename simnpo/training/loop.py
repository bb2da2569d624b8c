"""The run: a model, what it has to forget and what it has to keep in; the unlearned model and a report out."""

import logging
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from simnpo.batch import Sampler
from simnpo.config import UnlearnConfig
from simnpo.data import Example
from simnpo.errors import UserError
from simnpo.loading import load_tokenizer
from simnpo.planning import auto
from simnpo.report import write_report
from simnpo.training import result, run_folder, setup
from simnpo.training.checkpoint import load_checkpoint, read_state, restore_run_files, save_checkpoint
from simnpo.training.forward import Collator
from simnpo.training.log import Clock, RunLog, peak_memory_mib
from simnpo.training.main_rank import on_main
from simnpo.training.optimizer import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from simnpo.training.reference import with_reference
from simnpo.training.reference_cache import model_digest
from simnpo.training.signals import Stopped, StopSignals
from simnpo.training.smaller import SmallerSteps
from simnpo.training.step import StepTotals, accumulate, dealt, not_finite, objective_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything a step needs, put together once."""

    config: UnlearnConfig
    accelerator: Accelerator
    model: nn.Module
    tokenizer: Any
    collator: Collator
    forget: list[Example]
    retain: list[Example]
    heldout: list[Example]
    facts: dict[str, Any]  # besides the configuration, what a resumed run must find unchanged

    @property
    def output(self) -> Path:
        return self.config.output_dir()

    @property
    def num_steps(self) -> int:
        return self.config.num_steps(len(self.forget))


def unlearn(config: UnlearnConfig) -> Path:
    """Runs `config` from its data to its report; continues it if `config.resume`.

    Returns:
        The folder of the run, with the unlearned model in `model/`.

    Raises:
        UserError, FileNotFoundError: before the first step: the configuration, the data or the model cannot work.
        RunError: the run had to stop: a loss or weights that are not finite, a full disk.
        Stopped: a KeyboardInterrupt, by Ctrl-C or another signal, after a checkpoint.
    """
    if not config.output.strip():
        raise UserError(f"output must be the name of a folder, got {config.output!r}")
    accelerator = start_accelerator(config)
    with StopSignals() as stop, ExitStack() as held:
        on_main(accelerator, lambda: held.enter_context(run_folder.locked(config.output_dir())))
        return run_in_folder(config, accelerator, stop)


def run_in_folder(config: UnlearnConfig, accelerator: Accelerator, stop: StopSignals) -> Path:
    """`unlearn`, in a folder that no other process writes to."""
    output = config.output_dir()
    config = on_main(accelerator, lambda: auto.resumed(config, run_folder.saved_config(output)))
    on_main(accelerator, lambda: run_folder.check_output(config))
    if on_main(accelerator, lambda: run_folder.is_complete(output)):
        logger.warning("%s is complete: nothing is left to do", output)
        return output

    tokenizer = load_tokenizer(config.model)
    forget, retain, heldout = setup.read_data(config, tokenizer)
    config.num_steps(len(forget))  # refuses more than can be counted
    facts = {"data": setup.fingerprint(forget, retain), "ranks": accelerator.num_processes}
    checkpoint = on_main(accelerator, lambda: setup.newest_checkpoint(config, facts))
    if config.auto:
        device, ranks = accelerator.device, accelerator.num_processes
        config = on_main(accelerator, lambda: auto.choose_here(config, forget, retain, device, ranks))
    model = setup.build_model(config, accelerator.device)
    facts["model"] = on_main(accelerator, lambda: model_digest(model))
    if checkpoint is not None:
        setup.refuse_other_facts(config, checkpoint, facts)
    setup.check_tokens(model, [*forget, *retain, *heldout])
    collator = setup.make_collator(config, model, tokenizer, accelerator.device)
    setup.check_pieces(collator.packed, forget)
    collator = setup.with_exact_ratio(config, model, collator, forget)
    accelerator.wait_for_everyone()  # until every rank has seen the folder as it was
    if accelerator.is_main_process:
        run_folder.open_output(config, checkpoint)
        restore_run_files(checkpoint, output)
    collator = with_reference(
        config, accelerator, model, facts["model"], collator, forget, reload=checkpoint is not None
    )
    run = Run(config, accelerator, model, tokenizer, collator, forget, retain, heldout, facts)

    result.evaluate(run, "before")
    clock = train(run, checkpoint, stop)
    result.evaluate(run, "after")
    if accelerator.is_main_process:
        result.check_finite(run)
        result.save_model(run)
        result.write_summary(run, clock)
        write_report(output)
        run_folder.write_complete(output)
    accelerator.wait_for_everyone()
    return output


def start_accelerator(config: UnlearnConfig) -> Accelerator:
    """Accelerate's view of the machine.

    Raises:
        UserError: a way of spreading the model that this loop does not know, or too few sequences for the ranks.
    """
    # `autocast` is the run's own, so that `accelerate launch` cannot choose another precision than the config
    accelerator = Accelerator(cpu=config.cpu, mixed_precision="no")
    spread = accelerator.distributed_type
    if spread in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate is set to {spread.value}: this command knows one process or DistributedDataParallel, the "
            "whole model on every rank; train one that must be sharded in a loop of yours, with simnpo.attach(model)"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched and accelerate found no accelerator for them to share: each would run "
            "alone and write over the others; add --cpu to run them on the CPU"
        )
    if accelerator.num_processes > 1 and config.gradient_release:
        raise UserError(
            "gradient_release updates a weight before the ranks have added up its gradient: run it on one process"
        )
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size < parts:
        raise UserError(
            f"batch_size must be at least ranks x gradient_accumulation_steps = {parts}, one forget sequence for each, "
            f"got {config.batch_size}"
        )
    if accelerator.device.type == "cpu":
        # where deepspeed is installed, it would look for an accelerator and print that it has found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if accelerator.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return accelerator


def train(run: Run, checkpoint: Path | None, stop: StopSignals) -> Clock:
    """Takes every step that `checkpoint` has not taken, and leaves a checkpoint of the last one.

    Raises:
        Stopped: a signal has asked to stop; there is a checkpoint of the step that was being taken.
        RunError: the loss or the weights are no longer finite, a step does not fit, or the disk is full.
    """
    config, accelerator, num_steps = run.config, run.accelerator, run.num_steps
    rank, world = accelerator.process_index, accelerator.num_processes
    optimizer = make_optimizer(
        run.model.parameters(), config.weight_decay, name=config.optimizer, gradient_release=config.gradient_release
    )
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "out_of_memory": []}
    if checkpoint is not None:
        load_checkpoint(checkpoint, run.model, optimizer)
        state = read_state(checkpoint)
    start = state["step"]
    sampler = Sampler(run.forget, run.retain, config.batch_size, config.retain_sequences(), config.seed, world)
    model = accelerator.prepare(run.model).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    smaller = SmallerSteps(run.output, config, run.model, state["out_of_memory"])
    if world > 1 and start < num_steps:
        # DistributedDataParallel decides after its first backward in which order it adds up from then on: that one is
        # thrown away, so that the sums of a resumed run round as those of one that was not stopped
        accumulate(accelerator, model, run.collator, sampler, config, start)
        optimizer.zero_grad()

    clock = Clock(state["tokens"], state["seconds"])
    with RunLog(run.output, start, num_steps, enabled=accelerator.is_main_process) as log, stop.deferred():
        for step in range(start, num_steps):
            if config.weight_examples and step in (0, num_steps // 2):
                log.weights(forget_weights(run, step))
            rate = learning_rate(step, num_steps, config.learning_rate, config.warmup_ratio)
            set_learning_rate(optimizer, rate)
            totals = smaller.accumulate(accelerator, model, run.collator, sampler, step)
            grad_norm = clip_gradients(parameters, config.max_grad_norm).item()
            if not (all(map(math.isfinite, totals)) and math.isfinite(grad_norm)):
                what = f"step {step + 1}: the loss is {totals.loss} and the gradient norm {grad_norm}"
                raise not_finite(what, run.model, config, run.collator, sampler.step(step, rank))
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            clock.add(totals.tokens)
            if done % config.logging_steps == 0 or done == num_steps:
                log.step(metrics_row(run, done, totals, grad_norm, rate, clock))
            is_save_step = config.save_steps and done % config.save_steps == 0
            signum = stop.agreed(accelerator.device)
            if (is_save_step or done == num_steps or signum) and accelerator.is_main_process:
                state = {"tokens": clock.tokens, "seconds": clock.seconds(), "out_of_memory": smaller.changes}
                state |= {"config": config.fixed(), **run.facts}
                save_checkpoint(run.output, done, run.model, optimizer, state, keep=config.keep_checkpoints)
            if signum:
                accelerator.wait_for_everyone()  # none may end before the checkpoint is written
                raise Stopped(signum, together=world > 1)
        if config.weight_examples:
            log.weights(forget_weights(run, num_steps))
    return clock


def metrics_row(run: Run, step: int, totals: StepTotals, grad_norm: float, rate: float, clock: Clock) -> dict[str, Any]:
    """The numbers of one step, over all its micro-batches and ranks. NLLs are nats per target."""
    return {
        "step": step,
        "epoch": step * run.config.batch_size / len(run.forget),
        "loss": totals.loss,
        "forget_loss": totals.forget_loss,
        "retain_loss": totals.retain_loss,
        "forget_nll": totals.forget_nll / max(totals.forget_tokens, 1),
        "retain_nll": totals.retain_loss,
        "grad_norm": None if run.config.gradient_release else grad_norm,  # there never are all gradients
        "learning_rate": rate,
        "tokens": clock.tokens,
        "tokens_per_second": clock.lap(),
        "peak_memory_mib": peak_memory_mib(run.accelerator.device),
        "seconds": clock.seconds(),
    }


def forget_weights(run: Run, step: int) -> dict[str, Any]:
    """The gradient weight of the first forget examples after `step` steps, for weights.jsonl."""
    examples = run.forget[: run.config.weight_examples]
    rows = dealt(run.accelerator, objective_weights, run.model, run.config, run.collator, examples)
    num_tokens, logps, weights = zip(*rows, strict=True)
    return {
        "step": step,
        "ids": [example.id for example in examples],
        "num_tokens": list(num_tokens),
        "logps": list(logps),
        "weights": list(weights),
    }
