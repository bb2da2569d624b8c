"""What `pip install .` and `python -m build` make of the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import simnpo

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree"),
]
IMPORTS = """
import importlib.metadata, pathlib, sys
sys.modules.update(dict.fromkeys({blocked!r}))
import simnpo, simnpo.cli, torch
from simnpo import SimNPO, attach, linear_logps, linear_unlearn_loss
import simnpo.kernels.row_pass, simnpo.benchmarks.suite, simnpo.demo
from simnpo.demo import __file__ as demo
for file in (simnpo.__file__, simnpo.kernels.row_pass.__file__, demo):
    assert pathlib.Path(file).is_relative_to({target!r}), file
h, w = torch.randn(1, 5, 4, requires_grad=True), torch.randn(7, 4)
linear_unlearn_loss(h, w, torch.arange(5)[None], SimNPO()).loss.backward()
assert h.grad.isfinite().all()
assert importlib.metadata.version("simnpo") == simnpo.__version__ == {version!r}
print("imported")
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source archive, and the wheel built from it, of a copy of the tree; the isolated build needs a network."""
    pytest.importorskip("build", reason="the package `build` makes the archives")
    source = tmp_path_factory.mktemp("source") / "simnpo"
    ignore = shutil.ignore_patterns(".git", ".venv*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), cwd=source)
    return source / "dist"


def test_archives_hold_the_kernels_once(built: Path):
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    files = zipfile.ZipFile(wheel).namelist()
    for path in ("simnpo/kernels/row_pass.py", "simnpo/benchmarks/suite.py", "simnpo/py.typed"):
        assert path in files
    assert "simnpo/demo/forget.jsonl" in files
    assert "simnpo/report/report.html.jinja" in files
    # Hugging Face's package has the name `kernels`, and others have `tests` and `benchmarks`
    assert {path.split("/")[0] for path in files} == {"simnpo", f"simnpo-{simnpo.__version__}.dist-info"}
    with tarfile.open(archive) as tar:
        members = {member.name.split("/", 1)[-1]: member for member in tar.getmembers()}
    assert members["simnpo/kernels/row_pass.py"].isfile()
    assert "tests/test_row_pass.py" in members
    assert "constraints.txt" in members


@pytest.mark.parametrize("blocked", [[], ["triton"]], ids=["with triton", "without triton"])
def test_wheel_imports_from_where_it_is_installed(built: Path, tmp_path: Path, blocked: list[str]):
    target = tmp_path / "site"
    (wheel,) = built.glob("*.whl")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
        cwd=tmp_path,
    )
    # somebody else's `kernels` beside ours stays what it is
    (target / "kernels").mkdir()
    (target / "kernels/__init__.py").write_text("WHOSE = 'theirs'\n")
    code = IMPORTS.format(blocked=blocked, target=str(target), version=simnpo.__version__)
    code += "import kernels; assert kernels.WHOSE == 'theirs'\n"
    assert "imported" in run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))


def test_wheel_from_the_link(tmp_path: Path):
    """`pip wheel .` in a clone, where simnpo/kernels is a link."""
    source = tmp_path / "clone"
    run("git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(source), cwd=tmp_path)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path))
    run(sys.executable, "-m", "pip", "wheel", *options, str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert "simnpo/kernels/row_pass.py" in zipfile.ZipFile(wheel).namelist()
