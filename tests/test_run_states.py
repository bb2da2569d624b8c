"""Start, kill, signal, report, resume, edit, a second process, in any order: status 0 means a complete model.

A few sequences run with all tests; SIMNPO_FAULTS=full (`make test-faults`) runs hundreds.
"""

import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_fault_matrix import contents, untimed
from test_resume import config  # noqa: F401

from simnpo.cli import main
from simnpo.training.run_folder import LOCK

FULL = os.environ.get("SIMNPO_FAULTS") == "full"
SIZES = {"max_examples": 80, "stateful_step_count": 12} if FULL else {"max_examples": 4, "stateful_step_count": 6}
WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PLACES = ("", "checkpoints", "checkpoints/step-00000001", "checkpoints/step-00000002", "model", "plots")


def in_a_child(arguments: list[str], output: Path, number: int = 0, event: int = 0) -> int:
    """Runs the command in a child, which gets a signal at the `event`-th file of its folder that it touches.

    Returns:
        its exit status, negative where the signal killed it.
    """
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = 0

    def audit(name, args):
        nonlocal seen
        if name in WATCHED and args and str(output) in str(args[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), number)

    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 99  # a traceback
    try:
        sys.addaudithook(audit)
        status = main(arguments)
    finally:
        os._exit(status)


@pytest.fixture(scope="module")
def options(model_dir, forget_file, retain_file):
    given = {"model": model_dir, "forget": forget_file, "retain": retain_file, "max_steps": 2, "batch_size": 2}
    given |= {"save_steps": 1, "learning_rate": 1e-3, "eval_examples": 1, "weight_examples": 2, "method": "npo"}
    return ["unlearn", "--cpu", *(f"--{name}={value}" for name, value in given.items())]


@pytest.fixture(scope="module")
def clean(options, tmp_path_factory):
    output = tmp_path_factory.mktemp("clean") / "run"
    assert main([*options, f"--output={output}"]) == 0
    return untimed(output)


@pytest.mark.slow
def test_any_sequence_of_events(options, clean, monkeypatch, capfd):
    # the parent's pool of threads is no child's: transformers must not load weights in threads there
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")

    taken = []  # exit statuses

    class Events(RuleBasedStateMachine):
        @initialize()
        def begin(self):
            self.folder = Path(tempfile.mkdtemp())
            self.output, self.mine, self.names = self.folder / "run", {}, 0

        def take(self, *more: str, number: int = 0, event: int = 0) -> int:
            taken.append(in_a_child([*options, f"--output={self.output}", *more], self.output, number, event))
            return taken[-1]

        def tree(self) -> dict[str, bytes]:
            # but for the lock and the half-written files of a process that was killed, which are nobody's
            found = contents(self.output) if self.output.exists() else {}
            return {name: data for name, data in found.items() if ".simnpo-" not in name}

        def log(self) -> str:
            return self.output.with_suffix(".log").read_text()[-3000:]

        def check(self, status: int, allowed: tuple[int, ...]) -> None:
            assert status in allowed, f"status {status}: {self.log()}"
            if status == 0:
                assert untimed(self.output).items() >= clean.items()

        @rule()
        def start(self):
            before = self.tree()
            status = self.take()
            self.check(status, (0, 2))
            assert (status == 2) == bool(before)
            assert status == 0 or self.tree() == before

        @rule()
        def resume(self):
            # what stands in the way of a folder that must be replaced is named, and stays
            self.check(self.take("--resume"), (0, 1, 2) if self.mine else (0,))

        @rule(event=st.integers(1, 160), number=st.sampled_from(SIGNALS))
        def resume_and_die(self, event, number):
            status = self.take("--resume", number=number, event=event)
            refusals = (1, 2) if self.mine else ()
            self.check(status, (0, -number, 128 + number, *refusals))

        @precondition(lambda self: self.tree())
        @rule()
        def report(self):
            before = self.tree()
            self.check_report(in_a_child(["report", str(self.output)], self.output), before)

        def check_report(self, status: int, before: dict[str, bytes]) -> None:
            assert status in (0, 2), self.log()
            after = self.tree()
            changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
            assert all(name.startswith(("report.html", "plots/")) for name in changed), changed

        @precondition(lambda self: self.tree())
        @rule()
        def other_settings(self):
            before = self.tree()
            assert self.take("--resume", "--beta=0.3") == 2, self.log()
            assert self.tree() == before

        @precondition(lambda self: self.tree())
        @rule(place=st.sampled_from(PLACES))
        def edit(self, place):
            if (self.output / place).is_dir():
                self.names += 1
                path = self.output / place / f"mine-{self.names}.txt"
                path.write_text(path.name)
                self.mine[path] = path.name

        @precondition(lambda self: self.output.exists())
        @rule()
        def second_process(self):
            with (self.output / LOCK).open("w") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                before = self.tree()
                for more in ((), ("--resume",)):
                    assert self.take(*more) == 2, self.log()
                assert self.tree() == before
            (self.output / LOCK).unlink()

        @invariant()
        def files_of_others_are_as_they_were(self):
            if hasattr(self, "mine"):
                assert {path: path.read_text() for path in self.mine} == self.mine

        def teardown(self):
            for path in self.mine:
                path.unlink()
            self.mine = {}
            self.check(self.take("--resume"), (0,))
            shutil.rmtree(self.folder)

    run_state_machine_as_test(
        Events,
        settings=settings(
            **SIZES, deadline=None, derandomize=not FULL, database=None, suppress_health_check=list(HealthCheck)
        ),
    )
    if FULL:
        with capfd.disabled():
            print(f"\nrun states: {len(taken)} runs, ended with {Counter(taken)}", flush=True)
