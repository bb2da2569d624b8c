"""The paper's synthetic experiment (arXiv 2410.07163, section 5 and appendix H) from scratch, on a CPU, in minutes.

    python -m simnpo.benchmarks.paper.synthetic

Every seed has data, model and order of its own. Both parts, NPO and SimNPO on the same batches, no retain loss; the
curves show what forgetting costs the retain chain. Writes synthetic.md, synthetic.json and synthetic.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from simnpo.benchmarks.measure import environment
from simnpo.benchmarks.paper.chains import OWN_STATES
from simnpo.benchmarks.paper.experiment import KL, PARTS, Part, Size, make_data, measure, train, training_rows, unlearn
from simnpo.benchmarks.report import markdown_facts, markdown_table

FORGOTTEN = 0.42  # KL of a forget chain under a model that never saw it: where the methods are compared
COLOURS = {"NPO": "#d55e00", "SimNPO": "#0072b2"}

Curve = list[KL]


def unlearn_both_ways(name: str, seed: int, size: Size) -> dict[str, Curve]:
    """One seed of one part: a curve for each method, on the same model and the same batches."""
    part = PARTS[name]
    generator = torch.Generator().manual_seed(seed)
    data = make_data(part, size, generator)
    pretrained = train(training_rows(data.train, part.trained_on), size, generator)
    order = generator.get_state()
    curves = {}
    for method, objective in part.objectives().items():
        generator.set_state(order)
        forget_rows = training_rows(data.train, ("forget1", "forget2"))
        curves[method] = unlearn(copy.deepcopy(pretrained), objective, forget_rows, data.test, size, generator)
    return curves


def retrain(seed: int, size: Size) -> dict[str, KL]:
    """KL of each chain, in each part, under a model of the retain chain alone."""
    generator = torch.Generator().manual_seed(seed)
    parts = {name: make_data(part, size, generator) for name, part in PARTS.items()}
    model = train(training_rows(parts["lengths"].train, ("retain",)), size, generator)
    return {name: measure(model, data.test) for name, data in parts.items()}


def retain_kl_when_forgotten(curve: Curve, forget: str, level: float = FORGOTTEN) -> float | None:
    """KL of the retain chain when that of `forget` first reaches `level`, between two steps by a straight line."""
    for before, after in pairwise(curve):
        if before[forget] < level <= after[forget]:
            share = (level - before[forget]) / (after[forget] - before[forget])
            return before["retain"] + share * (after["retain"] - before["retain"])
    return None


def run_all(seeds: int, size: Size, processes: int) -> list[dict[str, Any]]:
    """Every part and seed, in as many processes of one thread each.

    Returns:
        For each part and seed: part, seed, curves of the methods, KL of the retrained model.
    """
    # fork would copy the threads of whoever calls
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        curves = {
            (name, seed): pool.submit(unlearn_both_ways, name, seed, size) for seed in range(seeds) for name in PARTS
        }
        retrained = [pool.submit(retrain, seed, size) for seed in range(seeds)]
        return [
            {"part": name, "seed": seed, "curves": job.result(), "retrained": retrained[seed].result()[name]}
            for (name, seed), job in curves.items()
        ]


def comparison(runs: list[dict[str, Any]], forget: str) -> dict[str, Any]:
    """Retain KL of both methods at the level, over the seeds in which both get there."""
    values = {method: [retain_kl_when_forgotten(r["curves"][method], forget) for r in runs] for method in COLOURS}
    reached = [pair for pair in zip(*values.values()) if None not in pair]
    npo, ours = ([pair[i] for pair in reached] for i in range(2))
    return {
        "seeds": len(runs),
        "reached": len(reached),
        **{method: _mean_and_spread(kls) for method, kls in zip(COLOURS, (npo, ours))},
        "ratio": statistics.fmean(npo) / statistics.fmean(ours) if reached else None,
        "lower": sum(b < a for a, b in reached),
    }


def _mean_and_spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": spread, "min": min(values), "max": max(values)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="one thread each (default: every core)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/paper"))
    options = parser.parse_args(argv)
    # before the run: the commit that ran
    facts = environment(torch.device("cpu"), torch.float32, "python -m simnpo.benchmarks.paper.synthetic")
    runs = run_all(options.seeds, Size(), options.processes)
    options.output.mkdir(parents=True, exist_ok=True)
    facts["threads"] = f"1 in each of {options.processes} processes"
    lines = [json.dumps(run, default=float) for run in _rounded(runs)]
    text = f'{{"facts": {json.dumps(facts)},\n"runs": [\n' + ",\n".join(lines) + "\n]}\n"
    (options.output / "synthetic.json").write_text(text, encoding="utf-8")
    (options.output / "synthetic.md").write_text(markdown(runs, facts), encoding="utf-8")
    draw(runs, options.output / "synthetic.png")
    print((options.output / "synthetic.md").read_text(encoding="utf-8"))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


NOTES = """\
KL(true next state || model), nats, mean over the positions of held-out sequences. {seeds} seeds; each has data, model
and order of its own. NPO and SimNPO start from the same model and see the same batches of 4 for 50 steps at learning
rate 5e-4, without a retain loss. Compared where a forget chain reaches KL {level}, that of a model which never saw it:
mean, sample standard deviation and range over the seeds. A ratio above 1 says SimNPO damaged the retain chain less; the
chain in bold is the one the part is about.

Differences from the published code: {test} held-out sequences of each chain and not all, and KL to the true chains (the
code can also measure it to the retrained model).

![retain KL against forget KL](synthetic.png)
"""


def markdown(runs: list[dict[str, Any]], facts: dict[str, str]) -> str:
    seeds = len({run["seed"] for run in runs})
    pages = ["# The paper's synthetic experiment, again\n", markdown_facts(facts)]
    pages.append(NOTES.format(seeds=seeds, level=FORGOTTEN, test=Size().test_sequences))
    for name in dict.fromkeys(run["part"] for run in runs):
        part, mine = PARTS[name], [run for run in runs if run["part"] == name]
        pages.append(f"## {part.title}\n\n{_comparison_table(mine, part.decided_on)}")
        pages.append(_start_table(mine, part))
    return "\n".join(pages)


def _comparison_table(runs: list[dict[str, Any]], decided_on: str) -> str:
    lines = []
    for forget in ("forget1", "forget2"):
        found = comparison(runs, forget)
        if not found["reached"]:
            lines.append([f"{forget}: starts there or never gets there", "", "", "", ""])
            continue
        cells = ["{mean:.3f} ± {sd:.3f} ({min:.3f} to {max:.3f})".format(**found[method]) for method in COLOURS]
        label = f"**{forget}**" if forget == decided_on else forget
        lines.append([label, *cells, f"{found['ratio']:.2f}", f"{found['lower']} of {found['reached']}"])
    columns = [f"KL {FORGOTTEN} on", *(f"retain KL, {method}" for method in COLOURS), "NPO / SimNPO", "SimNPO lower in"]
    return markdown_table(columns, lines)


def _start_table(runs: list[dict[str, Any]], part: Part) -> str:
    ours = {
        "before unlearning": [run["curves"]["SimNPO"][0] for run in runs],
        "never saw the forget chains": [run["retrained"] for run in runs],
    }
    published = {"before unlearning": part.published_start, "never saw the forget chains": part.published_retrained}
    lines = []
    for name, rows in ours.items():
        means = {chain: statistics.fmean(row[chain] for row in rows) for chain in OWN_STATES}
        for who, kls in (("ours", means), ("the paper's figure 5", published[name])):
            lines.append([f"{name}, {who}", *(f"{kls[chain]:.4f}" for chain in OWN_STATES)])
    return markdown_table(["mean KL", *OWN_STATES], lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Retain KL against forget KL, as in the paper's figure 5: a thin line a seed, markers where it is forgotten."""
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(run["part"] for run in runs))
    figure = Figure(figsize=(9, 3.6 * len(parts)), layout="constrained")
    grid = figure.subplots(len(parts), 2, squeeze=False)
    for row, name in zip(grid, parts):
        mine = [run for run in runs if run["part"] == name]
        for axes, forget in zip(row, ("forget1", "forget2")):
            _draw_curves(axes, mine, forget)
            axes.set_title(f"{PARTS[name].title}: {forget}", fontsize=10)
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=60)


def _draw_curves(axes: Any, runs: list[dict[str, Any]], forget: str) -> None:
    for method, colour in COLOURS.items():
        for run in runs:
            curve = run["curves"][method]
            xs, ys = [kl[forget] for kl in curve], [kl["retain"] for kl in curve]
            axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.6, label=method if run is runs[0] else None)
            at_level = retain_kl_when_forgotten(curve, forget)
            if at_level is not None:
                axes.plot(FORGOTTEN, at_level, "o", color=colour, markersize=4)
    retrained = [statistics.fmean(run["retrained"][key] for run in runs) for key in (forget, "retain")]
    axes.plot(*retrained, "k*", markersize=10, label="never saw the forget chains")
    axes.axvline(FORGOTTEN, color="#999", linewidth=0.6, linestyle=":")
    axes.set(xlim=(0, 1), ylim=(0, 0.5), xlabel=f"KL of {forget} (forgotten: high)", ylabel="KL of retain (kept: low)")


if __name__ == "__main__":
    main()
