"""`simnpo report`: report.html of a run, made again from what is in its folder by now."""

import argparse

from simnpo.cli import COMMANDS
from simnpo.report.page import write_report
from simnpo.text import visible


def main(options: list[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser("simnpo report", description=COMMANDS["report"])
    parser.add_argument("run", help="folder of the run; evaluations and attacks are folders inside it")
    print(visible(f"report: {write_report(parser.parse_args(options).run)}"))
    return 0
