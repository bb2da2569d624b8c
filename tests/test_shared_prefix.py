"""What all sequences of a packed row begin with, computed once, against every sequence by itself."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from test_attention import models

from simnpo import attach, attention
from simnpo.attention import NAME, PackedBounds, use_packed_attention
from simnpo.batch import Sampler, collate
from simnpo.config import UnlearnConfig
from simnpo.data import Example
from simnpo.model import hidden_states, relative_error, shares_prefix
from simnpo.objectives import SimNPO
from simnpo.training import setup
from simnpo.training.forward import Collator, token_logps
from simnpo.training.step import accumulate

CPU = torch.device("cpu")
PREFIX = 11


def examples(name: str, lengths: list[int], *, alternates: bool = False, prompt: int = 2) -> list[Example]:
    """Random sequences that share PREFIX tokens and then have a prompt of their own."""
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    shared = torch.arange(PREFIX).tolist()
    made = []
    for i, n in enumerate(lengths):
        # the first tokens after the prefix all differ
        ids = [*shared, 20 + 7 * i, *torch.randint(250, (n - 1,), generator=rng).tolist()]
        labels = [-100] * (PREFIX + prompt) + ids[PREFIX + prompt :]
        made.append(Example(f"{name}:{i}", "", "x", ids, labels))
    if alternates:
        others = examples(f"other {name}", lengths[::-1])
        made = [Example(e.id, "", "x", e.input_ids, e.labels, alternate=other) for e, other in zip(made, others)]
    return made


def with_all_rows(example: Example) -> Example:
    """One more token, which nothing sees, so that the last one predicts a target."""
    return replace(example, input_ids=[*example.input_ids, 0], labels=[*example.labels, 0])


@pytest.mark.parametrize("written_out", [256, 0])
@pytest.mark.parametrize("name", ["llama", "shared-heads", "qwen2", "sliding", "both"])
def test_states_and_gradients_are_those_of_every_sequence_alone(name, written_out, monkeypatch):
    monkeypatch.setattr(attention, "WRITTEN_OUT", written_out)
    model = models()[name].double().eval()
    model.set_attn_implementation("sdpa")
    several = examples("f", [5, 7, 3, 40, 38, 4, 7])
    alone = [hidden_states(model, collate([example], packed=False))[0] for example in several]
    expected = torch.cat([alone[0], *(states[PREFIX:] for states in alone[1:])])
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert use_packed_attention(model) == NAME
    batch = collate([with_all_rows(example) for example in several], packed=True, share_prefix=True)
    assert batch.shared_prefix == PREFIX
    packed = hidden_states(model, batch)
    torch.testing.assert_close(packed, expected, rtol=1e-9, atol=1e-9)
    (packed * weights).sum().backward()
    for key, gradient in gradients.items():
        # the norms of Gemma add up in float32, in another order
        assert relative_error(dict(model.named_parameters())[key].grad, gradient) < 1e-5, key


@pytest.mark.parametrize("method", ["simnpo", "npo", "tnpo", "dpo", "kto"])
def test_a_step_is_that_of_whole_sequences(method):
    config = UnlearnConfig(
        model="", forget="", retain="", output="", method=method, precision="fp32", batch_size=4, alternate="alternate"
    )
    forget, retain = examples("f", [9, 4, 12, 5], alternates=True), examples("r", [6, 30, 8])
    named = [*forget, *(example.alternate for example in forget)]
    ref_logps = {e.id: -2.0 * e.num_targets for e in named}
    ref_token_logps = {e.id: [-1.5 * (label != -100) for label in [*e.labels[1:], -100]] for e in forget}
    objective = config.objective()
    sampler = Sampler(forget, retain, 4, 3, seed=0)
    found = []
    for share in (True, False):
        model = attach(make_model())
        use_packed_attention(model)
        collator = Collator(
            True, 256, CPU, ref_logps if objective.needs_ref_logps else None,
            ref_token_logps if objective.needs_ref_token_logps else None, config.alternates(), share_prefix=share,
        )  # fmt: skip
        totals = accumulate(Accelerator(cpu=True), model, collator, sampler, config, 0)
        found.append((totals, {name: p.grad for name, p in model.named_parameters()}))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
    for name, gradient in our_gradients.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_prefix_stands_once():
    forget, retain = examples("f", [4, 6]), examples("r", [5])
    whole, shared = (collate(forget, retain, packed=True, share_prefix=share) for share in (False, True))
    assert whole.shared_prefix == 0
    assert shared.shared_prefix == PREFIX
    assert whole.cu_seqlens.tolist() == [0, 15, 32, 48]
    # the last token of each, which predicts nothing, is left out
    assert shared.cu_seqlens.tolist() == [0, 14, 19, 23]
    assert shared.position_ids[0].tolist() == [*range(14), *range(11, 16), *range(11, 15)]
    assert shared.input_ids[0, 14:19].tolist() == forget[1].input_ids[PREFIX:-1]
    kept = whole.targets != -100
    assert shared.targets[shared.targets != -100].equal(whole.targets[kept])
    assert shared.num_targets == whole.num_targets
    assert shared.num_inputs == whole.num_inputs


def test_what_predicts_a_target_is_not_shared():
    # without a prompt of their own the last shared token predicts the first target of each
    forget = examples("f", [4, 6], prompt=0)
    batch = collate(forget, packed=True, share_prefix=True)
    assert batch.shared_prefix == PREFIX - 1
    assert (batch.targets != -100).sum() == sum(e.num_targets for e in forget)


def test_it_is_not_shared_where_that_saves_little_or_cannot_be():
    several = examples("f", [4, 6])
    assert collate(several, packed=False, share_prefix=True).shared_prefix == 0
    assert collate(several[:1], packed=True, share_prefix=True).shared_prefix == 0
    assert collate(examples("f", [400, 400]), packed=True, share_prefix=True).shared_prefix == 0
    pieces = Example("p", "", "x", several[0].input_ids, several[0].labels, piece_lengths=(10, 5))
    assert collate([several[1], pieces], packed=True, share_prefix=True).shared_prefix == 0


def test_scores_of_a_token_are_not_shared():
    config = UnlearnConfig(model="", forget="", output="", precision="fp32")
    model, several = attach(make_model()), examples("f", [4, 6])
    use_packed_attention(model)
    rows = [
        token_logps(model, config, Collator(True, 256, CPU, None, share_prefix=s), [several]) for s in (True, False)
    ]
    assert rows[0] == rows[1]
    assert [len(row) for row in rows[0]] == [15, 17]


def test_a_model_that_cannot_is_measured_and_refused():
    model, batch = attach(make_model()), collate(examples("f", [4, 6]), packed=True, share_prefix=True)
    model.set_attn_implementation("sdpa")
    assert not shares_prefix(model)
    with pytest.raises(ValueError, match=r"shared_prefix=11 needs .* which 'sdpa' attention cannot"):
        model(**batch.inputs(), objective=SimNPO())
    use_packed_attention(model)
    assert shares_prefix(model)
    model(**batch.inputs(), objective=SimNPO())
    padded = collate(examples("f", [4, 6]), packed=False)
    with pytest.raises(ValueError, match="only the sequences of one packed causal row"):
        model(**{**padded.inputs(), "shared_prefix": 3}, objective=SimNPO())
    with pytest.raises(ValueError, match="the first sequence has 5 tokens, too few to begin with 5"):
        PackedBounds([5, 7], CPU, prefix=5)


@pytest.mark.parametrize(
    ("options", "shared"), [({}, True), ({"share_prefix": "off"}, False), ({"packing": "off"}, False)]
)
def test_a_run_shares_unless_it_is_told_not_to(options, shared):
    config = UnlearnConfig(model="", forget="", output="", **options)

    class tokenizer:
        pad_token_id = 256

    assert setup.make_collator(config, attach(make_model()), tokenizer, CPU).share_prefix is shared
