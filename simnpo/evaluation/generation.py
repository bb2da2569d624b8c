"""What a model writes by itself when it always takes the most probable token."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from simnpo.data import Example
from simnpo.model import causal_lm, position_limit

logger = logging.getLogger(__name__)


def greedy_answers(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int | None = None
) -> list[str]:
    """What the model answers to each prompt.

    Args:
        examples: each with a prompt; they make one batch.
        max_new_tokens: of an answer; None: twice the longest reference.
    """
    room = max_new_tokens or 2 * max(example.num_targets for example in examples)
    texts = greedy_continuations(model, tokenizer, [example.prompt_ids for example in examples], room)
    return [text.strip() for text in texts]


def greedy_continuations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    """What the model writes after each prompt, special tokens left out; see `greedy_tokens`."""
    written = greedy_tokens(model, tokenizer, prompts, max_new_tokens)
    return tokenizer.batch_decode(written, skip_special_tokens=True)


@torch.no_grad()
def greedy_tokens(
    model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """The tokens that the model writes after each prompt.

    Args:
        prompts: token ids, none empty; they make one batch, padded on the left.
        max_new_tokens: of a continuation; it ends before at an end-of-sequence token, and padding follows.

    Returns:
        A list for each prompt; shorter ones, down to none, where the model has learned no positions further on.
    """
    limit = position_limit(model)
    if limit is None:
        return _generate(model, tokenizer, prompts, max_new_tokens)
    written: list[list[int]] = [[] for _ in prompts]
    by_room: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_room[min(max_new_tokens, limit - len(prompt))].append(i)
    for room, indices in by_room.items():
        if room > 0:
            for i, tokens in zip(indices, _generate(model, tokenizer, [prompts[i] for i in indices], room)):
                written[i] = tokens
    return written


def _generate(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    device, pad = next(model.parameters()).device, tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    lm: Any = causal_lm(model)
    own = lm.generation_config
    # `generate` fills in what its argument leaves open from the model's own configuration, sampling included
    lm.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=sorted(end_tokens(model, tokenizer)),
    )
    try:
        output = lm.generate(
            input_ids=torch.tensor(ids, device=device),  # (B, T)
            attention_mask=torch.tensor(mask, device=device),
        )
    finally:
        lm.generation_config = own
    return output[:, width:].tolist()


def warn_of_short_answers(limit: int | None, prompt_lengths: Sequence[int], max_new_tokens: int) -> None:
    """Warns once of all answers that the positions a model has learned leave too little room for."""
    short = [length for length in prompt_lengths if limit is not None and length + max_new_tokens > limit]
    if short:
        logger.warning(
            "%d of %d answers may be cut short, %d of them to nothing: the model has learned %d positions, and the "
            "longest prompt leaves room for %d of %d tokens",
            len(short), len(prompt_lengths), sum(length >= (limit or 0) for length in short), limit,
            max(0, (limit or 0) - max(short)), max_new_tokens,
        )  # fmt: skip


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens after which an answer is over: the model's and the tokenizer's."""
    lm: Any = causal_lm(model)
    return {*_listed(lm.generation_config.eos_token_id), *_listed(tokenizer.eos_token_id)}


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
