"""An attached model under the engines that spread it over processes, and `simnpo unlearn` on two of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import make_model, make_tokenizer, write_rows
from ranks import PASSED, run_on_ranks
from safetensors.torch import load_file
from test_attached_model import RETAIN, make, make_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from simnpo import SimNPO, attach, linear_unlearn_loss
from simnpo.config import UnlearnConfig
from simnpo.errors import UserError
from simnpo.training.checkpoint import checkpoints
from simnpo.training.loop import unlearn

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


def as_launched():
    """What a launcher tells its processes."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "localhost"}


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


def check_a_resumed_run():
    """To the same bits, also where more than two numbers are added up, in an order that is the engine's."""
    folder, rank = [tempfile.mkdtemp()], dist.get_rank()
    dist.broadcast_object_list(folder)
    files = {name: Path(folder[0]) / name for name in ("model", "forget.jsonl", "retain.jsonl", "whole", "resumed")}
    if rank == 0:
        make_model().save_pretrained(files["model"])
        make_tokenizer().save_pretrained(files["model"])
        for name in ("forget.jsonl", "retain.jsonl"):
            write_rows(files[name], [{"prompt": f"{name} {i}?", "response": f"{name} {i}" * (i + 1)} for i in range(9)])
    dist.barrier()
    as_launched()
    config = UnlearnConfig(
        model=str(files["model"]), forget=str(files["forget.jsonl"]), retain=str(files["retain.jsonl"]),
        output=str(files["whole"]), max_steps=4, batch_size=6, learning_rate=1e-3, save_steps=1, keep_checkpoints=9,
        eval_examples=3, cpu=True,
    )  # fmt: skip
    unlearn(config)
    if rank == 0:
        done = ("report.html", "complete.json", "model", *(f"checkpoints/step-0000000{step}" for step in (3, 4)))
        shutil.copytree(files["whole"], files["resumed"])
        for name in done:
            remove = shutil.rmtree if (files["resumed"] / name).is_dir() else os.remove
            remove(files["resumed"] / name)
    dist.barrier()
    unlearn(replace(config, output=str(files["resumed"]), resume=True))
    assert outcome(files["resumed"]) == outcome(files["whole"])


def check_a_head_that_fsdp_has_sharded_is_not_used_outside():
    rank = dist.get_rank()
    model = make("llama")
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    hidden, targets = torch.randn(1, 3, 32, dtype=torch.float64), torch.tensor([[1, 2, 3 + rank]])
    with pytest.raises(UserError, match=r"FSDP .* has cut its weights into parts.*simnpo\.attach before"):
        attach(model)
    with pytest.raises(ValueError, match=r"A head that FSDP has sharded .*simnpo\.attach"):
        linear_unlearn_loss(hidden, model.lm_head.weight, targets, SimNPO())


def check_accelerate_fsdp2():
    """What Accelerate makes of a model with FSDP2, which it would not start on a CPU by itself."""
    as_launched()
    accelerator = Accelerator(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    for family in ("llama", "llama tied"):
        model, *exact = alone(family)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        assert isinstance(model, FSDPModule)
        assert_same(step(model, backward=accelerator.backward), model, *exact)
    AcceleratorState._reset_state(reset_partial_state=True)


def check_zero3():
    """Accelerate's DeepSpeed ZeRO-3, in the float32 it computes in on a CPU, on models that are loaded in parts."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    families = ("llama", "llama tied")
    exact, folder = {family: alone(family)[1:] for family in families}, [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        for family in families:
            make(family).save_pretrained(f"{folder[0]}/{family}")
    dist.barrier()
    as_launched()
    os.environ["DS_ACCELERATOR"] = "cpu"
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    for family, (exact_loss, gradients) in exact.items():
        model = AutoModelForCausalLM.from_pretrained(f"{folder[0]}/{family}", dtype=torch.float32)
        hidden, targets = torch.randn(1, 3, 32), torch.tensor([[1, 2, 3]])
        with pytest.raises(ValueError, match=r"lm_head_weight is empty, \(0,\): .*ZeRO-3 .*simnpo\.attach\(model\)"):
            linear_unlearn_loss(hidden, model.lm_head.weight, targets, SimNPO())
        with deepspeed.zero.GatheredParameters([model.lm_head.weight]):
            linear_unlearn_loss(hidden, model.lm_head.weight, targets, SimNPO())
        with pytest.raises(UserError, match=r"ZeRO-3 has cut its weights into parts.*pass verify=False"):
            attach(model)
        attach(model, verify=False)
        engine, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loss = step(engine, backward=engine.backward)
        torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0)
        for name, parameter in model.named_parameters():
            gradient, scale = safe_get_full_grad(parameter).double(), gradients[name].abs().max().item()
            # float32 rounds to 6e-8 of each of the numbers that are added up
            torch.testing.assert_close(
                gradient, gradients[name], rtol=0, atol=5e-6 * scale, msg=lambda m, n=name: f"{n} {m}"
            )


CHECKS = [
    check_ddp,
    check_fsdp2,
    check_accelerate_fsdp2,
    check_tensor_parallel,
    check_context_parallel,
    check_a_head_that_fsdp_has_sharded_is_not_used_outside,
]


ON_FOUR = [check_a_resumed_run]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"{world}")
def outcomes(request, tmp_path_factory):
    checks = CHECKS + (ON_FOUR if request.param == 4 else [])
    return run_on_ranks(request.param, checks, tmp_path_factory.mktemp(f"world{request.param}"))


@pytest.mark.slow
@pytest.mark.parametrize("check", [*CHECKS, *ON_FOUR], ids=lambda check: check.__name__)
def test_on_several_processes(outcomes, check):
    if check.__name__ not in outcomes:
        pytest.skip("runs on 4 processes")
    assert outcomes[check.__name__] == PASSED, outcomes[check.__name__]


@pytest.mark.slow
def test_attached_model_under_zero3(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed ZeRO-3 is tested where deepspeed is installed")
    assert run_on_ranks(2, [check_zero3], tmp_path) == {"check_zero3": PASSED}


# simnpo unlearn


@pytest.fixture(scope="module")
def launch(model_dir, forget_file, retain_file):
    """Starts `simnpo unlearn` on two processes, as a user does; every rank by itself where `cpu` is left out."""

    def start(output, *options, cpu=True):
        arguments = {"model": model_dir, "forget": forget_file, "retain": retain_file, "output": output, **SETTINGS}
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
            *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
            *("--module", "simnpo.cli", "unlearn"),
            *(f"--{name}={value}" for name, value in arguments.items()),
            *(["--cpu"] if cpu else []),
            *options,
        ]
        log = (output.parent / f"{output.name}.log").open("w")
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)

    return start


SETTINGS = {"method": "npo", "max_steps": 12, "batch_size": 5, "retain_batch_size": 3, "learning_rate": 1e-3}
TIMINGS = ("tokens_per_second", "peak_memory_mib", "seconds")
SETTINGS |= {"save_steps": 1, "eval_examples": 5, "precision": "fp32"}


def workers(launcher: int) -> dict[int, int]:
    """Process id of each rank that the launcher has started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        found |= {int(v.removeprefix("RANK=")): int(child) for v in variables if v.startswith("RANK=")}
    return found


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(output: Path) -> dict[str, object]:
    """What has to be the same, bit for bit."""
    rows = read_rows(output / "metrics.jsonl")
    return {
        "weights": (output / "model/model.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows],
        "probes": (output / "weights.jsonl").read_text(),
        "evaluation": (output / "evaluation.json").read_text(),
        "checkpoints": [path.name for path in checkpoints(output / "checkpoints")],
    }


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")
def test_two_ranks_take_the_steps_of_one_and_survive_the_death_of_one(
    launch, tmp_path, model_dir, forget_file, retain_file
):
    both = tmp_path / "both"
    assert launch(both).wait() == 0, (tmp_path / "both.log").read_text()
    assert (tmp_path / "both.log").read_text().count("unlearned model:") == 1

    files = {"model": str(model_dir), "forget": str(forget_file), "retain": str(retain_file)}
    alone = unlearn(UnlearnConfig(**files, **SETTINGS, output=str(tmp_path / "alone"), cpu=True))
    ours, theirs = (load_file(output / "model/model.safetensors") for output in (both, alone))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n} {m}")
    for ours, theirs in zip(*(read_rows(output / "metrics.jsonl") for output in (both, alone)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["tokens"] == theirs["tokens"]
    scores = [json.loads((output / "evaluation.json").read_text()) for output in (both, alone)]
    for when in ("before", "after"):
        for name in ("forget", "retain"):
            ours, theirs = (one[when][name]["examples"] for one in scores)
            assert [one["id"] for one in ours] == [one["id"] for one in theirs]
            assert [one["nll"] for one in ours] == pytest.approx([one["nll"] for one in theirs], rel=1e-4)

    # a signal to one rank ends both after the same step
    stopped = tmp_path / "stopped"
    process = launch(stopped, "--save_steps=0")
    while not (stopped / "metrics.jsonl").exists():
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.005)
    os.kill(workers(process.pid)[1], signal.SIGTERM)
    assert process.wait() != 0
    said = (tmp_path / "stopped.log").read_text()
    assert said.count("stopped by SIGTERM: the same command with --resume continues") == 2, said
    [saved] = checkpoints(stopped / "checkpoints")
    assert saved.name == f"step-{read_rows(stopped / 'metrics.jsonl')[-1]['step']:08d}"
    assert launch(stopped, "--save_steps=0", "--resume").wait() == 0, (tmp_path / "stopped.log").read_text()
    resumed, whole = outcome(stopped), outcome(both)
    assert resumed.pop("checkpoints") == [saved.name, whole.pop("checkpoints")[-1]]
    assert resumed == whole

    killed = tmp_path / "killed"
    process = launch(killed)
    while (
        len(checkpoints(killed / "checkpoints")) == 0 or checkpoints(killed / "checkpoints")[-1].name < "step-00000004"
    ):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    assert process.wait() != 0
    assert not (killed / "report.html").exists()
    assert launch(killed, "--resume").wait() == 0, (tmp_path / "killed.log").read_text()
    assert outcome(killed) == outcome(both)


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, model_dir, forget_file, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    if torch.cuda.is_available():
        pytest.skip("with a GPU accelerate waits for the other process")
    with pytest.raises(UserError, match=r"2 processes were launched and accelerate found no accelerator.*add --cpu"):
        unlearn(UnlearnConfig(model=str(model_dir), forget=str(forget_file), output=str(tmp_path / "run")))


def test_engines_that_shard_the_model_are_refused(monkeypatch, model_dir, forget_file, tmp_path):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match=r"accelerate is set to FSDP.* the whole model on every rank.*simnpo\.attach"):
        unlearn(UnlearnConfig(model=str(model_dir), forget=str(forget_file), output=str(tmp_path / "run"), cpu=True))
