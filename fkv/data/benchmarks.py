"""Questions with known answers: AIME, MATH500, GSM8K and the like, from a file or the hub."""

import dataclasses
import decimal
import numbers
import reprlib
import string
from typing import Any

import numpy as np

from fkv.data import sources
from fkv.errors import UserError

CHOOSE = "Answer with the letter of the right choice."


@dataclasses.dataclass(frozen=True)
class Source:
    """A benchmark's file or data set, and its columns; `wrong` are those of wrong choices."""

    path: str
    split: str
    subset: str = ""
    question: str = "problem"
    answer: str = "answer"
    wrong: tuple[str, ...] = ()


_GPQA = (
    "gpqa_diamond", "Question", "Correct Answer",
    ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
)  # fmt: skip
KNOWN = {
    "aime24": Source("HuggingFaceH4/aime_2024", "train"),
    "aime25": Source("math-ai/aime25", "test"),
    "math500": Source("HuggingFaceH4/MATH-500", "test"),
    "gsm8k": Source("openai/gsm8k", "test", "main", "question"),
    "gpqa": Source("Idavidrein/gpqa", "train", *_GPQA),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question."""

    id: str
    text: str  # the user's message, instruction included
    answer: str  # the reference
    choice: bool = False  # whether it is the letter of one of the choices in the text


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Questions, and unusable rows: (row, reason)."""

    questions: list[Question]
    unusable: list[tuple[int, str]]


def known(name: str, split: str, subset: str, question: str, answer: str) -> Source:
    """The source of this name in `KNOWN`, or else a file or hub id with these columns."""
    return KNOWN.get(name) or Source(name, split, subset, question, answer)


def words(value: Any) -> str | None:
    """A string, UTF-8 bytes, or a list of one of these, as text; else, and for blanks, None."""
    if isinstance(value, list | tuple | np.ndarray) and len(value) == 1:
        return words(value[0])
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) and value.strip() else None


def text(value: Any) -> str | None:
    """The `words` of a value, or its finite number written out: 12.0 as 12, 1e-05 as 0.00001."""
    if isinstance(value, list | tuple | np.ndarray) and len(value) == 1:
        return text(value[0])
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, decimal.Decimal) and value.is_finite():
        plain = f"{value:f}"
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    if isinstance(value, float | np.floating) and np.isfinite(value):
        return np.format_float_positional(value, trim="-")
    return words(value)


def reference(value: Any) -> str | None:
    """The `text` of a right answer; for GSM8K's, which end in `#### n`, the n."""
    found = text(value)
    return found and (found.rsplit("####", 1)[-1].strip() or None)


def load(source: Source, instruction: str) -> Benchmark:
    """Reads a benchmark, with the instruction and a space before each question.

    Multiple choices follow the question in a fixed order.

    Raises:
      UserError: it can't be read, lacks a column, or has no usable row.
    """
    path = source.path
    rows = sources.open_rows(path, source.split, source.subset)
    names = (source.question, source.answer, *source.wrong)
    reads = (words, text if source.wrong else reference, *[text] * len(source.wrong))
    columns = [sources.column(rows, name, path) for name in names]
    ids = sources.column(rows, "id", path) if "id" in rows.column_names else []
    ids = [text(x) for x in ids]
    if None in ids or len(set(ids)) < len(rows):
        ids = [str(i) for i in range(len(rows))]
    questions, unusable = [], []
    for i, values in enumerate(zip(*columns, strict=True)):
        found = [read(value) for read, value in zip(reads, values, strict=True)]
        if None in found:
            j = found.index(None)
            unusable.append((i, f"{names[j]} is {reprlib.repr(values[j])}"))
            continue
        asked, right, *wrong = found[0], *(x.strip() for x in found[1:])
        if right in wrong:
            unusable.append((i, f"{source.wrong[wrong.index(right)]} is also the right one"))
            continue
        if wrong:
            asked, right = _choices(asked, [right, *wrong], i)
        questions.append(Question(ids[i], f"{instruction} {asked}".strip(), right, bool(wrong)))
    if not questions:
        row, why = unusable[0] if unusable else (0, "the file is empty")
        raise UserError(
            f"{path}: none of its {len(rows)} rows has {' and '.join(names)} (row {row}: {why})"
        )
    return Benchmark(questions, unusable)


def _choices(asked: str, answers: list[str], row: int) -> tuple[str, str]:
    """The question with all answers below it, and the letter of `answers[0]`, the right one."""
    order = np.random.default_rng(row).permutation(len(answers)).tolist()
    letters = string.ascii_uppercase[: len(answers)]
    lines = [f"{letter}) {answers[i]}" for letter, i in zip(letters, order, strict=True)]
    return "\n".join([asked.strip(), "", *lines, "", CHOOSE]), letters[order.index(0)]
