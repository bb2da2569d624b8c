"""B sequences, T positions, D hidden size, V vocabulary."""

import pytest
import torch
from numerics import assert_no_worse_than_eager, relative_error
from test_linear_unlearn_loss import LargestLogits
from torch.utils.flop_counter import FlopCounterMode

from simnpo import linear_kl
from simnpo.kernels.head import LogitTransform
from simnpo.kernels.kl_pass import kl_pass, kl_pass_torch

HEAD = {"logit_scale": 0.7, "logit_softcap": 5.0}
UPSTREAM = 1.7


def plain_kl(h, w, b, ref_h, ref_w, ref_b, targets, logit_scale=1.0, logit_softcap=None):
    """On all the logits, by autograd."""

    def log_softmax(h, w, b):
        z = logit_scale * (h @ w.T + b)
        return (z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)).log_softmax(-1)

    log_q, log_p = log_softmax(ref_h, ref_w, ref_b), log_softmax(h, w, b)
    counted = targets != -100
    return (log_q.exp() * (log_q - log_p)).sum(-1)[counted].sum() / counted.sum().clamp(min=1)


def operands(dtype=torch.float64, distance=1.0, B=5, T=7, D=12, V=53):
    """A reference of another hidden size, at about `distance` from the model in logits; ragged targets."""
    g = torch.Generator().manual_seed(7)
    h, w = torch.randn(B, T, D, generator=g, dtype=dtype), torch.randn(V, D, generator=g, dtype=dtype)
    b, shift = torch.randn(V, generator=g, dtype=dtype), torch.randn(V, generator=g, dtype=dtype)
    ref_h = torch.cat([h, torch.ones(B, T, 1, dtype=dtype)], -1)
    ref_w = torch.cat([w, distance * shift[:, None]], -1)
    targets = torch.randint(0, V, (B, T), generator=g)
    targets[0] = -100
    targets[1, 2:] = -100
    targets[2, ::2] = -100
    return (h, w, b), (ref_h, ref_w, b), targets


def gradients(fn, tensors, wanted):
    leaves = [x.detach().clone().requires_grad_(name in wanted) for name, x in zip("hwb", tensors)]
    loss = fn(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss * UPSTREAM, [x for x in leaves if x.requires_grad])]


@pytest.mark.parametrize("chunk_tokens", [None, 1, 6])
@pytest.mark.parametrize("wanted", ["hwb", "h", "w"])
@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "scale, softcap"])
@pytest.mark.parametrize("distance", [1.0, 1e-3, 30.0])
def test_equals_autograd_of_the_formula(chunk_tokens, wanted, head, distance):
    tensors, ref, targets = operands(distance=distance)

    def ours(h, w, b):
        return linear_kl(
            h, w, ref[0], ref[1], targets, bias=b, ref_bias=ref[2], chunk_tokens=chunk_tokens, **head
        )  # fmt: skip

    def plain(h, w, b):
        return plain_kl(h, w, b, *ref, targets, **head)

    for a, exact in zip(gradients(ours, tensors, wanted), gradients(plain, tensors, wanted), strict=True):
        # at distance 1e-3 the formula itself loses 6 of its 16 digits
        assert relative_error(a, exact) < (1e-8 if distance < 1 else 1e-11)


def test_packed_normaliser_and_reference_without_gradient():
    (h, w, _), (ref_h, ref_w, _), targets = operands()
    ref_h.requires_grad_(), h.requires_grad_()
    whole = linear_kl(h, w, ref_h, ref_w, targets)
    packed = linear_kl(h.flatten(0, 1), w, ref_h.flatten(0, 1), ref_w, targets.flatten())
    assert packed.item() == pytest.approx(whole.item(), rel=1e-12)
    parts = [linear_kl(h[i], w, ref_h[i], ref_w, targets[i], num_tokens=int((targets != -100).sum())) for i in range(5)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)
    whole.backward()
    assert ref_h.grad is None
    assert h.grad.norm() > 0


def test_is_zero_at_the_reference_and_without_tokens():
    (h, w, _), _, targets = operands()
    h.requires_grad_(), w.requires_grad_()
    for of in (targets, torch.full_like(targets, -100)):
        kl = linear_kl(h, w, h.detach().clone(), w.detach().clone(), of)
        assert kl.item() == 0
        assert not any(g.any() for g in torch.autograd.grad(kl, (h, w)))


@pytest.mark.parametrize("wanted", ["hwb", "h", ""])
def test_triton_equals_torch(wanted):
    tensors, ref, targets = operands(torch.float32)
    runs = []
    for impl in ("triton", "torch"):

        def kl(h, w, b, impl=impl):
            return linear_kl(h, w, *ref[:2], targets, bias=b, ref_bias=ref[2], chunk_tokens=10, impl=impl, **HEAD)

        runs.append(gradients(kl, tensors, wanted) if wanted else [kl(*tensors)])
    for triton, torch_ in zip(*runs, strict=True):
        assert relative_error(triton, torch_) < 2e-6


@pytest.mark.parametrize("impl", [kl_pass, kl_pass_torch])
@pytest.mark.parametrize(("N", "V"), [(1, 1), (3, 7), (2, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("distance", [1e-3, 1.0, 100.0])
def test_pass(impl, N, V, dtype, distance):
    torch.manual_seed(1)
    logits = 3 * torch.randn(N, V).to(dtype)
    ref = (logits + distance * torch.randn(N, V)).to(dtype)
    z = logits.double().requires_grad_()
    log_q = ref.double().log_softmax(1)
    exact = (log_q.exp() * (log_q - z.log_softmax(1))).sum(1)
    (gradient,) = torch.autograd.grad(exact.sum(), z)
    chunk = logits.clone()
    kl = impl(chunk, ref, LogitTransform(), LogitTransform(), write_gradient=False)
    assert torch.equal(chunk, logits)
    assert torch.equal(kl, impl(chunk, ref, LogitTransform(), LogitTransform(), write_gradient=True))
    assert (kl >= 0).all()
    assert relative_error(kl, exact.detach()) < 1e-3 if distance < 1 else 1e-5
    assert (chunk.double() - gradient).norm() <= 2 * torch.finfo(dtype).eps * gradient.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [1e-2, 1.0])
def test_no_worse_than_eager(dtype, distance):
    tensors, ref, targets = (
        [x.to(dtype) for x in some] if isinstance(some, tuple) else some
        for some in operands(distance=distance, B=4, T=24, D=64, V=900)
    )

    def ours(h, w, b):
        return linear_kl(h, w, *ref[:2], targets, bias=b, ref_bias=ref[2])

    def plain(h, w, b):
        return plain_kl(h, w, b, *(x.to(h.dtype) for x in ref), targets)

    runs = [
        gradients(fn, x, "hw") for fn, x in ((ours, tensors), (plain, tensors), (plain, [x.double() for x in tensors]))
    ]
    for name, *values in zip(("kl", "dhidden", "dweight"), *runs, strict=True):
        # the divergence of two rounded rows feels each rounding 1/distance times
        assert_no_worse_than_eager(*values, f"{name} at {distance}", 4 * torch.finfo(dtype).eps / distance)


def test_number_of_products_and_size_of_chunks():
    B, T, D, V, chunk_tokens = 4, 6, 16, 64, 10
    targets = torch.randint(0, V, (B, T))
    for wanted, products in (("hw", 4), ("h", 3), ("", 2)):
        h, w, ref_h, ref_w = (torch.randn(*shape) for shape in ((B, T, D), (V, D)) * 2)
        h.requires_grad_("h" in wanted), w.requires_grad_("w" in wanted)
        with FlopCounterMode(display=False) as counter, LargestLogits(V, D) as seen:
            kl = linear_kl(h, w, ref_h, ref_w, targets, chunk_tokens=chunk_tokens)
            if wanted:
                kl.backward()
        assert counter.get_total_flops() == products * 2 * B * T * D * V
        assert 0 < seen.largest <= chunk_tokens * V


def test_refuses():
    (h, w, _), (ref_h, ref_w, _), targets = operands()
    with pytest.raises(ValueError, match="ref_lm_head_weight must have the 53 rows of lm_head_weight, got 50"):
        linear_kl(h, w, ref_h, ref_w[:50], targets)
    with pytest.raises(ValueError, match="targets must be"):
        linear_kl(h, w, ref_h[:2], ref_w, targets)
    with pytest.raises(ValueError, match="num_tokens must be a positive integer"):
        linear_kl(h, w, ref_h, ref_w, targets, num_tokens=0)
