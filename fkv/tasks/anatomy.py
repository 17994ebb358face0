"""What each word of a ledger walk is for, and how that looks on a page."""

from collections.abc import Sequence
from html import escape

from fkv.tasks.ledger import FILLERS, MARKS, Problem

# What a word is for, with the colour that it has on a page.
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
    """What each word of prompt, thought and answer is for: a key of `COLOURS`.

    A `fact` is on the path, an `idle fact` isn't; a `mark` is one that the thought writes down,
    with its sum.
    """
    role, path = ["frame"], {}
    for entry in _entries(problem.prompt):
        if entry[0] == "note":
            kind = "remark"
        elif entry[1] == "=":
            kind = "fee"
        else:
            kind = "fact"
            path[entry[0]] = len(role), entry
        role += [kind] * len(entry)
    used, words, at = set(), problem.thought, 0
    role += ["frame"] * (len(problem.prompt) - len(role))
    while at < len(words):
        if words[at] in FILLERS:
            role.append("filler")
            at += 1
            continue
        used.add(words[at])
        marked = words[at + 2] in MARKS
        role += ["hop"] * (5 + marked) + ["mark"] * (2 * marked)
        at += 5 + 3 * marked
    for node, (start, entry) in path.items():
        if node not in used:
            role[start : start + len(entry)] = ["idle fact"] * len(entry)
    return (*role, *["answer"] * len(problem.answer))


def _entries(prompt: Sequence[str]) -> list[tuple[str, ...]]:
    """The entries of a ledger, each with its semicolon."""
    found, entry = [], ()
    for word in prompt[1:]:
        entry += (word,)
        if word == ";":
            found.append(entry)
            entry = ()
    return found


def first_error(words: Sequence[str], problem: Problem) -> int | None:
    """Where the words that a model wrote after the prompt first leave the right path.

    Fillers are free: any number of any of them may stand anywhere in the thought.

    Returns:
      Index of the first wrong word, the number of words if they only end too early, and None if
      all is right.
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


def html(words: Sequence[str], colours: Sequence[str]) -> str:
    """Words on coloured grounds, for a notebook.

    Args:
      colours: one CSS colour a word.
    """
    spans = (
        f'<span style="background:{colour};color:black;padding:1px 3px">{escape(word)}</span>'
        for word, colour in zip(words, colours, strict=True)
    )
    return f'<div style="font-family:monospace;line-height:1.7">{" ".join(spans)}</div>'


def story(problem: Problem) -> str:
    """The whole problem as HTML: a line for what the words are for, the prompt, the thought."""
    words = (*problem.prompt, *problem.thought, *problem.answer)
    begin = len(problem.prompt)
    colours = [COLOURS[role] for role in roles(problem)]
    parts = (
        ("what the colours say", html(list(COLOURS), list(COLOURS.values()))),
        ("prompt", html(words[:begin], colours[:begin])),
        ("chain of thought and answer", html(words[begin:], colours[begin:])),
    )
    return "".join(f"<p><b>{title}</b></p>{body}" for title, body in parts)


def verdict(title: str, words: Sequence[str], problem: Problem) -> str:
    """What a model wrote, as HTML: right up to the first error, which is red, and pale after it."""
    wrong = first_error(words, problem)
    at = len(words) if wrong is None else wrong
    colours = ["#c7e9c0"] * at + ["#fb6a4a"] * (at < len(words))
    colours += ["#f5f5f5"] * (len(words) - len(colours))
    says = "right" if wrong is None else f"wrong from word {at + 1} of {len(words)}"
    return f"<p><b>{escape(title)}</b>: {says}</p>{html(words, colours)}"
