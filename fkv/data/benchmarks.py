"""Questions with known answers: AIME, MATH500, GSM8K and the like, from a file or the hub."""

import dataclasses
import string

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


def load(source: Source, instruction: str = INSTRUCTION) -> Benchmark:
    """Reads a benchmark.

    GSM8K's answers, which end in `#### n`, are cut to the n. Where there are wrong answers, all are
    put below the question in an order that is the same every time, and the letter is asked for.

    Args:
      instruction: put before each question, with a blank between.

    Raises:
      UserError: it can't be read, lacks a column, or no row can be used.
    """
    path = source.path
    rows = sources.open_rows(path, source.split, source.subset)
    columns = (source.question, source.answer, *source.wrong)
    fields = [sources.column(rows, name, path) for name in columns]
    names = [str(name) for name in rows["id"]] if "id" in rows.column_names else []
    if len(set(names)) < len(rows):  # none, or some that name two rows
        names = range(len(rows))
    questions, unusable = [], []
    for i, (name, *values) in enumerate(zip(names, *fields, strict=True)):
        asked, *answers = values
        if not isinstance(asked, str) or not asked.strip():
            unusable.append((i, f"{source.question} is {asked!r}"))
            continue
        empty = [j for j, x in enumerate(answers, 1) if x is None or not str(x).strip()]
        if empty:
            unusable.append((i, f"{columns[empty[0]]} is {values[empty[0]]!r}"))
            continue
        reference, *wrong = (str(x).rsplit("####", 1)[-1].strip() for x in answers)
        if wrong:
            asked, reference = _choices(asked, reference, wrong, i)
        text = f"{instruction} {asked}".strip()
        questions.append(Question(str(name), text, reference, bool(wrong)))
    if not questions:
        raise UserError(f"{path}: none of its {len(rows)} rows has {' and '.join(columns)}")
    return Benchmark(questions, unusable)


def _choices(asked: str, right: str, wrong: list[str], row: int) -> tuple[str, str]:
    """The question with all answers below it, and the letter of the right one."""
    order = np.random.default_rng(row).permutation(1 + len(wrong))
    answers = [right, *wrong]
    lines = [
        f"{letter}) {answers[i]}" for letter, i in zip(string.ascii_uppercase, order, strict=False)
    ]
    letter = string.ascii_uppercase[order.tolist().index(0)]
    return "\n".join([asked.strip(), "", *lines, "", CHOOSE]), letter
