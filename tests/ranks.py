"""Checks that run on several processes: started once for all of them, as that costs more than a check."""

import json
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState

Check = Callable[[], None]
PASSED = "passed"


def backend_for(world: int) -> str:
    """NCCL where every rank has a GPU of its own."""
    return "nccl" if torch.cuda.device_count() >= world else "gloo"


def own_device() -> torch.device:
    """Where this rank's collectives take their tensors."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def run_on_ranks(world: int, checks: Sequence[Check], folder: Path, *, backend: str = "gloo") -> dict[str, str]:
    """Runs the checks, in order, on `world` processes.

    Returns:
        by name of the check: PASSED, or what went wrong on the ranks where it did. After a failure the ranks are no
        longer in step, and the checks that follow are "not reached".
    """
    # a fork has everything imported, which takes a fresh process longer than the checks; CUDA does not survive one
    method = "spawn" if torch.cuda.is_available() else "fork"
    mp.start_processes(_rank, (world, list(checks), folder, backend), nprocs=world, start_method=method)
    ranks = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
    outcomes = {}
    for check in checks:
        found = [rank.get(check.__name__, "not reached") for rank in ranks]
        wrong = [f"rank {i}: {what}" for i, what in enumerate(found) if what != PASSED]
        outcomes[check.__name__] = "\n".join(wrong) or PASSED
    return outcomes


def _rank(rank: int, world: int, checks: list[Check], folder: Path, backend: str) -> None:
    # a fork has no use of its parent's pool of threads: transformers must not load weights in threads there
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    torch.set_num_threads(1)
    # what a run of an earlier test has found out about the machine: one process
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options = {"init_method": f"file://{folder}/meeting-point", "timeout": timedelta(seconds=60)}
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=world, **options)
    outcomes = {}
    for check in checks:
        try:
            check()
            outcomes[check.__name__] = PASSED
        except BaseException:
            outcomes[check.__name__] = traceback.format_exc()
            break
    (folder / f"{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    if len(outcomes) == len(checks) and outcomes[checks[-1].__name__] == PASSED:
        dist.destroy_process_group()


def shard(tensor: torch.Tensor, sizes: Sequence[int], dim: int = 0, rank: int | None = None) -> torch.Tensor:
    """This rank's part of a tensor cut into parts of these sizes."""
    return tensor.split(list(sizes), dim)[dist.get_rank() if rank is None else rank]
