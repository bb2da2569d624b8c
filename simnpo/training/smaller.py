"""A step that runs out of memory is taken again in smaller pieces: the same mathematics, less of it at once.

Each time the micro-batches are halved, and once they are single sequences the chunk of the loss. What was decided in
which step is kept in out_of_memory.json and in the checkpoints, so that a resumed run takes every step as it was taken.
"""

import gc
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from simnpo.batch import Sampler, seed_torch
from simnpo.config import UnlearnConfig
from simnpo.errors import RunError, UserError
from simnpo.kernels.chunks import MIN_CHUNK_TOKENS, default_chunk_tokens
from simnpo.model import is_out_of_memory, output_head
from simnpo.shapes import read_json
from simnpo.training.disk import write_json
from simnpo.training.forward import Collator, arithmetic
from simnpo.training.step import StepTotals, accumulate

logger = logging.getLogger(__name__)


class SmallerSteps:
    """Takes the steps of a run, in smaller pieces from the step on that did not fit.

    Args:
        output: folder of the run, which may hold the out_of_memory.json of the part of it that is done.
        config: as the user gave it.
        model: attached, to learn the size of a chunk from.
        known: the changes up to the checkpoint that the run continues from, in case the file has gone.

    Raises:
        UserError: out_of_memory.json is damaged.
    """

    def __init__(
        self, output: Path, config: UnlearnConfig, model: nn.Module, known: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.path, self.config, self.model = output / "out_of_memory.json", config, model
        found = self._read()
        self.changes: list[dict[str, Any]] = [*known] if found is None else found

    def _read(self) -> list[dict[str, Any]] | None:
        if not self.path.exists():
            return None
        saved = read_json(self.path, {"changes": [{str: int}], "sha256": str})
        if saved["sha256"] != self._digest(saved["changes"]):
            raise UserError(
                f"{self.path} says how steps were taken, and has been changed or belongs to another run: once it is "
                "removed, --resume goes by what the checkpoint knows of it"
            )
        return saved["changes"]

    def _digest(self, changes: Any) -> str:
        return hashlib.sha256(json.dumps([self.config.fixed(), changes], sort_keys=True).encode()).hexdigest()

    def config_at(self, step: int) -> UnlearnConfig:
        """The configuration of a step, counted from 0."""
        config = self.config
        for change in self.changes:
            if change["step"] <= step:
                config = replace(config, **{name: value for name, value in change.items() if name != "step"})
        return config

    def accumulate(
        self, accelerator: Accelerator, model: nn.Module, collator: Collator, sampler: Sampler, step: int
    ) -> StepTotals:
        """`simnpo.training.step.accumulate`, again in smaller pieces where it does not fit.

        Raises:
            RunError: a step of single sequences and the smallest chunk does not fit; or it cannot be taken again: there
                are other ranks, which are waiting, or weights that were updated inside backward.
        """
        while True:
            config = self.config_at(step)
            # before each try: a resumed run, which takes the step once, draws the same dropout
            seed_torch(config.seed, step, accelerator.process_index)
            try:
                return accumulate(accelerator, model, collator, sampler, config, step)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # out of the handler, whose error holds on to the tensors of the failed step
            model.zero_grad()
            gc.collect()
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
            self._halve(config, accelerator, sampler, step, reason)

    def _halve(self, config: UnlearnConfig, accelerator: Accelerator, sampler: Sampler, step: int, reason: str) -> None:
        where = f"step {step + 1} ran out of memory ({reason})"
        if accelerator.num_processes > 1:
            raise RunError(
                f"{where} on rank {accelerator.process_index}, and the other ranks cannot take it again: the "
                "checkpoints are intact; start a run with --auto, or with more --gradient_accumulation_steps"
            )
        sequences = max(map(len, sampler.step(step, accelerator.process_index)))
        change = _smaller(config, self.model, sequences, accelerator.device)
        if change is None:
            raise RunError(
                f"{where} with single sequences and a chunk of {config.chunk_tokens or MIN_CHUNK_TOKENS} tokens: the "
                "checkpoints are intact; `simnpo plan` names settings that fit"
            )
        self.changes.append({"step": step, **change})
        write_json(self.path, {"changes": self.changes, "sha256": self._digest(self.changes)})
        now = ", ".join(f"{name} {value}" for name, value in change.items())
        if config.gradient_release:
            raise RunError(
                f"{where} while weights were updated inside backward: the same command with --resume goes back to the "
                f"newest checkpoint and takes the step with {now}"
            )
        logger.warning("%s: taken again, and from now on, with %s; the mathematics is the same", where, now)


def _smaller(config: UnlearnConfig, model: nn.Module, sequences: int, device: torch.device) -> dict[str, int] | None:
    """The fields to change, None where there is nothing left to halve."""
    if config.gradient_accumulation_steps < sequences and not config.gradient_release:
        return {"gradient_accumulation_steps": min(2 * config.gradient_accumulation_steps, sequences)}
    chunk_tokens = config.chunk_tokens
    if chunk_tokens is None:
        weight = output_head(model).weight
        itemsize = arithmetic(config).itemsize
        chunk_tokens = default_chunk_tokens(len(weight), itemsize, device, head_is_trained=weight.requires_grad)
    if chunk_tokens <= MIN_CHUNK_TOKENS:
        return None
    return {"chunk_tokens": max(chunk_tokens // 2, MIN_CHUNK_TOKENS)}
