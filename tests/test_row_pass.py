"""N tokens of a chunk, V vocabulary."""

import pytest
import torch
from numerics import relative_error

from simnpo.kernels.head import LogitTransform
from simnpo.kernels.row_pass import row_gradient, row_gradient_torch, row_pass, row_pass_torch

SHAPES = [(1, 1), (3, 7), (5, 128), (4, 8200)]
TRANSFORMS = {
    "plain": lambda V: LogitTransform(),
    "bias, scale, softcap": lambda V: LogitTransform(torch.randn(V), 0.7, 5.0),
}


def operands(N, V, transform, dtype):
    torch.manual_seed(4)
    logits = 3 * torch.randn(N, V).to(dtype)
    targets = torch.randint(0, V, (N,))
    targets[0] = V - 1
    target_logits = transform.at(targets, logits.float().gather(1, targets[:, None])[:, 0].clone())
    return logits, targets, target_logits


def exact(logits, targets, transform):
    """log-softmax and its gradient by autograd in float64."""
    products = logits.double().requires_grad_()
    z = transform.scale * (products if transform.bias is None else products + transform.bias)
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    logps = z.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logps.detach(), torch.autograd.grad(logps.sum(), products)[0]


@pytest.mark.parametrize("impl", [row_pass, row_pass_torch])
@pytest.mark.parametrize(("N", "V"), SHAPES)
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_and_gradient_in_place(impl, N, V, kind, dtype):
    transform = TRANSFORMS[kind](V)
    logits, targets, target_logits = operands(N, V, transform, dtype)
    logps_exact, dlogits_exact = exact(logits, targets, transform)
    chunk = logits.clone()
    logps, _, _ = impl(chunk, targets, target_logits, transform, write_gradient=False)
    assert torch.equal(chunk, logits)
    again, largest, total = impl(chunk, targets, target_logits, transform, write_gradient=True)
    assert torch.equal(logps, again)
    assert (logps <= 0).all()
    assert (logps - logps_exact).abs().max() < 1e-5
    assert (chunk.double() - dlogits_exact).norm() <= 2 * torch.finfo(dtype).eps * (dlogits_exact.norm() + 1e-3)
    z = transform(logits.to(torch.float32, copy=True))
    torch.testing.assert_close(largest + total.log(), z.logsumexp(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", [(row_pass, row_gradient), (row_pass_torch, row_gradient_torch)])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_gradient_of_slabs_and_scattered_rows(impl, dtype, kind):
    stats_of, gradient_of = impl
    N, V = 5, 61
    transform = TRANSFORMS[kind](V)
    logits, targets, target_logits = operands(N, V, transform, dtype)
    rows, coefs = torch.tensor([4, 0, 2]), torch.tensor([0.5, -2.0, 3.0])
    stats = stats_of(logits, targets[rows], target_logits[rows], transform, write_gradient=False, rows=rows)
    out = torch.full_like(logits, torch.nan)
    for start, stop in ((0, 20), (20, 61)):
        columns = slice(start, stop)
        gradient_of(
            logits[:, columns], targets[rows] - start, target_logits[rows], *stats, transform.columns(columns),
            out[:, columns], rows=rows, coefs=coefs,
        )  # fmt: skip
    expected = exact(logits, targets, transform)[1][rows] * coefs[:, None]
    assert relative_error(out[rows], expected) < torch.finfo(dtype).eps
    assert out[[1, 3]].isnan().all()


@pytest.mark.parametrize("impl", [row_pass, row_pass_torch])
def test_certainty_and_impossibility(impl):
    # the target 60 nats above the rest, and 60 below
    logits = torch.zeros(2, 50)
    logits[0, 3], logits[1, 3] = 60, -60
    targets = torch.tensor([3, 3])
    logps, _, _ = impl(logits, targets, logits[:, 3].clone(), LogitTransform(), write_gradient=True)
    assert logps[0].item() == pytest.approx(-49 * torch.tensor(-60.0).double().exp().item(), rel=1e-4, abs=0)
    assert logps[1].item() == pytest.approx(-60 - torch.tensor(49.0).log().item(), rel=1e-6)
    assert logits[0, 3].item() == pytest.approx(-logps[0].item(), rel=1e-6, abs=0)  # 1 - p, not 0
