"""The kernels on the device that is there: a GPU, or Triton's interpreter (bf16 is wrong in it) at tiny shapes."""

import copy

import pytest
import torch
from conftest import make_model
from numerics import REGIMES, assert_no_worse_than_eager, regime_operands

from simnpo import attach, linear_logps
from simnpo.benchmarks.operands import FORGET_COEF, OBJECTIVE, RETAIN_COEF, Batch, exact
from simnpo.benchmarks.rivals import flat_logps, simnpo_of
from simnpo.kernels.linear_unlearn_loss import linear_unlearn_loss
from simnpo.model import relative_error
from simnpo.upcast import check_float32, float32_arithmetic

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
N, D, V, T = (2048, 512, 32003, 128) if ON_GPU else (32, 16, 150, 8)
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_GPU else [torch.float16, torch.float32]


def ours(batch, chunk_tokens):
    return linear_unlearn_loss(
        batch.hidden_states, batch.weight, batch.targets, OBJECTIVE, cu_seqlens=batch.cu_seqlens,
        retain_mask=batch.retain_mask, forget_coef=FORGET_COEF, retain_coef=RETAIN_COEF, chunk_tokens=chunk_tokens,
        impl="triton",
    ).loss  # fmt: skip


def make(regime, dtype):
    h, w, targets = (x.to(DEVICE) for x in regime_operands(regime, N, D, V))
    return Batch(h.to(dtype), w.to(dtype), targets, T)


def values(loss_of, batch, mode):
    leaves = batch.require_grad(mode)
    loss = loss_of(batch)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["trained", "frozen"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_no_worse_than_eager(regime, dtype, mode, chunks):
    batch = make(regime, dtype)
    triton = values(lambda batch: ours(batch, N // chunks), batch, mode)
    eager = values(simnpo_of(flat_logps), batch, mode)
    truth = exact(batch)
    for name, *three in zip(("loss", "dH", "dW"), triton, eager, (truth.loss, truth.dhidden, truth.dweight)):
        # the loss averages one rounding a token, which may cancel better for eager
        ulp = torch.finfo(dtype).eps / 2
        if name == "loss":
            ulp = ulp / N**0.5 + 4 * torch.finfo(torch.float32).eps
        assert_no_worse_than_eager(*three, f"{regime} {name}", ulp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logps_never_positive_and_the_same_every_time(dtype):
    batch = make("memorised", dtype)
    operands = batch.hidden_states, batch.weight, batch.targets
    first, second = (linear_logps(*operands, chunk_tokens=N // 2, impl="triton") for _ in range(2))
    assert (first <= 0).all()
    assert torch.equal(first, second)
    a, b = (values(lambda batch: ours(batch, N // 4), batch, "trained") for _ in range(2))
    assert all(map(torch.equal, a, b))


def test_float32_arithmetic_on_bf16_weights():
    model = attach(make_model(hidden_size=64, num_attention_heads=4))
    ids = torch.arange(3 * 50).view(3, 50) % 250
    for p in model.parameters():
        p.data = p.data.bfloat16()
    with torch.no_grad():
        truth = attach(copy.deepcopy(model).double())(ids, labels=ids, token_logps=True)
    model, ids = model.to(DEVICE), ids.to(DEVICE)
    with torch.no_grad():
        rounded = model(ids, labels=ids, token_logps=True)
    check_float32(model)
    with float32_arithmetic(model):
        ours = model(ids, labels=ids, token_logps=True)
    # the 16 bits of a number in two bf16 parts
    assert relative_error(ours.cpu().double(), truth) < 2**-14
    assert relative_error(rounded.cpu().double(), truth) > 2**-11
