"""N tokens of a chunk, V vocabulary."""

import pytest
import torch
from numerics import relative_error
from test_row_pass import TRANSFORMS, operands

from simnpo.kernels.head import LogitTransform, RowReductions, RowStats
from simnpo.kernels.mixed_gradient import mixed_gradient, mixed_gradient_torch
from simnpo.kernels.row_pass import row_gradient, row_pass, row_pass_torch
from simnpo.objectives.rows import Mix

IMPLS = {"triton": (row_pass, mixed_gradient), "torch": (row_pass_torch, mixed_gradient_torch)}


def stats_of(impl, logits, targets, target_logits, transform, rows=None):
    reductions = RowReductions.empty(len(targets), target_logits)
    values = impl(
        logits, targets, target_logits, transform, write_gradient=False, rows=rows, reductions=reductions
    )  # fmt: skip
    return RowStats(target_logits, *values), reductions


def exact(logits, targets, transform, mix):
    """The reductions, and the mix of three directions by autograd of functions that have them as gradients."""
    products = logits.double().requires_grad_()
    z = transform.scale * (products if transform.bias is None else products + transform.bias)
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    log_p = z.log_softmax(-1)
    rest = z.detach().scatter(1, targets[:, None], -torch.inf)
    other, others = rest.max(1)
    target, uniform, most = (x.double() for x in mix)
    rows = torch.arange(len(targets))
    value = target * log_p[rows, targets] + uniform * log_p.mean(1) + most * log_p[rows, others]
    return z.detach().mean(1), other, others, torch.autograd.grad(value.sum(), products)[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("N", "V"), [(3, 2), (3, 7), (5, 128), (2, 9000)])
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reductions_and_gradient_in_place(impl, N, V, kind, dtype):
    row_pass_, mixed_gradient_ = IMPLS[impl]
    transform = TRANSFORMS[kind](V)
    logits, targets, target_logits = operands(N, V, transform, dtype)
    mix = Mix(*torch.randn(3, N))
    mean, other, others, dlogits = exact(logits, targets, transform, mix)
    chunk = logits.clone()
    stats, reductions = stats_of(row_pass_, chunk, targets, target_logits, transform)
    assert torch.equal(chunk, logits)
    torch.testing.assert_close(reductions.mean_logits, mean.float(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(reductions.other_logits, other.float(), rtol=1e-5, atol=1e-6)
    # of several that are as large in half precision any is right
    at_others = transform(logits.double()).gather(1, reductions.others[:, None])[:, 0]
    assert (reductions.others != targets).all()
    torch.testing.assert_close(at_others.float(), other.float(), rtol=1e-5, atol=1e-5)
    if dtype == torch.float32:
        assert torch.equal(reductions.others, others)
        mixed_gradient_(chunk, targets, stats, reductions, mix, transform, chunk)
        assert relative_error(chunk, dlogits) < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_scattered_rows_and_the_logps_own_mix(impl):
    row_pass_, mixed_gradient_ = IMPLS[impl]
    N, V, transform = 5, 61, LogitTransform()
    logits, targets, target_logits = operands(N, V, transform, torch.float32)
    rows = torch.tensor([4, 0, 2])
    stats, reductions = stats_of(row_pass_, logits, targets[rows], target_logits[rows], transform, rows)
    out, expected = (torch.full_like(logits, torch.nan) for _ in range(2))
    zero = torch.zeros(3)
    mixed_gradient_(
        logits, targets[rows], stats, reductions, Mix(zero + 1, zero, zero), transform, out, rows=rows
    )  # fmt: skip
    row_gradient(logits, targets[rows], *stats, transform, expected, rows=rows)
    assert relative_error(out[rows], expected[rows]) < 1e-6
    assert out[[1, 3]].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_first_of_equal_logits(impl):
    logits = torch.zeros(2, 600)
    logits[0, [50, 300, 301]] = 2.0
    targets = torch.tensor([300, 7])
    _, reductions = stats_of(IMPLS[impl][0], logits, targets, logits[[0, 1], targets], LogitTransform())
    assert reductions.others.tolist() == [50, 0]
