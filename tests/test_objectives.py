"""The plain formulas on (B,) numbers, against hand-computed values and autograd."""

import math

import pytest
import torch

from simnpo import NPO, GradAscent, SimNPO, npo_loss, simnpo_loss


def test_simnpo_by_hand():
    # s = -6 nats over 3 tokens, beta 2, gamma 0.5: x = 2/3 * -6 + 0.5 = -3.5; loss = 2/2 log(1 + e^-3.5)
    loss = simnpo_loss(torch.tensor([-6.0]), torch.tensor([3]), beta=2.0, gamma=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3.5)), rel=1e-6)


def test_gamma_is_outside_beta():
    # the authors' TOFU code: beta * (nll / n - delta); ours: gamma = beta * delta
    beta, delta = 2.5, 0.4
    logps, n = torch.tensor([-6.0, -1.0]), torch.tensor([3, 5])
    theirs = -2 / beta * torch.nn.functional.logsigmoid(beta * (-logps / n - delta))
    torch.testing.assert_close(simnpo_loss(logps, n, beta=beta, gamma=beta * delta), theirs)


def test_npo_by_hand():
    # log-ratio -6 - -2 = -4, beta 0.5: loss = 4 log(1 + e^-2)
    loss = npo_loss(torch.tensor([-6.0]), torch.tensor([3]), torch.tensor([-2.0]), beta=0.5)
    assert loss.item() == pytest.approx(4 * math.log1p(math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize("objective", [SimNPO(2.5, 0.7), NPO(0.2), GradAscent(), GradAscent(normalize=True)], ids=repr)
def test_weight_is_the_derivative(objective):
    logps = torch.tensor([-300.0, -6.0, -1e-4, 0.0], dtype=torch.float64, requires_grad=True)
    num_tokens = torch.tensor([100, 3, 1, 0])
    loss, weight = objective.loss_and_weight(logps, num_tokens, torch.full((4,), -2.0, dtype=torch.float64))
    (derivative,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(weight, derivative)
    assert loss[3].item() == weight[3].item() == 0


def test_simnpo_tends_to_gradient_ascent():
    # beta -> 0: the weight 2/n sigmoid(0) of SimNPO is 1/n, W-GradDiff's
    _, weight = SimNPO(beta=1e-9).loss_and_weight(torch.tensor([-5.0]), torch.tensor([4]))
    assert weight.item() == pytest.approx(0.25)


@pytest.mark.parametrize("objective", [SimNPO, NPO])
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_must_be_positive(objective, beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        objective(beta=beta)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="num_tokens must have the shape"):
        simnpo_loss(torch.zeros(3), torch.ones(3, 1))
    with pytest.raises(ValueError, match="ref_logps must have the shape"):
        npo_loss(torch.zeros(3), torch.ones(3), torch.zeros(3, 1))
