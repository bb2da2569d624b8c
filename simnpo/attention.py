"""Attention over packed sequences, each by itself: no (N, N) mask, no product between two sequences.

transformers asks an attention implementation for a mask once a forward and hands it to every layer. The mask here is
the list of bounds of the packed sequences, read off the mask function that transformers would have filled an (N, N)
tensor with. Padded batches and generation with a cache get the mask and the arithmetic of "sdpa".

    a GPU, half precision        torch's variable-length flash attention
    anywhere else                scaled_dot_product_attention over groups of sequences of about the same length;
    short ones on a CPU          the products and the softmax written out: torch's bf16 backward there is several times
                                 slower than they are

A prefix that all sequences begin with stands in the row once and is copied into every group, on a GPU as well.

Dimension key:
    N  tokens of a packed row      H  heads      d  head dimension
"""

import inspect
import logging
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import is_flash_attn_2_available

from simnpo.kernels.autograd import first_derivative_only
from simnpo.model import SHARED_PREFIX, causal_lm, hidden_states, probe, same_hidden_states

logger = logging.getLogger(__name__)

NAME = "simnpo_varlen"
# masks of attention implementations have a registry of their own since then
SUPPORTED = Version(transformers.__version__) >= Version("4.53")
# sequences whose lengths differ by less are computed together, the shorter ones padded
GROUP_RATIO = 1.3
# tokens of a sequence up to which its scores may exist, on a CPU
WRITTEN_OUT = 256


class PackedBounds:
    """Where the sequences of a packed row begin and end, and what they share.

    Attributes:
        longest: tokens of the longest sequence.
        prefix: tokens at the beginning of the row that every sequence begins with. They stand there once: what follows
            them belongs to the first sequence, and the others follow without them. 0: nothing is shared.
        cu_seqlens: (B + 1,) int32.
        groups: of sequences of about the same length, computed together. A shared prefix is a sequence of its own too,
            the only one whose output at the prefix is kept.
        rows: which rows of N all groups have, one group after another, the prefix in each sequence; a row that pads a
            shorter sequence repeats its last one.
        inverse: (N,) where each row is among `rows`.
        copies: (S, prefix) where those of the prefix are among `rows`, for each of S sequences; None without one.
        out_rows: which rows of N all groups compute, one group after another.
        own: like out_rows, bool, False where a row pads.
        back: (N,) where each row is among `out_rows`.
    """

    def __init__(self, lengths: list[int], device: torch.device, prefix: int = 0) -> None:
        if prefix and not prefix < lengths[0]:
            raise ValueError(f"the first sequence has {lengths[0]} tokens, too few to begin with {prefix} and go on")
        self.prefix = prefix
        starts = [0, *accumulate(lengths)]
        self.cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
        spans = [(start, length, 0) for start, length in zip(starts, lengths)]
        if prefix:
            # rows that are a sequence's own, behind how many of the prefix
            spans = [(0, prefix, 0), (prefix, lengths[0] - prefix, prefix), *((a, n, prefix) for a, n, _ in spans[1:])]
        self.longest = max(behind + length for _, length, behind in spans)
        self.groups: list[Group] = []
        rows, is_copy, out_rows, own = [], [], [], []
        for members in _similar(spans):
            start, length = (torch.tensor([span[i] for span in members])[:, None] for i in (0, 1))
            behind, T = members[0][2], members[0][1]
            column = torch.arange(T)[None]
            here = start + torch.minimum(column, length - 1)  # (B, T)
            before = torch.arange(behind).expand(len(members), behind)
            self.groups.append(Group(len(members), behind + T, behind))
            rows.append(torch.cat([before, here], dim=1).flatten())
            is_copy.append((torch.arange(behind + T) < behind).expand(len(members), -1).flatten())
            out_rows.append(here.flatten())
            own.append((column < length).flatten())
        self._index(torch.cat(rows), torch.cat(is_copy), torch.cat(out_rows), torch.cat(own), starts[-1], device)

    def _index(
        self, rows: Tensor, is_copy: Tensor, out_rows: Tensor, own: Tensor, N: int, device: torch.device
    ) -> None:
        back, inverse = torch.empty(N, dtype=torch.int64), torch.empty(N, dtype=torch.int64)
        back[out_rows[own]] = own.nonzero().flatten()
        # the rows that are not copies of the prefix are the computed ones, in the same order
        inverse[out_rows[own]] = (~is_copy).nonzero().flatten()[own]
        copies = None
        if self.prefix:
            copies = torch.cat([inverse[: self.prefix], is_copy.nonzero().flatten()]).view(-1, self.prefix).to(device)
        self.copies = copies
        self.rows, self.inverse = rows.to(device), inverse.to(device)
        self.out_rows, self.own, self.back = out_rows.to(device), own.to(device), back.to(device)


class Group(NamedTuple):
    """Sequences that are computed together.

    Attributes:
        size: how many.
        tokens: of the longest.
        behind: of them, at the beginning, those whose output is computed elsewhere.
    """

    size: int
    tokens: int
    behind: int


class _TakeRows(torch.autograd.Function):
    """x[rows], (n, H, d), whose gradient is taken by rows as well: no zeros to add to, and the same bits every time.

    inverse: where each row of x is in the result. copies: (S, p) where the first p rows of x are in the result, which
    has them S times; None: it has every row once. own: of the rows of x, those that the result has; None: all. The rows
    that pad a sequence have no gradient, for what they compute is dropped and nothing attends to them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, inverse: Tensor, copies: Tensor | None, own: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, copies, own)
        return x.index_select(0, rows)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout: Tensor):
        inverse, copies, own = ctx.saved_tensors
        dx = dout.index_select(0, inverse)
        if copies is not None:
            dx[: copies.shape[1]] = dout[copies].sum(0)
        return dx if own is None else dx.mul_(own[:, None, None]), None, None, None, None


def _similar(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Sequences by length, the longest first, a new group wherever one is shorter than its first by GROUP_RATIO.

    Spans are (start, tokens, behind how many); those of a group are behind the same.
    """
    groups: list[list[tuple[int, int, int]]] = []
    for span in sorted(spans, key=lambda span: (span[2], -span[1], span[0])):
        _, length, behind = span
        first = groups[-1][0] if groups else None
        if first is not None and first[2] == behind and behind + first[1] <= GROUP_RATIO * (behind + length):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def packed_bounds(
    batch_size: int, q_length: int, kv_length: int, q_offset: int, mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None, device: torch.device,
) -> PackedBounds | None:  # fmt: skip
    """The bounds of the sequences that `mask_function` keeps apart; None where they are no causal packed row.

    What they share is `SHARED_PREFIX`, of which no mask function knows.
    """
    whole = batch_size == 1 and q_length == kv_length and int(q_offset) == 0 and attention_mask is None
    if not whole or q_length < 2:
        return None
    zero, n = torch.zeros((), dtype=torch.int64, device=device), torch.arange(q_length, device=device)
    sees_next = mask_function(zero, zero, n[:-1], n[1:])
    sees_previous = torch.as_tensor(mask_function(zero, zero, n[1:], n[:-1]), device=device).expand(q_length - 1)
    if torch.as_tensor(sees_next).any():
        return None
    cuts = [0, *((~sees_previous).nonzero().flatten() + 1).tolist(), q_length]
    return PackedBounds([stop - start for start, stop in pairwise(cuts)], device, SHARED_PREFIX.get())


def varlen_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, *,
    mask_function: Callable[..., Tensor], attention_mask: Tensor | None = None, device: Any = "cpu", **options: Any,
) -> Any:  # fmt: skip
    """What transformers hands to every layer as its attention mask: `PackedBounds`, or the mask of "sdpa"."""
    from transformers.masking_utils import sdpa_mask

    bounds = packed_bounds(batch_size, q_length, kv_length, q_offset, mask_function, attention_mask, device)
    if bounds is not None:
        return bounds
    if SHARED_PREFIX.get():
        raise ValueError("only the sequences of one packed causal row can share their first tokens")
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, device=device, **options,
    )  # fmt: skip


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function of transformers.

    Args:
        query, key, value: (1, H, N, d), key and value with fewer heads where they are shared.
        attention_mask: of `varlen_mask`.
        sliding_window: tokens a token attends to, itself among them; None: all before it.

    Returns:
        (1, N, H, d) and no attention weights.

    Raises:
        ValueError: the model wants scores capped or sinks, which no kernel here has.
    """
    if not isinstance(attention_mask, PackedBounds):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **options,
        )  # fmt: skip
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"{NAME} attention has no {name}: use another --attention")
    bounds, dtype = attention_mask, value.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (N, H, d)
    if sliding_window is not None and sliding_window >= bounds.longest:
        sliding_window = None
    flash = _flash_attention() if q.is_cuda and dtype in (torch.float16, torch.bfloat16) and not dropout else None
    if flash is not None and not bounds.prefix and q.shape[-1] == v.shape[-1] <= 256:
        return flash(q, k, v, bounds, scaling, sliding_window)[None], None
    outputs = []
    sizes = [group.size * group.tokens for group in bounds.groups]
    grouped = (_TakeRows.apply(x, bounds.rows, bounds.inverse, bounds.copies, None).split(sizes) for x in (q, k, v))
    for (B, T, behind), *rows in zip(bounds.groups, *grouped, strict=True):
        some_q, some_k, some_v = (x.view(B, T, *x.shape[1:]).transpose(1, 2) for x in rows)
        if T <= WRITTEN_OUT and not q.is_cuda and not dropout:
            out = _written_out(some_q[:, :, behind:], some_k, some_v, scaling, sliding_window)
        else:
            out = F.scaled_dot_product_attention(
                some_q, some_k, some_v,
                attn_mask=None if sliding_window is None else _window(T, T, sliding_window, q.device),
                dropout_p=dropout, is_causal=sliding_window is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1],
            )[:, :, behind:]  # fmt: skip
        outputs.append(out.transpose(1, 2).reshape(B * (T - behind), *out.shape[1:2], -1))
    padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _TakeRows.apply(padded, bounds.back, bounds.out_rows, None, bounds.own)[None], None


def _written_out(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """(B, H, Q, d) attention of the last Q of T tokens, whose (Q, T) scores exist; heads that share a key are rows of
    one product, which scales the scores and hides what is to come.
    """
    B, H, Q, d = q.shape
    shared, T = k.shape[1:3]
    hidden = ~_window(Q, T, T if window is None else window, q.device)
    mask = torch.zeros(Q, T, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf).repeat(H // shared, 1)
    rows, keys, values = (x.reshape(B * shared, -1, x.shape[-1]) for x in (q, k, v))
    scores = torch.baddbmm(mask, rows, keys.transpose(1, 2), alpha=d**-0.5 if scale is None else scale)
    # computed in float32, whatever the dtype, and rounded for the product as it would be anyway
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ values).view(B, H, Q, -1)


def _window(Q: int, T: int, size: int, device: torch.device) -> Tensor:
    """(Q, T) bool: True where one of the last Q of T rows attends to a column."""
    distance = torch.arange(T - Q, T, device=device)[:, None] - torch.arange(T, device=device)[None]
    return (distance >= 0) & (distance < size)


def _flash_attention() -> Callable[..., Tensor] | None:
    """torch's variable-length attention, if this torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # its arguments have changed from release to release: causal was a flag, and heads had to be repeated
    known = inspect.signature(varlen_attn).parameters

    def run(q: Tensor, k: Tensor, v: Tensor, bounds: PackedBounds, scale: float | None, window: int | None) -> Tensor:
        options: dict[str, Any] = {} if scale is None else {"scale": scale}
        if "window_size" in known:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        elif window is None:
            options["is_causal"] = True
        else:
            raise ValueError(
                f"torch {torch.__version__} has no sliding window in {NAME} attention: use --attention sdpa"
            )
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out: Any = varlen_attn(
            q, k, v, bounds.cu_seqlens, bounds.cu_seqlens, bounds.longest, bounds.longest, **options
        )  # fmt: skip
        return out

    return run


def register() -> None:
    """Makes the attention known to transformers as NAME."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, varlen_mask)


@torch.no_grad()
def use_packed_attention(model: nn.Module) -> str:
    """Has a model attend within packed sequences without a mask: by flash-attn where that is installed and runs, else
    by this file, else as it did.

    What is chosen gives the hidden states that the model gave before, measured on a few made-up packed sequences.

    Args:
        model: causal language model of transformers, with or without adapters; in evaluation mode.

    Returns:
        The attention implementation, as transformers names it.
    """
    lm = causal_lm(model)
    before: Any = lm.config._attn_implementation
    packed, alone = probe(model, [5, 7, 11, 7]), probe(model, [7])
    expected = hidden_states(model, alone)[0]
    candidates = [NAME] if SUPPORTED else []
    # where the package does not run transformers would fetch a kernel from the hub in its place
    if packed.input_ids.is_cuda and is_flash_attn_2_available():
        candidates.insert(0, "flash_attention_2")
    for name in candidates:
        register()
        try:
            lm.set_attn_implementation(name)
            # the model decides by its own whether it can: an older one leaves its implementation as it is
            if lm.config._attn_implementation == name:
                hidden = hidden_states(model, packed)
                if same_hidden_states(model, hidden[-7:], expected) and same_hidden_states(
                    model, hidden[5:12], expected
                ):
                    return name
        except (TypeError, ValueError, RuntimeError, ImportError, AttributeError, IndexError) as error:
            logger.info("%s attention does not run here: %s", name, error)
        lm.set_attn_implementation(before)
    return before
