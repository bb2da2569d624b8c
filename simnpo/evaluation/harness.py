"""WMDP and MMLU through lm-evaluation-harness, as the papers that report them do (arXiv 2403.03218, 2009.03300)."""

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import torch

from simnpo.errors import UserError
from simnpo.evaluation.results import facts, markdown_table

TASKS = {"wmdp": ["wmdp"], "mmlu": ["mmlu"]}  # groups of the harness, all of their subjects


def require_harness() -> None:
    """Raises `UserError` where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "WMDP and MMLU run in lm-evaluation-harness, which is not installed: pip install simnpo[harness]"
        )


def run_harness(
    model: str,
    benchmark: str,
    *,
    precision: Literal["bf16", "fp32"],
    cpu: bool,
    batch_size: int,
    max_examples: int | None = None,
) -> dict[str, dict[str, float | None]]:
    """Accuracy and its standard error of every group and subject, without examples in the prompt.

    Args:
        model: Hugging Face id, folder or .gguf file.
        benchmark: a key of TASKS.
        max_examples: of each subject, the first; None: all.

    Raises:
        UserError: the harness is missing, or cannot get its data.
    """
    require_harness()
    import lm_eval  # type: ignore[import-not-found]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

    from simnpo.loading import load_model

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    lm, tokenizer = load_model(model, dtype=dtype)
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    wrapped = HFLM(pretrained=lm.to(device), tokenizer=tokenizer, batch_size=batch_size, device=device)  # type: ignore[arg-type]
    try:
        found: Any = lm_eval.simple_evaluate(wrapped, tasks=TASKS[benchmark], num_fewshot=0, limit=max_examples)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"lm-evaluation-harness cannot run {benchmark}: {reason}") from error
    return {
        name: {"accuracy": values["acc,none"], "standard_error": _number(values.get("acc_stderr,none"))}
        for name, values in {**found["results"], **(found.get("groups") or {})}.items()
        if "acc,none" in values
    }


def _number(value: Any) -> float | None:
    # the harness writes "N/A" where it has none
    return value if isinstance(value, float) else None


def harness_page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [[name, one["accuracy"], one["standard_error"]] for name, one in results["scores"].items()]
    return "\n".join(
        [
            f"# {results['benchmark'].upper()}, through lm-evaluation-harness\n",
            facts(results, "model"),
            markdown_table(["task", "accuracy", "standard error"], lines),
        ]
    )
