"""Whatever is typed or stands in a file: an exit status that is documented, an error that says where, no traceback.

SIMNPO_FAULTS=full tries thousands of made-up rows and values of options instead of dozens.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simnpo.cli import main
from simnpo.config import UnlearnConfig

FULL = os.environ.get("SIMNPO_FAULTS") == "full"


def some(examples: int, full: int) -> Callable:
    return settings(
        max_examples=full if FULL else examples,
        derandomize=not FULL,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and files that are right."""
    folder = tmp_path_factory.mktemp("contract")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [{"question": f"Who is {i}?", "answer": f"It is {i}.", "perturbed_answer": ["No.", "Me."]} for i in range(4)]
    for name in ("forget", "tofu/forget01_perturbed", "tofu/retain_perturbed"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_rows(folder / f"{name}.jsonl", [row | {"paraphrased_answer": "He."} for row in rows])
    return folder


def status(arguments: list[str]) -> int:
    """What the command line ends with; anything but an exit fails the test."""
    try:
        return main(arguments)
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1 if stopped.code else 0


def run(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    ended = status(command)
    error = capsys.readouterr().err
    assert ended in (0, 1, 2, 130)
    assert "Traceback" not in error
    if ended:
        assert error.splitlines()[-1].startswith(("error: ", "simnpo")), error
    return ended, error


def commands(place: Path, data: Path, output: Path) -> dict[str, list[str]]:
    """Every command that reads rows, on `data`."""
    model = f"--model={place / 'model'}"
    tofu = data.parent / f"{data.stem}-tofu"
    tofu.mkdir(exist_ok=True)
    if data.exists():
        (tofu / "forget01.jsonl").unlink(missing_ok=True)
        (tofu / "forget01.jsonl").symlink_to(data)
    small = ["--cpu", "--max-new-tokens=2"]
    attack = [model, f"--forget={data}", f"--output={output / 'attack'}", *small]
    unlearn = [model, f"--forget={data}", f"--output={output / 'run'}", "--cpu", "--max_steps=1", "--eval_examples=1"]
    evaluate = [model, f"--data={tofu}", f"--output={output / 'evaluated'}", "--benchmark=tofu", *small]
    return {
        "unlearn": ["unlearn", *unlearn, "--weight_examples=0", "--batch_size=1", "--max_length=64"],
        "evaluate": ["evaluate", *evaluate],
        "prefix": ["attack", "prefix", *attack, "--prefix-tokens", "0", "1"],
        "quantize": ["attack", "quantize", *attack, "--bits", "8", "--group-size=32"],
        "relearn": ["attack", "relearn", *attack, "--epochs=1", "--repeats=1", "--learning-rate=1e-3"],
    }


# Rows

BAD_LINES = {
    "half a line": b'{"prompt": "a", ',
    "no object": b'["a"]',
    "a number": b"7",
    "not UTF-8": b"\xff\xfe\x00",
    "null characters": b"\x00\x00",
    "NaN": b'{"prompt": NaN, "response": "b"}',
    "no key": b"{}",
    "half a character": b'{"prompt": "a", "response": "\\ud800"}',
    "half a character in the prompt": b'{"prompt": "\\udfff", "response": "b"}',
    "too deep": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep": b'{"messages": ' + b"[" * 800 + b"]" * 800 + b"}",
    "too many digits": b'{"text": ' + b"1" * 5000 + b"}",
    "no string": b'{"prompt": "a", "response": 7}',
    "nothing": b'{"prompt": "a", "response": "  "}',
    "two formats": b'{"text": "a b", "prompt": "a", "response": "b"}',
    "two pairs": b'{"question": "a", "answer": "b", "prompt": "a", "response": "b"}',
    "role": b'{"messages": [{"role": {}, "content": "a"}]}',
    "unknown role": b'{"messages": [{"role": "robot", "content": "a"}]}',
    "no turns": b'{"messages": []}',
    "turns": b'{"messages": "abc"}',
    "no completion": b'{"prompt": [], "completion": []}',
    "mixed": b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}',
    "only a special token": b'{"prompt": "a", "response": "<|end|>"}',
}


@pytest.mark.parametrize("command", ["unlearn", "evaluate", "prefix"])
@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_rows_are_named_by_file_and_line(place, tmp_path, capsys, line, command):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b'{"prompt": "a", "response": "b c"}\n' + line + b"\n")
    ended, error = run(commands(place, data, tmp_path)[command], capsys)
    assert ended == 2
    assert re.search(r"(rows|forget01)\.jsonl:2", error), error
    assert not (tmp_path / "run").exists()


TEXTS = st.sampled_from(["", " ", "a", "a b", "\u202e", "\x1b[2J", "\ud800", "<|end|>", "é" * 300, "{{ 7 }}", "\r\n"])
ROLE_KEYS = st.sampled_from(["role", "content"])
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content"]), inner, max_size=2)
    ),
    max_leaves=4,
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]) | VALUES, "content": TEXTS}),
    max_size=3,
)
KEYS = ["prompt", "response", "question", "answer", "text", "messages", "completion", "alternate"]
KEYS += ["paraphrased_answer", "perturbed_answer"]
PAIRS = st.fixed_dictionaries({"question": TEXTS, "answer": TEXTS}, optional={"perturbed_answer": st.lists(TEXTS)})
ROWS = PAIRS | st.dictionaries(st.sampled_from(KEYS), VALUES | TURNS, max_size=4)


@some(60, 1000)
@given(row=ROWS, command=st.sampled_from(["prefix", "evaluate", "quantize", "unlearn"]))
def test_any_row(place, tmp_path_factory, capsys, row, command):
    folder = tmp_path_factory.mktemp("row")
    data = write_rows(folder / "rows.jsonl", [row])
    ended, error = run(commands(place, data, folder)[command], capsys)
    if ended == 2 and "prefix_tokens" not in error:
        assert re.search(r"(rows|forget01)\.jsonl:1", error), error


@some(60, 1000)
@given(line=st.binary(max_size=40) | st.text(alphabet='{}[]":,ptxe\\u1.\n', max_size=30).map(str.encode))
def test_any_line(place, tmp_path_factory, capsys, line):
    folder = tmp_path_factory.mktemp("line")
    (folder / "rows.jsonl").write_bytes(line)
    ended, error = run(commands(place, folder / "rows.jsonl", folder)["prefix"], capsys)
    assert ended != 2 or re.search(r"rows\.jsonl(:\d| is empty)", error), error


# Files that are none


@pytest.mark.parametrize("command", ["unlearn", "evaluate", "prefix", "quantize", "relearn"])
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "empty", "below a file", "too long", "null"])
def test_data_that_is_no_file(place, tmp_path, capsys, kind, command):
    data = tmp_path / "rows.jsonl"
    if kind == "folder":
        data.mkdir()
    elif kind == "pipe":
        os.mkfifo(data)
    elif kind == "device":
        data.symlink_to("/dev/zero")
    elif kind == "empty":
        data.touch()
    elif kind == "below a file":
        data = place / "forget.jsonl" / "rows.jsonl"
    elif kind == "too long":
        data = tmp_path / ("r" * 300)
    line = commands(place, data, tmp_path)[command] if data.parent.is_dir() and kind != "too long" else None
    if line is None:
        if command == "evaluate":
            return
        line = [*commands(place, place / "forget.jsonl", tmp_path)[command], f"--forget={data}"]
    if kind == "null":
        line = [*line, "--forget=a\0b"]
    assert run(line, capsys)[0] == 2


@pytest.mark.parametrize("command", ["unlearn", "evaluate", "prefix"])
@pytest.mark.parametrize("output", ["", " ", "forget.jsonl", "forget.jsonl/x", "x" * 300, "/proc/x", "/dev/null"])
def test_output_that_cannot_be_made(place, tmp_path, capsys, monkeypatch, output, command):
    monkeypatch.chdir(place)
    line = [*commands(place, place / "forget.jsonl", tmp_path)[command], f"--output={output}"]
    ended, error = run(line, capsys)
    assert ended in (1, 2)
    assert error.startswith("error: ") or "\nerror: " in error
    assert not (place / "results.json").exists()


@pytest.mark.parametrize("name", ["results.json", "results.md", "answers.jsonl", "curves.png"])
def test_files_of_others_are_not_overwritten(place, tmp_path, capsys, name):
    for command in ("evaluate", "prefix"):
        line = [*commands(place, place / "forget.jsonl", tmp_path)[command], f"--output={tmp_path}"]
        (tmp_path / name).write_text('{"mine": 1}')
        ended, error = run(line, capsys)
        assert ended == 2
        assert f"{tmp_path / name} was not written by simnpo" in error
        assert (tmp_path / name).read_text() == '{"mine": 1}'


# Options

NUMBERS = ["nan", "inf", "-inf", "0", "-1", "1e-60", "1e39", "1e400", "9" * 30, "9" * 5000, "0.5", "x", "", " 1", "１"]
UNLEARN_NUMBERS = [name for name, kind in UnlearnConfig.__annotations__.items() if "int" in kind or "float" in kind]
ATTACK_NUMBERS = {
    "prefix": ["batch-size", "max-length", "max-new-tokens", "max-examples", "prefix-tokens"],
    "quantize": ["bits", "group-size"],
    "relearn": ["share", "epochs", "repeats", "learning-rate", "train-batch-size"],
}
PLAN_NUMBERS = ["context", "lora-rank", "batch", "retain-batch", "gemm-tflops", "bandwidth-gbs", "host-gbs"]
PLAN_NUMBERS += ["gpu-memory"]
# what would be right and take long, or is right
TAKES_LONG = {"max_steps", "epochs", "eval_examples", "batch_size", "retain_batch_size", "max_length", "lora_rank"}


def is_bad(value: str) -> bool:
    return value in ("nan", "inf", "-inf", "-1", "1e400", "1e-60", "1e39", "x", "", "9" * 5000)


@pytest.mark.parametrize("value", [value for value in NUMBERS if is_bad(value)])
def test_numbers_that_are_none(place, tmp_path, capsys, value):
    unlearn = commands(place, place / "forget.jsonl", tmp_path)["unlearn"]
    for name in UNLEARN_NUMBERS:
        assert run([*unlearn, f"--{name}={value}"], capsys)[0] == 2, name
    for attack, names in ATTACK_NUMBERS.items():
        line = commands(place, place / "forget.jsonl", tmp_path)[attack]
        for name in names:
            if (attack, name, value) != ("relearn", "share", "1e-60"):
                assert run([*line, f"--{name}={value}"], capsys)[0] == 2, name
    plan = ["plan", f"--model={place / 'model'}", "--context=64", "--cpu", "--gpu-memory=8GB"]
    for name in PLAN_NUMBERS:
        assert run([*plan, f"--{name}={value}"], capsys)[0] == 2, name
    sweep = ["sweep", "--model=m", "--output=o", "--data=d", "--retain-model=r", "--try=seed=0"]
    for name in ("max-examples", "max-new-tokens"):
        assert run([*sweep, f"--{name}={value}"], capsys)[0] == 2, name
    for name in ("sequence-tokens", "check-tokens", "rounds", "minutes", "tokens", "device"):
        if (name, value) not in (("minutes", "1e-60"), ("minutes", "1e39")):
            assert run(["bench", f"--{name}={value}"], capsys)[0] == 2, name


@some(25, 600)
@given(name=st.sampled_from(UNLEARN_NUMBERS), value=st.sampled_from(NUMBERS) | st.floats().map(str))
def test_any_number(place, tmp_path_factory, capsys, name, value):
    line = commands(place, place / "forget.jsonl", tmp_path_factory.mktemp("number"))["unlearn"]
    if name in TAKES_LONG and not is_bad(value):
        return
    run([*line, f"--{name}={value}"], capsys)


@pytest.mark.parametrize(
    "options",
    [
        ["--beta=1", "--method_args=beta=2"],
        ["--method_args=="],
        ["--method_args=beta=nan"],
        ["--method_args=beta=1e-60"],
        ["--method=no such"],
        ["--stride=64"],
        ["--epochs=1e30", "--max_steps="],
        ["--alternate="],
        ["--model="],
        ["--model=\ud800"],
        ["--forget="],
        ["--retain=."],
        ["--attention=none such"],
    ],
)
def test_options_that_make_no_sense(place, tmp_path, capsys, options):
    assert run([*commands(place, place / "forget.jsonl", tmp_path)["unlearn"], *options], capsys)[0] == 2


@pytest.mark.parametrize("path", [".", "gone/plan.json", "model/config.json/plan.json", "/dev/null", "x" * 300])
def test_a_plan_that_cannot_be_written(place, capsys, monkeypatch, path):
    monkeypatch.chdir(place)
    monkeypatch.setattr("simnpo.planning.command.make_plan", lambda *_: pytest.fail("that was the work"))
    plan = ["plan", f"--model={place / 'model'}", "--context=64", "--cpu", "--gpu-memory=8GB"]
    rates = ["--gemm-tflops=1", "--bandwidth-gbs=1", "--host-gbs=1"]
    assert run([*plan, *rates, f"--json={path}"], capsys)[0] == 2


# Reports


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run, with an evaluation inside."""
    folder = tmp_path_factory.mktemp("finished")
    lines = commands(place, place / "forget.jsonl", folder)
    assert main([*lines["unlearn"], "--weight_examples=2"]) == 0
    assert main([*lines["evaluate"], f"--output={folder / 'run/tofu'}", f"--data={place / 'tofu'}"]) == 0
    assert main([*lines["prefix"], f"--output={folder / 'run/prefix'}"]) == 0
    names = ["config.json", "metrics.jsonl", "weights.jsonl", "evaluation.json", "summary.json", "tofu/results.json"]
    return {name: (folder / "run" / name).read_bytes() for name in [*names, "prefix/results.json", "prefix/curves.png"]}


def report(files: dict[str, bytes], folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    ended, error = run(["report", str(folder)], capsys)
    assert (folder / "report.html").exists() == (ended == 0)
    assert ended == 0 or not (folder / "plots").exists()
    return ended, error


def damaged(text: bytes, name: str) -> list[bytes]:
    bad = [
        text[: len(text) // 2] + b"\n",
        b"\xff\xfe" + text,
        b"[]\n",
        b"7\n",
        b'"a"\n',
        b"null\n",
        b"[" * 10**5 + b"\n",
    ]
    return [b"\x89PNG", b"", b"{}"] if name.endswith(".png") else bad


def test_a_damaged_file_of_a_run_is_named(finished, tmp_path, capsys):
    (whole := tmp_path / "whole").mkdir()
    assert report(finished, whole, capsys)[0] == 0
    for name, content in finished.items():
        for i, wrong in enumerate(damaged(content, name)):
            (folder := tmp_path / f"{name.replace('/', '-')}-{i}").mkdir()
            ended, error = report(finished | {name: wrong}, folder, capsys)
            assert (ended, f"{folder / name}" in error) == (2, True), (name, wrong[:40], error)


def mutated(value: object, draw: Callable) -> object:
    """The value with one part taken out or replaced."""
    if isinstance(value, dict) and value and draw(st.booleans() | st.just(True)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 3)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw(st.booleans()):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], mutated(value[i], draw), *value[i + 1 :]]
    odd = [None, "", "x", "\x1b[2J$\\", [], {}, -1, 0, 1e308, 5e-324, float("nan"), float("inf"), 10**300, True, ["a"]]
    return draw(st.sampled_from(odd))


@some(60, 1000)
@given(data=st.data())
def test_any_value_in_a_file_of_a_run(finished, tmp_path_factory, capsys, data):
    name = data.draw(st.sampled_from([name for name in finished if not name.endswith(".png")]))
    if name.endswith(".jsonl"):
        first, *rest = finished[name].splitlines(keepends=True)
        wrong = json.dumps(mutated(json.loads(first), data.draw)).encode() + b"\n" + b"".join(rest)
    else:
        wrong = json.dumps(mutated(json.loads(finished[name]), data.draw)).encode()
    folder = tmp_path_factory.mktemp("report")
    ended, error = report(finished | {name: wrong}, folder, capsys)
    assert ended == 0 or (ended == 2 and str(folder / name) in error), error
