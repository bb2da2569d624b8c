"""B sequences, T positions, D hidden size, V vocabulary; N packed tokens."""

import pytest
import torch
import torch.nn.functional as F
from memory import peak_bytes
from numerics import REGIMES, assert_no_worse_than_eager, regime_operands, relative_error
from torch.utils.flop_counter import FlopCounterMode

from simnpo import NPO, GradAscent, SimNPO, linear_unlearn_loss
from simnpo.kernels.chunks import loss_memory_bytes
from simnpo.kernels.linear_logps import linear_logps_torch
from simnpo.kernels.row_pass import TORCH_BLOCK_BYTES

OBJECTIVES = (SimNPO(beta=2.5, gamma=0.7), NPO(beta=0.2), GradAscent(), GradAscent(normalize=True))
COEFS = {"forget_coef": 0.1375, "retain_coef": 1.3}
HEAD = {"logit_scale": 0.7, "logit_softcap": 5.0}
UPSTREAM = 1.7


def plain_loss(h, w, targets, objective, retain_mask, ref_logps, forget_coef=1.0, retain_coef=1.0, **head):
    """The formulas of the papers on all the logits, written out once more: sequences are the rows of (B, T)."""
    token_logps = linear_logps_torch(h, w, targets, **head)
    forget, retain = [], []
    for i in range(len(targets)):
        counted = targets[i] != -100
        s, n = token_logps[i].sum(), int(counted.sum())
        if retain_mask[i]:
            retain.append(token_logps[i][counted])
        elif n == 0:
            forget.append(s * 0)
        elif isinstance(objective, SimNPO):
            forget.append(-2 / objective.beta * F.logsigmoid(-objective.beta / n * s - objective.gamma))
        elif isinstance(objective, NPO):
            forget.append(-2 / objective.beta * F.logsigmoid(-objective.beta * (s - ref_logps[i])))
        else:
            forget.append(s / n if objective.normalize else s)
    forget_loss = torch.stack(forget).mean() if forget else h.new_zeros(())
    retain_loss = -torch.cat(retain).mean() if retain and sum(map(len, retain)) else h.new_zeros(())
    return forget_coef * forget_loss + retain_coef * retain_loss


def ragged(B=6, T=9, D=16, V=53, dtype=torch.float64):
    """A ragged batch: a one-token response, an empty sequence, ignored tokens in the middle; half of it retain."""
    torch.manual_seed(2)
    targets = torch.randint(0, V, (B, T))
    targets[0, 1:] = -100
    targets[1] = -100
    targets[2, ::2] = -100
    targets[3, 6:] = -100
    h, w, b = torch.randn(B, T, D, dtype=dtype), torch.randn(V, D, dtype=dtype), torch.randn(V, dtype=dtype)
    retain_mask = torch.arange(B) >= 4
    ref_logps = -10 + 3 * torch.randn(B, dtype=dtype)
    return (h, w, b), targets, retain_mask, ref_logps


def gradients(loss_fn, tensors, wanted):
    leaves = [x.detach().clone().requires_grad_(name in wanted) for name, x in zip("hwb", tensors)]
    out = loss_fn(*leaves)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    return [loss.detach(), *torch.autograd.grad(loss * UPSTREAM, [x for x in leaves if x.requires_grad])]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 12])
@pytest.mark.parametrize("wanted", ["hwb", "h", "w"])
def test_equals_autograd_of_the_formulas_in_float64(objective, chunk_tokens, wanted):
    tensors, targets, retain_mask, ref_logps = ragged()

    def ours(h, w, b):
        return linear_unlearn_loss(
            h,
            w,
            targets,
            objective,
            retain_mask=retain_mask,
            ref_logps=ref_logps,
            chunk_tokens=chunk_tokens,
            bias=b,
            **COEFS,
            **HEAD,
        )

    def plain(h, w, b):
        return plain_loss(h, w, targets, objective, retain_mask, ref_logps, bias=b, **COEFS, **HEAD)

    (loss, *grads), (exact, *exact_grads) = gradients(ours, tensors, wanted), gradients(plain, tensors, wanted)
    assert abs(loss - exact) <= 1e-12 * abs(exact)
    for ours_, exact_ in zip(grads, exact_grads, strict=True):
        assert relative_error(ours_, exact_) < 1e-10


@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=repr)
def test_gradcheck(objective):
    (h, w, b), targets, retain_mask, ref_logps = ragged(T=3, D=4, V=7)
    for x in (h, w, b):
        x.requires_grad_()

    def loss(h, w, b):
        return linear_unlearn_loss(
            h,
            w,
            targets,
            objective,
            retain_mask=retain_mask,
            ref_logps=ref_logps,
            chunk_tokens=2,
            bias=b,
            **COEFS,
            **HEAD,
        ).loss

    assert torch.autograd.gradcheck(loss, (h, w, b))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("wanted", ["hwb", "h"])
def test_triton_equals_torch(objective, chunk_tokens, wanted):
    tensors, targets, retain_mask, ref_logps = ragged(dtype=torch.float32)
    runs = []
    for impl in ("triton", "torch"):

        def loss(h, w, b, impl=impl):
            return linear_unlearn_loss(
                h, w, targets, objective, retain_mask=retain_mask, ref_logps=ref_logps,
                chunk_tokens=chunk_tokens, bias=b, impl=impl, **COEFS, **HEAD,
            )  # fmt: skip

        runs.append([*loss(*tensors)[:6], *gradients(loss, tensors, wanted)])
    for triton, torch_ in zip(*runs, strict=True):
        assert relative_error(triton, torch_) < 2e-6


def test_what_it_reports():
    (h, w, _), targets, retain_mask, ref_logps = ragged()
    out = linear_unlearn_loss(h, w, targets, NPO(0.2), retain_mask=retain_mask, ref_logps=ref_logps, **COEFS)
    token_logps = linear_logps_torch(h, w, targets)
    torch.testing.assert_close(out.logps, token_logps.sum(1))
    assert out.num_tokens.tolist() == (targets != -100).sum(1).tolist()
    log_ratio = out.logps - ref_logps
    expected = torch.where(retain_mask | (out.num_tokens == 0), 0, 2 * torch.sigmoid(0.2 * log_ratio))
    torch.testing.assert_close(out.weights, expected)
    torch.testing.assert_close(
        out.loss, COEFS["forget_coef"] * out.forget_loss + COEFS["retain_coef"] * out.retain_loss
    )
    torch.testing.assert_close(out.retain_loss, -out.logps[retain_mask].sum() / out.num_tokens[retain_mask].sum())


def test_simnpo_weight_is_the_papers():
    (h, w, _), targets, _, _ = ragged()
    out = linear_unlearn_loss(h, w, targets, SimNPO(beta=2.5, gamma=0.7))
    n = out.num_tokens.clamp(min=1)
    paper = torch.where(out.num_tokens > 0, 2 / n * torch.sigmoid(2.5 * out.logps / n + 0.7), 0)
    torch.testing.assert_close(out.weights, paper)


@pytest.mark.parametrize("wanted", ["hw", "h"])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_packed_equals_padded(wanted, chunk_tokens):
    (h, w, b), targets, retain_mask, ref_logps = ragged()
    lengths = torch.tensor([3, 5, 9, 7, 9, 8])
    keep = torch.arange(9) < lengths[:, None]
    targets = targets.masked_fill(~keep, -100)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    options = {"retain_mask": retain_mask, "ref_logps": ref_logps, "chunk_tokens": chunk_tokens}

    def padded(h, w, b):
        return linear_unlearn_loss(h, w, targets, SimNPO(2.5, 0.3), **options)

    def packed(h, w, b):
        return linear_unlearn_loss(h[keep], w, targets[keep], SimNPO(2.5, 0.3), cu_seqlens=cu_seqlens, **options)

    for a, b_ in zip(gradients(padded, (h, w, b), wanted), gradients(packed, (h, w, b), wanted), strict=True):
        assert relative_error(a, b_) < 1e-13


@pytest.mark.parametrize("which", ["all forget", "all retain"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_sided_batches(which, impl):
    (h, w, b), targets, retain_mask, ref_logps = ragged(dtype=torch.float32)
    retain_mask = torch.full_like(retain_mask, which == "all retain")

    def ours(h, w, b):
        return linear_unlearn_loss(h, w, targets, SimNPO(), retain_mask=retain_mask, chunk_tokens=4, impl=impl)

    def plain(h, w, b):
        return plain_loss(h, w, targets, SimNPO(), retain_mask, ref_logps)

    for a, exact in zip(gradients(ours, (h, w, b), "hw"), gradients(plain, (h, w, b), "hw"), strict=True):
        assert relative_error(a, exact) < 1e-5


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_everything_ignored_is_zero(impl):
    tensors, targets, retain_mask, _ = ragged(dtype=torch.float32)

    def loss(h, w, b):
        return linear_unlearn_loss(h, w, torch.full_like(targets, -100), SimNPO(), retain_mask=retain_mask, impl=impl)

    for x in gradients(loss, tensors, "hw"):
        assert not x.any()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [None, 40])
def test_no_worse_than_eager_in_four_regimes(regime, dtype, chunk_tokens):
    h, w, targets = regime_operands(regime, N=96, D=64, V=1500)
    h, targets = h.view(4, 24, 64), targets.view(4, 24)
    retain_mask = torch.tensor([False, True, False, False])
    rounded = h.to(dtype), w.to(dtype), w[:, 0]

    def ours(h, w, b):
        return linear_unlearn_loss(h, w, targets, SimNPO(2.5, 0.3), retain_mask=retain_mask, chunk_tokens=chunk_tokens)

    def plain(h, w, b):
        return plain_loss(h, w, targets, SimNPO(2.5, 0.3), retain_mask, None)

    runs = [
        gradients(fn, x, "hw") for fn, x in ((ours, rounded), (plain, rounded), (plain, [x.double() for x in rounded]))
    ]
    assert (linear_unlearn_loss(*rounded[:2], targets, SimNPO()).logps <= 0).all()
    for name, *values in zip(("loss", "dhidden", "dweight"), *runs, strict=True):
        # the loss is one float32 number at the end of three roundings
        ulp = 2 * torch.finfo(torch.float32).eps if name == "loss" else torch.finfo(dtype).eps / 2
        assert_no_worse_than_eager(*values, f"{regime} {name}", ulp)


def count_products(fn, N, D, V):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops() / (2 * N * D * V)


@pytest.mark.parametrize("chunk_tokens", [None, 20, 8, 5])
def test_number_of_products(chunk_tokens):
    # 8 tokens a sequence: chunks of several sequences, of one, and sequences longer than a chunk
    B, T, D, V = 4, 8, 16, 64
    h, w = torch.randn(B, T, D), torch.randn(V, D)
    targets = torch.randint(0, V, (B, T))
    retain_mask = torch.tensor([False, True, False, False])

    for requires, expected in ((("h", "w"), 3), (("h",), 2), (("w",), 2), ((), 1)):
        H, W = h.clone().requires_grad_("h" in requires), w.clone().requires_grad_("w" in requires)

        def step(H=H, W=W):
            loss = linear_unlearn_loss(H, W, targets, SimNPO(), retain_mask=retain_mask, chunk_tokens=chunk_tokens).loss
            if loss.requires_grad:
                loss.backward()

        assert count_products(step, B * T, D, V) == expected


class LargestLogits(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor with V columns (or, transposed, rows) that is not the head's own size."""

    def __init__(self, V: int, D: int):
        super().__init__()
        self.V, self.D, self.largest = V, D, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and self.V in x.shape and self.D not in x.shape:
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("wanted", ["hw", "h", ""])
def test_never_more_than_a_chunk_of_logits(wanted):
    B, T, D, V, chunk_tokens = 4, 24, 16, 67, 10
    tensors = torch.randn(B, T, D), torch.randn(V, D), torch.randn(V)
    targets = torch.randint(0, V, (B, T))
    with LargestLogits(V, D) as seen:
        leaves = [x.clone().requires_grad_(name in wanted) for name, x in zip("hw", tensors)]
        loss = linear_unlearn_loss(*leaves, targets, SimNPO(), chunk_tokens=chunk_tokens).loss
        if wanted:
            loss.backward()
    assert 0 < seen.largest <= chunk_tokens * V


def test_same_bits_every_run_and_second_backward():
    tensors, targets, retain_mask, _ = ragged(dtype=torch.float32)
    h, w = (x.clone().requires_grad_() for x in tensors[:2])
    runs = []
    for _ in range(2):
        loss = linear_unlearn_loss(h, w, targets, SimNPO(), retain_mask=retain_mask, chunk_tokens=5).loss
        runs.append(torch.autograd.grad(loss, (h, w), retain_graph=True))
        runs.append(torch.autograd.grad(loss, (h, w)))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_double_backward_raises():
    tensors, targets, _, _ = ragged()
    h = tensors[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(linear_unlearn_loss(h, tensors[1], targets, SimNPO()).loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_inputs_are_not_modified():
    tensors, targets, retain_mask, ref_logps = ragged(dtype=torch.float32)
    h, w = (x.clone().requires_grad_() for x in tensors[:2])
    linear_unlearn_loss(
        h, w, targets, NPO(), retain_mask=retain_mask, ref_logps=ref_logps, chunk_tokens=4
    ).loss.backward()
    assert torch.equal(h, tensors[0])
    assert torch.equal(w, tensors[1])


def test_autocast_with_float32_master_weights():
    tensors, targets, retain_mask, _ = ragged(dtype=torch.float32)

    def ours(h, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_unlearn_loss(h, w, targets, SimNPO(), retain_mask=retain_mask, chunk_tokens=8)

    def plain(h, w, b):
        return plain_loss(h, w, targets, SimNPO(), retain_mask, None)

    for a, exact in zip(gradients(ours, tensors, "hw"), gradients(plain, tensors, "hw"), strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, exact) < 2e-2


def test_inside_a_compiled_caller():
    tensors, targets, retain_mask, _ = ragged(dtype=torch.float32)

    def caller(h, w, b):
        return linear_unlearn_loss(h * 2, w, targets, SimNPO(), retain_mask=retain_mask).loss * 3

    compiled = torch.compile(caller, backend="aot_eager")
    for a, exact in zip(gradients(compiled, tensors, "hw"), gradients(caller, tensors, "hw"), strict=True):
        assert relative_error(a, exact) < 1e-6


def test_extreme_rewards_stay_finite():
    # a forgotten sequence 3 000 nats below its reference and one far above: sigmoid saturates, nothing overflows
    (h, w, _), targets, _, _ = ragged(dtype=torch.float32)
    for shift in (-3e3, 3e3):
        for impl in ("torch", "triton"):
            H = h.clone().requires_grad_()
            ref_logps = torch.full((6,), shift)
            out = linear_unlearn_loss(H, w, targets, NPO(2.0), ref_logps=ref_logps, impl=impl)
            out.loss.backward()
            assert torch.isfinite(out.loss)
            assert torch.isfinite(H.grad).all()
            assert out.weights[2].item() == pytest.approx(2.0 if shift < 0 else 0.0)


BAD = {
    "needs ref_logps": lambda h, w, t: linear_unlearn_loss(h, w, t, NPO()),
    "ref_logps must be \\(6,\\)": lambda h, w, t: linear_unlearn_loss(h, w, t, NPO(), ref_logps=torch.zeros(5)),
    "retain_mask must be \\(6,\\)": lambda h, w, t: linear_unlearn_loss(h, w, t, SimNPO(), retain_mask=t[:2, 0] > 0),
    "retain_mask must be bool": lambda h, w, t: linear_unlearn_loss(h, w, t, SimNPO(), retain_mask=torch.ones(6)),
    "at least one sequence": lambda h, w, t: linear_unlearn_loss(h[:0], w, t[:0], SimNPO()),
    "cu_seqlens goes with packed": lambda h, w, t: linear_unlearn_loss(h, w, t, SimNPO(), cu_seqlens=torch.arange(7)),
    "need cu_seqlens": lambda h, w, t: linear_unlearn_loss(h[0], w, t[0], SimNPO()),
    "cu_seqlens must rise from 0 to the 9": lambda h, w, t: linear_unlearn_loss(
        h[0], w, t[0], SimNPO(), cu_seqlens=torch.tensor([0, 5, 12])
    ),
    "targets must be in": lambda h, w, t: linear_unlearn_loss(h, w, t - 1, SimNPO()),
    "beta must be positive": lambda h, w, t: linear_unlearn_loss(h, w, t, SimNPO(beta=0.0)),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_refuses(message):
    (h, w, _), targets, _, _ = ragged(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        BAD[message](h, w, targets.where(targets != 0, 1).index_fill(1, torch.tensor([0]), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [1024, 256, 40])
@pytest.mark.parametrize("trained", [True, False])
def test_memory_is_the_formulas(dtype, chunk_tokens, trained):
    B, T, D, V = 16, 64, 64, 16_000
    h, w = torch.randn(B, T, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_(trained)
    targets = torch.randint(0, V, (B, T))

    def step():
        loss = linear_unlearn_loss(h, w, targets, SimNPO(), chunk_tokens=chunk_tokens).loss
        loss.backward()
        return h.grad, w.grad

    formula = loss_memory_bytes(
        B * T, D, V, chunk_tokens, dtype.itemsize, head_is_trained=trained, late_sequences=B if chunk_tokens < T else 0
    )
    # the torch row pass works on two cache-sized blocks: a float32 copy of some rows, and its rounding
    blocks = 0 if h.is_cuda else 2 * TORCH_BLOCK_BYTES["cpu"]
    assert formula * 0.99 <= peak_bytes(step) <= formula * 1.02 + blocks
