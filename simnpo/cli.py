"""The `simnpo` command."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from simnpo.errors import LogLine, UserError, check_arguments, exit_status
from simnpo.text import visible

if TYPE_CHECKING:
    from simnpo.config import UnlearnConfig

COMMANDS = {
    "unlearn": "make a model forget one file of examples and keep another",
    "plan": "predict the memory and time of a run, and print the command that fits",
    "demo": "do that to a small model that comes with pip, in minutes",
    "evaluate": "score a model on TOFU, MUSE, WMDP or MMLU",
    "sweep": "unlearn with many settings and score each on TOFU",
    "attack": "try to bring back what a model was made to forget",
    "report": "make the report of a run again, with the evaluations and attacks in its folder",
    "bench": "time the loss beside everybody else's on this machine",
}

# whose `main` runs a command
MODULES = {
    "plan": "simnpo.planning.command",
    "demo": "simnpo.demo",
    "evaluate": "simnpo.evaluation.command",
    "sweep": "simnpo.sweep.command",
    "attack": "simnpo.attacks.command",
    "report": "simnpo.report.command",
    "bench": "simnpo.benchmarks.suite",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    It is 0, 1 where a run had to stop, 2 for wrong input, and 128 and the number of the signal that stopped it: 130 for
    Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, 138 for SIGUSR1.
    """
    return exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Finds the command and runs it; see `main`, which turns what this raises into an exit status."""
    check_arguments(argv)
    parser = argparse.ArgumentParser("simnpo", description="SimNPO and NPO unlearning of language models.")
    parser.add_argument("--version", action="version", version=f"simnpo {version('simnpo')}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        # each command reads its own options, so that only the one that runs is imported
        commands.add_parser(name, help=text, add_help=False)
    arguments, options = parser.parse_known_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(LogLine("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        return command_main(arguments.command)(options)
    except KeyboardInterrupt as error:
        hint = ": the same command with --resume continues from the newest checkpoint"
        what = f"stopped by {error}" if str(error) not in ("", "SIGINT") else "interrupted"
        print(f"{what}{hint if arguments.command == 'unlearn' else ''}", file=sys.stderr)
        return getattr(error, "exit_status", 130)


def command_main(command: str) -> Callable[[list[str]], int]:
    """What runs a command; imports its module."""
    return unlearn if command == "unlearn" else importlib.import_module(MODULES[command]).main


class ListMethods(argparse.Action):
    """Prints the methods of `simnpo unlearn`."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from simnpo.objectives.methods import describe

        print(describe())
        parser.exit()


def unlearn(options: list[str]) -> int:
    config = read_config(options, "simnpo unlearn", COMMANDS["unlearn"])

    import torch
    from transformers.utils.logging import disable_progress_bar

    from simnpo.training.loop import unlearn
    from simnpo.training.signals import Stopped

    disable_progress_bar()
    try:
        output = unlearn(config)
    except Stopped as stopped:
        if stopped.together:
            torch.distributed.destroy_process_group()
        raise
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        print(visible(f"unlearned model: {output / 'model'}\nreport: {output / 'report.html'}"))
    if torch.distributed.is_initialized():
        # a rank whose threads are still listening when the interpreter ends is aborted
        torch.distributed.destroy_process_group()
    return 0


def read_config(options: list[str], prog: str, description: str) -> "UnlearnConfig":
    """The configuration that the options of `simnpo unlearn` describe; `prog` is the command that takes them."""
    from transformers.hf_argparser import HfArgumentParser

    from simnpo.config import UnlearnConfig

    parser = HfArgumentParser(
        UnlearnConfig,  # type: ignore[arg-type]
        prog=prog,
        description=description,
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("--list-methods", action=ListMethods, help="show every --method with its formula, and stop")
    arguments = parser.parse_args(options)
    if not arguments.output.strip():
        raise UserError("output must be a folder, got an empty name")
    return UnlearnConfig(**{field.name: getattr(arguments, field.name) for field in fields(UnlearnConfig)})


if __name__ == "__main__":
    sys.exit(main())
