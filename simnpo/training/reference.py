"""The reference: log-probabilities of forget examples under the model as it is before the first step.

They are computed once, or found on disk, so that there never is a second model and a step needs one number a sequence.
"""

import json
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from rich.progress import track
from torch import nn

from simnpo.config import UnlearnConfig
from simnpo.data import Example
from simnpo.training.disk import write_json
from simnpo.training.forward import Collator, in_pieces, sequence_logps, token_logps
from simnpo.training.reference_cache import cache_folder, cache_key, read_references, write_references

PLAIN_SECONDS = 10.0  # between lines of progress, where there is no terminal to draw a bar in


def with_reference(
    config: UnlearnConfig,
    accelerator: Accelerator,
    model: nn.Module,
    digest: str,
    collator: Collator,
    forget: list[Example],
    *,
    reload: bool,
) -> Collator:
    """The collator with what the objective wants of the model as it is now: log-probabilities of forget examples and
    alternates, or of each of their tokens.

    The run keeps them in reference.json, and `reference_cache` keeps them for other runs. All ranks must call.

    Args:
        model: attached, on its device.
        digest: the model's, see `simnpo.training.reference_cache.model_digest`.
        reload: take those of reference.json if it is there, for a run that goes on.
    """
    objective = config.objective()
    per_token = objective.needs_ref_token_logps
    if not (objective.needs_ref_logps or per_token):
        return collator
    path = config.output_dir() / "reference.json"
    known = reload and path.exists()
    accelerator.wait_for_everyone()  # until every rank has seen whether it is there
    if not known:
        examples = [*forget, *(example.alternate for example in forget if example.alternate is not None)]
        values = _found_or_computed(config, accelerator, model, digest, collator, forget, examples, per_token)
        if accelerator.is_main_process:
            write_json(path, {example.id: value for example, value in zip(examples, values, strict=True)})
    accelerator.wait_for_everyone()
    reference = json.loads(path.read_text(encoding="utf-8"))
    return collator._replace(**{"ref_token_logps" if per_token else "ref_logps": reference})


def _found_or_computed(
    config: UnlearnConfig, accelerator: Accelerator, model: nn.Module, digest: str, collator: Collator,
    forget: list[Example], examples: list[Example], per_token: bool,
) -> list[Any]:  # fmt: skip
    """What the cache has, which only the first rank reads and writes; otherwise all compute their share."""
    found, file = None, None
    if accelerator.is_main_process:
        key = cache_key(config, model, digest, collator, forget, per_token=per_token)
        file = cache_folder(config) / f"{key}.safetensors"
        sizes = [len(example.input_ids) for example in examples] if per_token else None
        found = read_references(file, sizes, len(examples))
    [is_known] = broadcast_object_list([found is not None])
    if is_known:
        if file is not None:
            Console(stderr=True).print(f"reference log-probabilities: from {file}", highlight=False, soft_wrap=True)
        return found or []
    values = reference_logps(config, accelerator, model, collator, examples, per_token=per_token)
    if file is not None:
        write_references(file, values, per_token=per_token)
    return values


def reference_logps(
    config: UnlearnConfig, accelerator: Accelerator, model: nn.Module, collator: Collator, examples: list[Example], *,
    per_token: bool,
) -> list[Any]:  # fmt: skip
    """Log-probabilities of each example's targets under the attached model as it is.

    A document goes through piece by piece, and whole batches are dealt to the ranks: memory is that of MAX_TOKENS or of
    the longest piece, and the numbers are the same bits on any number of ranks.

    Returns:
        of each example the sum, nats; or with `per_token` a list like its input_ids, 0 where ignored.
    """
    parts, batches = in_pieces(examples, packed=collator.packed)
    own = batches[accelerator.process_index :: accelerator.num_processes]
    shown = _with_progress(own, enabled=accelerator.is_main_process)
    of_batches = token_logps if per_token else partial(sequence_logps, exact=collator.exact_ratio)
    ids = [piece.id for batch in own for piece in batch]
    of_piece: dict[str, Any] = {}
    for share in gather_object([dict(zip(ids, of_batches(model, config, collator, shown), strict=True))]):
        of_piece |= share
    if per_token:
        return [[logp for piece in some for logp in of_piece[piece.id]] for some in parts]
    return [math.fsum(of_piece[piece.id] for piece in some) for some in parts]


def _with_progress(batches: list[list[Example]], *, enabled: bool) -> Iterator[list[Example]]:
    """The batches one by one, with a bar, or a line now and then."""
    console = Console(stderr=True)
    if enabled and console.is_terminal:
        yield from track(batches, "reference", console=console, transient=True)
        return
    done, total, said = 0, sum(map(len, batches)), time.perf_counter()
    for batch in batches:
        yield batch
        done += len(batch)
        if enabled and time.perf_counter() - said > PLAIN_SECONDS:
            console.print(f"reference log-probabilities: {done}/{total} sequences", highlight=False)
            said = time.perf_counter()
