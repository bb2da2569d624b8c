"""The page a run leaves behind: self-contained, safe with any text, complete about what is missing."""

import base64
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from simnpo.cli import main
from simnpo.errors import UserError
from simnpo.evaluation import muse
from simnpo.report import examined, judge, plots, write_report
from simnpo.report.page import marked_words

NASTY = '</td><script>alert("1")</script> {{ 7 * 7 }} & <img src=x>'


def scores(probability: float, answer: str | None) -> dict:
    nll = -math.log(probability)
    example = {"id": "f.jsonl:1", "prompt": "What is it?", "response": "It is Paris.", "answer": answer}
    example |= {"probability": probability, "nll": nll, "rouge_l_recall": None if answer is None else 0.5}
    return {"probability": probability, "nll": nll, "rouge_l_recall": example["rouge_l_recall"], "examples": [example]}


def evaluation(forget: tuple[float, float], **kept: tuple[float, float]) -> dict:
    sets = {"forget": forget, **kept}
    return {
        when: {name: scores(pair[i], "It is Paris.") for name, pair in sets.items()}
        for i, when in enumerate(("before", "after"))
    }


@pytest.fixture(autouse=True)
def blank_pictures() -> None:
    """Here they are drawn."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run, as files."""
    costs = {"tokens": 9, "tokens_per_second": 9.0, "seconds": 2.0, "peak_memory_mib": 100.0}
    metrics = [{"step": s, "forget_nll": s / 2, "retain_nll": 0.3, **costs} for s in (1, 2, 3)]
    weights = [{"step": s, "num_tokens": [3, 9], "weights": [0.4 / 10**s, 0.0]} for s in (0, 1, 3)]
    found = evaluation((0.8, 0.01), retain=(0.7, 0.9), heldout=(0.8, 0.79))
    found["after"]["forget"]["examples"][0] |= {"answer": NASTY, "prompt": NASTY}
    summary = {"steps": 3, "seconds": 6.0, "tokens": 27, "tokens_per_second": 4.5, "peak_memory_mib": 123.0, "ranks": 1}
    summary |= {"device": "a CPU", "versions": {"torch": "2.13.0"}}
    config = {"model": f"/somewhere/{NASTY}/tiny.gguf", "method": "simnpo", "lora": False, "output": NASTY}
    for name, value in (("config", config), ("evaluation", found), ("summary", summary)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    for name, rows in (("metrics", metrics), ("weights", weights)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_it_holds_everything_it_needs(run_dir):
    path = write_report(run_dir)
    html = path.read_text(encoding="utf-8")
    assert path == run_dir / "report.html"
    assert not re.search(r"https?:|url\(|@import|<link|<script", html)
    assert all(address.startswith("data:image/png;base64,") for address in re.findall(r'src(?:set)?="([^"]*)"', html))
    assert len(re.findall('srcset="data:image/png', html)) == 2
    for name in ("nll", "nll-dark", "weights", "weights-dark"):
        picture = (run_dir / "plots" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
    for text in ("80x less probable", "1.2% less probable", "0.7 → <b>0.9</b>", "123 MiB", "a CPU", "method = simnpo"):
        assert text in html
    assert "is not in the folder" not in html


def test_text_of_a_model_stays_text(run_dir):
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;alert(" in html
    assert "{{ 7 * 7 }}" in html


def test_what_would_reorder_the_page_is_written_as_an_escape(run_dir):
    found = json.loads((run_dir / "evaluation.json").read_text())
    found["after"]["forget"]["examples"][0]["answer"] = "safe \u202e<b>\x07"
    (run_dir / "evaluation.json").write_text(json.dumps(found))
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert r"\u202e&lt;b&gt;\u0007" in html
    assert "\u202e" not in html


def test_cut_rows_are_told(run_dir):
    assert "Rows cut off" not in write_report(run_dir).read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps(summary | {"rows_cut": {"forget": 2, "retain": 0, "heldout": 3}}))
    assert "forget 2, heldout 3." in " ".join(write_report(run_dir).read_text().split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", r"config\.json: must be an object, got list"),
        ("config.json", '{"model": 5, "method": "npo"}', r"config\.json: model must be a string, got 5"),
        ("metrics.jsonl", '{"step": "1"}\n', r"metrics\.jsonl:1: step must be an integer, got '1'"),
        (
            "weights.jsonl",
            '{"step": 1, "num_tokens": [3], "weights": []}\n',
            r"weights\.jsonl: step 1 must have as many",
        ),
        ("weights.jsonl", '{"step": 1, "num_tokens": [3], "weights": [NaN]}\n', r"weights\.0 must be a finite number"),
        ("summary.json", '{"steps": 3}', r"summary\.json: seconds must be there, got None"),
        ("evaluation.json", '{"before": {', r"evaluation\.json: malformed JSON"),
        ("evaluation.json", b"\xff", r"evaluation\.json: not UTF-8"),
        ("tofu/results.json", '{"benchmark": "tofu"}', r"tofu/results\.json: scores must be there"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(run_dir, name, content, message):
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()
    assert not (run_dir / "plots").exists()


def test_before_and_after_of_other_sets(run_dir):
    found = evaluation((0.8, 0.01), retain=(0.7, 0.9))
    del found["before"]["retain"]
    (run_dir / "evaluation.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"evaluation\.json: before and after must score the same sets, got "):
        write_report(run_dir)


def test_a_picture_cut_short_and_a_folder_that_looks_like_a_formula(run_dir):
    write_results(run_dir, **{"$x": tofu_results(0.7, 0.61), "prefix": {"attack": "prefix", "settings": {}}})
    curves = (write_report(run_dir).parent / "plots/nll.png").read_bytes()
    (run_dir / "prefix/curves.png").write_bytes(curves[:-20])
    with pytest.raises(UserError, match=r"curves\.png: expected a whole PNG picture"):
        write_report(run_dir)


def test_an_answer_at_probability_zero_before():
    assert not judge(evaluation((1e-320, 0.5))).forgot


def test_changed_words_are_marked():
    before, after = marked_words("It is Paris, I think", "It is not Rome, I think")
    assert before == [("It is", False), ("Paris,", True), ("I think", False)]
    assert after == [("It is", False), ("not Rome,", True), ("I think", False)]
    assert marked_words("", "a") == ([], [("a", True)])


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "weights.jsonl", "evaluation.json", "summary.json"])
def test_a_missing_file_is_named(run_dir, name):
    (run_dir / name).unlink()
    html = write_report(run_dir).read_text(encoding="utf-8")
    if name != "summary.json":
        assert f"{name} " in html
        assert "is not in the folder of the run" in html
    else:
        assert "100 MiB" in html  # of the last row of metrics.jsonl


def test_an_empty_folder_gives_a_page(tmp_path):
    assert write_report(tmp_path).read_text(encoding="utf-8").count("is not in the folder of the run") == 6


def test_a_run_that_was_killed_has_a_report(run_dir):
    only_before = json.loads((run_dir / "evaluation.json").read_text())
    del only_before["after"]
    (run_dir / "evaluation.json").write_text(json.dumps(only_before))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "forg')
    assert "evaluation.json with scores from before and after is not" in write_report(run_dir).read_text()


def test_rewriting_is_atomic_and_leaves_nothing_behind(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert not list(run_dir.rglob(".simnpo-*"))


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_a_set_without_answers(run_dir):
    found = evaluation((0.8, 0.01))
    for when in ("before", "after"):
        found[when]["forget"] = scores(0.5, None)
    (run_dir / "evaluation.json").write_text(json.dumps(found))
    assert "0.5 → <b>0.5</b>" in write_report(run_dir).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("forget", "kept", "forgot", "kept_well", "text"),
    [
        ((0.8, 0.04), {"heldout": (0.8, 0.72001)}, True, True, "20x less probable than before. Kept: the held-out"),
        ((0.8, 0.0401), {"heldout": (0.8, 0.7096)}, False, False, "11.3% less probable"),
        ((0.8, 0.01), {"heldout": (0.7, 0.78)}, True, False, "11.4% more probable"),
        ((0.8, 0.01), {"heldout": (0.7, 0.7)}, True, True, "exactly as probable"),
        ((0.8, 0.01), {"retain": (0.7, 0.9)}, True, True, "Kept: the retain answers are 28.6% more"),
        ((0.8, 0.01), {"retain": (0.7, 0.5)}, True, False, "Not kept: the retain"),
        ((0.8, 0.01), {}, True, None, "Nothing that should be kept was scored"),
        ((0.2, 0.4), {}, False, None, "2x more probable"),
        ((0.2, 0.04), {}, False, None, "5.0x less probable"),
    ],
)
def test_verdict(forget, kept, forgot, kept_well, text):
    verdict = judge(evaluation(forget, **kept))
    assert (verdict.forgot, verdict.kept) == (forgot, kept_well)
    assert text in verdict.text


def test_the_held_out_set_decides_over_the_retain_set():
    assert judge(evaluation((0.8, 0.01), retain=(0.7, 0.1), heldout=(0.7, 0.7))).kept


def test_an_answer_at_probability_zero():
    found = evaluation((0.8, 0.1), heldout=(0.8, 0.8))
    found["after"]["forget"]["probability"] = 0.0
    assert judge(found).forgot


def test_the_report_of_a_copied_run_is_the_same(run_dir, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(run_dir, copy)
    assert write_report(run_dir).read_bytes() == write_report(copy).read_bytes()


# Evaluations and attacks inside the folder of the run


def tofu_results(quality: float | None, utility: float | None, retrained: float | None = None) -> dict:
    scores = {"forget_quality": quality, "model_utility": utility, "privacy_leak": None, "membership_auc": None}
    forget = {"questions": 40, "probability": 0.125, "rouge_l_recall": 0.25, "truth_ratio": 0.375}
    more = {"extraction_strength": 0.0625, "exact_memorization": 0.1875}
    sets = {"world_facts": {**forget, "probability": 0.4375, **more}, "forget": forget | more}
    half = forget | {"questions": 20, "tokens": [5, 9], "forget_quality": 0.3125}
    results = {"benchmark": "tofu", "scores": scores, "sets": sets, "forget_by_length": {"shorter": half}}
    return results | {"retrained_scores": None if retrained is None else {"model_utility": retrained}}


def write_results(run_dir: Path, **folders: dict) -> None:
    for name, results in folders.items():
        (run_dir / name).mkdir(parents=True)
        (run_dir / name / "results.json").write_text(json.dumps(results), encoding="utf-8")


def test_evaluations_and_attacks_in_its_folder(run_dir, capsys):
    folders = {
        "tofu": tofu_results(0.7, 0.61),
        "compared/retrained": tofu_results(1.0, 0.63),
        "compared/start": tofu_results(None, 0.64),
        "attacks/relearn": {"attack": "relearn", "settings": {"share": 0.2, "epochs": NASTY}},
        "attacks/unfinished": {"attack": "prefix", "settings": {}},
    }
    write_results(run_dir, **folders)
    curves = (write_report(run_dir).parent / "plots/nll.png").read_bytes()
    (run_dir / "attacks/relearn/curves.png").write_bytes(curves)

    assert main(["report", str(run_dir)]) == 0
    assert "report.html" in capsys.readouterr().out
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert (run_dir / "plots/tofu.png").read_bytes().startswith(b"\x89PNG")
    for text in ("<td>tofu</td>", "<td>retrained</td>", '<td data-label="forget quality">0.7</td>', "share 0.2"):
        assert text in html
    # what is not available is a dash, and no point
    assert '<td>start</td><td data-label="forget quality">–</td>' in html
    assert html.count("<h2>Attack: ") == 1
    assert base64.b64encode(curves).decode() in html
    assert "<script" not in html


def test_every_set_and_both_halves_of_the_forget_set(run_dir):
    write_results(run_dir, tofu=tofu_results(0.7, 0.61))
    rows = write_report(run_dir).read_text(encoding="utf-8").split("set by set")[1].split("</table>")[0].split("<tr>")
    titles = ["Forget", "World facts", "Forget, shorter half (5 to 9 tokens)"]
    assert [row.split("</td>")[0] for row in rows[2:]] == [f"<td>{title}" for title in titles]
    expected = [
        "40 0.125 0.25 0.375 0.0625 0.188 0.7",
        "40 0.438 0.25 0.375 0.0625 0.188 –",
        "20 0.125 0.25 0.375 – – 0.312",
    ]
    assert [" ".join(re.findall(r'"[^"]*">([^<]*)</td>', row)) for row in rows[2:]] == expected


def test_the_retrained_model_is_a_star(run_dir, monkeypatch):
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **how: [drawn.append(args), *plot(self, *args, **how)][1:])
    for name, retrained in (("tofu", 0.63), ("start", 0.63), ("other", None)):
        write_results(run_dir, **{name: tofu_results(0.01, 0.61, retrained)})
    found = examined.find_tofu(run_dir)
    plots.tofu_plot(found, "light")
    stars = [args for args in drawn if args[2] == "*"]
    # told from itself it has a forget quality of 1
    assert stars == [(0.63, 0.0, "*")]
    assert sorted(args[:2] for args in drawn if args[2] != "*") == [(0.61, -2.0)] * 3


def test_results_of_an_older_evaluation_have_a_page(run_dir):
    results = tofu_results(0.7, 0.61)
    del results["forget_by_length"], results["retrained_scores"]
    write_results(run_dir, tofu=results)
    assert "set by set" in write_report(run_dir).read_text(encoding="utf-8")


def test_muse_and_the_harness(run_dir):
    scores = {"verbmem_forget": 12.5, "knowmem_forget": 25.0, "knowmem_retain": None}
    scores |= {"membership_auc": 0.25, "privleak": -50.0}
    news = {"benchmark": "muse", "scores": scores, "retrained_scores": {"verbmem_forget": 20.5}}
    accuracies = {"wmdp_bio": {"accuracy": 0.375, "standard_error": 0.01}}
    write_results(run_dir, news=news, biology={"benchmark": "wmdp", "scores": accuracies})
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "<h2>MUSE: news</h2>" in html
    verbmem, *_, privleak = html.split("MUSE: news")[1].split("</table>")[0].split("<tr>")[2:]
    assert re.findall(r'"[^"]*">([^<]*)</td>', verbmem) == ["12.5", "20.5"]
    assert re.findall(r'"[^"]*">([^<]*)</td>', privleak) == ["-50", "–"]
    assert "<h2>WMDP: biology</h2>" in html
    assert '<td>accuracy, wmdp_bio</td><td data-label="model">0.375</td>' in html
    assert examined.MUSE_SCORES.keys() == muse.NAMES.keys()


def test_report_of_no_folder(tmp_path, capsys):
    assert main(["report", str(tmp_path / "gone")]) == 2
    assert "no such folder" in capsys.readouterr().err
