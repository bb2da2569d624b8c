"""SimNPO's beta and gamma on the synthetic experiment (the paper has them on TOFU, figure A2).

    python -m simnpo.benchmarks.paper.margins

Part 1 of `synthetic.py`: what the retain chain has lost when the short forget chain is gone, for every pair of beta and
gamma, on one model and several orders of the batches. Writes margins.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path

import torch

from simnpo import SimNPO
from simnpo.benchmarks.measure import environment
from simnpo.benchmarks.paper.experiment import PARTS, Size, make_data, train, training_rows, unlearn
from simnpo.benchmarks.paper.synthetic import FORGOTTEN, retain_kl_when_forgotten
from simnpo.benchmarks.report import markdown_facts, markdown_table

BETAS = (0.5, 1.0, 2.0, 4.0, 8.0)
GAMMAS = (0.0, 0.5, 1.0, 2.0)
PART = PARTS["lengths"]


def sweep(
    betas: tuple[float, ...], gammas: tuple[float, ...], orders: int, size: Size
) -> dict[tuple[float, float], list[float]]:
    """Retain KL at the level for each (beta, gamma), one for each order that gets there."""
    generator = torch.Generator().manual_seed(0)
    data = make_data(PART, size, generator)
    pretrained = train(training_rows(data.train, PART.trained_on), size, generator)
    rows = training_rows(data.train, ("forget1", "forget2"))
    found: dict[tuple[float, float], list[float]] = {}
    for beta in betas:
        for gamma in gammas:
            for order in range(orders):
                same_batches = torch.Generator().manual_seed(order)
                objective = SimNPO(beta, gamma)
                curve = unlearn(copy.deepcopy(pretrained), objective, rows, data.test, size, same_batches)
                kl = retain_kl_when_forgotten(curve, PART.decided_on)
                found.setdefault((beta, gamma), []).extend([] if kl is None else [kl])
    return found


NOTES = """\
KL of the retain chain, nats, when that of forget2 reaches {level}: mean ± sample standard deviation over {orders}
orders of the batches, one model ({steps} steps at most). Lower is better; "k of n": not every order got there.

"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/paper"))
    options = parser.parse_args(argv)
    facts = environment(torch.device("cpu"), torch.float32, "python -m simnpo.benchmarks.paper.margins")
    size = Size(unlearn_steps=30, test_sequences=96)
    found = sweep(BETAS, GAMMAS, options.orders, size)
    notes = NOTES.format(level=FORGOTTEN, orders=options.orders, steps=size.unlearn_steps)
    page = f"# SimNPO's beta and gamma\n\n{markdown_facts(facts)}\n{notes}{table(found, options.orders)}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "margins.md").write_text(page, encoding="utf-8")
    print(page)


def table(found: dict[tuple[float, float], list[float]], orders: int) -> str:
    """A line a beta, a column a gamma."""
    betas, gammas = (sorted({key[i] for key in found}) for i in range(2))
    lines = [[f"beta {beta:g}", *(_cell(found[beta, gamma], orders) for gamma in gammas)] for beta in betas]
    return markdown_table(["", *(f"gamma {gamma:g}" for gamma in gammas)], lines)


def _cell(kls: list[float], orders: int) -> str:
    few = "" if len(kls) == orders else f" ({len(kls)} of {orders})"
    if not kls:
        return f"not reached{few}"
    spread = f" ± {statistics.stdev(kls):.3f}" if len(kls) > 1 else ""
    return f"{statistics.fmean(kls):.3f}{spread}{few}"


if __name__ == "__main__":
    main()
