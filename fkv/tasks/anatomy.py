"""The role of each word of a ledger walk, shown as HTML."""

import itertools
from collections.abc import Iterable, Sequence
from html import escape

from fkv.tasks.ledger import DIGITS, FILLERS, MARKS, Problem

# Roles and their colours.
COLOURS = {
    "fact": "#9ecae1",
    "idle fact": "#dddddd",
    "remark": "#dddddd",
    "fee": "#fdd0a2",
    "frame": "#ffffff",
    "filler": "#f5f5f5",
    "hop": "#deebf7",
    "mark": "#c7e9c0",
    "answer": "#fff7bc",
}


def roles(problem: Problem) -> tuple[str, ...]:
    """The role of each word of prompt, thought and answer: a key of `COLOURS`.

    A `fact` is on the path, an `idle fact` is not; a `mark` is one that the thought writes down,
    with its sum.
    """
    role = ["frame"]
    for entry in " ".join(problem.prompt[1:-3]).split(";")[:-1]:
        name, kind, *rest = entry.split()
        fact = "fact" if name in problem.thought else "idle fact"
        what = "remark" if name == "note" else "fee" if kind == "=" else fact
        role += [what] * (3 + len(rest))
    role += ["frame"] * 3
    for before, word in itertools.pairwise(("<think>", *problem.thought)):
        marked = (before in DIGITS and word in MARKS) or (before in MARKS and role[-1] == "mark")
        role.append("filler" if word in FILLERS else "mark" if marked else "hop")
    return (*role, *["answer"] * len(problem.answer))


def first_error(words: Sequence[str], problem: Problem) -> int | None:
    """Where the words that a model generated first deviate from the right path.

    Fillers may be anywhere in the thought.

    Returns:
      Index of the first wrong word, the number of words if they only end too early, or None if
      everything is right.
    """
    right = [w for w in problem.thought if w not in FILLERS] + list(problem.answer)
    done = 0
    for i, word in enumerate(words):
        if word in FILLERS and "</think>" not in right[:done]:
            continue
        if done == len(right) or word != right[done]:
            return i
        done += 1
    return None if done == len(right) else len(words)


def html(words: Iterable[str], colours: Iterable[str]) -> str:
    """Words as HTML, each on a background of its CSS colour."""
    spans = (
        f'<span style="background:{colour};color:black;padding:1px 3px">{escape(word)}</span>'
        for word, colour in zip(words, colours, strict=True)
    )
    return f'<div style="font-family:monospace;line-height:1.7">{" ".join(spans)}</div>'


def story(problem: Problem) -> str:
    """The whole problem as HTML: the roles, the prompt, the thought."""
    colours = [COLOURS[role] for role in roles(problem)]
    begin = len(problem.prompt)
    parts = {
        "roles": html(COLOURS, COLOURS.values()),
        "prompt": html(problem.prompt, colours[:begin]),
        "chain of thought and answer": html(problem.thought + problem.answer, colours[begin:]),
    }
    return "".join(f"<p><b>{title}</b></p>{body}" for title, body in parts.items())


def verdict(title: str, words: Sequence[str], problem: Problem) -> str:
    """A model's words as HTML: green up to the first error, which is red, and pale after it."""
    wrong = first_error(words, problem)
    at = len(words) if wrong is None else wrong
    colours = ["#c7e9c0"] * at + ["#fb6a4a"] * (at < len(words))
    colours += ["#f5f5f5"] * (len(words) - len(colours))
    says = "right" if wrong is None else f"wrong from word {at + 1} of {len(words)}"
    return f"<p><b>{escape(title)}</b>: {says}</p>{html(words, colours)}"
