"""An attached model under the engines that spread it over processes, and `simnpo unlearn` on two of them."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from ranks import PASSED, run_on_ranks
from test_attached_model import RETAIN, make, make_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from simnpo import SimNPO, attach, linear_unlearn_loss

OBJECTIVE = SimNPO(beta=1.7, gamma=0.4)
TOLERANCE = 1e-6  # float64, relative to the largest entry


def alone(family, trained=lambda name: True):
    """Model, loss and gradients of one process that has the whole batch."""
    model = attach(make(family))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    loss = model(**make_batch(), objective=OBJECTIVE, retain_mask=RETAIN, retain_coef=1.3).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return model, loss.detach(), gradients


def step(engine, backward=torch.Tensor.backward):
    """This rank's share of the batch through the engine, as its gradients are averaged; the loss of all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    batch = make_batch()
    counted = batch["labels"][RETAIN][:, 1:] != -100
    out = engine(
        **{name: tensor[rank::world] for name, tensor in batch.items()}, objective=OBJECTIVE,
        retain_mask=RETAIN[rank::world], retain_coef=1.3, num_forget=2, num_retain_tokens=int(counted.sum()),
    )  # fmt: skip
    backward(out.loss * world)
    loss = out.loss.detach()
    dist.all_reduce(loss)
    return loss


def assert_same(loss, model, exact_loss, exact):
    torch.testing.assert_close(loss, exact_loss, rtol=TOLERANCE, atol=0)
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == exact.keys()
    for name, gradient in exact.items():
        mine = ours[name].full_tensor() if isinstance(ours[name], DTensor) else ours[name]
        scale = gradient.abs().max().item()
        torch.testing.assert_close(mine, gradient, rtol=0, atol=TOLERANCE * scale, msg=lambda m, n=name: f"{n} {m}")


TRAINED = {
    "everything": lambda name: True,
    "all but the head": lambda name: "lm_head" not in name and "embed" not in name,
}


def check_ddp():
    for family in ("llama", "llama tied"):
        for trained in TRAINED.values():
            model, *exact = alone(family, trained)
            assert_same(step(DistributedDataParallel(model)), model, *exact)


def check_fsdp2():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for family in ("llama", "llama tied"):
        for trained in TRAINED.values():
            for shards_head in (False, True):
                model, *exact = alone(family, trained)
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                if shards_head and family == "llama":
                    fully_shard(model.lm_head, mesh=mesh)
                fully_shard(model, mesh=mesh)
                assert_same(step(model), model, *exact)


def check_tensor_parallel():
    """transformers' own: the body's layers and the head sharded, every rank with the whole batch."""
    distributed = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    for family in ("llama", "llama tied"):
        _, loss, exact = alone(family)
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            make(family).save_pretrained(folder[0])
        dist.barrier()
        model = AutoModelForCausalLM.from_pretrained(folder[0], distributed_config=distributed, dtype=torch.float64)
        assert isinstance(model.lm_head.weight, DTensor)
        attach(model)
        for shift in (False, True):
            model.zero_grad()
            batch = make_batch()
            if shift:
                labels = batch.pop("labels")
                batch["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            out = model(**batch, objective=OBJECTIVE, retain_mask=RETAIN, retain_coef=1.3)
            out.loss.backward()
            assert_same(out.loss.detach(), model, loss, exact)
        expected = make(family)(input_ids=batch["input_ids"]).logits
        torch.testing.assert_close(model(input_ids=batch["input_ids"]).logits, expected, rtol=0, atol=1e-4)


def check_context_parallel():
    """Sequences cut over the ranks. No slice attends to another here: how the body does that is the body's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, batch = attach(make("llama")), make_batch()
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    ids = [part[rank] for part in (batch["input_ids"].tensor_split(world, 1), targets.tensor_split(world, 1))]
    options = {"objective": OBJECTIVE, "retain_mask": RETAIN, "retain_coef": 1.3}
    out = model(input_ids=ids[0], shift_labels=ids[1], sequence_group=dist.group.WORLD, **options)
    out.loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    for gradient in ours.values():
        dist.all_reduce(gradient)
    model = make("llama")
    hidden = [model.model(input_ids=part).last_hidden_state for part in batch["input_ids"].tensor_split(world, 1)]
    exact = linear_unlearn_loss(
        torch.cat(hidden, 1), model.lm_head.weight, targets, OBJECTIVE, retain_mask=RETAIN, retain_coef=1.3
    )
    exact.loss.backward()
    torch.testing.assert_close(out.loss, exact.loss)
    torch.testing.assert_close(out.logps, exact.logps)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=lambda m, n=name: f"{n} {m}")
    with pytest.raises(ValueError, match=r"sequence_group needs shift_labels: the label of a slice's last token"):
        attach(model)(input_ids=ids[0], labels=ids[0], sequence_group=dist.group.WORLD, **options)


def check_a_head_that_fsdp_has_sharded_is_not_used_outside():
    rank = dist.get_rank()
    model = make("llama")
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    hidden, targets = torch.randn(1, 3, 32, dtype=torch.float64), torch.tensor([[1, 2, 3 + rank]])
    with pytest.raises(ValueError, match=r"A head that FSDP has sharded .*simnpo\.attach"):
        linear_unlearn_loss(hidden, model.lm_head.weight, targets, SimNPO())


def check_zero3():
    """DeepSpeed ZeRO-3, in the float32 it computes in on a CPU: against float32 on one process."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    for family in ("llama", "llama tied"):
        model, exact_loss, exact = alone(family)
        model = model.float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
        assert model.lm_head.weight.numel() == 0
        hidden, targets = torch.randn(1, 3, 32), torch.tensor([[1, 2, 3]])
        with pytest.raises(
            ValueError, match=r"lm_head_weight is empty, \(0,\): DeepSpeed ZeRO-3 .*simnpo\.attach\(model\)"
        ):
            linear_unlearn_loss(hidden, model.lm_head.weight, targets, SimNPO())
        with deepspeed.zero.GatheredParameters([model.lm_head.weight]):
            linear_unlearn_loss(hidden, model.lm_head.weight, targets, SimNPO())
        loss = step(engine, backward=engine.backward)
        torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)
        for name, parameter in model.named_parameters():
            gradient, scale = safe_get_full_grad(parameter).double(), exact[name].abs().max().item()
            torch.testing.assert_close(
                gradient, exact[name], rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n} {m}"
            )


CHECKS = [
    check_ddp,
    check_fsdp2,
    check_tensor_parallel,
    check_context_parallel,
    check_context_parallel,
    check_a_head_that_fsdp_has_sharded_is_not_used_outside,
]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"{world}")
def outcomes(request, tmp_path_factory):
    return run_on_ranks(request.param, CHECKS, tmp_path_factory.mktemp(f"world{request.param}"))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_attached_model_on_several_processes(outcomes, check):
    assert outcomes[check.__name__] == PASSED, outcomes[check.__name__]


@pytest.mark.slow
def test_attached_model_under_zero3(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed ZeRO-3 is tested where deepspeed is installed")
    assert run_on_ranks(2, [check_zero3], tmp_path) == {"check_zero3": PASSED}
