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


@pytest.mark.parametrize("impl", [sequence_pass, sequence_pass_torch])
def test_a_long_sum_is_rounded_like_a_number_not_like_a_chain(impl):
    # four sequences: a chain's error is a random walk, and may happen to end close to where it began
    S, N = 4, 32_768
    token_logps = -17 * torch.rand(S * N, generator=torch.Generator().manual_seed(0))
    results, places = SequenceResults.zeros(S, token_logps), torch.arange(S)
    is_retain = torch.zeros(S, dtype=torch.bool)
    impl(token_logps, token_logps.clone(), N * torch.arange(S + 1), places, is_retain, results, GradAscent(), None, 1.0)
    exact = token_logps.view(S, N).double().sum(1)
    # half a unit in the last place of a float32, and as much again for each of a few sums of parts
    assert ((results.logps - exact).abs() < 4 * 2**-24 * exact.abs()).all()
