"""MUSE (arXiv 2407.06460): verbatim memory, knowledge memory and privacy leakage, on a folder of its files.

    verbmem/forget.json                                [{"prompt", "gt"}]          how does the text go on?
    knowmem/{forget,retain}_qa.json, *_qa_icl.json     [{"question", "answer"}]    few-shot questions
    privleak/{forget,holdout}.json                     ["text"]                    was the text seen in training?

VerbMem and KnowMem are 100 times the mean ROUGE-L F1 of greedy continuations (128 and 32 tokens). PrivLeak compares the
AUC of Min-40% with a retrained model's. MUSE's models are plain language models: no chat template is used.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from simnpo import metrics
from simnpo.data import Example
from simnpo.errors import UserError
from simnpo.evaluation.results import facts, markdown_table
from simnpo.evaluation.subject import Subject
from simnpo.rows import string
from simnpo.shapes import read_json

VERBMEM_TOKENS, KNOWMEM_TOKENS = 128, 32
ANSWER_ENDS = ("\n\n", "\nQuestion", "Question:")
KNOWMEM_SETS = {"knowmem_forget": "forget_qa", "knowmem_retain": "retain_qa"}
PRIVLEAK_SETS = ("forget", "holdout")
NAMES = {
    "verbmem_forget": "VerbMem on forget (lower: forgotten)",
    "knowmem_forget": "KnowMem on forget (lower: forgotten)",
    "knowmem_retain": "KnowMem on retain (higher: kept)",
    "membership_auc": "AUC of Min-40%, held-out against forget texts (0: all known, 0.5: none)",
    "privleak": "PrivLeak, percent (0: as the retrained model, -100: all known)",
}

Pair = tuple[str, str]


class Muse(NamedTuple):
    """What a folder holds; a task whose files are missing is None and has its reason.

    verbmem: (prompt, how it goes on).   knowmem: for each set (question, answer) pairs, and those shown before.
    privleak: texts of forget and holdout.
    """

    verbmem: list[Pair] | None
    knowmem: dict[str, tuple[list[Pair], list[Pair]]]
    privleak: dict[str, list[str]] | None
    missing: dict[str, str]


class Continuation(NamedTuple):
    """For answers.jsonl."""

    task: str
    prompt: str
    reference: str
    written: str
    rouge_l_f1: float


def read_muse(data: str, max_examples: int | None = None) -> Muse:
    """Reads what there is of MUSE's files.

    Args:
        data: folder of one corpus, "data/news" in MUSE's own repository.
        max_examples: of each file, the first; None: all. The questions shown before others are never cut.

    Raises:
        UserError: there is no such folder, none of the files is there, or one is malformed; names file and row.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"data: no such folder: {data}")
    missing: dict[str, str] = {}

    def some(name: str, keys: tuple[str, str] | None, task: str, at_most: int | None = max_examples) -> Any:
        path = folder / f"{name}.json"
        if not path.exists():
            missing.setdefault(task, f"{name}.json is not in {data}")
            return None
        return _rows(path, keys)[:at_most]

    verbmem = some("verbmem/forget", ("prompt", "gt"), "verbmem_forget")
    knowmem = {}
    for task, name in KNOWMEM_SETS.items():
        asked = some(f"knowmem/{name}", ("question", "answer"), task)
        shown = some(f"knowmem/{name}_icl", ("question", "answer"), task, None)
        if asked is not None and shown is not None:
            knowmem[task] = (asked, shown)
    texts = {name: some(f"privleak/{name}", None, "privleak") for name in PRIVLEAK_SETS}
    if verbmem is None and not knowmem and None in texts.values():
        raise UserError(f"data: {data} has none of MUSE's files: {', '.join(dict.fromkeys(missing.values()))}")
    return Muse(verbmem, knowmem, None if None in texts.values() else texts, missing)


def _rows(path: Path, keys: tuple[str, str] | None) -> list[Any]:
    """A JSON list of objects with two strings, as pairs, or of strings."""
    rows = read_json(path, object)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a JSON list that is not empty, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        texts = [row] if keys is None else [row.get(key) for key in keys] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            expected = "a text" if keys is None else f"an object with the texts {' and '.join(keys)}"
            raise UserError(f"{path}, row {i + 1}: expected {expected}, got {str(row)[:80]}")
        for text in texts:
            string({"text": text}, "text", f"{path}, row {i + 1}")
    return rows if keys is None else [tuple(row[key] for key in keys) for row in rows]


def measure_muse(subject: Subject, muse: Muse) -> tuple[dict[str, float], dict[str, list[float]], list[Continuation]]:
    """Everything that needs the model.

    Returns:
        Scores by name, Min-40% of the forget and holdout texts, and every continuation.
    """
    scores, written = {}, []
    if muse.verbmem is not None:
        written += _continued(subject, muse.verbmem)
    for task, (asked, shown) in muse.knowmem.items():
        written += _answered(subject, task, asked, shown)
    for task in dict.fromkeys(one.task for one in written):
        scores[task] = 100 * fmean(one.rouge_l_f1 for one in written if one.task == task)
    min_k = {}
    if muse.privleak is not None:
        sequences = {name: _sequences(subject, name, texts) for name, texts in muse.privleak.items()}
        scored = iter(subject.score([e for some in sequences.values() for e in some]))
        min_k = {name: [metrics.min_k(next(scored).logps) for _ in some] for name, some in sequences.items()}
        scores["membership_auc"] = metrics.membership_auc(min_k["forget"], min_k["holdout"])
    return scores, min_k, written


def _continued(subject: Subject, pairs: Sequence[Pair]) -> list[Continuation]:
    tokenizer = subject.tokenizer
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    # special tokens count towards the 128, as in the published code
    cut = [tokenizer(reference)["input_ids"][:VERBMEM_TOKENS] for _, reference in pairs]
    references = tokenizer.batch_decode(cut, skip_special_tokens=True)
    texts = subject.answer(prompts, VERBMEM_TOKENS, "verbmem")
    f1 = metrics.rouge_l_f1(references, texts)
    rows = zip([prompt for prompt, _ in pairs], references, texts, f1)
    return [Continuation("verbmem_forget", *row) for row in rows]


def _answered(subject: Subject, task: str, asked: Sequence[Pair], shown: Sequence[Pair]) -> list[Continuation]:
    before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shown)
    prompts = [subject.tokenizer(f"{before}Question: {question}\nAnswer: ")["input_ids"] for question, _ in asked]
    texts = [first_answer(text) for text in subject.answer(prompts, KNOWMEM_TOKENS, task)]
    f1 = metrics.rouge_l_f1([answer for _, answer in asked], texts)
    return [Continuation(task, *pair, text, value) for pair, text, value in zip(asked, texts, f1)]


def first_answer(text: str) -> str:
    """What was written before the model went on to ask itself another question."""
    for end in ANSWER_ENDS:
        text = text.split(end)[0]
    return text


def _sequences(subject: Subject, name: str, texts: Sequence[str]) -> list[Example]:
    """Every token but the first is a target."""
    examples = []
    for i, text in enumerate(texts, start=1):
        ids = subject.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) < 2:
            raise UserError(f"privleak/{name}.json, row {i}: the tokenizer makes fewer than two tokens of {text!r}")
        examples.append(Example(f"privleak/{name}.json:{i}", "", text, ids, ids))
    return examples


class Retrained(NamedTuple):
    """The same scores of a model that never saw the forget set."""

    name: str
    scores: dict[str, float]


def retrained_from_results(path: Path) -> Retrained:
    """Reads results.json of an earlier evaluation.

    Raises:
        UserError: it is something else.
    """
    try:
        results = read_json(path, {"benchmark": str, "scores": {str: (float, None)}})
    except (OSError, UserError) as error:
        raise UserError(f"retain_model: {path} is not results.json of `simnpo evaluate`: {error}") from error
    benchmark, scores = results["benchmark"], results["scores"]
    if benchmark != "muse":
        raise UserError(f"retain_model: {path} has results of {benchmark}, expected muse")
    return Retrained(str(path), {name: value for name, value in scores.items() if value is not None})


def muse_results(
    scores: Mapping[str, float], missing: Mapping[str, str], retrained: Retrained | None
) -> dict[str, Any]:
    """Everything MUSE defines; a score that cannot be computed is None and has its reason."""
    found = {name: scores.get(name) for name in NAMES}
    not_available = {name: missing[name] for name in ("verbmem_forget", *KNOWMEM_SETS) if name in missing}
    auc = found["membership_auc"]
    if auc is None:
        not_available |= dict.fromkeys(("membership_auc", "privleak"), missing.get("privleak", "it was not measured"))
    elif retrained is None:
        not_available["privleak"] = "it compares with a retrained model: --retain-model"
    elif not retrained.scores.get("membership_auc"):
        not_available["privleak"] = f"{retrained.name} has no AUC above 0"
    else:
        found["privleak"] = metrics.privacy_leak(auc, retrained.scores["membership_auc"])
    of_retrained = None if retrained is None else {name: retrained.scores.get(name) for name in NAMES}
    return {"scores": found, "retrained_scores": of_retrained, "not_available": not_available}


def muse_page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    reasons, retrained = results["not_available"], results["retrained_scores"]
    columns = ["score", "model", *(["retrained"] if retrained else [])]
    lines = []
    for name, title in NAMES.items():
        value = f"not available: {reasons[name]}" if name in reasons else results["scores"][name]
        lines.append([title, value, *([retrained[name]] if retrained else [])])
    return "\n".join(["# MUSE\n", facts(results, "model", "retain_model", "data"), markdown_table(columns, lines)])
