"""Many steps take no more memory than few, and a run that is killed again and again loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer
from test_resume import outcome

STEPS, KILLS = 2000, 20


@pytest.fixture
def options(forget_file, retain_file, tmp_path):
    """A run of a model of one layer: thousands of its steps are half a minute."""
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return {
        "model": str(tmp_path / "model"), "forget": str(forget_file), "retain": str(retain_file), "batch_size": 2,
        "learning_rate": 1e-3, "eval_examples": 0, "cpu": True, "output": str(tmp_path / "run"),
    }  # fmt: skip


def run(code: str, *arguments: str) -> str:
    """`code` in a process of its own, with one thread: the steps are too small for two."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout


STEADY = """
import json, sys
from pathlib import Path
from simnpo.config import UnlearnConfig
from simnpo.training import loop

def resident_mib() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 2**10

take, seen = loop.metrics_row, []
def metrics_row(run, step, *rest):
    if step % 200 == 0:
        seen.append(resident_mib())
    return take(run, step, *rest)

loop.metrics_row = metrics_row
loop.unlearn(UnlearnConfig(**json.loads(sys.argv[1])))
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_memory_does_not_grow_with_the_steps(options):
    seen = json.loads(run(STEADY, json.dumps(options | {"max_steps": STEPS, "save_steps": 500})).splitlines()[-1])
    assert len(seen) == STEPS // 200
    # the first half has the first checkpoint and the middle of weights.jsonl; after it the hidden states of a step,
    # four sequences of forty tokens, would add 20 MiB
    assert max(seen) - seen[STEPS // 400] < 4.0, seen


# kills children that run or resume, at random moments, until it was often enough; after a run that is over, another
KILLED = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from simnpo.config import UnlearnConfig
from simnpo.report import plots
from simnpo.training.loop import unlearn

# the parent's pool of threads is no child's: transformers must not load weights in threads there
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
# drawn in memory, longer than a step takes
plots.Figure.savefig = lambda self, png, **_: png.write(b"a picture")
options, kills, folder = json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
# here first: the children find everything imported, and are killed in the run and not before it
unlearn(UnlearnConfig(**options, output=str(folder / "whole")))
moments, done, runs = random.Random(0), 0, 0
while done < kills or not (folder / str(runs) / "complete.json").exists():
    if (folder / str(runs) / "complete.json").exists():
        runs += 1
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        unlearn(UnlearnConfig(**options, resume=True, output=str(folder / str(runs))))
        os._exit(0)
    if done < kills:
        time.sleep(moments.uniform(0.0, 0.5))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    done += os.WIFSIGNALED(status)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
"""


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(options, tmp_path):
    options |= {"max_steps": 100, "save_steps": 3}
    del options["output"]
    run(KILLED, json.dumps(options), str(KILLS), str(tmp_path / "killed"))
    whole = outcome(tmp_path / "killed" / "whole")
    assert len(whole["metrics"]) == 100
    for output in (tmp_path / "killed").iterdir():
        assert outcome(output) == whole, output.name
