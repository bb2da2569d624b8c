"""One head or one sequence on several ranks: what they have to tell each other.

    vocab_group       tensor parallel: a rank holds some rows of the head, and all tokens
    sequence_group    context or sequence parallel: a rank holds some tokens of every sequence, and the whole head

Vocabulary. Of its own columns other than the target a rank knows the largest logit m_r and t_r = sum exp(z - m_r); the
target's logit one of them knows. One all-gather a chunk brings the three numbers of each token together, and all ranks
merge them in the same order:

    m = max_r m_r        t = sum_r t_r exp(m_r - m)        logp = -softplus(m + log t - target_logit)

A rank's columns of the gradient then need no other rank. dH is a sum over columns: it is all-reduced chunk by chunk,
while the next chunk is multiplied. dW and dbias are the rank's own rows, complete.

Sequences. The log-probabilities of the sequences that end with a chunk are all-reduced, one number each, before they
become losses and weights. dH is the rank's own rows, complete; dW and dbias are sums over the rank's tokens, which
whoever reduces the gradients of all the other weights over the ranks adds up.

Dimension key, here and in the test:
    R  ranks      N  tokens      n  tokens of a chunk      V  vocabulary      D  hidden size      B  sequences
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from simnpo.kernels.checks import Layout
from simnpo.kernels.head import HeadOptions, RowStats
from simnpo.kernels.row_pass import join_target

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def local_head(
    weight: Tensor, bias: Tensor | None, vocab_group: ProcessGroup | None, sequence_group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor | None, ProcessGroup | None]:
    """What this rank holds of a head, and the ranks that hold the rest: itself, unless the head is a DTensor.

    A DTensor whose vocabulary is sharded is shared by the ranks of that mesh dimension; a replicated one is whole.

    Raises:
        ValueError: it is sharded in another way, or over other ranks than those of `vocab_group`.
    """
    if not _is_dtensor(weight):
        return weight, bias, vocab_group
    from torch.distributed.tensor import DTensor, Partial, Shard  # only a caller who has a DTensor pays for the import

    assert isinstance(weight, DTensor)
    mesh, placements = weight.device_mesh, weight.placements
    sharded = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(sharded) > 1 or any(placements[dim] != Shard(0) for dim in sharded):
        raise ValueError(
            "lm_head_weight, a DTensor, must be replicated or have its vocabulary sharded over one mesh dimension, "
            f"Shard(0), got {placements}: pass lm_head_weight.full_tensor(), with grad_placements=[Partial()] where "
            "the ranks have different tokens"
        )
    if sharded:
        group = mesh.get_group(sharded[0])
        if vocab_group not in (None, group):
            raise ValueError(f"vocab_group must be the ranks of lm_head_weight's mesh dimension {sharded[0]}, or None")
        vocab_group = group
    if bias is not None and (not isinstance(bias, DTensor) or bias.placements != placements):
        raise ValueError(f"bias must be a DTensor placed like lm_head_weight, {placements}")
    # a replicated weight sees only this rank's tokens of a split sequence: its gradient is a part of a sum
    gradients = [
        Partial() if placement.is_replicate() and sequence_group is mesh.get_group(dim) else placement
        for dim, placement in enumerate(placements)
    ]

    def local(tensor: DTensor) -> Tensor:
        # redistribute changes nothing here; on the way back it turns the gradient into the parameter's own placement
        return tensor.redistribute(placements=placements).to_local(grad_placements=gradients)

    return local(weight), None if bias is None else local(bias), vocab_group


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, which every rank must ask for at once; any other tensor as it is."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def share_vocab(
    group: ProcessGroup | None, options: HeadOptions, weight: Tensor, targets: Tensor, needs: tuple[bool, ...]
) -> tuple[HeadOptions, int, int]:
    """Ask the other ranks for their rows of the head, and make sure that all work on the same tokens.

    Args:
        group: None where the whole vocabulary is here; then nothing is asked.
        weight: (V of this rank, D).   targets: (N,) indices into the whole vocabulary.
        needs: who takes a gradient.

    Returns:
        options: with the group, and the least chunk of any rank.
        V: rows of the head on all ranks.
        first: the vocabulary's index of this rank's first row.

    Raises:
        ValueError: the tokens or what takes a gradient differ between the ranks; or there is a gradient budget.
    """
    if group is None:
        return options, len(weight), 0
    if options.gradient_error:
        raise ValueError(
            f"gradient_error must be 0 with a vocab_group, got {options.gradient_error}: which columns carry the "
            "gradient is a question to the whole vocabulary, and each rank sees its own part"
        )
    # exchanging two targets, or changing one, changes it
    checksum = (targets * torch.arange(1, len(targets) + 1, device=targets.device)).sum()
    facts = torch.tensor([len(weight), options.chunk_tokens, *needs, len(targets)], device=targets.device)
    ranks = gather_rows(torch.cat([facts, checksum[None]]), group).tolist()
    if any(row[-2:] != ranks[0][-2:] for row in ranks):
        raise ValueError(
            "hidden_states and targets must be the same on all ranks of vocab_group; their numbers of tokens are "
            f"{[row[-2] for row in ranks]} and their targets differ. A head that FSDP has sharded belongs to ranks "
            "with different tokens: use it inside its module's forward (simnpo.attach), where it is whole"
        )
    _agree_on_gradients([row[2:-2] for row in ranks], "vocab_group")
    rows = [row[0] for row in ranks]
    options = options._replace(chunk_tokens=min(row[1] for row in ranks), vocab_group=group)
    return options, sum(rows), sum(rows[: dist.get_rank(group)])


def shared_row_stats(x: Tensor, weight: Tensor, chunk: Tensor, targets: Tensor, options: HeadOptions) -> RowStats:
    """The stats of a chunk's tokens over the whole vocabulary.

    Args:
        x: (n, D).   weight: this rank's (V, D).   chunk: (n, V) their products.
        targets: (n,) counted from this rank's first row; those outside [0, V) are another rank's.
    """
    passes, transform = options.passes, options.transform
    mine = (targets >= 0) & (targets < len(weight))
    # the row pass leaves the target out of its sum and joins it afterwards: a target of this rank's stays out until all
    # ranks are merged, and where it is another's the column nearest to it joins at once
    nearest = targets.clamp(0, len(weight) - 1)
    logits = transform.at(nearest, passes.indexed_dot(x, weight, nearest))
    rest = logits.masked_fill(mine, -torch.inf)
    _, largest, total = passes.row_pass(chunk, nearest, rest, transform, write_gradient=False)
    target_logits = logits.masked_fill(~mine, -torch.inf)
    assert options.vocab_group is not None
    ranks = gather_rows(torch.stack([largest, total, target_logits]), options.vocab_group)
    return merge_row_stats(*ranks.unbind(1))


def merge_row_stats(largest: Tensor, total: Tensor, target_logits: Tensor) -> RowStats:
    """From the stats of every rank's columns but the target, all (R, n), to those of the whole rows.

    target_logits is -inf on all ranks but the target's.
    """
    # a rank whose only column is the target has seen nothing
    largest = largest.masked_fill(total == 0, -torch.inf)
    rest_largest, target_logit = largest.amax(0), target_logits.amax(0)
    rest_total = (total * torch.exp(largest - rest_largest)).sum(0)
    return RowStats(target_logit, *join_target(rest_largest, rest_total, target_logit))


class PartialSums:
    """Tensors that are sums over the vocabulary: each becomes the sum over the ranks in place, on its way at once.

    Without a group they are whole already.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.works: list[Any] = []

    def add(self, tensor: Tensor | None) -> None:
        """Start to sum up `tensor`, contiguous, which must not be touched before `wait`."""
        if self.group is not None and tensor is not None:
            self.works.append(dist.all_reduce(tensor, group=self.group, async_op=True))

    def wait(self) -> None:
        """Until every tensor is the sum over the ranks."""
        for work in self.works:
            work.wait()
        self.works.clear()


class SplitSequences(NamedTuple):
    """The sequences of a batch whose tokens are spread over ranks.

    num_tokens: (B,) tokens of each on all ranks.   longest: (B,) the most that one rank has of it.
    """

    group: ProcessGroup
    num_tokens: list[int]
    longest: list[int]


def split_sequences(
    group: ProcessGroup | None, options: HeadOptions, layout: Layout, needs: tuple[bool, ...]
) -> tuple[HeadOptions, SplitSequences | None]:
    """Add up the tokens of each sequence over the ranks, and make sure that all see the same sequences.

    Args:
        group: None where the sequences are whole; then nothing is asked.   layout: of the tokens that are here.
        needs: who takes a gradient.

    Returns:
        options: with the least chunk of any rank: all must cut the same sequences into the same chunks.
        split: None where the sequences are whole.

    Raises:
        ValueError: the sequences or what takes a gradient differ between the ranks; or there is a gradient budget.
    """
    if group is None:
        return options, None
    if options.gradient_error:
        raise ValueError(
            f"gradient_error must be 0 with a sequence_group, got {options.gradient_error}: the budget is one of all "
            "tokens of the batch, and each rank sees its own"
        )
    device, B = layout.rows.device, len(layout.lengths)
    ranks = gather_rows(torch.tensor([B, options.chunk_tokens, *needs], device=device), group).tolist()
    if any(row[0] != B for row in ranks):
        raise ValueError(
            f"all ranks of sequence_group must have the same sequences, got {[row[0] for row in ranks]} of them: "
            "a rank without a token of some sequence still lists it, all ignored or with two equal cu_seqlens"
        )
    _agree_on_gradients([row[2:] for row in ranks], "sequence_group")
    retain = [int(flag) for flag in layout.is_retain]
    batches = gather_rows(torch.tensor([layout.lengths, retain], device=device), group).tolist()
    if any(flags != retain for _, flags in batches):
        raise ValueError("retain_mask must be the same on all ranks of sequence_group")
    shares = list(zip(*(lengths for lengths, _ in batches), strict=True))
    options = options._replace(chunk_tokens=min(row[1] for row in ranks))
    return options, SplitSequences(group, [sum(share) for share in shares], [max(share) for share in shares])


def gather_rows(mine: Tensor, group: ProcessGroup) -> Tensor:
    """`mine` of every rank, (R, *mine.shape), the same on all of them."""
    ranks = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather(list(ranks.unbind()), mine.contiguous(), group=group)
    return ranks


def _agree_on_gradients(needs: list[list[int]], group: str) -> None:
    if any(row != needs[0] for row in needs):
        raise ValueError(
            f"hidden_states, lm_head_weight and bias must take a gradient on all ranks of {group} or on none, got "
            f"requires_grad {[[bool(need) for need in row] for row in needs]}"
        )
