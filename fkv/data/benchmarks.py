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

# The paper's.
INSTRUCTION = (
    "Please solve the following problem step by step and put the final answer within \\boxed{}."
)


CHOOSE = "Answer with the letter of the right choice."


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a well-known benchmark lies on the hub, and its columns.

    Attributes:
      wrong: columns of wrong answers, for questions of which one of several answers is chosen.
    """

    path: str
    split: str
    subset: str = ""
    question: str = "problem"
    answer: str = "answer"
    wrong: tuple[str, ...] = ()


KNOWN = {
    "aime24": Source("HuggingFaceH4/aime_2024", "train"),
    "aime25": Source("math-ai/aime25", "test"),
    "math500": Source("HuggingFaceH4/MATH-500", "test"),
    "gsm8k": Source("openai/gsm8k", "test", "main", "question"),
    "gpqa": Source(
        "Idavidrein/gpqa",
        "train",
        "gpqa_diamond",
        "Question",
        "Correct Answer",
        ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      id: names it in results.
      text: what the user asks, instruction included.
      answer: the reference.
      choice: whether it is the letter of one of the answers that are given in the text.
    """

    id: str
    text: str
    answer: str
    choice: bool = False


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Questions, and the rows that could not be used: (row, why)."""

    questions: list[Question]
    unusable: list[tuple[int, str]]


def known(name: str, split: str, subset: str, question: str, answer: str) -> Source:
    """The source of a well-known name (see `KNOWN`), or of a file or hub id with these columns."""
    return KNOWN.get(name) or Source(name, split, subset, question, answer)


def words(value: Any) -> str | None:
    """The text that stands in a column: a string, UTF-8 bytes, or a list of one such; else None."""
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) and len(value) == 1:
        return words(value[0])
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) and value.strip() else None


def text(value: Any) -> str | None:
    """The text that stands in a column, or its number written out: 12.0 as 12, 1e-05 as 0.00001.

    None for all else: nothing, blanks, truth values, NaN, longer lists, dicts and times.
    """
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) and len(value) == 1:
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
    """The right answer that a column gives, None where there is none.

    That is its `text`, of which GSM8K's, which end in `#### n`, are cut to the n.
    """
    found = text(value)
    return found and (found.rsplit("####", 1)[-1].strip() or None)


def load(source: Source, instruction: str = INSTRUCTION) -> Benchmark:
    """Reads a benchmark.

    Where there are wrong answers, all are put below the question in an order that is the same every
    time, and the letter is asked for.

    Args:
      instruction: put before each question, with a blank between.

    Raises:
      UserError: it can't be read, lacks a column, or no row can be used.
    """
    path = source.path
    rows = sources.open_rows(path, source.split, source.subset)
    columns = (source.question, source.answer, *source.wrong)
    reads = (words, text if source.wrong else reference, *[text] * len(source.wrong))
    fields = [sources.column(rows, name, path) for name in columns]
    questions, unusable = [], []
    for i, (name, *values) in enumerate(zip(_names(rows, path), *fields, strict=True)):
        found = [read(value) for read, value in zip(reads, values, strict=True)]
        if None in found:
            j = found.index(None)
            unusable.append((i, f"{columns[j]} is {reprlib.repr(values[j])}"))
            continue
        asked, right, *wrong = found[0], *(x.strip() for x in found[1:])
        if right in wrong:
            unusable.append((i, f"{source.wrong[wrong.index(right)]} is the right one, too"))
            continue
        if wrong:
            asked, right = _choices(asked, right, wrong, i)
        questions.append(Question(name, f"{instruction} {asked}".strip(), right, bool(wrong)))
    if not questions:
        row, why = unusable[0] if unusable else (0, "there is none")
        raise UserError(
            f"{path}: none of its {len(rows)} rows has {' and '.join(columns)} (row {row}: {why})"
        )
    return Benchmark(questions, unusable)


def _names(rows: sources.Rows, path: str) -> list[str]:
    """Ids of the rows: those of the column `id`, or numbers if it does not name each row."""
    found = sources.column(rows, "id", path) if "id" in rows.column_names else []
    names = [text(x) for x in found]
    whole = None not in names and len(set(names)) == len(rows)
    return names if whole else [str(i) for i in range(len(rows))]


def _choices(asked: str, right: str, wrong: list[str], row: int) -> tuple[str, str]:
    """The question with all answers below it, and the letter of the right one."""
    order = np.random.default_rng(row).permutation(1 + len(wrong))
    answers = [right, *wrong]
    lines = [
        f"{letter}) {answers[i]}" for letter, i in zip(string.ascii_uppercase, order, strict=False)
    ]
    letter = string.ascii_uppercase[order.tolist().index(0)]
    return "\n".join([asked.strip(), "", *lines, "", CHOOSE]), letter
