"""Look-ups in real text: a line said earlier, begun again, whose rest only that line tells.

The context is a piece of a document, unchanged; the question repeats the beginning of one of its
lines, and the answer is what followed there. Whether a candidate is a look-up at all, the full
cache decides (`fkv.evaluation.recall`).
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fkv.data.documents import Document

_VALUE = r"""\d[\w.]*|r?b?'[^'\n]{2,60}'|r?b?"[^"\n]{2,60}\""""
# Kinds of lines, the most special first: the beginning of a line, and the rest that is asked for.
KINDS = {
    # a function's arguments
    "arguments": r"(\s*(?:async )?def \w+\((?:self, |cls, )?)(?!self\))([^\s()][^()\n]{2,60})\).*",
    # a key of a table
    "entry": rf"(\s*(?:'[^'\n]+'|\"[^\"\n]+\"|\d+|[\w.]+)\s*:\s)\s*({_VALUE}|[A-Z]\w+),.*",
    # a name that a value was given to
    "constant": rf"(\s*[A-Za-z_][\w.]*\s*=\s)\s*({_VALUE})\s*(?:#.*)?",
    # what something is called with
    "call": (r"(\s*(?:[\w.]+ = |return |yield |await |raise )?[\w.]+\()([^()\s][^()\n]{2,60})\).*"),
    # a name or a number in prose, after at least three words
    "name": (
        r"(\W*(?:[A-Za-z][\w'’-]*,? ){3,12})"
        r"([A-Z][a-z]+[\w-]*|[A-Z][A-Z\d]{2,}|\d{2,}[\w.]*)\b.*"
    ),
    # how a line of prose goes on after at least four words
    "word": r"(\W*(?:[A-Za-z][\w'’-]*[,;:]? ){4,12})([a-z]{6,})\b.*",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
_TOKENS = 8  # of an answer that count, at most


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A question about a context; int32.

    Attributes:
      kind: of `KINDS`.
      question: token ids that follow the context, and end where the answer begins.
      answer: token ids.
      line: the line that has the answer.
    """

    kind: str
    question: np.ndarray
    answer: np.ndarray
    line: str

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.question, self.answer])


@dataclasses.dataclass(frozen=True)
class Context:
    """A piece of a document that questions are asked about; int32.

    Attributes:
      document: its id.
      piece: which one of the document.
      ids: tokens [c].
      bare: tokens of the same piece without the lines that are asked for, at most c.
      lookups: candidates, whose lines lie in the first half.
    """

    document: str
    piece: int
    ids: np.ndarray
    bare: np.ndarray
    lookups: tuple[Lookup, ...]


@dataclasses.dataclass(frozen=True)
class Maker:
    """How contexts are cut and asked about.

    Attributes:
      tokenize: from a text to token ids, without special tokens.
      length: tokens of a context.
      room: most tokens of a question and its answer.
      most: candidates of a context.
      front: special tokens that every context begins with, as the tokenizer adds them to a text.
    """

    tokenize: Callable[[str], Sequence[int]]
    length: int
    room: int
    most: int
    front: tuple[int, ...] = ()


def contexts(found: Sequence[Document], maker: Maker, seed: int) -> Iterator[Context]:
    """Contexts with candidates: the first piece of all documents, the second of all, and so on."""
    waiting = [(document, _pieces(document.text, maker)) for document in found]
    for piece in itertools.count():
        left = []
        for document, pieces in waiting:
            lines = next(pieces, None)
            if lines is None:
                continue
            left.append((document, pieces))
            context = _context(document, piece, lines, maker, seed)
            if context is not None:
                yield context
        if not left:
            return
        waiting = left


def _pieces(text: str, maker: Maker) -> Iterator[list[str]]:
    """Lines of consecutive pieces of more than `length` tokens; what is left at the end is not."""
    lines, count = [], 0
    for line in text.split("\n"):
        lines.append(line)
        count += len(maker.tokenize(line + "\n"))
        if count > maker.length and len(maker.tokenize("\n".join(lines))) > maker.length:
            yield lines
            lines, count = [], 0


def _candidates(
    lines: Sequence[str], early: Callable[[int], bool], name: str
) -> list[tuple[int, str, re.Match]]:
    """(index, kind, match) of lines that can be asked for: kinds in turn, random ones of each.

    Args:
      early: whether the line of an index lies where it must.
      name: what their order depends on.
    """
    stripped = [line.strip() for line in lines]
    found = {kind: [] for kind in KINDS}
    for i, line in enumerate(lines):
        matches = ((kind, pattern.fullmatch(line)) for kind, pattern in _PATTERNS.items())
        kind, match = next(((kind, match) for kind, match in matches if match), ("", None))
        if match is None:
            continue
        begin = match[1].strip()
        unique = len(begin) >= 4 and sum(begin in other for other in stripped) == 1
        if unique and early(i):
            found[kind].append((i, kind, match))
    # Of each document by itself, whatever else is asked.
    for mine in found.values():
        mine.sort(key=lambda one: hashlib.sha256(f"{name} {one[0]}".encode()).digest())
    return [one for row in itertools.zip_longest(*found.values()) for one in row if one]


def _context(
    document: Document, piece: int, lines: list[str], maker: Maker, seed: int
) -> Context | None:
    """The context of a piece, or None if it has no candidates."""
    tokenize, length = maker.tokenize, maker.length - len(maker.front)
    text = "\n".join(lines)
    whole = list(tokenize(text))[:-1]  # the last token may merge with what follows it
    before = len(whole) - length  # tokens of the text that lie before the context

    def early(i):
        start, end = (len(tokenize("\n".join(lines[:j]) + "\n")) for j in (i, i + 1))
        return before < start and end <= before + length // 2

    kept, dropped = [], set()
    for i, kind, match in _candidates(lines, early, f"{seed} {document.id} {piece}"):
        if len(kept) == maker.most:
            break
        lookup = _lookup(kind, match, text, whole, tokenize)
        if lookup is not None and len(lookup.ids) <= maker.room:
            kept.append(lookup)
            dropped.add(i)
    if not kept:
        return None
    bare = tokenize("\n".join(line for i, line in enumerate(lines) if i not in dropped))[:-1]
    ids, bare = ([*maker.front, *x[-length:]] for x in (whole, bare))
    return Context(document.id, piece, _ids(ids), _ids(bare), tuple(kept))


def _lookup(
    kind: str, match: re.Match, text: str, whole: list[int], tokenize: Callable
) -> Lookup | None:
    """A look-up of a line, in the tokens that the line would have after the text."""

    def after(line):
        return list(tokenize(f"{text}\n{line}"))

    line, begin, answered = match[0], match[1].rstrip(), match[0][: match.end(2)]
    ids = after(line + "\n")
    start, end = (_common(ids, after(part)) for part in (begin, answered))
    if ids[: len(whole)] != whole or not len(whole) < start < end:
        return None
    return Lookup(kind, _ids(ids[len(whole) : start]), _ids(ids[start:end][:_TOKENS]), line)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)
