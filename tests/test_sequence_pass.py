"""S sequences of the launch, B of the batch, N tokens."""

import pytest
import torch
from numerics import relative_error

from simnpo import NPO, GradAscent, SimNPO
from simnpo.kernels.sequence_pass import SequenceResults, sequence_pass, sequence_pass_torch


@pytest.mark.parametrize("impl", [sequence_pass, sequence_pass_torch])
@pytest.mark.parametrize("objective", [SimNPO(2.5, 0.7), NPO(0.2), GradAscent(), GradAscent(normalize=True)], ids=repr)
def test_losses_weights_and_coefficients(impl, objective):
    torch.manual_seed(5)
    lengths = [3, 2500, 0, 40]
    places = torch.tensor([4, 0, 2, 1])  # their order in the plan is not that of the batch; place 3 is in no launch
    is_retain = torch.tensor([False, True, False, False, False])
    offsets = torch.tensor([7, *lengths]).cumsum(0)
    N = int(offsets[-1]) + 5
    token_logps, before = -torch.rand(N), torch.randn(N)
    ref_logps = -20 * torch.rand(5)
    coefs, results = before.clone(), SequenceResults.zeros(5, token_logps)
    impl(token_logps, coefs, offsets, places, is_retain, results, objective, ref_logps, 0.25)

    expected_coefs = before.double()
    for i, b in enumerate(places.tolist()):
        tokens = slice(int(offsets[i]), int(offsets[i + 1]))
        s = token_logps[tokens].double().sum().requires_grad_()
        loss, weight = objective.loss_and_weight(s[None], torch.tensor([lengths[i]]), ref_logps[b : b + 1])
        if is_retain[b]:
            loss, weight = -s[None], torch.zeros(1)
        elif lengths[i]:
            (derivative,) = torch.autograd.grad(loss, s)
            assert weight.item() == pytest.approx(derivative.item(), rel=1e-12)
            expected_coefs[tokens] = 0.25 * weight.item()
        for got, want in zip((r[b] for r in results), (s, loss[0], weight[0]), strict=True):
            assert got.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-7)
    assert relative_error(coefs, expected_coefs) < 1e-6
    assert [r[3].item() for r in results] == [0, 0, 0]
