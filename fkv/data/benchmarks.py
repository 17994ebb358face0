"""Questions with known answers: AIME, MATH500, GSM8K and the like, from a file or the hub."""

import dataclasses

from fkv.data import sources
from fkv.errors import UserError

# The paper's.
INSTRUCTION = (
    "Please solve the following problem step by step and put the final answer within \\boxed{}."
)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      id: names it in results.
      text: what the user asks, instruction included.
      answer: the reference.
    """

    id: str
    text: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Questions, and the rows that could not be used: (row, why)."""

    questions: list[Question]
    unusable: list[tuple[int, str]]


def load(
    path: str,
    split: str = "test",
    subset: str = "",
    question: str = "problem",
    answer: str = "answer",
    instruction: str = INSTRUCTION,
) -> Benchmark:
    """Reads a benchmark.

    Args:
      question, answer: the columns. GSM8K's answers, which end in `#### n`, are cut to the n.
      instruction: put before each question, with a blank between.

    Raises:
      UserError: it can't be read, lacks a column, or no row can be used.
    """
    rows = sources.open_rows(path, split, subset)
    asked_n, reference_n = (sources.column(rows, name, path) for name in (question, answer))
    names = [str(name) for name in rows["id"]] if "id" in rows.column_names else []
    if len(set(names)) < len(rows):  # none, or some that name two rows
        names = range(len(rows))
    questions, unusable = [], []
    for i, (name, asked, reference) in enumerate(zip(names, asked_n, reference_n, strict=True)):
        if not isinstance(asked, str) or not asked.strip():
            unusable.append((i, f"{question} is {asked!r}"))
        elif reference is None or not str(reference).strip():
            unusable.append((i, f"{answer} is {reference!r}"))
        else:
            reference = str(reference).rsplit("####", 1)[-1].strip()
            questions.append(Question(str(name), f"{instruction} {asked}".strip(), reference))
    if not questions:
        raise UserError(f"{path}: none of its {len(rows)} rows has both {question} and {answer}")
    return Benchmark(questions, unusable)
