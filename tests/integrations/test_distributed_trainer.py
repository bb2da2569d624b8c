import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_ranks
from test_huggingface import fresh_accelerate

__all__ = ["fresh_accelerate"]  # a fixture of every test here too
SCRIPT = Path(two_ranks.__file__)


def launch(folder: Path, objective: str, accumulation: int) -> None:
    # with --cpu it would start processes by MPI; these do not look for the GPUs, for their arguments say use_cpu
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    with socket.socket() as free:  # older Accelerate takes port 0 as it is
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, f"--main_process_port={port}"]
    path = os.pathsep.join(map(str, [SCRIPT.parents[2], SCRIPT.parents[1], SCRIPT.parent]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    command += [str(SCRIPT), str(folder), objective, str(accumulation)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("objective", two_ranks.OBJECTIVES)
def test_two_ranks_take_the_steps_of_one(tmp_path, objective):
    """Two ranks with a micro-batch each see the rows that one rank sees in two; 11 rows of evaluation are uneven."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    two_ranks.run(tmp_path / "one", objective, accumulation=2)
    launch(tmp_path / "two", objective, accumulation=1)
    one, two = (torch.load(tmp_path / name / "found.pt", weights_only=False) for name in ("one", "two"))
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for name, parameter in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], parameter, rtol=1e-4, atol=1e-5, msg=name)
    for ours, theirs in zip(one["log"], two["log"], strict=True):
        for name in {"loss", "forget_loss", "retain_loss", "grad_norm"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    measured = {name for name in one["evaluation"] if name.endswith(("nll", "probability", "loss"))}
    assert len(measured) == (4 if objective == "npo" else 5)
    for name in measured:
        assert one["evaluation"][name] == pytest.approx(two["evaluation"][name], rel=1e-4), name
    if objective == "npo":
        references = [json.loads((tmp_path / run / "run" / "reference.json").read_text()) for run in ("one", "two")]
        assert len(references[0]) == 8
        assert references[0] == pytest.approx(references[1], rel=1e-5)
