"""The plain formulas on (B,) numbers, against hand-computed values and autograd."""

import math

import pytest
import torch
from formulas import PAIRS, ROWS, SEQUENCE, TOKENWISE, pair_loss, sequence_loss, token_loss
from numerics import relative_error

from simnpo import NPO, GradAscent, SimNPO, npo_loss, simnpo_loss
from simnpo.objectives import CATNIP, DPO, KTO, NNPO, PDU, TNPO, WGA, WTNPO, JensUn, SatImp, Unlikelihood
from simnpo.objectives.pairs import PairSums
from simnpo.objectives.rows import Row
from simnpo.objectives.tokenwise import log1mexp


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


@pytest.mark.parametrize("objective", [*SEQUENCE, KTO(0.3)], ids=repr)
def test_sequence_objectives_are_their_formulas(objective):
    n = torch.tensor([100, 3, 1, 7])
    ref = torch.tensor([-250.0, -2.0, -1.0, -9.0], dtype=torch.float64)
    s = torch.tensor([-300.0, -6.0, -1e-4, -3.0], dtype=torch.float64, requires_grad=True)
    plain = torch.stack([sequence_loss(objective, s[i], int(n[i]), ref[i]) for i in range(4)])
    (derivative,) = torch.autograd.grad(plain.sum(), s)
    loss, weight = objective.loss_and_weight(s.detach(), n, ref)
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-12, atol=0)
    # autograd's own 1 - sigmoid loses digits where it is close to 0
    torch.testing.assert_close(weight, derivative, rtol=1e-12, atol=1e-15)


def test_kto_sees_its_kl_as_a_shift_of_the_reference():
    objective, s, n, ref = KTO(0.3), torch.tensor([-6.0]), torch.tensor([3]), torch.tensor([-2.0])
    shifted = objective.shifted_reference(ref, torch.tensor(0.8))
    loss, _ = objective.loss_and_weight(s, n, shifted)
    assert loss.item() == pytest.approx(sequence_loss(objective, s, 3, ref, kl=0.8).item(), rel=1e-6)


def test_n_npo_is_npo_per_token():
    s, n, ref = torch.tensor([-6.0]), torch.tensor([4]), torch.tensor([-2.0])
    (a, wa), (b, wb) = NNPO(2.0).loss_and_weight(s, n, ref), NPO(0.5).loss_and_weight(s, n, ref)
    # beta / n for NPO's beta: the same sigmoid, under a factor of 2 / beta
    assert (a / b).item() == pytest.approx(0.25)
    assert (wa / wb).item() == pytest.approx(0.25)


@pytest.mark.parametrize("objective", PAIRS, ids=repr)
def test_pair_objectives_are_their_formulas(objective):
    n, n_alt = torch.tensor([5, 2, 0, 4]), torch.tensor([3, 9, 4, 0])
    ref, ref_alt = torch.randn(2, 4, dtype=torch.float64) - 8
    s, s_alt = (torch.randn(2, 4, dtype=torch.float64) - 8).requires_grad_()
    plain = torch.stack(
        [pair_loss(objective, s[i], int(n[i]), ref[i], s_alt[i], int(n_alt[i]), ref_alt[i]) for i in range(2)]
    )
    of_s, of_alt = torch.autograd.grad(plain.sum(), (s, s_alt))
    loss, weight = objective.loss_and_weight(PairSums(s.detach(), n, ref, s_alt.detach(), n_alt, ref_alt))
    torch.testing.assert_close(loss[:2], plain.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(weight[:2], of_s[:2], rtol=1e-12, atol=0)
    ratio = objective.alternate_ratio(n.double(), n_alt.double())
    torch.testing.assert_close((weight * ratio)[:2], of_alt[:2], rtol=1e-12, atol=0)
    assert loss[2:].tolist() == weight[2:].tolist() == [0, 0]


def rows_of_logits(N=40, V=11):
    torch.manual_seed(3)
    z = (3 * torch.randn(N, V, dtype=torch.float64)).requires_grad_()
    return z, torch.randint(0, V, (N,)), -3 * torch.rand(N, dtype=torch.float64)


@pytest.mark.parametrize("objective", TOKENWISE, ids=repr)
def test_token_objectives_are_their_formulas(objective):
    z, y, ref = rows_of_logits()
    plain = token_loss(objective, z, y, ref)
    (dz,) = torch.autograd.grad(plain.sum(), z)
    logps = z.detach().log_softmax(-1)
    loss, slope = objective.loss_and_slope(logps.gather(1, y[:, None])[:, 0], ref)
    onehot = torch.nn.functional.one_hot(y, z.shape[1])
    assert relative_error(loss, plain.detach()) < 1e-13
    assert relative_error(slope[:, None] * (onehot - logps.exp()), dz) < 1e-13


# slope of a token in closed form, from p and the reference's q
CLOSED_FORMS = [
    (WGA(1.5), lambda p, q: p**1.5),
    (TNPO(3.0), lambda p, q: 2 * p**3 / (p**3 + q**3)),
    (WTNPO(3.0, 1.5), lambda p, q: 2 * p**4.5 / (p**3 + q**3)),
    (SatImp(2.0, 0.5), lambda p, q: p**2 * (1 - p) ** 0.5),
    (Unlikelihood(), lambda p, q: p / (1 - p)),
    (CATNIP(0.4), lambda p, q: 2 * p**0.4 / (p**0.4 + (1 - p) ** 0.4) / (1 - p)),
    (JensUn(), lambda p, q: p / 2 * torch.log(p / (1 + p))),
]


@pytest.mark.parametrize(
    ("objective", "closed_form"), CLOSED_FORMS, ids=lambda x: repr(x) if hasattr(x, "source") else ""
)
def test_closed_forms_of_the_weights(objective, closed_form):
    p, q = torch.rand(2, 50, dtype=torch.float64).clamp(1e-4, 1 - 1e-4)
    _, slope = objective.loss_and_slope(p.log(), q.log())
    torch.testing.assert_close(slope, closed_form(p, q), rtol=1e-10, atol=0)


def test_catnip_at_1_is_twice_the_unlikelihood():
    logps = -4 * torch.rand(50, dtype=torch.float64)
    for ours, theirs in zip(CATNIP(1.0).loss_and_slope(logps), Unlikelihood().loss_and_slope(logps), strict=True):
        torch.testing.assert_close(ours, 2 * theirs, rtol=1e-12, atol=0)


def test_ce_u_has_the_gradient_of_the_unlikelihood():
    # CE-U (arXiv 2503.01224): cross-entropy to the model's own distribution with the target's logit at -infinity
    z, y, _ = rows_of_logits()
    teacher = z.detach().scatter(1, y[:, None], -torch.inf).softmax(-1)
    (ce_u,) = torch.autograd.grad(-(teacher * z.log_softmax(-1)).sum(), z)
    (ours,) = torch.autograd.grad(token_loss(Unlikelihood(), z, y).sum(), z)
    assert relative_error(ours, ce_u) < 1e-13


@pytest.mark.parametrize("objective", ROWS, ids=repr)
def test_row_objectives_are_their_formulas(objective):
    z, y, _ = rows_of_logits()
    plain = token_loss(objective, z, y)
    (dz,) = torch.autograd.grad(plain.sum(), z)
    x, V = z.detach(), z.shape[1]
    p, target = x.softmax(-1), x.gather(1, y[:, None])[:, 0]
    other, m = x.scatter(1, y[:, None], -torch.inf).max(-1)
    loss, mix = objective.loss_and_mix(Row(target - x.logsumexp(-1), target, x.logsumexp(-1), x.mean(-1), other))
    at_y, at_m = (torch.nn.functional.one_hot(i, V) for i in (y, m))
    ours = mix.target[:, None] * (at_y - p) + mix.uniform[:, None] * (1 / V - p) + mix.other[:, None] * (at_m - p)
    assert relative_error(loss, plain.detach()) < 1e-13
    assert relative_error(ours, dz) < 1e-13
    assert not isinstance(objective, PDU) or (target > other).any()


@pytest.mark.parametrize("objective", TOKENWISE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_at_both_ends_stay_finite(objective, dtype):
    logps = torch.tensor([0.0, -1e-30, -1e-8, -87.0, -1e4], dtype=dtype)
    loss, slope = objective.loss_and_slope(logps, torch.tensor([-1e4, 0.0, -1.0, 0.0, -1e4], dtype=dtype))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(slope).all()


def test_log1mexp_at_both_ends():
    # 1 - e^-1e-8 = 1e-8 (1 - 5e-9); log(1 - e^-50) = -e^-50
    values = log1mexp(torch.tensor([-1e-8, -50.0, -0.5], dtype=torch.float64))
    exact = [math.log(1e-8) - 5e-9, -math.exp(-50.0), math.log1p(-math.exp(-0.5))]
    assert values.tolist() == pytest.approx(exact, rel=1e-14, abs=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(0.0), "beta must be positive"),
        (lambda: WGA(-1.0), "beta must be 0 or more"),
        (lambda: ROWS[1].__class__(1.5), "smoothing must be between 0 and 1"),
        (lambda: NNPO().loss_and_weight(torch.zeros(1), torch.ones(1)), "NNPO needs ref_logps"),
        (lambda: TNPO().loss_and_slope(torch.zeros(1)), "TNPO needs ref_token_logps"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
