"""Four tasks of real text for launch.harness, all from what ships with Python.

    python -m tests.harness.real DIR --count=16

Pages are of Python's language reference; choices are between true and false continuations of them;
the needle is a number in a page, in the form of `ruler`'s niah_single; what is to be written are
the arguments of a function of the standard library whose source is given.
"""

import argparse
import pydoc_data.topics
import re
import sysconfig
from pathlib import Path

import numpy as np

from tests.harness import local

PAGE = 1600  # characters, about 400 tokens
WORDS = 10  # of a choice
KEYS = "amber birch cedar delta ember fjord grove heath islet jetty knoll lagoon marsh".split()
PARAGRAPH = re.compile(r"\n\s*\n")


def pages(rng: np.random.Generator) -> list[str]:
    """Pages of the reference in random order: whole paragraphs of prose, on one line each."""
    found = []
    for _, text in sorted(pydoc_data.topics.topics.items()):
        page = ""
        for part in PARAGRAPH.split(text):
            line = " ".join(part.split())
            if not re.fullmatch(r"[A-Z].{60,}[.:]", line):
                continue  # headings, code and grammars
            page += line + "\n"
            if len(page) >= PAGE:
                found.append(page)
                page = ""
    return [found[i] for i in rng.permutation(len(found))]


def functions(rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Source, the name of a function in its first half, and the function's arguments."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for one in re.finditer(r"^ *def ([a-z]\w{5,})\((\w+, \w+(?:, \w+)?)\):$", text, re.M):
            source = text[max(0, one.start() - 300) : one.start() - 300 + PAGE]
            if one.start() >= 300 and source.count(f"{one[1]}(") == 1 and len(source) == PAGE:
                found.append((source[source.index("\n") + 1 :], one[1], one[2]))
    return [found[i] for i in rng.permutation(len(found))]


def documents(count: int, seed: int = 0) -> dict[str, list[dict]]:
    """Documents for each task of `local`."""
    rng = np.random.default_rng(seed)
    text = pages(rng)
    if len(text) < 4 * count:
        raise SystemExit(f"--count={count}: there are {len(text)} pages, and 4 a document")
    found = {name: [] for name in local.TASKS}
    for i in range(count):
        found["pages"].append({"page": text[4 * i]})
        *begin, last = text[4 * i + 1].splitlines()
        others = (text[4 * i + j].splitlines()[-1] for j in (2, 3))
        ends = [" ".join(x.split()[:WORDS]) for x in (last, *others)]
        order = rng.permutation(len(ends))
        found["choose"].append({
            "notes": "\n".join(begin) + "\n", "question": "How does this go on?",
            "choices": [ends[j] for j in order], "answer": int(np.argmin(order)),
        })  # fmt: skip
        *lines, last = text[4 * i + 2].splitlines()
        key, number = KEYS[i % len(KEYS)], int(rng.integers(10**6, 10**7))
        lines.insert(
            int(rng.integers(len(lines) // 2 + 1)),
            f"One of the special magic numbers for {key} is: {number}.",
        )
        ask = f"What is the special magic number for {key} mentioned in the provided text?"
        found["needle"].append({
            "input": "\n".join([*lines, last, ask]), "outputs": [str(number)],
            "gen_prefix": f"The special magic number for {key} mentioned in the provided text is",
            "max_length": 512,
        })  # fmt: skip
    for source, name, given in functions(rng)[:count]:
        asked = f"{source}\n\n# Again:\ndef {name}("
        found["write"].append({"text": asked, "answer": f"{given}):"})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--count", type=int, default=16, help="documents of each task")
    args = parser.parse_args(argv)
    some = documents(args.count)
    local.write_tasks(args.dir, some, lengths=(512,))
    for name, docs in some.items():
        print(f"{args.dir}/{name}.yaml: {len(docs)} documents")


if __name__ == "__main__":
    main()
