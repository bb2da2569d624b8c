"""Every objective through the fused operations, against autograd of its formula on all the logits.

B sequences, T positions, D hidden size, V vocabulary.
"""

import pytest
import torch
from formulas import EVERY, PAIRS, ROWS, SEQUENCE, TOKENWISE, batch_loss
from numerics import REGIMES, assert_no_worse_than_eager, regime_operands, relative_error
from torch.utils.flop_counter import FlopCounterMode

from simnpo import linear_unlearn_loss, unlearn_loss
from simnpo.objectives import (
    CATNIP,
    DPO,
    KTO,
    NPO,
    PDU,
    WGA,
    GradAscent,
    InvertedHinge,
    MaxEntropy,
    SatImp,
    SimPO,
    Unlikelihood,
)

COEFS = {"forget_coef": 0.1375, "retain_coef": 1.3}
HEAD = {"logit_scale": 0.7, "logit_softcap": 5.0}
UPSTREAM = 1.7
# KTO's KL is that of whole answers
WEIGHTED = [objective for objective in EVERY if not isinstance(objective, KTO)]


def batch(objective, dtype=torch.float64, T=9, D=16, V=53):
    """Ragged: one-token, empty, ignored tokens in the middle; retain rows between; alternates where they are needed."""
    torch.manual_seed(2)
    B = 10
    targets = torch.randint(0, V, (B, T))
    targets[0, 1:] = -100
    targets[1] = -100
    targets[2, ::2] = -100
    targets[3, 6:] = -100
    targets[7, 4:] = -100
    targets[9, :] = -100
    h, w, b = torch.randn(B, T, D, dtype=dtype), torch.randn(V, D, dtype=dtype), torch.randn(V, dtype=dtype)
    extras = {
        "retain_mask": torch.tensor([b in (4, 6) for b in range(B)]),
        "ref_logps": -10 + 3 * torch.randn(B, dtype=dtype),
        "ref_token_logps": -3 * torch.rand(B, T, dtype=dtype),
    }
    if objective.needs_alternates:
        # of the pairs one has an empty forget side, and one an empty alternate
        extras["alternates"] = torch.tensor([5, 7, 8, 9, -1, -1, -1, -1, -1, -1])
    return (h, w, b), targets, extras


def logits_of(h, w, b, logit_scale=1.0, logit_softcap=None):
    z = logit_scale * (h @ w.T + b)
    return z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)


def gradients(loss_fn, tensors, wanted):
    leaves = [x.detach().clone().requires_grad_(name in wanted) for name, x in zip("hwb", tensors)]
    out = loss_fn(*leaves)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    return [loss.detach(), *torch.autograd.grad(loss * UPSTREAM, [x for x in leaves if x.requires_grad])]


@pytest.mark.parametrize(("objective", "weighted"), [*((o, False) for o in EVERY), *((o, True) for o in WEIGHTED)])
@pytest.mark.parametrize(("chunk_tokens", "wanted"), [(None, "hwb"), (4, "hwb"), (13, "w"), (4, "h")])
def test_equals_autograd_of_the_formula(objective, chunk_tokens, wanted, weighted):
    tensors, targets, extras = batch(objective)
    extras |= {"token_weights": torch.rand(targets.shape, dtype=torch.float64)} if weighted else {}

    def ours(h, w, b):
        return linear_unlearn_loss(
            h, w, targets, objective, bias=b, chunk_tokens=chunk_tokens, **extras, **COEFS, **HEAD
        )

    def plain(h, w, b):
        return batch_loss(objective, logits_of(h, w, b, **HEAD), targets, **extras, **COEFS)

    for ours_, exact in zip(gradients(ours, tensors, wanted), gradients(plain, tensors, wanted), strict=True):
        assert relative_error(ours_, exact) < 1e-10


@pytest.mark.parametrize("objective", EVERY, ids=repr)
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_in(objective, inplace):
    (h, w, b), targets, extras = batch(objective)
    logits = logits_of(h, w, b)

    def ours(z):
        return unlearn_loss(z * 1, targets, objective, inplace=inplace, **extras, **COEFS)

    def plain(z):
        return batch_loss(objective, z, targets, **extras, **COEFS)

    runs = []
    for fn in (ours, plain):
        z = logits.clone().requires_grad_()
        out = fn(z)
        loss = out if isinstance(out, torch.Tensor) else out.loss
        runs.append([loss.detach(), *torch.autograd.grad(UPSTREAM * loss, z)])
    for ours_, exact in zip(*runs, strict=True):
        assert relative_error(ours_, exact) < 1e-11


@pytest.mark.parametrize("objective", [*SEQUENCE, KTO(0.3), *PAIRS], ids=repr)
@pytest.mark.parametrize(("chunk_tokens", "wanted"), [(None, "hwb"), (4, "hwb"), (4, "h")])
def test_exact_logps_decide_the_loss_and_the_weights(objective, chunk_tokens, wanted):
    tensors, targets, extras = batch(objective)
    # of retain sequences they say nothing
    exact = (-12 + 4 * torch.randn(len(targets), dtype=torch.float64)).masked_fill(extras["retain_mask"], torch.nan)
    logits = logits_of(*tensors, **HEAD)

    def ours(h, w, b):
        return linear_unlearn_loss(
            h, w, targets, objective, bias=b, chunk_tokens=chunk_tokens, exact_logps=exact, **extras, **COEFS, **HEAD
        )

    def plain(h, w, b):
        return batch_loss(objective, logits_of(h, w, b, **HEAD), targets, exact_logps=exact, **extras, **COEFS)

    runs = [gradients(loss, tensors, wanted) for loss in (ours, plain)]
    for ours_, autograd in zip(*runs, strict=True):
        assert relative_error(ours_, autograd) < 1e-10
    out = unlearn_loss(logits, targets, objective, exact_logps=exact, **extras, **COEFS)
    assert relative_error(out.loss, runs[1][0]) < 1e-11
    counted = (targets != -100).any(1) & ~extras["retain_mask"]
    if not isinstance(objective, KTO):  # whose alternates are not read again
        assert torch.equal(out.logps[counted], exact[counted])


@pytest.mark.parametrize("objective", [*PAIRS, KTO(0.3), *TOKENWISE[:4], *ROWS], ids=repr)
@pytest.mark.parametrize("wanted", ["hwb", "h"])
def test_triton_equals_torch(objective, wanted):
    tensors, targets, extras = batch(objective, dtype=torch.float32, T=5, D=8, V=19)
    runs = []
    for impl in ("triton", "torch"):

        def loss(h, w, b, impl=impl):
            return linear_unlearn_loss(
                h, w, targets, objective, bias=b, chunk_tokens=9, impl=impl, **extras, **COEFS, **HEAD
            )  # fmt: skip

        runs.append([*loss(*tensors)[:6], *gradients(loss, tensors, wanted)])
    for triton, torch_ in zip(*runs, strict=True):
        assert relative_error(triton, torch_) < 5e-6


@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_number_of_products(objective):
    # 8 tokens a sequence: everything in one chunk, chunks of a few sequences, sequences longer than a chunk
    B, T, D, V = 6, 8, 16, 64
    targets = torch.randint(0, V, (B, T))
    extras = {
        "retain_mask": torch.arange(B) >= 4, "ref_logps": -torch.rand(B), "ref_token_logps": -torch.rand(B, T),
    }  # fmt: skip
    alternates = 2 if objective.needs_alternates else 0
    if alternates:
        extras["alternates"] = torch.tensor([2, 3, -1, -1, -1, -1])
    unit = 2 * T * D * V
    for chunk_tokens in (None, 20, 5):
        for requires, products in (("hw", 3), ("h", 2), ("w", 2), ("", 1)):
            h = torch.randn(B, T, D).requires_grad_("h" in requires)
            w = torch.randn(V, D).requires_grad_("w" in requires)
            with FlopCounterMode(display=False) as counter:
                loss = linear_unlearn_loss(h, w, targets, objective, chunk_tokens=chunk_tokens, **extras).loss
                if requires:
                    loss.backward()
            # KTO's alternates carry no gradient
            without = alternates if isinstance(objective, KTO) else 0
            assert counter.get_total_flops() == unit * ((B - without) * products + without), (chunk_tokens, requires)


@pytest.mark.parametrize(
    ("objective", "impl"), [*((o, "torch") for o in EVERY), *((o, "triton") for o in (Unlikelihood(), *ROWS[2:]))]
)
@pytest.mark.parametrize("logit", [200.0, -200.0])
def test_certain_and_impossible_tokens_stay_finite(objective, impl, logit):
    (_, _, _), targets, extras = batch(objective, dtype=torch.float32)
    D, V = 4, 53
    h, w = torch.ones(10, 9, D), torch.zeros(V, D)
    w[7] = logit / D
    targets = targets.where(targets == -100, 7)
    h.requires_grad_(), w.requires_grad_()
    out = linear_unlearn_loss(h, w, targets, objective, impl=impl, chunk_tokens=20, **extras)
    for x in (out.loss, out.weights, *torch.autograd.grad(out.loss, (h, w))):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_everything_ignored_is_zero(objective):
    (h, w, _), targets, extras = batch(objective)
    h, w = h.requires_grad_(), w.requires_grad_()
    out = linear_unlearn_loss(h, w, torch.full_like(targets, -100), objective, **extras)
    assert out.loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(out.loss, (h, w)))


@pytest.mark.parametrize("objective", [Unlikelihood(), CATNIP(), InvertedHinge(), SatImp(beta2=0.5)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_memorised_tokens_in_half_precision(objective, dtype):
    # p is within 1e-7 of 1 and the slope of -log(1 - p) is 1e7: only its product with 1 - p is of order 1
    torch.manual_seed(0)
    B, T, D, V = 2, 3, 32, 40
    w = torch.randn(V, D, dtype=torch.float64)
    targets = torch.randint(0, V, (B, T))
    h = w[targets] * 0.5 + 0.1 * torch.randn(B, T, D, dtype=torch.float64)
    h, w = h.to(dtype), w.to(dtype)

    def ours(h, w, b):
        return linear_unlearn_loss(h, w, targets, objective)

    def plain(h, w, b):
        ref = torch.zeros(B, T, dtype=torch.float64)
        return batch_loss(
            objective, h @ w.T, targets, retain_mask=torch.zeros(B).bool(), ref_logps=ref[:, 0], ref_token_logps=ref
        )

    tensors = h, w, w[:, 0]
    exact = gradients(plain, [x.double() for x in tensors], "hw")
    assert exact[0].isfinite()
    for name, a, e in zip(("loss", "dhidden", "dweight"), gradients(ours, tensors, "hw"), exact):
        assert relative_error(a, e) < max(4 * torch.finfo(dtype).eps, 2e-6), name


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("objective", [*ROWS, Unlikelihood(), SatImp(beta2=0.5)], ids=repr)
def test_no_worse_than_eager_in_bf16(objective, regime):
    h, w, targets = regime_operands(regime, N=48, D=64, V=1500)
    h, w, targets = h.view(4, 12, 64).bfloat16(), w.bfloat16(), targets.view(4, 12)
    extras = {"retain_mask": torch.tensor([False, True, False, False]), "ref_logps": torch.zeros(4)}
    extras["ref_token_logps"] = torch.zeros(4, 12)

    def ours(h, w, b):
        return linear_unlearn_loss(h, w, targets, objective, chunk_tokens=20, **extras)

    def plain(h, w, b):
        # eager's log-softmax in float32, as every trainer has it
        return batch_loss(objective, (h @ w.T).to(torch.promote_types(h.dtype, torch.float32)), targets, **extras)

    tensors = h, w, w[:, 0]
    runs = [
        gradients(fn, x, "hw") for fn, x in ((ours, tensors), (plain, tensors), (plain, [x.double() for x in tensors]))
    ]
    for name, *values in zip(("loss", "dhidden", "dweight"), *runs, strict=True):
        assert_no_worse_than_eager(*values, f"{regime} {name}", torch.finfo(torch.bfloat16).eps / 2)


def test_weights_are_the_mean_derivative():
    objective = WGA(1.5)
    (h, w, b), targets, extras = batch(objective)
    out = linear_unlearn_loss(h, w, targets, objective, bias=b, **extras)
    counted = targets != -100
    logp = logits_of(h, w, b).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    n = counted.sum(1).clamp(min=1)
    expected = ((logp * 1.5).exp() * counted).sum(1) / n / n
    torch.testing.assert_close(out.weights, expected.where(~extras["retain_mask"], 0))
    torch.testing.assert_close(out.logps, (logp * counted).sum(1))


def test_weights_of_a_pair():
    (h, w, b), targets, extras = batch(DPO())
    out = linear_unlearn_loss(h, w, targets, DPO(0.2), bias=b, **extras)
    ratio = out.logps - extras["ref_logps"]
    weight = 2 * torch.sigmoid(0.2 * (ratio[0] - ratio[5]))
    assert out.weights[0].item() == pytest.approx(weight.item())
    assert out.weights[5].item() == pytest.approx(-weight.item())
    # an empty side: no loss, no weight on either side
    assert out.weights[[1, 7, 3, 9, 4, 6]].tolist() == [0] * 6
    n = out.num_tokens
    simpo = linear_unlearn_loss(h, w, targets, SimPO(), bias=b, **extras).weights
    assert simpo[8].item() == pytest.approx((-simpo[2] * n[2] / n[8]).item())


def test_token_weights_make_weighted_gradient_ascent():
    (h, w, b), targets, extras = batch(WGA())
    logp = logits_of(h, w, b).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]

    def ours(h, w, b):
        objective = GradAscent(normalize=True)
        return linear_unlearn_loss(h, w, targets, objective, bias=b, token_weights=(1.5 * logp).exp(), **extras)

    def wga(h, w, b):
        return linear_unlearn_loss(h, w, targets, WGA(1.5), bias=b, **extras)

    for a, e in zip(gradients(ours, (h, w, b), "hwb"), gradients(wga, (h, w, b), "hwb"), strict=True):
        assert relative_error(a, e) < 1e-12


@pytest.mark.parametrize("objective", [*SEQUENCE[4:], *PAIRS, *TOKENWISE[:2]], ids=repr)
def test_gradient_budget(objective):
    tensors, targets, extras = batch(objective)

    def loss(gradient_error):
        def run(h, w, b):
            return linear_unlearn_loss(
                3 * h, w, targets, objective, chunk_tokens=20, gradient_error=gradient_error, **extras
            )  # fmt: skip

        return run

    out = loss(0.02)(*(x.clone().requires_grad_() for x in tensors))
    assert 0 < out.gradient_error.item() <= 0.02
    for a, e in zip(gradients(loss(0.02), tensors, "hw"), gradients(loss(0.0), tensors, "hw"), strict=True):
        assert relative_error(a, e) < 0.03


@pytest.mark.parametrize(
    ("objective", "change", "message"),
    [
        (DPO(), {"alternates": None}, "DPO needs alternates"),
        (DPO(), {"ref_logps": None}, "DPO needs ref_logps"),
        (DPO(), {"alternates": torch.tensor([5, 5, 8, 9, -1, -1, -1, -1, -1, -1])}, "one alternate of its own"),
        (DPO(), {"alternates": torch.tensor([4, 7, 8, 9, -1, -1, -1, -1, -1, -1])}, "one alternate of its own"),
        (DPO(), {"alternates": torch.tensor([5, 7, 8, 99, -1, -1, -1, -1, -1, -1])}, "one alternate of its own"),
        (NPO(), {"alternates": torch.full((10,), -1)}, "no use for alternate answers"),
        (WGA(), {"token_weights": torch.ones(10)}, "token_weights must be"),
        (KTO(), {"token_weights": torch.ones(10, 9)}, "KTO takes no token_weights"),
        (TOKENWISE[1], {"ref_token_logps": None}, "TNPO needs ref_token_logps"),
        (MaxEntropy(), {"gradient_error": 0.01}, "gradient_error must be 0 with MaxEntropy"),
        (WGA(), {"exact_logps": torch.zeros(10)}, "exact_logps must be None: WGA weighs single tokens"),
        (NPO(), {"exact_logps": torch.zeros(9)}, r"exact_logps must be \(10,\) float32"),
        (NPO(), {"exact_logps": torch.zeros(10, dtype=torch.bfloat16)}, "got .* torch.bfloat16"),
        (NPO(), {"exact_logps": torch.zeros(10), "token_weights": torch.ones(10, 9)}, "not both"),
    ],
)
def test_refuses(objective, change, message):
    (h, w, _), targets, extras = batch(objective)
    with pytest.raises(ValueError, match=message):
        linear_unlearn_loss(h, w, targets, objective, **extras | change)


def test_row_objectives_need_two_tokens():
    h, w, targets = torch.randn(1, 2, 3), torch.randn(1, 3), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="PDU needs rows of at least 2 logits"):
        linear_unlearn_loss(h, w, targets, PDU())
