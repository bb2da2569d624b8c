"""No code is fetched from the Hugging Face hub that nobody asked for, with the package `kernels` installed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from transformers import GPTJConfig, GPTJForCausalLM

from simnpo import hub_code
from simnpo.errors import UserError
from simnpo.hub_code import refuse_unasked

# a package that looks like the real one, and says when it is asked for something
KERNELS = """
import sys

def get_kernel(*args, **options):
    print("FETCHED", args, file=sys.stderr)
    raise FileNotFoundError("no such kernel")

def mark(*args, **options):
    return lambda function: function

use_kernel_forward_from_hub = use_kernel_func_from_hub = use_kernelized_func = mark
replace_kernel_forward_from_hub = register_kernel_mapping = kernelize = use_kernel_mapping = get_kernel

class Any:
    def __init__(self, *args, **options):
        pass
    def load(self):
        get_kernel("a layer")

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Any
"""
OFFLINE = """
import socket, sys

connect = socket.socket.connect
def refuse(self, address):
    if isinstance(address, tuple):
        print("CONNECTS", address, file=sys.stderr)
        raise OSError("no network")
    return connect(self, address)
socket.socket.connect = refuse
"""


def run(tmp_path: Path, code: str) -> subprocess.CompletedProcess:
    """Runs `code` in a process that has a package `kernels`, and no network."""
    version = getattr(transformers.utils.import_utils, "KERNELS_MIN_VERSION", "0.10.0")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(f'__version__ = "{version}"\n{KERNELS}')
    (tmp_path / f"kernels-{version}.dist-info").mkdir()
    about = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    (tmp_path / f"kernels-{version}.dist-info" / "METADATA").write_text(about)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", OFFLINE + code],
        env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip


def test_a_run_asks_for_nothing_and_says_nothing_of_kernels(model_dir, forget_file, tmp_path):
    options = ["unlearn", "--model", str(model_dir), "--forget", str(forget_file), "--output", str(tmp_path / "run")]
    options += ["--max-steps", "1", "--batch-size", "2", "--cpu", "--eval-examples", "1"]
    check = "import transformers; assert transformers.utils.is_kernels_available()\n"
    done = run(tmp_path, f"{check}from simnpo.cli import main\nsys.exit(main({options!r}))")
    assert done.returncode == 0, done.stderr
    said = (done.stdout + done.stderr).lower()
    for word in ("fetched", "connects", "kernel", "huggingface.co", "traceback"):
        assert word not in said


def test_models_that_look_for_kernels_by_themselves(tmp_path):
    config = GPTJConfig(
        vocab_size=260, n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=4, bos_token_id=1, eos_token_id=2
    )
    GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
    code = f"""
import torch
from simnpo.loading import load_weights
from transformers.integrations import hub_kernels
load_weights({str(tmp_path / "gptj")!r}, dtype=torch.float32)
for name in getattr(hub_kernels, "_HUB_KERNEL_MAPPING", []):
    assert hub_kernels.lazy_load_kernel(name) is None
try:
    load_weights({str(tmp_path / "gptj")!r}, dtype=torch.float32, attention="flash_attention_2")
except ValueError as error:
    print(error)
"""
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert "FETCHED" not in done.stderr
    assert "CONNECTS" not in done.stderr
    assert "kernel" not in done.stderr.lower()
    assert "attention: flash_attention_2 needs a package of that name" in done.stdout


def test_what_the_user_names_is_fetched(model_dir, tmp_path):
    code = f"""
import torch
from simnpo.loading import load_weights
load_weights({str(model_dir)!r}, dtype=torch.float32, attention="kernels-community/some-attention")
"""
    done = run(tmp_path, code)
    assert "FETCHED ('kernels-community/some-attention'" in done.stderr
    assert "UserError: model: cannot load" in done.stderr


def test_only_the_named_repository(monkeypatch):
    monkeypatch.setattr(hub_code, "_asked", set())
    fetched = []
    module = SimpleNamespace(__name__="none", get_kernel=lambda name, **options: fetched.append(name))
    hub_code._guard(module)
    hub_code._guard(module)
    with pytest.raises(FileNotFoundError, match="kernels-community/a is code on the Hugging Face hub"):
        module.get_kernel("kernels-community/a")
    refuse_unasked("paged|kernels-community/a@main:forward")
    module.get_kernel("kernels-community/a", revision="main")
    assert fetched == ["kernels-community/a"]


def test_flash_attention_that_is_not_installed():
    with pytest.raises(UserError, match="attention: flash_attention_9 needs a package of that name"):
        refuse_unasked("flash_attention_9")
    refuse_unasked("sdpa")
