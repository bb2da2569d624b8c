"""`simnpo evaluate`: a benchmark's scores of a model, and of a retrained one to compare with."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from simnpo.cli import COMMANDS
from simnpo.config import LARGEST_INT
from simnpo.errors import UserError
from simnpo.text import shorten, visible

MOST_TOKENS = 2**20  # of a sequence, or sequences of a batch: more would be a slip of the keyboard
BENCHMARKS = ("tofu", "muse", "wmdp", "mmlu")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("simnpo evaluate", description=COMMANDS["evaluate"])
    parser.add_argument("--model", required=True, help="Hugging Face id, folder or .gguf file")
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    parser.add_argument("--output", required=True, help="folder for results.json, results.md and answers.jsonl")
    parser.add_argument("--data", help="tofu, muse: folder with the benchmark's files; tofu: or its id on the hub")
    parser.add_argument("--split", help="tofu: the forget set (default: forget01)")
    parser.add_argument(
        "--retain-model", help="model that never saw the forget set, or results.json of its own evaluation"
    )
    parser.add_argument("--max-examples", type=int, help="of each set, the first (default: all)")
    add_model_options(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How to run a model that is examined."""
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of one forward at most (default: 32)")
    parser.add_argument("--max-length", type=int, help="tokens of a sequence, the rest is cut (default: 512)")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer (default: the benchmark's)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of weights and arithmetic")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")


def check_numbers(arguments: argparse.Namespace, *names: str, least: int = 1, most: int = LARGEST_INT) -> None:
    """Raises `UserError` where one of the named options is given, or a number of its list, and out of bounds."""
    for name in names:
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not least <= number <= most:
                bounds = f"at most {most}" if number > most else f"at least {least}" if least else "0 or more"
                raise UserError(f"{name} must be {bounds}, got {shorten(str(number))}")


def check_model_numbers(arguments: argparse.Namespace) -> None:
    """`check_numbers` of the options that evaluations and attacks share."""
    check_numbers(arguments, "max_examples")
    check_numbers(arguments, "batch_size", "max_length", "max_new_tokens", most=MOST_TOKENS)


def main(options: list[str]) -> int:
    """Runs the command; returns the exit status."""
    arguments = parser().parse_args(options)
    check_model_numbers(arguments)
    if arguments.benchmark in ("tofu", "muse") and arguments.data is None:
        raise UserError(f"--benchmark {arguments.benchmark} needs --data: the folder with its files")

    # brings torch and transformers: after whatever can be refused without them
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    evaluate = {"tofu": tofu, "muse": muse, "wmdp": harness, "mmlu": harness}[arguments.benchmark]
    page = evaluate(arguments)
    show(page)
    print(visible(f"results: {Path(arguments.output) / 'results.json'}"))
    return 0


def refuse_options(arguments: argparse.Namespace, *names: str) -> None:
    """Raises `UserError` where an option was given that this benchmark would ignore."""
    for name in names:
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} has no meaning for --benchmark {arguments.benchmark}: leave it out")


def settings_of(arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What decides the numbers beside model and data."""
    chosen = {"precision": arguments.precision, "max_examples": arguments.max_examples, **more}
    return {name: value for name, value in chosen.items() if value is not None}


def load(arguments: argparse.Namespace, name: str, *, precision: str | None = None) -> Any:
    """The model to examine; `precision` overrides that of the arguments."""
    from simnpo.evaluation.subject import load_subject

    precision = precision or arguments.precision
    return load_subject(name, precision=precision, cpu=arguments.cpu, batch_size=arguments.batch_size)  # type: ignore[arg-type]


def show(page: str) -> None:
    """Prints Markdown on the terminal."""
    console = Console()
    # a pipe says nothing of its width, and tables would be squeezed
    (console if console.is_terminal else Console(width=160)).print(Markdown(visible(page)))


def tofu(arguments: argparse.Namespace) -> str:
    """Evaluates on TOFU, writes the results and returns their page."""
    from simnpo.evaluation.measures import measure
    from simnpo.evaluation.results import open_folder, versions, write_results
    from simnpo.evaluation.tofu import (
        MAX_LENGTH,
        MAX_NEW_TOKENS,
        RETRAINED_SETS,
        WRITTEN_SETS,
        answer_rows,
        read_tofu,
        retrained_from_measures,
        retrained_from_results,
        tofu_page,
        tofu_results,
    )
    from simnpo.loading import load_tokenizer

    split, max_length = arguments.split or "forget01", arguments.max_length or MAX_LENGTH

    def read(name: str) -> Any:
        return read_tofu(arguments.data, split, load_tokenizer(name), max_length, arguments.max_examples)

    found, retrained, compared = read(arguments.model), None, arguments.retain_model
    if compared is not None and compared.endswith(".json"):
        retrained = retrained_from_results(Path(compared), split, len(found.sets["forget"].answers))
    elif compared is not None:
        sets = read(compared).sets
        of_retrained = {name: sets[name] for name in RETRAINED_SETS if name in sets}
    folder = open_folder(arguments.output)

    room = arguments.max_new_tokens or MAX_NEW_TOKENS
    measures = measure(load(arguments, arguments.model), found.sets, write=WRITTEN_SETS, max_new_tokens=room)
    if compared is not None and retrained is None:
        # the first model is gone by now: there never are two
        measured = measure(load(arguments, compared), of_retrained, write=(), max_new_tokens=room)
        retrained = retrained_from_measures(compared, measured)
    results = {
        "benchmark": "tofu",
        "model": arguments.model,
        "data": arguments.data,
        "split": split,
        "retain_model": compared,
        "settings": settings_of(arguments, max_new_tokens=room, max_length=max_length),
        "versions": versions(),
        **tofu_results(measures, found.missing, retrained),
    }
    page = tofu_page(results)
    write_results(folder, results, page, answer_rows(found.sets, measures))
    return page


def muse(arguments: argparse.Namespace) -> str:
    """Evaluates on MUSE, writes the results and returns their page."""
    from simnpo.evaluation.muse import (
        Retrained,
        measure_muse,
        muse_page,
        muse_results,
        read_muse,
        retrained_from_results,
    )
    from simnpo.evaluation.results import open_folder, versions, write_results
    from simnpo.loading import load_tokenizer

    refuse_options(arguments, "max_new_tokens", "split", "max_length")
    found, retrained, compared = read_muse(arguments.data, arguments.max_examples), None, arguments.retain_model
    if compared is not None and compared.endswith(".json"):
        retrained = retrained_from_results(Path(compared))
    # a name that is none shows before the work, not between the two models
    for name in (arguments.model, *([compared] if compared and retrained is None else [])):
        load_tokenizer(name)
    folder = open_folder(arguments.output)
    scores, min_k, written = measure_muse(load(arguments, arguments.model), found)
    if compared is not None and retrained is None:
        retrained = Retrained(compared, measure_muse(load(arguments, compared), found)[0])
    results = {
        "benchmark": "muse",
        "model": arguments.model,
        "data": arguments.data,
        "retain_model": compared,
        "settings": settings_of(arguments),
        "versions": versions(),
        **muse_results(scores, found.missing, retrained),
        "per_question": {"min_k": min_k},
    }
    page = muse_page(results)
    write_results(folder, results, page, [one._asdict() for one in written])
    return page


def harness(arguments: argparse.Namespace) -> str:
    """Runs WMDP or MMLU in lm-evaluation-harness, writes the results and returns their page."""
    from simnpo.evaluation.harness import harness_page, require_harness, run_harness
    from simnpo.evaluation.results import open_folder, versions, write_results

    refuse_options(arguments, "max_new_tokens", "split", "max_length", "data", "retain_model")
    require_harness()
    folder = open_folder(arguments.output)
    results = {
        "benchmark": arguments.benchmark,
        "model": arguments.model,
        "settings": settings_of(arguments),
        "versions": versions("lm-eval"),
        "scores": run_harness(
            arguments.model,
            arguments.benchmark,
            precision=arguments.precision,
            cpu=arguments.cpu,
            batch_size=arguments.batch_size,
            max_examples=arguments.max_examples,
        ),
    }
    page = harness_page(results)
    write_results(folder, results, page)
    return page
