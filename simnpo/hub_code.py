"""Keeps transformers from fetching kernels from the Hugging Face hub that nobody asked for.

With the package `kernels` installed, transformers fetches and runs code from there in these places:

    hub_kernels.lazy_load_kernel    mamba-ssm and causal-conv1d when a Mamba is built (before 5.16), fp8 and MoE layers
    hub_kernels.get_kernel          RWKV on a GPU, gpt-oss (mxfp4), other quantised models, packed GGUF weights
    gguf.kernels                    layers of a model that was loaded from a GGUF file
    is_flash_attn_2_available       asked when GPT-J, GPT-Neo or Falcon are imported, which fetches a kernel to see
    flash_attention_2, 3, 4         kernels-community/flash-attn2 and others, where the package flash-attn is missing
    config.json                     an attention implementation that it names (`simnpo.loading.read_config`)

Without that package the same places warn that a kernel is missing, or stay silent. Layers marked with
`use_kernel_forward_from_hub` stay as they are unless a model is loaded with `use_kernels=True`.
"""

import logging
from typing import Any

import transformers

from simnpo.errors import UserError

# repositories that the user named, as in `--attention kernels-community/flash-attn2`
_asked: set[str] = set()


def refuse_unasked(attention: str | None) -> None:
    """Turns fetching off for the rest of the process, but for the repository that `attention` names, if any.

    Raises:
        UserError: `attention` is a flash attention whose package is not installed.
    """
    if attention is not None and "/" in attention:
        _asked.add(_repository(attention))
    elif attention is not None and attention.startswith("flash_attention_"):
        installed = getattr(transformers.utils, f"is_{attention.replace('attention', 'attn')}_available", None)
        if installed is None or not installed():
            raise UserError(
                f"attention: {attention} needs a package of that name, which is not installed or does not run here: "
                "use sdpa, or name a kernel on the Hugging Face hub, as kernels-community/flash-attn2"
            )
    try:
        from transformers.integrations import hub_kernels
    except ImportError:
        # older transformers fetch nothing
        return
    _guard(hub_kernels)
    _guard_fallback(transformers.utils.import_utils)
    try:
        from transformers.integrations.gguf import kernels as gguf_kernels
    except ImportError:
        return
    gguf_kernels.kernelize_ggml_layers = lambda model: None


def _guard(hub_kernels: Any) -> None:
    """Lets `get_kernel` fetch what was asked for only, and `lazy_load_kernel` look for installed packages instead."""
    fetch = getattr(hub_kernels, "get_kernel", None)
    if fetch is not None and fetch.__name__ != "asked_only":

        def asked_only(kernel_name: str, *args: Any, **options: Any) -> Any:
            if _repository(kernel_name) in _asked:
                return fetch(kernel_name, *args, **options)
            raise FileNotFoundError(f"{kernel_name} is code on the Hugging Face hub, which was not asked for")

        hub_kernels.get_kernel = asked_only
    if getattr(hub_kernels, "_kernels_enabled", False):
        hub_kernels._kernels_enabled = False
        # transformers says of every layer it could have marked that kernels are disabled
        logging.getLogger(hub_kernels.__name__).addFilter(lambda record: "usage is disabled" not in record.getMessage())


def _guard_fallback(import_utils: Any) -> None:
    """Has a missing flash attention count as missing, and not as one that could be fetched, unless it was asked for."""
    name = "is_flash_attn_kernel_fallback_available"
    fetches = getattr(import_utils, name, None)
    if fetches is None or fetches.__name__ == "asked_only":
        return

    def asked_only(fa_version: int) -> bool:
        from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

        return FLASH_ATTN_KERNEL_FALLBACK[f"flash_attention_{fa_version}"] in _asked and fetches(fa_version)

    setattr(import_utils, name, asked_only)


def _repository(name: str) -> str:
    """The repository in "paged|owner/name@revision:function"."""
    return name.split("|")[-1].split(":")[0].split("@")[0].strip()
