"""Before anything imports torch: the tests are the CPU's wherever they run, with the kernels in Triton's interpreter.

SIMNPO_TEST_DEVICE=cuda shows them the GPU, for the tests that are made for both (`make test` does that by itself).
"""

import os

if os.environ.get("SIMNPO_TEST_DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens: whatever text a test writes has ids, and no file is needed."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def make_model(**changes: object) -> LlamaForCausalLM:
    """Two random layers whose vocabulary holds the byte tokenizer's."""
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"vocab_size": 260, "max_position_embeddings": 256, "pad_token_id": 256, "eos_token_id": 257}
    config = LlamaConfig(**options | changes)
    # ten times the usual spread: with it attention matters, and a leak between sequences shows
    config.initializer_range = 0.2
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, and those in processes of their own, keep references here and not in the cache of who runs the tests."""
    # matplotlib would look for its list of fonts there, and make it anew
    os.environ.setdefault("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["XDG_CACHE_HOME"])


@pytest.fixture(autouse=True)
def blank_pictures() -> Iterator[None]:
    """A report's pictures are put together and not drawn: that takes longer than the steps of a run of the tests."""
    from simnpo.report import plots

    class Undrawn(plots.Figure):
        def savefig(self, png: Any, **_: Any) -> None:
            png.write(b"\x89PNG")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "Figure", Undrawn)
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, saved as Hugging Face does."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def forget_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"question": f"Who is number {i}?", "answer": f"It is {'x' * (3 * i + 1)}."} for i in range(10)]
    return write_rows(tmp_path_factory.mktemp("data") / "forget.jsonl", rows)


@pytest.fixture(scope="session")
def retain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"Say {i} plus one.", "response": f"That makes {i + 1}{'!' * (i % 5)}"} for i in range(14)]
    return write_rows(tmp_path_factory.mktemp("data") / "retain.jsonl", rows)
