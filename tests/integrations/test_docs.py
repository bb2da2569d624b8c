"""Every Python block of README.md and docs/: those of a page run in order, in one namespace, on tiny models."""

import functools
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from test_huggingface import fresh_accelerate

import simnpo

__all__ = ["fresh_accelerate"]  # a fixture of every test here too

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# what a page may need beside this package -> the words of its blocks that show it
OPTIONAL = {"bitsandbytes": "load_in_4bit", "trl": "from trl", "datasets": "from datasets"}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with data in which every name of a model means a tiny one."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("forget", 6), ("retain", 9)):
        rows = ({"question": f"Who is {name} {i}?", "answer": "It is " + "x" * i + "."} for i in range(count))
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    make_model(hidden_size=64).save_pretrained("tiny")
    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: load("tiny", **options)
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: make_tokenizer())
    if importlib.util.find_spec("trl") is not None:
        import trl

        # its default is bfloat16 on a GPU
        monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, use_cpu=True))
    # the classes of open-unlearning, which cannot be installed
    for name in ("trainer", "trainer.unlearn", "trainer.unlearn.npo", "trainer.unlearn.simnpo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for method in ("NPO", "SimNPO"):
        setattr(sys.modules[f"trainer.unlearn.{method.lower()}"], method, type(method, (), {}))


def names() -> dict:
    """What the README's blocks take for granted."""
    input_ids = torch.randint(0, 250, (4, 9))
    labels = input_ids.clone()
    return {
        "simnpo": simnpo,
        "torch": torch,
        "model": make_model(),
        "tokenizer": make_tokenizer(),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "targets": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100),
        "retain_mask": torch.tensor([False, False, True, True]),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, workplace):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    namespace = names() if page.name == "README.md" else {}
    for number, block in enumerate(blocks, start=1):
        missing = [name for name, sign in OPTIONAL.items() if sign in block and importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"block {number} needs {missing[0]}, which is not installed")
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


def test_the_pages_have_blocks():
    assert {page.name for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))} >= {
        "README.md", "accelerate.md", "huggingface.md", "open-unlearning.md", "peft.md", "pytorch.md", "trl.md",
    }  # fmt: skip
