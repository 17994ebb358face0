"""Look-ups made from text: what is asked, where its answer lies, and what is left out."""

import re

import numpy as np
import pytest

from fkv.data import lookups
from fkv.data.documents import Document

IDS = {}


def tokenize(text):
    """Words with the blanks before them, single signs and digits; ids in order of appearance."""
    found = re.findall(r" ?[A-Za-z_]+|\d|\n|.", text)
    return [IDS.setdefault(word, len(IDS)) for word in found]


def words(ids):
    names = list(IDS)
    return "".join(names[i] for i in ids)


def filler(i, count):
    return [f"    x{i}_{j}[y, z{j}]" for j in range(count)]


TABLE = ["COLOURS = {", "    'red': 0x1234,", "    'green': 0x77,", "    'blue': Sky,", "}"]
CODE = [
    *filler(0, 4), *TABLE, "    limit = 4096  # of one", "def area(self, width, height):",
    "    # this was first written by Ada for the engine", *filler(1, 6), "def area2(self):",
    *filler(2, 14), "LATE = 77", *filler(3, 80),
]  # fmt: skip
ASKED = {
    "    'red':": ("entry", " 0x1234"),
    "    'green':": ("entry", " 0x77"),
    "    'blue':": ("entry", " Sky"),
    "    limit =": ("constant", " 4096"),
    "def area(self,": ("arguments", " width, height"),
    "    # this was first written by": ("name", " Ada"),
}


def made(lines=CODE, length=500, room=40, most=12, front=(), seed=0):
    maker = lookups.Maker(tokenize, length, room, most, front)
    document = Document("code", "a.py", "\n".join(lines))
    return list(lookups.contexts([document], maker, seed))


def test_lines_of_the_first_half_are_asked_for():
    context = made()[0]
    text = words(context.ids)
    assert len(context.ids) == 500 and text in "\n".join(CODE)
    found = {}
    for one in context.lookups:
        question = words(one.question)
        found[question[question.index("\n") + 1 :]] = one.kind, words(one.answer)
        # The question follows the context as text, and is a line of its first half.
        assert one.line in words(context.ids[:250]).split("\n")
        assert question.endswith("\n" + one.line[: one.line.index(words(one.answer))])
        assert text + question.partition("\n")[0] + "\n" in "\n".join(CODE)  # to a line's end
    assert found == ASKED  # not `area2`, whose answer is `self`, nor LATE


def test_the_bare_context_lacks_the_lines_and_nothing_else():
    context = made()[0]
    text, bare = words(context.ids).split("\n"), words(context.bare).split("\n")
    lines = [one.line for one in context.lookups]
    assert not set(lines) & set(bare) and len(context.bare) <= len(context.ids)
    kept = [line for line in text[1:] if line not in lines]  # the first is cut
    assert bare[-len(kept) :] == kept


def test_a_line_that_begins_like_another_is_not_asked_for():
    lines = ["LATE = 31" if line.startswith("    limit") else line for line in CODE]
    context = made(lines)[0]
    assert "LATE = 77" in words(context.ids)
    assert not [one for one in context.lookups if "LATE" in one.line]


def test_limits():
    assert len(made(most=2)[0].lookups) == 2
    assert all(len(one.ids) <= 12 for one in made(room=12)[0].lookups)
    front = made(front=(7, 8))[0]
    assert front.ids[:2].tolist() == front.bare[:2].tolist() == [7, 8] and len(front.ids) == 500
    assert made(length=10_000) == []  # a document that is shorter


def test_kinds_take_turns_and_the_order_depends_on_the_seed():
    orders = [tuple(x.line for x in made(seed=seed)[0].lookups) for seed in range(5)]
    assert len({tuple(sorted(order)) for order in orders}) == 1 < len(set(orders))
    kinds = [x.kind for x in made(most=4)[0].lookups]
    assert sorted(kinds) == ["arguments", "constant", "entry", "name"]


def test_pieces_of_all_documents_come_in_turn():
    maker = lookups.Maker(tokenize, 500, 40, 12)
    texts = ["\n".join(line.replace("x", name) for line in CODE * 2) for name in "ab"]
    found = list(lookups.contexts([Document("code", "", x) for x in texts], maker, 0))
    assert [x.piece for x in found] == sorted(x.piece for x in found)
    assert len({(x.document, x.piece) for x in found}) == len(found) > 2
    alone = list(lookups.contexts([Document("code", "", texts[1])], maker, 0))
    mine = [x for x in found if x.document == alone[0].document]
    for x, y in zip(mine, alone, strict=True):
        np.testing.assert_array_equal(x.ids, y.ids)
        assert [one.line for one in x.lookups] == [one.line for one in y.lookups]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("    port = 80", "constant"), ("NAME: str = 'x y'", None), ("x = f(3)", None),
        ("    x = f(3, y)", "call"), ("return self.f('ab')", "call"), ("f(g(x), 3)", None),
        ("    'a b': 12,", "entry"), ("    12: 'bzip2',  # why", "entry"),
        ("    'a': [1, 2],", None),
        ("    def f(self, a, *b):", "arguments"), ("def f(a) -> int:", None),
        ("def get(key, default=None) -> int:", "arguments"), ("    def f(self):", None),
        ("* The man who went to Paris in May", "name"), ("see RFC 2822", None),
        ("it was said in the year 1815, when", "name"), ("All of this is lower case", None),
        ("all of this is really lower case", "word"), ("not really enough words", None),
    ],
)  # fmt: skip
def test_kinds_of_lines(line, kind):
    matches = [k for k, pattern in lookups._PATTERNS.items() if pattern.fullmatch(line)]
    assert (matches[0] if matches else None) == kind
