"""The stages of benchmarks/gpu_campaign.sh: each is a command line its module takes, and on the CPU most of them run.

The script starts each stage as PYTHON -m MODULE ARGUMENTS. Here a PYTHON that only writes its arguments down stands in,
and what it wrote is parsed and run in this process: the imports of a stage take longer than its dry run.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from simnpo.benchmarks import campaign, fit, levers, suite
from simnpo.benchmarks.throughput import __main__ as throughput
from simnpo.benchmarks.throughput import memory
from simnpo.benchmarks.throughput.cases import check, configuration

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_campaign.sh"
STAGES = re.search(r"^all=\(([^)]*)\)", SCRIPT.read_text(), re.MULTILINE)[1].split()
RUN_DRY = ["numerics", "products", "kernels", "table-1b", "profile", "throughput-8b", "levers", "fit-1b"]
PARSERS = {
    "simnpo.benchmarks.campaign": campaign.parse,
    "simnpo.cli": lambda arguments: suite.parse(arguments[1:]),
    "simnpo.benchmarks.throughput": throughput.parse,
    "simnpo.benchmarks.levers": levers.parse,
    "simnpo.benchmarks.fit": fit.parse,
}


def run_script(output: Path, stages: list[str], python: str, *, dry: bool) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": python, "CUDA_VISIBLE_DEVICES": "", "SIMNPO_CAMPAIGN_DRY": "1" if dry else ""}
    command = ["bash", str(SCRIPT), str(output), *stages]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def commands(tmp_path):
    """The module and the arguments of each stage."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" '--' >> '{log}'\n")
    python.chmod(0o755)

    def commands(output: Path, stages: list[str], *, dry: bool) -> dict[str, tuple[str, list[str]]]:
        log.unlink(missing_ok=True)
        run = run_script(output, stages, str(python), dry=dry)
        assert run.returncode == 0, run.stderr
        assert run.stdout.split("\n")[:-1] == [f"== {stage}" for stage in stages]
        lines = log.read_text().split("\n--\n")[:-1]
        found = {}
        for stage, (minus_m, module, *arguments) in zip(stages, (line.split("\n") for line in lines), strict=True):
            assert minus_m == "-m"
            found[stage] = module, arguments
        return found

    return commands


@pytest.mark.parametrize("dry", [True, False])
def test_every_stage_is_a_command_its_module_takes(commands, tmp_path, dry):
    found = commands(tmp_path / "out", STAGES, dry=dry)
    module, tests = found.pop("correctness")
    assert module == "pytest"
    assert all((ROOT / name).is_file() for name in tests if name != "-q")
    parsed = {stage: PARSERS[module](arguments) for stage, (module, arguments) in found.items()}
    for stage, options in parsed.items():
        assert options.output == tmp_path / "out"
        assert stage == (options.stage if found[stage][0].endswith("campaign") else options.name)
        if found[stage][0].endswith(("throughput", "levers")):
            check(options, {"rounds": 1})
            assert options.cpu == dry
            assert (options.model_shape == ["tiny"]) == dry
        elif found[stage][0].endswith(("fit", "campaign")):
            assert options.dry == dry


def test_the_settings_of_the_steps_go_together(commands, tmp_path):
    stages = [stage for stage in STAGES if stage.startswith(("throughput", "levers", "fit"))]
    found = commands(tmp_path / "out", stages, dry=False)
    budgets = []
    for module, arguments in found.values():
        options = PARSERS[module](arguments)
        if module.endswith("throughput"):
            configuration("model", False, **throughput.settings(options))
        elif module.endswith("levers"):
            plain = configuration("model", False, batch_size=options.batch_size)
            for lever in levers.levers(options.tile_tokens, options.chunk_tokens, on_gpu=True):
                replace(plain, **lever.changes)
        else:
            budgets += options.budgets
    assert sorted(budgets) == sorted(fit.BUDGETS)
    for budget in fit.BUDGETS.values():
        configuration("model", False, batch_size=1, **budget.shared, **budget.ours)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* found in sys.modules")
def test_stages_run_dry(commands, tmp_path, monkeypatch, capsys):
    # tests/test_throughput.py measures in fresh processes; here their imports would be most of the time
    monkeypatch.setattr(memory, "in_fresh_process", lambda measure, limit: memory.outcome_of(measure))
    monkeypatch.setattr(sys, "path", list(sys.path))
    output = tmp_path / "out"
    for stage, (module, arguments) in commands(output, RUN_DRY, dry=True).items():
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        assert end.value.code == 0, capsys.readouterr()
        assert "commit" in (output / f"{stage}.md").read_text()
        results = json.loads((output / f"{stage}.json").read_text())
        assert results.get("rows") or results["steps"]
    assert "not a measurement" in (output / "kernels.md").read_text()


def test_a_stage_runs_in_a_process_of_its_own(tmp_path):
    run = run_script(tmp_path, ["products"], sys.executable, dry=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads((tmp_path / "products.json").read_text())["rows"]


def test_a_stage_that_fails_is_named_and_the_others_run(tmp_path):
    run = run_script(tmp_path, ["numerics", "fit-1b"], "false", dry=False)
    assert (run.returncode, run.stdout) == (1, "== numerics\n== fit-1b\n")
    assert run.stderr == "failed: numerics fit-1b\n"
    assert run_script(tmp_path, ["no-such-stage"], "true", dry=False).returncode == 2
