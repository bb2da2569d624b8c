"""N tokens, D hidden size, V vocabulary; B x T where a batch is padded."""

import pytest
import torch
from numerics import REGIMES, assert_no_worse_than_eager, regime_operands, relative_error, value_and_grad
from torch.utils.flop_counter import FlopCounterMode

from simnpo import linear_logps
from simnpo.kernels.linear_logps import linear_logps_torch

IMPLS = ("torch", "triton")
HEAD = {"logit_scale": 0.7, "logit_softcap": 5.0}


def operands(B=3, T=7, D=16, V=53, dtype=torch.float64, ignored=0.3):
    torch.manual_seed(1)
    targets = torch.randint(0, V, (B, T))
    targets[torch.rand(B, T) < ignored] = -100
    return [torch.randn(B, T, D, dtype=dtype), torch.randn(V, D, dtype=dtype), torch.randn(V, dtype=dtype)], targets


def gemms(fn, N, D, V):
    """How many products of N x D with D x V `fn` runs."""
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops() / (2 * N * D * V)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 100])
@pytest.mark.parametrize("head", [{}, HEAD])
@pytest.mark.parametrize("trained", [True, False])
def test_equals_autograd_in_float64(chunk_tokens, head, trained):
    (h, w, b), targets = operands()
    upstream = torch.randn(targets.shape, dtype=torch.float64)
    inputs = [h, w, b] if trained else [h]

    def run(op, **kwargs):
        def fn(h, w=w, b=b):
            return op(h, w, targets, bias=b, **head, **kwargs)

        return value_and_grad(fn, inputs, upstream)

    for ours, exact in zip(run(linear_logps, chunk_tokens=chunk_tokens), run(linear_logps_torch), strict=True):
        assert relative_error(ours, exact) < 1e-12


@pytest.mark.parametrize("trained", [True, False])
def test_gradcheck(trained):
    (h, w, b), targets = operands(B=2, T=3, D=4, V=7)
    h.requires_grad_()
    for x in (w, b):
        x.requires_grad_(trained)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logps(h, w, targets, bias=b, chunk_tokens=2, **HEAD), (h, w, b)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head", [{}, HEAD])
@pytest.mark.parametrize("trained", [True, False])
def test_triton_equals_torch(dtype, head, trained):
    (h, w, b), targets = operands(dtype=dtype)
    upstream = torch.randn(targets.shape)
    b = b if head else None

    def run(impl):
        def fn(h, w=w):
            return linear_logps(h, w, targets, bias=b, chunk_tokens=5, impl=impl, **head)

        return value_and_grad(fn, [h, w] if trained else [h], upstream)

    for triton, torch_ in zip(run("triton"), run("torch"), strict=True):
        assert relative_error(triton, torch_) < (1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_no_worse_than_eager_in_four_regimes(regime, dtype, trained):
    h, w, targets = regime_operands(regime, N=96, D=64, V=1500)
    h, w = h.to(dtype), w.to(dtype)
    upstream = torch.rand(96) + 0.5

    def run(op, h, w):
        return value_and_grad(
            lambda *x: op(*(x if trained else (x[0], w)), targets), [h, w] if trained else [h], upstream
        )

    ours, eager, exact = (
        run(linear_logps, h, w),
        run(linear_logps_torch, h, w),
        run(linear_logps_torch, h.double(), w.double()),
    )
    assert (ours[0] <= 0).all()
    for name, *values in zip(("logps", "dhidden", "dweight")[: len(ours)], ours, eager, exact, strict=True):
        assert_no_worse_than_eager(*values, f"{regime} {name}", ulp=torch.finfo(dtype).eps / 2)


def test_memorised_gradient_survives_bf16():
    # at p = 1 - 1e-4 plain bf16 logits are 5 % wrong; the exact target logit leaves the rounding of the operands
    h, w, targets = regime_operands("memorised", N=96, D=576, V=2000)
    h, w = h.bfloat16(), w.bfloat16()
    run = [value_and_grad(lambda h, op=op, w=w: op(h, w, targets), [h]) for op in (linear_logps, linear_logps_torch)]
    exact = value_and_grad(lambda h: linear_logps_torch(h, w.double(), targets), [h.double()])
    ours, eager = (relative_error(r[1], exact[1]) for r in run)
    assert ours < 0.006
    assert ours < eager / 5


def test_number_of_products():
    B, T, D, V = 3, 8, 16, 64
    (h, w, _), targets = operands(B, T, D, V, dtype=torch.float32, ignored=0)
    H, W = h.clone().requires_grad_(), w.clone().requires_grad_()
    upstream = torch.randn(B, T)
    for hidden, weight, expected in ((h, w, 1), (H, w, 2), (H, W, 4)):

        def step(hidden=hidden, weight=weight):
            logps = linear_logps(hidden, weight, targets, chunk_tokens=5)
            if logps.requires_grad:
                logps.backward(upstream)

        assert gemms(step, B * T, D, V) == expected


def test_ignored_rows_cost_no_product():
    B, T, D, V = 2, 10, 16, 64
    (h, w, _), targets = operands(B, T, D, V, dtype=torch.float32, ignored=0)
    targets[:, :7] = -100
    assert gemms(lambda: linear_logps(h, w, targets), 6, D, V) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_everywhere_and_empty(impl):
    w = torch.randn(11, 4, requires_grad=True)
    for N in (0, 3):
        h = torch.randn(N, 4, requires_grad=True)
        logps = linear_logps(h, w, torch.full((N,), -100), impl=impl)
        assert logps.tolist() == [0.0] * N
        for grad in torch.autograd.grad(logps.sum(), (h, w)):
            assert not grad.any()


def test_vocabulary_of_one_word_is_certain():
    for impl in IMPLS:
        assert linear_logps(
            torch.randn(2, 4), torch.randn(1, 4), torch.zeros(2, dtype=torch.long), impl=impl
        ).tolist() == [0, 0]


def test_views_strides_and_unmutated_inputs():
    B, T, D, V = 3, 6, 8, 30
    (h, w, _), targets = operands(B, T, D, V)
    strided_h = torch.randn(T, B, 2 * D, dtype=h.dtype)[..., 1::2].transpose(0, 1).copy_(h).requires_grad_()
    strided_w = torch.randn(D, V + 3, dtype=h.dtype).t()[3:].copy_(w).requires_grad_()
    offset_targets = torch.cat([targets.new_zeros(1), targets.flatten()])[1:].view(B, T)
    before = strided_h.detach().clone(), strided_w.detach().clone()
    got = linear_logps(strided_h, strided_w, offset_targets, chunk_tokens=4)
    got.sum().backward()
    exact = value_and_grad(lambda h, w: linear_logps_torch(h, w, targets), [h, w])
    for ours, want in zip((got, strided_h.grad, strided_w.grad), exact, strict=True):
        assert relative_error(ours, want) < 1e-12
    assert torch.equal(strided_h, before[0])
    assert torch.equal(strided_w, before[1])


@pytest.mark.parametrize("trained", [True, False])
def test_second_backward_repeats_and_double_backward_raises(trained):
    (h, w, _), targets = operands(dtype=torch.float32)
    h.requires_grad_()
    w.requires_grad_(trained)
    leaves = [h, w] if trained else [h]
    loss = linear_logps(h, w, targets).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, second))
    (grad,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_autocast_multiplies_in_bf16_and_keeps_float32_gradients():
    (h, w, _), targets = operands(dtype=torch.float32)

    def under_autocast(h, w):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_logps(h, w, targets)

    def cast_by_hand(h, w):
        return linear_logps(h.bfloat16(), w.bfloat16(), targets)

    ours, by_hand = value_and_grad(under_autocast, [h, w]), value_and_grad(cast_by_hand, [h, w])
    assert ours[2].dtype == torch.float32
    for a, b in zip(ours, by_hand, strict=True):
        assert relative_error(a, b) < 1e-2
    assert torch.equal(ours[0], by_hand[0])


def test_inside_a_compiled_caller():
    (h, w, _), targets = operands(dtype=torch.float32)

    def caller(h, w):
        return linear_logps(h * 2, w, targets) * 3

    compiled = torch.compile(caller, backend="aot_eager")
    for ours, exact in zip(value_and_grad(compiled, [h, w]), value_and_grad(caller, [h, w]), strict=True):
        assert relative_error(ours, exact) < 1e-6


BAD = {
    "lm_head_weight must be": lambda h, w, t: linear_logps(h, w[:, :3], t),
    "targets must be \\(3, 7\\)": lambda h, w, t: linear_logps(h, w, t[:, :4]),
    "targets must be int64": lambda h, w, t: linear_logps(h, w, t.float()),
    "targets must be in \\[0, 53\\)": lambda h, w, t: linear_logps(h, w, t.clone().fill_(53)),
    "one dtype": lambda h, w, t: linear_logps(h, w.half(), t),
    "dequantise": lambda h, w, t: linear_logps(h, w.to(torch.int8), t),
    "bias must be": lambda h, w, t: linear_logps(h, w, t, bias=w[:3, 0]),
    "hidden_states must be": lambda h, w, t: linear_logps(h[None], w, t),
    "chunk_tokens must be": lambda h, w, t: linear_logps(h, w, t, chunk_tokens=0),
    "logit_softcap must be positive": lambda h, w, t: linear_logps(h, w, t, logit_softcap=0.0),
    "impl must be": lambda h, w, t: linear_logps(h, w, t, impl="cuda"),
    "lm_head_weight must be on cpu": lambda h, w, t: linear_logps(h, w.to("meta"), t),
    'use impl="torch" for float64': lambda h, w, t: linear_logps(h.double(), w.double(), t, impl="triton"),
}


@pytest.mark.parametrize("message", BAD)
def test_refuses(message):
    (h, w, _), targets = operands(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        BAD[message](h, w, targets)


def test_triton_on_a_cpu_tensor_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (h, w, _), targets = operands(dtype=torch.float32)
    with pytest.raises(ValueError, match='use impl="torch"'):
        linear_logps(h, w, targets, impl="triton")


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
def test_float32_logits_of_bf16_operands(regime, trained):
    h, w, targets = regime_operands(regime, N=96, D=64, V=1500)
    h, w, upstream = h.bfloat16(), w.bfloat16(), torch.rand(96) + 0.5

    def run(h, w, op=linear_logps, **options):
        return value_and_grad(
            lambda *x: op(*(x if trained else (x[0], w)), targets, **options), [h, w] if trained else [h], upstream
        )

    wide, narrow = run(h, w, logits_dtype=torch.float32, chunk_tokens=40), run(h, w, chunk_tokens=40)
    exact = run(h.double(), w.double(), op=linear_logps_torch)
    # the log-probabilities lose only float32's rounding, the gradients that of dz to bf16
    assert relative_error(wide[0], exact[0]) < 3e-6
    for a, b, c in zip(wide[1:], narrow[1:], exact[1:], strict=True):
        assert relative_error(a, c) < min(0.004, 1.1 * relative_error(b, c))


def test_refuses_logits_narrower_than_the_products():
    (h, w, _), targets = operands(dtype=torch.float32)
    with pytest.raises(ValueError, match="logits_dtype must be None"):
        linear_logps(h, w, targets, logits_dtype=torch.bfloat16)
