"""What stands before the first step: the data, the model, and the checkpoint to continue from."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simnpo.attached_model import attach
from simnpo.attention import use_packed_attention
from simnpo.config import LONG_TARGETS, UnlearnConfig
from simnpo.data import Example, load_examples, warn_about_overlap
from simnpo.errors import UserError
from simnpo.evaluation.generation import warn_of_short_answers
from simnpo.loading import load_weights
from simnpo.memory.checkpoints import checkpoint_layers
from simnpo.memory.tiles import tile_layers
from simnpo.model import add_lora, causal_lm, keeps_sequences_apart, position_limit, refusing, shares_prefix
from simnpo.pieces import separate, split
from simnpo.training import checkpoint
from simnpo.training.forward import Collator, arithmetic, autocast
from simnpo.upcast import check_float32

logger = logging.getLogger(__name__)


def newest_checkpoint(config: UnlearnConfig, facts: dict[str, Any]) -> Path | None:
    """The checkpoint to continue from, None to start at step 0.

    Args:
        facts: what has to be as it was when the checkpoint was written, besides the configuration.

    Raises:
        UserError: no checkpoint is intact, or the configuration or one of `facts` has changed; names it.
    """
    path = checkpoint.newest_checkpoint(config.output_dir() / "checkpoints")
    if path is not None:
        config.refuse_changes(checkpoint.read_state(path)["config"])
        refuse_other_facts(config, path, facts)
    return path


def refuse_other_facts(config: UnlearnConfig, path: Path, facts: dict[str, Any]) -> None:
    """Raises `UserError` naming those of `facts` that differ from what checkpoint `path` was written with."""
    state = checkpoint.read_state(path)
    changed = [f"{name} (was {state[name]!r}, now {value!r})" for name, value in facts.items() if state[name] != value]
    if changed:
        raise UserError(f"--resume cannot continue {config.output} to the same bits, changed: {', '.join(changed)}")


def read_data(config: UnlearnConfig, tokenizer: Any) -> tuple[list[Example], list[Example], list[Example]]:
    """Forget, retain and held-out examples, the last two empty if not given; warns where forget and retain overlap.

    With a stride they are split instead of cut. Each piece is an example, but for those of a forget document that share
    its reward.
    """
    alternate = None if config.alternates() == "none" else config.alternate
    cut_at = config.max_length if config.stride is None else None
    forget, retain, heldout = (
        [] if path is None else load_examples(path, tokenizer, cut_at, alternate)
        for path, alternate in ((config.forget, alternate), (config.retain, None), (config.heldout, None))
    )
    warn_about_overlap(forget, retain)
    if config.stride is not None:
        forget, retain, heldout = (
            [split(example, config.max_length, config.stride) for example in examples]
            for examples in (forget, retain, heldout)
        )
        retain, heldout = separate(retain, tokenizer), separate(heldout, tokenizer)
        if config.reward_per == "piece":
            forget = separate(forget, tokenizer)
    return forget, retain, heldout


def fingerprint(*sets: list[Example]) -> str:
    """Changes when any token, label or bound of a piece does, of an alternate too."""
    digest = hashlib.sha256()
    for examples in sets:
        digest.update(f"set of {len(examples)}".encode())
        for example in examples:
            # an example at a time: the text of a whole corpus of long documents is several times its tokens
            for e in (example, *([example.alternate] if example.alternate else [])):
                digest.update(json.dumps((e is example, e.input_ids, e.labels, e.piece_lengths)).encode())
    return digest.hexdigest()[:16]


def build_model(config: UnlearnConfig, device: torch.device) -> nn.Module:
    """The model on its device, ready to train: loss attached, adapters added."""
    torch.manual_seed(config.seed)
    if config.load_in_4bit:
        model = load_weights(
            config.model, dtype=arithmetic(config), attention=config.attention, in_4bit_on=device
        )  # fmt: skip
    else:
        # a body that adapters freeze only has to be as exact as the arithmetic; what trains keeps its small updates
        dtype = arithmetic(config) if config.lora or config.weights == "bf16" else torch.float32
        model = load_weights(config.model, dtype=dtype, attention=config.attention).to(device)  # type: ignore[arg-type]
    attach(model)
    if config.gradient_checkpointing:
        checkpoint_layers(model, offload=config.offload_activations, device=device)
    if config.tile_tokens is not None:
        tile_layers(model, config.tile_tokens)
    return add_lora(model, config.lora_rank, config.lora_alpha) if config.lora else model


def check_tokens(model: nn.Module, examples: list[Example]) -> None:
    """Whether the model has an embedding of every token and, where it has learned its positions, of every position;
    warns where it has none for the answers that a report shows.

    Raises:
        UserError: it has not; names the first example.
    """
    limit = check_readable(model, examples)
    asked = [(len(example.prompt_ids), example.num_targets) for example in examples if example.prompt_ids]
    warn_of_short_answers(limit, [length for length, _ in asked], 2 * max((n for _, n in asked), default=1))


def check_readable(model: nn.Module, examples: list[Example]) -> int | None:
    """`check_tokens` without its warning; returns `simnpo.model.position_limit`."""
    size, limit = len(causal_lm(model).get_input_embeddings().weight), position_limit(model)  # type: ignore[arg-type]
    for example in [*examples, *(example.alternate for example in examples if example.alternate is not None)]:
        if max(example.input_ids) >= size:
            raise UserError(
                f"{example.id}: token {max(example.input_ids)} is outside the model's vocabulary of {size}: "
                "the tokenizer belongs to another model"
            )
        longest = max(example.piece_lengths, default=len(example.input_ids))
        if limit is not None and longest > limit:
            raise UserError(
                f"{example.id}: {longest} tokens are more than the {limit} positions the model has learned: use "
                f"--max-length {limit} or less"
            )
    return limit


def make_collator(config: UnlearnConfig, model: nn.Module, tokenizer: Any, device: torch.device) -> Collator:
    """Packs where the model keeps packed sequences apart, with what they all begin with once where it can share that.

    Raises:
        UserError: `packing` is "on" and the model does not.
    """
    packed, share = config.packing != "off", False
    if packed:
        model.eval()
        with refusing(f"model: {type(causal_lm(model)).__name__} cannot run"), autocast(config, device):
            if config.attention is None:
                use_packed_attention(model)
            packed = keeps_sequences_apart(model)
            share = packed and config.share_prefix == "auto" and shares_prefix(model)
        if not packed:
            name = f"{type(causal_lm(model)).__name__} mixes sequences that are packed into one row"
            if config.packing == "on":
                raise UserError(f"packing: {name}; use --packing auto or off, or another --attention")
            logger.warning("padding instead of packing: %s", name)
    alternates = config.alternates()
    return Collator(packed, tokenizer.pad_token_id, device, None, alternates=alternates, share_prefix=share)


def with_exact_ratio(config: UnlearnConfig, model: nn.Module, collator: Collator, forget: list[Example]) -> Collator:
    """The collator of a run that reads the log-ratio of forget sequences in float32, if this is one; where it might be
    and the model cannot, one with float32 logits.

    Raises:
        UserError: `exact_ratio` is "on" and the model cannot compute in float32 on the weights it has.
    """
    longest = max(example.num_targets for example in forget)
    if config.reads_exact_ratio(longest):
        try:
            check_float32(model)
            return collator._replace(exact_ratio=True)
        except UserError as error:
            if config.exact_ratio == "on":
                raise
            logger.warning("%s; the log-ratio is read in bf16", error)
    coarse = config.precision == "bf16" and config.objective().sums_ratio and longest > LONG_TARGETS
    return collator._replace(logits_dtype=torch.float32) if coarse else collator


def check_pieces(packed: bool, forget: list[Example]) -> None:
    """Whether documents whose pieces share a reward can go through the model.

    Raises:
        UserError: they cannot, for it keeps pieces apart only where sequences are packed; names the first document.
    """
    for example in [*forget, *(example.alternate for example in forget if example.alternate is not None)]:
        if len(example.piece_lengths) > 1 and not packed:
            raise UserError(
                f"reward_per: {example.id} is a document of {len(example.piece_lengths)} pieces that share one reward, "
                "so they go through the model as one packed row, and this run does not pack: use --reward_per piece, "
                "another --attention, or no --packing off"
            )
