"""Attention over packed sequences against transformers' own, sequence by sequence."""

import pytest
import torch
from conftest import make_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM, Qwen2Config
from transformers.models.qwen2 import Qwen2ForCausalLM

from simnpo import attach
from simnpo.attention import NAME, PackedBounds, packed_bounds, register, use_packed_attention
from simnpo.model import hidden_states, keeps_sequences_apart, probe, relative_error

LENGTHS = [5, 7, 1, 40, 38, 2, 7]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 260, "initializer_range": 0.2}  # fmt: skip


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    gemma = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    return {
        "llama": make_model(),
        "shared-heads": make_model(num_key_value_heads=2),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SMALL)),
        "sliding": MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)),
        "both": Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **gemma)),
    }


@pytest.mark.parametrize("name", ["llama", "shared-heads", "qwen2", "sliding", "both"])
def test_packed_sequences_get_the_states_and_gradients_they_get_alone(name):
    model = models()[name].double().eval()
    model.set_attn_implementation("sdpa")
    alone = torch.cat([hidden_states(model, probe(model, [n]))[0] for n in LENGTHS])
    weights = torch.randn_like(alone)
    (alone * weights).sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert use_packed_attention(model) == NAME
    packed = hidden_states(model, probe(model, LENGTHS))
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)
    (packed * weights).sum().backward()
    for key, gradient in expected.items():
        # the norms of Gemma add up in float32, in another order
        assert relative_error(dict(model.named_parameters())[key].grad, gradient) < 1e-5, key


def test_no_mask_of_the_row_is_made():
    model = make_model()
    use_packed_attention(model)
    sizes: list[int] = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    lengths = [30] * 100
    with Largest():
        hidden_states(model, probe(model, lengths))
    # the largest are the MLP's (N, I); a mask would be (N, N)
    assert max(sizes) <= 2 * sum(lengths) * 64


def test_padded_batches_and_generation_are_as_with_sdpa():
    model = make_model()
    ids = torch.tensor([[256, 256, 3, 9], [7, 5, 11, 2]])
    mask = (ids != 256).long()
    model.set_attn_implementation("sdpa")
    logits, text = model(ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, max_new_tokens=6)
    assert use_packed_attention(model) == NAME
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], logits[mask.bool()])
    assert model.generate(ids, attention_mask=mask, max_new_tokens=6).equal(text)


def test_groups_cover_every_row_once():
    bounds = PackedBounds(LENGTHS, torch.device("cpu"))
    assert bounds.groups == [(2, 40, 0), (2, 7, 0), (1, 5, 0), (1, 2, 0), (1, 1, 0)]
    every = torch.arange(sum(LENGTHS))
    assert bounds.rows[bounds.inverse].equal(every)
    assert bounds.out_rows[bounds.back].equal(every)
    assert bounds.own.sum() == sum(LENGTHS)
    assert bounds.out_rows[bounds.own].sort().values.equal(every)


def test_bounds_are_read_off_the_mask_function():
    owner = torch.tensor([0, 0, 0, 1, 2, 2])

    def mask_function(batch, head, q, kv):
        return (owner[q] == owner[kv]) & (kv <= q)

    def bidirectional(batch, head, q, kv):
        return q >= 0

    device = torch.device("cpu")
    assert packed_bounds(1, 6, 6, 0, mask_function, None, device).cu_seqlens.tolist() == [0, 3, 4, 6]
    assert packed_bounds(1, 6, 6, 0, bidirectional, None, device) is None
    assert packed_bounds(2, 6, 6, 0, mask_function, None, device) is None
    assert packed_bounds(1, 6, 9, 3, mask_function, None, device) is None


def test_a_model_it_would_change_keeps_its_own_attention(monkeypatch):
    from simnpo import attention

    def wrong(module, query, key, value, *args, **kwargs):
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    monkeypatch.setattr(attention, "varlen_attention", wrong)
    model = make_model()
    before = model.config._attn_implementation
    assert use_packed_attention(model) == before == model.config._attn_implementation
    monkeypatch.undo()
    register()


def test_scores_that_are_capped_are_refused():
    register()
    model = attach(make_model())
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="has no softcap: use another --attention"):
        model.model(**{"input_ids": torch.tensor([[1, 2, 3]]), "softcap": 5.0})


def test_other_packed_rows_still_stay_apart():
    model = make_model()
    use_packed_attention(model)
    assert keeps_sequences_apart(model)


@pytest.mark.parametrize("longest", [0, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_written_out_are_as_exact_as_the_library(monkeypatch, longest, dtype):
    from simnpo import attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8, dtype=torch.float64) for heads in (4, 2, 2))
    bounds = PackedBounds(LENGTHS, torch.device("cpu"))

    def error(dtype: torch.dtype, longest: int) -> float:
        monkeypatch.setattr(attention, "WRITTEN_OUT", longest)
        rounded = [x.to(dtype) for x in (q, k, v)]
        ours, _ = attention.varlen_attention(torch.nn.Module(), *rounded, bounds)
        exact, _ = attention.varlen_attention(torch.nn.Module(), *(x.double() for x in rounded), bounds)
        return relative_error(ours.double(), exact)

    assert error(dtype, longest) <= {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]
