"""B sequences, T positions, V vocabulary."""

import pytest
import torch
from numerics import relative_error, value_and_grad

from simnpo import NPO, GradAscent, SimNPO, linear_unlearn_loss, unlearn_loss

COEFS = {"forget_coef": 0.1375, "retain_coef": 1.3}


def batch(B=4, T=6, V=41, dtype=torch.float64):
    torch.manual_seed(3)
    targets = torch.randint(0, V, (B, T))
    targets[0, 2:] = -100
    targets[1] = -100
    return 3 * torch.randn(B, T, V, dtype=dtype), targets, torch.tensor([False, False, True, False]), -8 - torch.rand(B)


def with_identity_head(logits, targets, objective, **options):
    """The tested op against the tested op: logits are the hidden states of an identity head."""
    return linear_unlearn_loss(
        logits, torch.eye(logits.shape[-1], dtype=logits.dtype), targets, objective, **options
    ).loss


@pytest.mark.parametrize("objective", [SimNPO(2.5, 0.7), NPO(0.2), GradAscent()], ids=repr)
@pytest.mark.parametrize("inplace", [False, True])
def test_equals_the_fused_head(objective, inplace):
    logits, targets, retain_mask, ref_logps = batch()
    options = {"retain_mask": retain_mask, "ref_logps": ref_logps, **COEFS}

    def ours(z):
        return unlearn_loss(z * 1, targets, objective, inplace=inplace, **options).loss

    def exact(z):
        return with_identity_head(z, targets, objective, **options)

    for a, b in zip(value_and_grad(ours, [logits]), value_and_grad(exact, [logits]), strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_equals_torch(inplace, dtype):
    logits, targets, retain_mask, _ = batch(dtype=dtype)

    def run(impl):
        return value_and_grad(
            lambda z: unlearn_loss(z * 1, targets, SimNPO(), retain_mask=retain_mask, inplace=inplace, impl=impl).loss,
            [logits],
        )

    for triton, torch_ in zip(run("triton"), run("torch"), strict=True):
        assert relative_error(triton, torch_) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_packed_equals_padded():
    logits, targets, retain_mask, _ = batch()
    B, T, V = logits.shape
    padded = value_and_grad(lambda z: unlearn_loss(z, targets, SimNPO(), retain_mask=retain_mask).loss, [logits])

    def packed(z):
        bounds = torch.arange(B + 1) * T
        return unlearn_loss(z, targets.flatten(), SimNPO(), cu_seqlens=bounds, retain_mask=retain_mask).loss

    loss, grad = value_and_grad(packed, [logits.view(B * T, V)])
    assert torch.equal(loss, padded[0])
    assert torch.equal(grad.view(B, T, V), padded[1])


def test_logits_are_left_alone_unless_asked():
    logits, targets, _, _ = batch()
    z = logits.clone().requires_grad_()
    loss = unlearn_loss(z, targets, SimNPO()).loss
    first = torch.autograd.grad(loss, z, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, z)[0])
    assert torch.equal(z, logits)


def test_inplace_refuses_when_the_graph_needs_the_logits():
    logits, targets, _, _ = batch()
    z = logits.clone().requires_grad_().tanh()  # tanh keeps its result for backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        unlearn_loss(z, targets, SimNPO(), inplace=True).loss.backward()


def test_inplace_refuses_a_second_backward():
    logits, targets, _, _ = batch()
    loss = unlearn_loss(logits.clone().requires_grad_() * 1, targets, SimNPO(), inplace=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_allocates_no_second_logits():
    logits, targets, _, _ = batch()
    z = logits.clone().requires_grad_() * 1
    seen = []
    z.register_hook(lambda grad: seen.append(grad.data_ptr()))
    unlearn_loss(z, targets, SimNPO(), inplace=True).loss.backward()
    assert seen == [z.data_ptr()]


@pytest.mark.parametrize(
    ("message", "call"),
    {
        "logits must be": lambda z, t: unlearn_loss(z.long(), t, SimNPO()),
        "targets must be \\(4, 6\\)": lambda z, t: unlearn_loss(z, t[:, 1:], SimNPO()),
        "targets must be in \\[0, 41\\)": lambda z, t: unlearn_loss(z, t + 100, SimNPO()),
        "needs ref_logps": lambda z, t: unlearn_loss(z, t, NPO()),
        "inplace needs contiguous": lambda z, t: unlearn_loss(z[:, 1:], t[:, 1:], SimNPO(), inplace=True),
    }.items(),
)
def test_refuses(message, call):
    logits, targets, _, _ = batch()
    with pytest.raises(ValueError, match=message):
        call(logits, targets.clamp(min=0))


def test_the_class_of_an_objective_is_no_objective():
    hidden, weight, targets = torch.randn(1, 3, 4), torch.randn(5, 4), torch.tensor([[1, 2, 3]])
    for wrong, message in (
        (SimNPO, r"objective must be an instance: write SimNPO\(\), got the class"),
        ("npo", "'npo'"),
    ):
        with pytest.raises(TypeError, match=message):
            linear_unlearn_loss(hidden, weight, targets, wrong)
        with pytest.raises(TypeError, match=message):
            unlearn_loss(hidden, targets, wrong)
