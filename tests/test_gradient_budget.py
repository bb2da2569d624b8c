"""N tokens, D hidden size, V vocabulary, K kept columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import relative_error, value_and_grad
from torch.utils.flop_counter import FlopCounterMode

from simnpo import GradAscent, SimNPO, linear_logps, linear_unlearn_loss
from simnpo.kernels.gradient_budget import choose_columns, keep_columns
from simnpo.kernels.head import HeadOptions, LogitTransform, RowStats
from simnpo.kernels.passes import TORCH
from simnpo.kernels.row_pass import row_pass_torch


def peaked(B=6, T=20, D=24, V=700, spread=4.0, seed=0, dtype=torch.float32):
    """Logits with a common per-column part, as a language model's have: a few columns carry the gradient."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(V, D, generator=g) / D**0.5
    w[:, 0] = spread * torch.randn(V, generator=g)
    h = torch.randn(B, T, D, generator=g)
    h[..., 0] = 1
    targets = torch.multinomial(w[:, 0].softmax(0), B * T, replacement=True, generator=g).view(B, T)
    return h.to(dtype), w.to(dtype), targets, torch.arange(B) % 3 == 2


def loss_and_gradients(h, w, targets, retain_mask, wanted="hw", **options):
    leaves = [x.clone().requires_grad_(name in wanted) for name, x in zip("hw", (h, w), strict=True)]
    out = linear_unlearn_loss(*leaves, targets, SimNPO(), retain_mask=retain_mask, **options)
    return out, torch.autograd.grad(out.loss, [x for x in leaves if x.requires_grad])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000),
    st.floats(0, 30),
    st.sampled_from([1e-4, 4e-3, 0.05, 0.5]),
    st.sampled_from([None, 0.0, 1e-20, 1.0]),
)
def test_the_dropped_part_is_within_the_budget(seed, spread, gradient_error, smallest_coef):
    # any spectrum, any coefficients, also vanishing ones and mixed signs: measured on the gradient itself, in float64
    g = torch.Generator().manual_seed(seed)
    N, V = 9, 120
    logits = spread * torch.randn(N, V, generator=g, dtype=torch.float64) + spread * torch.randn(V, generator=g)
    targets = torch.randint(0, V, (N,), generator=g)
    coefs = None
    if smallest_coef is not None:
        coefs = torch.randn(N, generator=g, dtype=torch.float64)
        coefs[::2] *= smallest_coef
    target_logits = logits.gather(1, targets[:, None])[:, 0]
    stats = RowStats(
        target_logits, *row_pass_torch(logits, targets, target_logits, LogitTransform(), write_gradient=False)
    )
    options = HeadOptions(LogitTransform(), logits.dtype, logits.dtype, N, gradient_error, TORCH)
    kept, budget = keep_columns(logits, targets, stats, coefs, options)
    assert budget.relative_error() <= gradient_error
    if kept is None:
        return
    dz = -logits.softmax(1)
    dz[torch.arange(N), targets] = -torch.expm1(stats[1])
    weighted = dz if coefs is None else dz * coefs[:, None]
    dropped = weighted.index_fill(1, kept.columns, 0)
    assert dropped.norm() <= gradient_error * weighted.norm() * (1 + 1e-9) + 1e-300
    assert (dropped.square().sum() - budget.dropped).abs() <= 1e-9 * budget.total
    torch.testing.assert_close(kept.dz, dz[:, kept.columns])
    torch.testing.assert_close(kept.row_tail, dz.index_fill(1, kept.columns, 0).sum(1), rtol=1e-6, atol=1e-12)


def test_it_keeps_as_few_columns_as_the_budget_allows():
    energy = torch.tensor([4.0, 0.0, 1.0, 100.0, 0.25])
    for gradient_error, kept in ((0.0, [0, 2, 3, 4]), (0.05, [0, 2, 3]), (0.11, [0, 3]), (0.5, [3])):
        columns, budget = choose_columns(energy, gradient_error)
        assert columns.tolist() == kept
        assert budget.dropped.item() == pytest.approx(105.25 - energy[columns].sum().item(), abs=1e-12)


@pytest.mark.parametrize("chunk_tokens", [None, 50, 15])
@pytest.mark.parametrize("wanted", ["hw", "h", "w"])
def test_gradients_are_close_and_the_loss_is_exact(chunk_tokens, wanted):
    operands = peaked()
    exact, exact_grads = loss_and_gradients(*operands, wanted)
    for gradient_error, allowed in ((1e-3, 5e-3), (1e-2, 5e-2)):
        out, grads = loss_and_gradients(*operands, wanted, gradient_error=gradient_error, chunk_tokens=chunk_tokens)
        assert 0 < out.gradient_error <= gradient_error
        assert relative_error(out.loss, exact.loss) < 1e-6
        torch.testing.assert_close(out.logps, exact.logps)
        for ours, want in zip(grads, exact_grads, strict=True):
            assert 0 < relative_error(ours, want) < allowed


@pytest.mark.parametrize("chunk_tokens", [None, 15])
def test_triton_equals_torch(chunk_tokens):
    operands = peaked(B=3, T=10, V=300)
    runs = [
        loss_and_gradients(*operands, gradient_error=0.02, chunk_tokens=chunk_tokens, impl=impl)
        for impl in ("triton", "torch")
    ]
    (triton, triton_grads), (torch_, torch_grads) = runs
    assert triton.gradient_error.item() == pytest.approx(torch_.gradient_error.item(), rel=1e-4)
    for a, b in zip(triton_grads, torch_grads, strict=True):
        assert relative_error(a, b) < 1e-5


def test_the_tail_is_worth_its_vector():
    # the same columns without the rank-one stand-in are several times further off
    h, w, targets, retain_mask = peaked()
    _, exact = loss_and_gradients(h, w, targets, retain_mask)
    _, ours = loss_and_gradients(h, w, targets, retain_mask, gradient_error=0.02)
    columns = (ours[1] - ours[1].mean(0)).norm(dim=1) > 0
    assert columns.all()  # the dropped columns have a gradient too
    assert relative_error(ours[1], exact[1]) < 0.02


@pytest.mark.parametrize(("wanted", "dense"), [("hw", 3), ("h", 2)])
def test_the_backward_products_all_but_vanish(wanted, dense):
    operands = peaked(V=2000, spread=6.0)
    h, w = operands[:2]
    G = 2 * h.shape[0] * h.shape[1] * h.shape[2] * len(w)

    def products(gradient_error):
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(*operands, wanted, gradient_error=gradient_error)
        return counter.get_total_flops() / G

    assert products(0.0) == dense
    assert products(0.004) < 1.25


def test_flat_operands_are_multiplied_whole():
    operands = peaked(spread=0.0)
    out, grads = loss_and_gradients(*operands, gradient_error=0.004)
    _, exact = loss_and_gradients(*operands)
    assert out.gradient_error == 0
    for ours, want in zip(grads, exact, strict=True):
        assert relative_error(ours, want) < 1e-6


def test_sequences_without_weight_claim_no_columns():
    # one peaked sequence beside five forgotten flat ones: SimNPO's weight of those is e^-50, and so is their claim
    h, w, targets, _ = peaked(spread=6.0)
    h[1:, :, 0] = 0
    h[1:] *= 30
    alone, _ = loss_and_gradients(h[:1], w, targets[:1], None, gradient_error=0.01)
    assert alone.gradient_error > 0
    with FlopCounterMode(display=False) as counter:
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        out = linear_unlearn_loss(*leaves, targets, SimNPO(beta=10.0), gradient_error=0.01)
        out.loss.backward()
    assert out.weights[1:].max() < 1e-6 * out.weights[0]
    assert counter.get_total_flops() < 1.5 * 2 * targets.numel() * h.shape[-1] * len(w)


def test_linear_logps_of_a_trained_head_takes_a_budget_for_any_loss():
    h, w, targets, _ = peaked()
    upstream = torch.randn(targets.shape)
    exact = value_and_grad(lambda h, w: linear_logps(h, w, targets), [h, w], upstream)
    for chunk_tokens in (None, 30):
        ours = value_and_grad(
            lambda h, w, n=chunk_tokens: linear_logps(h, w, targets, gradient_error=0.01, chunk_tokens=n),
            [h, w],
            upstream,
        )
        assert torch.equal(ours[0], exact[0]) or relative_error(ours[0], exact[0]) < 1e-6
        for a, b in zip(ours[1:], exact[1:], strict=True):
            assert 0 < relative_error(a, b) < 0.05


def test_refuses():
    h, w, targets, _ = peaked()
    with pytest.raises(ValueError, match=r"gradient_error must be in \[0, 1\)"):
        linear_unlearn_loss(h, w, targets, GradAscent(), gradient_error=1.5)
    with pytest.raises(ValueError, match="use linear_unlearn_loss"):
        linear_logps(h.requires_grad_(), w, targets, gradient_error=0.01)
