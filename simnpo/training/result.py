"""What a run hands over: scores before and after, the model in Hugging Face format, the summary and the report."""

import importlib.metadata
import logging
import platform
from typing import TYPE_CHECKING, Literal

import torch
from peft import PeftModel

import simnpo
from simnpo.training.disk import whole_folder, write_json
from simnpo.training.log import Clock, peak_memory_mib

if TYPE_CHECKING:
    from simnpo.training.loop import Run

logger = logging.getLogger(__name__)


def save_model(run: "Run") -> None:
    """Writes the unlearned model and its tokenizer to `model/`; with LoRA merged, and the adapter alone to `adapter/`.

    Raises:
        RunError: the disk is full.
    """
    model = run.module.model
    if isinstance(model, PeftModel):
        with whole_folder(run.output / "adapter") as folder:
            model.save_pretrained(folder)
        # in fp32, or most of what the adapters add would be less than the last digit of a bf16 weight
        model = model.cpu().float().merge_and_unload()
    with whole_folder(run.output / "model") as folder:
        model.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)


def write_summary(run: "Run", clock: Clock) -> None:
    """Writes summary.json: what the run took, and with what."""
    device = run.accelerator.device
    write_json(
        run.output / "summary.json",
        {
            "steps": run.num_steps,
            "seconds": clock.seconds(),
            "tokens": clock.tokens,
            "tokens_per_second": clock.tokens / clock.seconds(),
            "peak_memory_mib": peak_memory_mib(device),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "ranks": run.accelerator.num_processes,
            "packed": run.collator.packed,
            "versions": {
                "simnpo": simnpo.__version__,
                **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "peft")},
            },
        },
    )


def evaluate(run: "Run", when: Literal["before", "after"]) -> None:
    if run.config.eval_examples:
        raise NotImplementedError


def write_report(run: "Run") -> None:
    pass
