"""What a run hands over: scores before and after, the model in Hugging Face format, the summary and the report."""

import importlib.metadata
import json
import logging
import math
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from rich.console import Console

import simnpo
import simnpo.evaluation.examples as evaluation
from simnpo.errors import RunError
from simnpo.loading import load_weights
from simnpo.training.checkpoint import not_finite
from simnpo.training.disk import whole_folder, write_json
from simnpo.training.forward import autocast, in_pieces, sequence_logps
from simnpo.training.log import Clock, peak_memory_mib

if TYPE_CHECKING:
    from simnpo.training.loop import Run

logger = logging.getLogger(__name__)


def check_finite(run: "Run") -> None:
    """Refuses a model whose log-probabilities are not finite, however finite its weights are.

    Raises:
        RunError: one of the first forget and retain examples, a step's worth, has none; nothing is handed over.
    """
    B = run.config.batch_size
    _, batches = in_pieces([*run.forget[:B], *run.retain[:B]], packed=run.collator.packed)
    logps = sequence_logps(run.model, run.config, run.collator, batches, exact=run.collator.exact_ratio)
    for example, logp in zip((example for batch in batches for example in batch), logps, strict=True):
        if not math.isfinite(logp):
            raise RunError(
                f"after the last step the log-probability of {example.id} is {logp}, so no model is written; a lower "
                "learning_rate may help"
            )


def save_model(run: "Run") -> None:
    """Writes the unlearned model and its tokenizer to `model/`; with LoRA merged, and the adapter alone to `adapter/`.

    Raises:
        RunError: the disk is full, or a merged weight is not finite.
    """
    model: Any = run.model
    if isinstance(model, PeftModel):
        with whole_folder(run.output / "adapter") as folder:
            model.save_pretrained(str(folder))
        if run.config.load_in_4bit:
            # into the weights that the body was rounded from: 4 bits would swallow what the adapters add
            base = load_weights(run.config.model, dtype=torch.float32)
            model = PeftModel.from_pretrained(base, str(run.output / "adapter"))
        # in fp32, or most of what the adapters add would be less than the last digit of a bf16 weight
        model = model.cpu().float().merge_and_unload()
        if name := not_finite(dict(model.named_parameters())):
            raise RunError(f"{name} is not finite with what its adapter adds, so no model is written; a lower "
                           "learning_rate or lora_alpha may help")  # fmt: skip
    with whole_folder(run.output / "model") as folder:
        model.save_pretrained(str(folder))
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
            "rows_cut": {
                name: sum(example.is_cut for example in examples)
                for name, examples in (("forget", run.forget), ("retain", run.retain), ("heldout", run.heldout))
                if examples
            },
            "versions": {
                "simnpo": simnpo.__version__,
                **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "peft")},
            },
        },
    )


def evaluate(run: "Run", when: Literal["before", "after"]) -> None:
    """Adds the model's scores as it is to evaluation.json, under `when`; a resumed run keeps its first "before".

    All ranks call it, each runs its share of the examples, and the first writes.
    """
    path = run.output / "evaluation.json"
    scores = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    at_most = run.config.eval_examples
    if at_most == 0 or (when == "before" and when in scores):
        return
    sets = {"forget": run.forget, "retain": run.retain, "heldout": run.heldout}
    some = {name: examples[:at_most] for name, examples in sets.items() if examples}
    with autocast(run.config, run.accelerator.device):
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        scored = evaluation.evaluate(run.model, run.tokenizer, some, rank=rank, num_ranks=world)
    if not run.accelerator.is_main_process:
        return
    scores[when] = {name: asdict(one) for name, one in scored.items()}
    write_json(path, scores)
    means = ", ".join(f"{name} {one.probability:.3g}" for name, one in scored.items())
    Console(stderr=True).print(f"{when}: mean probability of the answers: {means}", highlight=False, soft_wrap=True)
