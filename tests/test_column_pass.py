"""N tokens of a chunk, V vocabulary."""

import pytest
import torch
from numerics import relative_error

from simnpo.kernels.column_pass import column_pass, column_pass_torch
from simnpo.kernels.head import LogitTransform
from simnpo.kernels.row_pass import row_gradient_torch, row_pass_torch


@pytest.mark.parametrize("impl", [column_pass, column_pass_torch])
@pytest.mark.parametrize(("N", "V"), [(1, 3), (5, 61), (70, 1030)])
@pytest.mark.parametrize("transform", [lambda V: LogitTransform(), lambda V: LogitTransform(torch.randn(V), 0.7, 5.0)])
@pytest.mark.parametrize("with_coefs", [True, False])
def test_sums_of_the_gradient(impl, N, V, transform, with_coefs):
    torch.manual_seed(7)
    transform, logits, targets = transform(V), 3 * torch.randn(N, V), torch.randint(0, V, (N,))
    target_logits = transform.at(targets, logits.gather(1, targets[:, None])[:, 0].clone())
    stats = (target_logits, *row_pass_torch(logits, targets, target_logits, transform, write_gradient=False))
    coefs = torch.randn(N) if with_coefs else None
    dz = torch.empty(N, V)
    row_gradient_torch(logits, targets, *stats, transform, dz)
    before = logits.clone()
    energy, mass, row_mass = impl(logits, targets, *stats, transform, coefs)
    assert torch.equal(logits, before)
    weighted = dz if coefs is None else dz * coefs.abs()[:, None]
    assert relative_error(energy, weighted.double().square().sum(0)) < 1e-5
    assert relative_error(mass, weighted.double().sum(0)) < 1e-5
    assert (row_mass - dz.double().sum(1)).abs().max() < 1e-5


@pytest.mark.parametrize("impl", [column_pass, column_pass_torch])
def test_a_slab_counts_targets_from_its_first_column(impl):
    torch.manual_seed(8)
    logits, targets = torch.randn(4, 50), torch.tensor([3, 49, 20, 0])
    target_logits = logits.gather(1, targets[:, None])[:, 0].clone()
    stats = (target_logits, *row_pass_torch(logits, targets, target_logits, LogitTransform(), write_gradient=False))
    whole = impl(logits, targets, *stats, LogitTransform(), None)
    slab = impl(logits[:, 20:], targets - 20, *stats, LogitTransform(), None)
    for part, all_ in zip(slab[:2], whole[:2], strict=True):
        torch.testing.assert_close(part, all_[20:])
