"""Loads a model and its tokenizer, and refuses a folder that is wrong: no weight is random, none is left out unnoticed.

What a folder holds is checked before transformers builds anything from it, for a size in config.json may ask for more
memory than there is; what transformers made of it is checked after.
"""

import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from simnpo.checkpoint_files import Shapes, check_finite, check_json, check_sizes, is_finite, read_shapes, weight_files
from simnpo.digests import check_written_model
from simnpo.errors import UserError
from simnpo.hub_code import refuse_unasked
from simnpo.model import refusing

# what transformers calls the dtype to load weights in
DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
# buffers that old checkpoints hold and models now compute: causal masks and rotary frequencies
OLD_BUFFERS = re.compile(
    r"(rotary_emb\.inv_freq|\.(attn|attention|self_attention|self_attn)\.(masked_)?bias|position_ids)$"
)


def load_tokenizer(name_or_path: str) -> Any:
    """The model's tokenizer, with a pad token.

    Raises:
        UserError: there is none, it cannot be read or does not work, or it has neither a pad nor an end-of-sequence
            token.
    """
    source, options = _source(name_or_path)
    check_json(Path(name_or_path))
    if (Path(name_or_path) / "config.json").is_file():
        # the kind of tokenizer may depend on it
        read_config(name_or_path)
    with refusing(f"model: cannot load {name_or_path!r}: its tokenizer files"), _rust_panics():
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    what = f"model: the tokenizer of {name_or_path!r}"
    with refusing(f"{what} does not work"), _rust_panics():
        ids = tokenizer("a b")["input_ids"]
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise UserError(f"{what} has neither a pad nor an end-of-sequence token")
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.decode([*ids, tokenizer.pad_token_id], skip_special_tokens=True)
        if not ids or not all(type(i) is int and i >= 0 for i in [*ids, tokenizer.pad_token_id]):
            raise UserError(f"{what} makes of 'a b' the token ids {ids}, padded with {tokenizer.pad_token_id!r}")
    return tokenizer


def load_model(
    name_or_path: str, *, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """`load_weights` and `load_tokenizer`."""
    tokenizer = load_tokenizer(name_or_path)
    return load_weights(name_or_path, dtype=dtype, attention=attention), tokenizer


def load_weights(
    name_or_path: str, *, dtype: torch.dtype, attention: str | None = None, in_4bit_on: torch.device | None = None
) -> PreTrainedModel:
    """Loads a causal language model, every weight of it from its files.

    Args:
        name_or_path: Hugging Face id, folder, or path of a .gguf file.
        dtype: of the weights.
        attention: attention implementation as transformers names it; None is transformers' choice.
        in_4bit_on: put the model there with its linear layers, but the head, in 4 bits (NF4, double quantisation);
            `dtype` is that of everything else and of the arithmetic. None: no quantisation, on the CPU.

    Raises:
        UserError: there is no such model, a file is damaged or belongs to another model, transformers cannot read it,
            a weight is missing, unknown, of another shape or not finite, or bitsandbytes is not installed.
    """
    check_written_model(Path(name_or_path))
    is_gguf = name_or_path.endswith(".gguf")
    if in_4bit_on is not None and is_gguf:
        raise UserError(f"load_in_4bit: {name_or_path} is a GGUF file, which is loaded as it is: give a folder or id")
    refuse_unasked(attention)
    source, options = _source(name_or_path)
    # in another dtype transformers would keep the weights of a GGUF file packed
    options |= {DTYPE: torch.float32 if is_gguf else dtype, "trust_remote_code": False}
    if attention is not None:
        options["attn_implementation"] = attention
    if in_4bit_on is not None:
        options |= {"quantization_config": _nf4(dtype), "device_map": {"": in_4bit_on}}
    if is_gguf and hasattr(transformers, "GgufConfig"):
        # else it looks for a kernel that computes on packed weights, and warns that there is none
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    config = read_config(name_or_path)
    shapes = _check_folder(Path(name_or_path), config, in_4bit=in_4bit_on is not None)
    # what does not fit is reported by `_check_loaded`, in a line of its own
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with refusing(f"model: cannot load {name_or_path!r}"), _without_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
        model, info = loaded
        if is_gguf:
            model = _without_quantization(model, dtype)
        _check_loaded(model, info, name_or_path, shapes)
        _check_end_tokens(model, name_or_path)
    return model.eval()


def read_config(name_or_path: str) -> Any:
    """The configuration of a Hugging Face id, folder, config.json or .gguf file; its weights are not read.

    Raises:
        UserError: there is none, it is an adapter's, transformers cannot read it, or it asks for code from the hub.
    """
    refuse_unasked(None)
    source, options = _source(name_or_path)
    path = Path(name_or_path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"model: {path} holds a PEFT adapter, not a model: merge it into its base model (merge_and_unload, then "
            "save_pretrained) and give that folder"
        )
    check_json(path)
    where = str(path / "config.json") if path.is_dir() else name_or_path
    with refusing(f"model: cannot read the configuration {where!r}"):
        if not options:
            raw, _ = transformers.PretrainedConfig.get_config_dict(source)
            files = weight_files(path) if path.is_dir() else []
            check_sizes(raw, where, sum(len(read_shapes(file)) for file in files) or None)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        text = config.get_text_config()
        attention = [str(getattr(part, "_attn_implementation", None)) for part in (config, text)]
    if any("/" in name for name in attention):
        raise UserError(f"model: {where} asks for code from the hub: attention {max(attention)}")
    return config


def _source(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is given."""
    path = Path(name_or_path)
    if name_or_path.endswith((".gguf", ".json")) and not path.is_file():
        raise UserError(f"model: no such file: {name_or_path}")
    return (str(path.parent), {"gguf_file": path.name}) if name_or_path.endswith(".gguf") else (name_or_path, {})


def _nf4(dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


@contextmanager
def _without_report() -> Iterator[None]:
    """Leaves out transformers' table of weights that do not fit: what it says is an error here."""
    reporting = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    reporting.addFilter(is_other)
    try:
        yield
    finally:
        reporting.removeFilter(is_other)


@contextmanager
def _rust_panics() -> Iterator[None]:
    """Makes an ordinary error of a panic in `tokenizers`, which is raised past `except Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from error


def _check_folder(path: Path, config: Any, *, in_4bit: bool) -> dict[Path, Shapes]:
    """The shapes of all weights in a folder, by file; nothing of a hub id or a .gguf file.

    Raises:
        UserError: it holds a damaged file, or far too few weights for its config.json.
    """
    if not path.is_dir():
        return {}
    shapes = {file: read_shapes(file) for file in weight_files(path)}
    if in_4bit:
        # rounding to 4 bits may turn what is not finite into a number
        for file in shapes:
            check_finite(file)
    if not shapes or getattr(config, "quantization_config", None) is not None:
        return shapes
    stored = sum(shape.numel() for some in shapes.values() for shape in some.values())
    with refusing(f"model: transformers cannot make the model of {path / 'config.json'}"), torch.device("meta"):
        described = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    # a few missing weights have their names told once the others are loaded; far more may not fit into memory
    if described > 2 * stored + 2**20:
        raise UserError(f"model: {path / 'config.json'} describes {described:,} weights, and the files hold {stored:,}")
    return shapes


def _check_loaded(model: Any, info: dict[str, Any], name_or_path: str, shapes: dict[Path, Shapes]) -> None:
    """Raises `UserError` where a weight did not come from the files, or one in them was not used, or is not finite."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"model: {name_or_path!r} is a PEFT adapter, not a model: merge it into its base model first")

    def where(name: str) -> str:
        found = [file for file, some in shapes.items() if name in some]
        return str(found[0] if found else name_or_path)

    kind = type(model).__name__
    for name, stored, expected in info["mismatched_keys"]:
        raise UserError(
            f"model: {where(name)}: {name} has shape {tuple(stored)}, and config.json makes it {tuple(expected)}"
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    unread = set(info["missing_keys"])
    read = {id(parameter) for name, parameter in named.items() if name not in unread}
    missing = sorted(name for name in unread if id(named.get(name)) not in read)
    if missing:
        raise UserError(f"model: {name_or_path} lacks {_some(missing)}, which {kind} needs and would have at random")
    unexpected = sorted(name for name in info["unexpected_keys"] if not OLD_BUFFERS.search(name))
    if unexpected:
        raise UserError(f"model: {where(unexpected[0])} holds {_some(unexpected)}, of which {kind} knows nothing")
    if info.get("error_msgs"):
        raise UserError(f"model: cannot load {name_or_path!r}: {info['error_msgs'][0]}")
    for name, weight in model.state_dict().items():
        if not is_finite(weight):
            raise UserError(f"model: {where(name)}: {name} has weights that are NaN or infinite")


def _check_end_tokens(model: Any, name_or_path: str) -> None:
    """Raises `UserError` where the generation configuration names tokens by something else than numbers."""
    for field in ("eos_token_id", "pad_token_id"):
        ids = getattr(model.generation_config, field, None)
        if ids is not None and not all(type(i) is int for i in (ids if isinstance(ids, list) else [ids])):
            raise UserError(f"model: {field} of {name_or_path!r} must be a token id, or a list of them, got {ids!r}")


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _without_quantization(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a fresh model: one loaded from GGUF carries marks of it that `save_pretrained` trips over."""
    config = model.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    options = {DTYPE: dtype, "attn_implementation": config._attn_implementation}
    fresh = AutoModelForCausalLM.from_config(config, **options)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh
