"""Questions with their right answers and, where a file has them, the same in other words and wrong ones."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from simnpo.data import Example, encode
from simnpo.errors import UserError

logger = logging.getLogger(__name__)

Row = tuple[str, dict[str, Any]]  # where it stands, "file:line", and what it holds


@dataclass(frozen=True)
class QuestionSet:
    """A set of questions as sequences for the model.

    Attributes:
        answers: (n,) each question with its right answer.
        paraphrased: (n,) with the right answer in other words; the answers themselves where the rows have none.
        perturbed: (n, k) with k wrong answers; None where the rows have none.
    """

    answers: list[Example]
    paraphrased: list[Example]
    perturbed: list[list[Example]] | None

    def sequences(self) -> list[Example]:
        """Every sequence once, in a fixed order."""
        return [*self.answers, *self._other_paraphrases(), *(e for wrong in self.perturbed or [] for e in wrong)]

    def split(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[list[Any]] | None]:
        """Values of `sequences()` as those of answers, paraphrased and perturbed."""
        n = len(self.answers)
        answers, rest = list(values[:n]), list(values[n:])
        paraphrased = answers
        if self._other_paraphrases():
            paraphrased, rest = rest[:n], rest[n:]
        if self.perturbed is None:
            return answers, paraphrased, None
        k = len(self.perturbed[0])
        return answers, paraphrased, [rest[i * k : (i + 1) * k] for i in range(n)]

    def _other_paraphrases(self) -> list[Example]:
        return [] if self.paraphrased is self.answers else self.paraphrased


def encode_questions(rows: Iterable[Row], tokenizer: Any, max_length: int) -> QuestionSet:
    """Tokenises rows of any format `simnpo.data` reads; `paraphrased_answer` and `perturbed_answer` need questions.

    Raises:
        UserError: a row is malformed, an answer tokenises to nothing, or the rows differ in which answers they have;
            names file and line.
    """
    answers, paraphrased, perturbed = [], [], []
    for where, row in rows:
        answers.append(encode(row, tokenizer, where, max_length))
        question = next((row[key] for key in ("question", "prompt") if key in row), None)
        if question is None and {"paraphrased_answer", "perturbed_answer"} & row.keys():
            raise UserError(f"{where}: paraphrased_answer and perturbed_answer need a question, found {sorted(row)}")
        if "paraphrased_answer" in row:
            paraphrased.append(
                _answered(question, row["paraphrased_answer"], tokenizer, f"{where}, paraphrased_answer", max_length)
            )
        wrong = row.get("perturbed_answer", [])
        if not isinstance(wrong, list):
            raise UserError(f"{where}: perturbed_answer must be a list of strings, got {type(wrong).__name__}")
        perturbed.append(
            [
                _answered(question, text, tokenizer, f"{where}, perturbed_answer[{j}]", max_length)
                for j, text in enumerate(wrong)
            ]
        )
        if len(wrong) != len(perturbed[0]):
            raise UserError(
                f"{where}: perturbed_answer has {len(wrong)} answers, expected {len(perturbed[0])} "
                f"as in {answers[0].id}"
            )
        if paraphrased and len(paraphrased) != len(answers):
            lacking = answers[0].id if "paraphrased_answer" in row else where
            raise UserError(f"{lacking}: paraphrased_answer is missing, and other rows of the file have it")
    _warn_about_cut([*answers, *paraphrased, *(one for wrong in perturbed for one in wrong)], max_length)
    has_wrong = bool(perturbed and perturbed[0])
    return QuestionSet(answers, paraphrased or answers, perturbed if has_wrong else None)


def _warn_about_cut(examples: Sequence[Example], max_length: int) -> None:
    cut = [example.id for example in examples if example.is_cut]
    if cut:
        logger.warning("%d of %d sequences are cut at max_length=%d, the first is %s",
                       len(cut), len(examples), max_length, cut[0])  # fmt: skip


def _answered(question: Any, answer: Any, tokenizer: Any, where: str, max_length: int) -> Example:
    return encode({"question": question, "answer": answer}, tokenizer, where, max_length)
