"""The head or the sequences spread over the GPUs of this machine, by NCCL; over gloo processes where there are none."""

import pytest
import torch
import torch.distributed as dist
from ranks import PASSED, backend_for, own_device, run_on_ranks, shard
from test_linear_unlearn_loss import COEFS, HEAD, OBJECTIVES, UPSTREAM
from test_parallel import T_SIZES, V_SIZES, assert_gradients, exact_gradients

from simnpo import linear_unlearn_loss

WORLD = 4 if torch.cuda.device_count() >= 4 else 2


def on_device(tensor):
    return tensor.to(own_device())


def check_vocabulary_on_devices():
    sizes = V_SIZES[dist.get_world_size()]
    for objective in OBJECTIVES:
        exact, grads, (tensors, targets, retain_mask, ref_logps) = exact_gradients("hwb", objective, **HEAD)
        parts = (tensors[0], shard(tensors[1], sizes), shard(tensors[2], sizes))
        for dtype, impl, tolerance in _ways():
            h, w, b = (on_device(x).to(dtype).requires_grad_() for x in parts)
            out = linear_unlearn_loss(
                h, w, on_device(targets), objective, retain_mask=on_device(retain_mask), ref_logps=on_device(ref_logps),
                bias=b, chunk_tokens=12, impl=impl, vocab_group=dist.group.WORLD, **COEFS, **HEAD,
            )  # fmt: skip
            (out.loss * UPSTREAM).backward()
            assert abs(out.loss.cpu() - exact) <= tolerance * abs(exact), (objective, impl)
            own = [grads[0], *(shard(g, sizes) for g in grads[1:])]
            assert_gradients([x.grad.cpu().double() for x in (h, w, b)], own, tolerance)


def check_sequences_on_devices():
    sizes = T_SIZES[dist.get_world_size()]
    for objective in OBJECTIVES:
        exact, grads, (tensors, targets, retain_mask, ref_logps) = exact_gradients("hwb", objective, **HEAD)
        parts = (shard(tensors[0], sizes, 1), *tensors[1:])
        for dtype, impl, tolerance in _ways():
            h, w, b = (on_device(x).to(dtype).requires_grad_() for x in parts)
            out = linear_unlearn_loss(
                h, w, on_device(shard(targets, sizes, 1)), objective, retain_mask=on_device(retain_mask),
                ref_logps=on_device(ref_logps), bias=b, chunk_tokens=12, impl=impl, sequence_group=dist.group.WORLD,
                **COEFS, **HEAD,
            )  # fmt: skip
            (out.loss * UPSTREAM).backward()
            assert abs(out.loss.cpu() - exact) <= tolerance * abs(exact), (objective, impl)
            for gradient in (w.grad, b.grad):
                dist.all_reduce(gradient)
            own = [shard(grads[0], sizes, 1), *grads[1:]]
            assert_gradients([x.grad.cpu().double() for x in (h, w, b)], own, tolerance)


def _ways():
    # Triton's kernels have no float64
    yield torch.float64, "torch", 1e-10
    if own_device().type == "cuda":
        yield torch.float32, "triton", 1e-4


CHECKS = [check_vocabulary_on_devices, check_sequences_on_devices]


@pytest.mark.slow
def test_on_the_devices_there_are(tmp_path):
    outcomes = run_on_ranks(WORLD, CHECKS, tmp_path, backend=backend_for(WORLD))
    assert outcomes == {check.__name__: PASSED for check in CHECKS}, outcomes
