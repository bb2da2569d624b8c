"""Relearning after a sweep: what a few epochs on a fifth of the answers bring back of the others, method by method.

The paper's attack (SimNPO, figure 6): the shortest fifth of the forget answers, and a random one. What it is read
against is the retrained model under the same attack: it learns those answers for the first time.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from simnpo.attacks.curves import Row
from simnpo.attacks.relearn import WHICH, Relearning, Which, picked, relearn
from simnpo.evaluation.measures import Measures, measure
from simnpo.evaluation.questions import QuestionSet, encode_questions
from simnpo.evaluation.results import markdown_table
from simnpo.evaluation.subject import Subject, load_subject
from simnpo.rows import read_rows
from simnpo.training.disk import write_bytes, write_json, write_text

RETRAINED = "retrained"
RELEARNING = Relearning()
SCORES = {
    "probability_others": "probability of the answers not relearned",
    "extraction_strength_others": "their extraction strength",
}


def relearn_all(models: Mapping[str, Path], retrained: Path, answers: Path, output: Path) -> None:
    """Attacks the retrained model and every other, and writes relearning.json, .md and .png.

    Args:
        models: folder of each method's unlearned model.
        retrained: folder of the model that never saw the forget set.
        answers: JSON Lines of the forget set.
        output: folder.
    """
    rows: list[Row] = []
    for name, folder in {RETRAINED: retrained, **models}.items():
        # trained weights are float32, whatever the arithmetic
        subject = load_subject(str(folder), precision="fp32", show_progress=False)
        rows += attacked(subject, encode_questions(read_rows(answers), subject.tokenizer, 512), name)
        print(f"relearned {name}", flush=True)
    write_json(output / "relearning.json", {"relearning": RELEARNING._asdict(), "rows": rows})
    write_text(output / "relearning.md", page(rows))
    write_bytes(output / "relearning.png", picture(rows))


def attacked(subject: Subject, asked: QuestionSet, name: str) -> list[Row]:
    """Rows of one model before the attack and after it, for both fifths, each from the same weights.

    Unlike `simnpo attack relearn` it scores the answers alone, and has the model write none: on a CPU the perturbed
    answers and the writing take longer than all the rest.
    """
    autocast = torch.autocast(next(subject.model.parameters()).device.type, dtype=torch.bfloat16)
    start = {key: value.cpu().clone() for key, value in subject.model.state_dict().items()}

    def measured() -> Measures:
        with autocast:
            return measure(subject, {"forget": asked}, write=(), max_new_tokens=0)["forget"]

    def scored(measures: Measures, which: Which, chosen: list[int], epoch: int) -> Row:
        others = np.setdiff1d(np.arange(len(measures.probability)), chosen)
        scores = {name: float(getattr(measures, name.removesuffix("_others"))[others].mean()) for name in SCORES}
        return {"model": name, "relearned": which, "epoch": epoch, **scores}

    rows = []
    before = measured()
    for which in WHICH:
        chosen = picked(asked.answers, which, RELEARNING.share, repeat=0)
        rows.append(scored(before, which, chosen, 0))
        examples = [asked.answers[i] for i in chosen]
        for _ in relearn(subject, examples, RELEARNING, seed=0, autocast=autocast):
            pass
        rows.append(scored(measured(), which, chosen, RELEARNING.epochs))
        subject.model.load_state_dict(start)
    return rows


def page(rows: list[Row]) -> str:
    """Before the attack and after its last epoch, as Markdown."""
    table = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for which in WHICH:
            before, after = (row for row in rows if row["model"] == model and row["relearned"] == which)
            scores = [f"{before[score]:.3g} -> {after[score]:.3g}" for score in SCORES]
            table.append([model, which, *scores])
    share, epochs, rate, batch = RELEARNING
    return "\n".join(
        [
            "# Relearning\n",
            f"{epochs} epochs on {share:.0%} of the forget answers, learning rate {rate:g}, batches of {batch}; scores "
            "before and after.\n",
            markdown_table(["model", "relearned", *SCORES.values()], table),
            "![before and after](relearning.png)\n",
        ]
    )


def picture(rows: list[Row]) -> bytes:
    """The probability of the answers not relearned before and after, as PNG: two bars a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, which in zip(figure.subplots(1, len(WHICH), sharey=True), WHICH, strict=True):
        some = [row for row in rows if row["relearned"] == which]
        names = list(dict.fromkeys(row["model"] for row in some))
        for i, label in enumerate(("before", "after")):
            heights = [row["probability_others"] for row in some[i::2]]
            axes.bar([x + 0.4 * i for x in range(len(names))], heights, width=0.4, label=label)
        axes.set_xticks([x + 0.2 for x in range(len(names))], names, fontsize=8)
        axes.set_title(f"relearned: {which}", fontsize=9)
    figure.axes[0].set_ylabel(SCORES["probability_others"], fontsize=8)
    figure.axes[0].legend(fontsize=8, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, dpi=100, format="png")
    return png.getvalue()
