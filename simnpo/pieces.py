"""Documents longer than the context, in pieces.

A document of more than max_length tokens is cut like any other stream of tokens, prompt and response alike: piece k
holds max_length tokens from token k * stride on, the last one what is left. Tokens that an earlier piece has had as
targets are context in the next, and nothing is repeated beside them: a prompt stands in the pieces it reaches into. A
piece without a target is left out.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from simnpo.data import IGNORE_INDEX, Example


def piece_bounds(num_tokens: int, max_length: int, stride: int) -> list[tuple[int, int, int]]:
    """Where the pieces of a document start, where their own targets do, and where they end.

    Returns:
        (start, first own token, end) of each piece. The own tokens of all pieces are all tokens, each once, and all but
        the document's first have a token before them in their piece.

    Raises:
        ValueError: stride is not below max_length: a piece would start with a target that nothing predicts.
    """
    if not 0 < stride < max_length:
        raise ValueError(f"stride must be between 1 and max_length - 1 = {max_length - 1}, got {stride}")
    bounds = [(0, 0, min(max_length, num_tokens))]
    while (own := bounds[-1][2]) < num_tokens:
        start = len(bounds) * stride
        bounds.append((start, own, min(start + max_length, num_tokens)))
    return bounds


def split(example: Example, max_length: int, stride: int) -> Example:
    """The example as a document of pieces, one after another; as it is where it fits.

    Its alternate is split in the same way. See `Example.piece_lengths`.
    """
    if example.alternate is not None:
        example = replace(example, alternate=split(example.alternate, max_length, stride))
    num_tokens = len(example.input_ids)
    if num_tokens <= max_length:
        return example
    input_ids, labels, lengths = [], [], []
    for start, own, end in piece_bounds(num_tokens, max_length, stride):
        targets = example.labels[own:end]
        # the document's first token is no target: nothing predicts it
        if all(label == IGNORE_INDEX for label in (targets if own else targets[1:])):
            continue
        input_ids += example.input_ids[start:end]
        labels += [IGNORE_INDEX] * (own - start) + targets
        lengths.append(end - start)
    return replace(example, input_ids=input_ids, labels=labels, piece_lengths=tuple(lengths))


def pieces(example: Example) -> list[Example]:
    """The pieces of a document as examples of their own, "forget.jsonl:12#2" the second; a whole example by itself.

    They keep the document's prompt and response, and have no alternate.
    """
    if len(example.piece_lengths) < 2:
        return [example]
    parts, start = [], 0
    for number, length in enumerate(example.piece_lengths, start=1):
        rows = slice(start, start := start + length)
        parts.append(
            replace(
                example,
                id=f"{example.id}#{number}",
                input_ids=example.input_ids[rows],
                labels=example.labels[rows],
                alternate=None,
                piece_lengths=(length,),
            )
        )
    return parts


def separate(documents: Sequence[Example], tokenizer: Any) -> list[Example]:
    """Every piece as an example of its own, which reads as what it holds: its context, and its targets."""
    examples = []
    for piece in (piece for document in documents for piece in pieces(document)):
        if piece.piece_lengths:
            is_target = [label != IGNORE_INDEX for label in piece.labels]
            prompt, response = (
                tokenizer.decode(
                    [token for token, own in zip(piece.input_ids, is_target) if own == side], skip_special_tokens=True
                )
                for side in (False, True)
            )
            piece = replace(piece, prompt=prompt, response=response)
        examples.append(piece)
    return examples
