"""What `simnpo evaluate` and `simnpo attack` wrote into folders inside that of a run."""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple


class TofuScores(NamedTuple):
    """TOFU's scores of one model; None where they could not be computed."""

    name: str
    forget_quality: float | None
    model_utility: float | None
    privacy_leak: float | None
    forget: dict[str, float | None]  # of the forget set: probability, rouge_l_recall, truth_ratio, ...


class Attack(NamedTuple):
    """name: of its folder.   kind: "relearn", "quantize", "prefix".   picture: its curves, a data: address."""

    name: str
    kind: str
    settings: dict[str, Any]
    picture: str


def find_tofu(run_dir: Path) -> list[TofuScores]:
    """TOFU's results in the folders of a run: the run's own model and whatever it is compared with, by folder name."""
    found = []
    for path, results in _results(run_dir):
        if results.get("benchmark") == "tofu":
            scores = {name: results["scores"][name] for name in ("forget_quality", "model_utility", "privacy_leak")}
            found.append(TofuScores(path.parent.name, **scores, forget=results["sets"]["forget"]))
    return found


def find_attacks(run_dir: Path) -> list[Attack]:
    """Attacks on the run's model, those that have their curves."""
    found = []
    for path, results in _results(run_dir):
        curves = path.with_name("curves.png")
        if "attack" in results and curves.is_file():
            picture = f"data:image/png;base64,{base64.b64encode(curves.read_bytes()).decode()}"
            found.append(Attack(path.parent.name, results["attack"], results["settings"], picture))
    return found


def _results(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    paths = sorted({*run_dir.glob("*/results.json"), *run_dir.glob("*/*/results.json")})
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
