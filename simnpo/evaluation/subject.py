"""The model that is being examined: log-probabilities of what it reads, and what it writes."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import nn

from simnpo.attention import use_packed_attention
from simnpo.batch import collate
from simnpo.data import IGNORE_INDEX, Example
from simnpo.errors import UserError
from simnpo.evaluation.generation import end_tokens, greedy_tokens, warn_of_short_answers
from simnpo.kernels.linear_target_stats import linear_target_stats
from simnpo.loading import load_model
from simnpo.model import hidden_states, output_head, position_limit, refusing, shares_prefix, verify_head
from simnpo.training.setup import check_readable

# tokens of one forward, whatever the number of its sequences: long texts would not fit otherwise
MAX_BATCH_TOKENS = 16_384
# of one that is scored on a CPU: what stands between two products stays in its caches, a sixth to a quarter faster
CPU_BATCH_TOKENS = 512


@dataclass(frozen=True)
class TargetScores:
    """The targets of one sequence under one model, in order.

    Attributes:
        logps: (n,) float64, nats.
        is_greedy: (n,) bool, whether each is the most probable token after those before it.
    """

    logps: NDArray[np.float64]
    is_greedy: NDArray[np.bool_]

    @property
    def nll(self) -> float:
        """Per target, nats."""
        return float(-self.logps.mean())


@dataclass(frozen=True)
class Subject:
    """A model, its tokenizer and how to run it.

    Attributes:
        name: Hugging Face id, folder or file it was loaded from.
        model: causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer, with a pad token.
        batch_size: sequences of one forward at most.
        show_progress: a bar on stderr while it works.
        packs: score packed rows, in which what all sequences begin with stands once; the model must be able to
            (`simnpo.model.shares_prefix`). Else rows are padded.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    batch_size: int = 32
    show_progress: bool = False
    packs: bool = False

    @torch.no_grad()
    def score(self, examples: Sequence[Example], label: str = "scoring") -> list[TargetScores]:
        """The targets of each example, in one pass over all of them; the vocabulary exists only inside the head's op.

        Raises:
            UserError: an example has a token, or a position, that the model has no embedding of.
        """
        check_readable(self.model, list(examples))
        device = next(self.model.parameters()).device
        head = output_head(self.model)
        scores: list[TargetScores | None] = [None] * len(examples)
        for indices in self._bar(self._scored_together(examples, device.type), f"{label} {len(examples)}"):
            some = [examples[i] for i in indices]
            pad_token_id = self.tokenizer.pad_token_id
            batch = collate(some, packed=self.packs, pad_token_id=pad_token_id, share_prefix=self.packs).to(device)
            hidden = hidden_states(self.model, batch)
            targets = batch.targets[0] if self.packs else batch.targets
            stats = linear_target_stats(hidden, head.weight, targets, **head.options())
            counted = targets != IGNORE_INDEX
            logps = stats.logps[counted].double().cpu().split(batch.num_targets)
            is_greedy = stats.is_greedy[counted].cpu().split(batch.num_targets)
            for i, logp, greedy in zip(indices, logps, is_greedy):
                scores[i] = TargetScores(logp.numpy(), greedy.numpy())
        return scores  # type: ignore[return-value]

    def _scored_together(self, examples: Sequence[Example], device_type: str) -> list[list[int]]:
        """Indices of the examples of each forward.

        On a CPU, whose products are as fast with a few hundred rows as with many, the answers to one question are
        packed with each other, behind the question.
        """
        lengths = [len(example.input_ids) for example in examples]
        if device_type != "cpu":
            return self._alike(lengths, MAX_BATCH_TOKENS)
        by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
        if self.packs:
            for i, example in enumerate(examples):
                by_prompt[tuple(example.prompt_ids)].append(i)
            by_prompt.pop((), None)
        together = [indices for indices in by_prompt.values() if len(indices) > 1]
        alone = sorted({*range(len(examples))}.difference(*together))
        batches = [[alone[k] for k in some] for some in self._alike([lengths[i] for i in alone], CPU_BATCH_TOKENS)]
        for indices in together:
            answers = [lengths[i] - len(examples[i].prompt_ids) for i in indices]
            batches += [[indices[k] for k in some] for some in self._alike(answers, CPU_BATCH_TOKENS)]
        return batches

    def answer(
        self, prompts: Sequence[list[int]], max_new_tokens: int, label: str = "answering",
        begun: Sequence[list[int]] | None = None,
    ) -> list[str]:  # fmt: skip
        """What the model writes after each prompt, token ids in and text out, greedily.

        Args:
            prompts: none empty.
            max_new_tokens: of an answer, what is begun among them; it ends before at an end-of-sequence token.
            label: of the bar.
            begun: tokens with which each answer is known to begin, the most probable ones when they were scored.
                Written one by one they take far longer, and are the same but for near ties that bf16 decides by what
                else is in the batch. None: nothing is known.

        Raises:
            UserError: a prompt is longer than the positions the model has learned.
        """
        limit = position_limit(self.model)
        for i, prompt in enumerate(prompts):
            if limit is not None and len(prompt) > limit:
                raise UserError(
                    f"prompt {i + 1} of {len(prompts)}: {len(prompt)} tokens are more than the {limit} positions the "
                    "model has learned: use a smaller --max-length"
                )
        warn_of_short_answers(limit, [len(prompt) for prompt in prompts], max_new_tokens)
        written = [[] for _ in prompts] if begun is None else [tokens[:max_new_tokens] for tokens in begun]
        ends = end_tokens(self.model, self.tokenizer)
        going_on = [i for i, tokens in enumerate(written) if len(tokens) < max_new_tokens and not ends & {*tokens}]
        given = [prompts[i] + written[i] for i in going_on]
        batches = self._alike([len(tokens) + max_new_tokens for tokens in given], MAX_BATCH_TOKENS)
        for indices in self._bar(batches, f"{label} {len(given)}"):
            some = [going_on[k] for k in indices]
            room = max_new_tokens - min(len(written[i]) for i in some)
            new = greedy_tokens(self.model, self.tokenizer, [given[k] for k in indices], room)
            for i, tokens in zip(some, new):
                written[i] = (written[i] + tokens)[:max_new_tokens]
        return [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]

    def _alike(self, lengths: Sequence[int], most: int) -> list[list[int]]:
        """Indices of sequences of about the same length, the longest first: too little memory shows at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        batches: list[list[int]] = []
        for i in order:
            fits = batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= most
            if fits and len(batches[-1]) < self.batch_size:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _bar(self, batches: list[list[int]], label: str) -> Iterator[list[int]]:
        hidden = not (self.show_progress and batches)
        yield from track(batches, label, console=Console(stderr=True), disable=hidden)


def load_subject(
    name_or_path: str,
    *,
    precision: Literal["bf16", "fp32"] = "bf16",
    cpu: bool = False,
    batch_size: int = 32,
    show_progress: bool = True,
) -> Subject:
    """Loads a model to examine, onto the GPU if there is one.

    Raises:
        UserError: it cannot be loaded, or its head is none the fused operations know.
    """
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model, tokenizer = load_model(name_or_path, dtype=dtype)
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    model = model.to(device).eval()  # type: ignore[arg-type]
    verify_head(model)
    with refusing(f"model: {name_or_path!r} cannot run"):
        use_packed_attention(model)
        packs = shares_prefix(model)
    return Subject(name_or_path, model, tokenizer, batch_size, show_progress, packs)
