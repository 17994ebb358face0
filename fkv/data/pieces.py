"""Traces of plain text: documents cut into sequences of one length."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fkv.data.documents import Document

WAYS = ("pieces", "first", "packed")


@dataclasses.dataclass(frozen=True)
class Cutter:
    """How documents become sequences of token ids.

    Attributes:
      tokenize: from a text to its token ids, without special tokens.
      length: T, tokens of every sequence.
      front: special tokens that every sequence begins with, as the tokenizer adds them to a text.
      end: end of a document, in packed ones.
    """

    tokenize: Callable[[str], Sequence[int]]
    length: int
    front: tuple[int, ...] = ()
    end: int | None = None

    @property
    def room(self) -> int:
        """Tokens of the text in a sequence."""
        return self.length - len(self.front)

    def trace(self, ids: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.asarray(self.front, np.int32), np.asarray(ids, np.int32)])


Trace = tuple[Document, int, np.ndarray]  # its (first) document, the number of the piece, token ids


def cut(documents: Sequence[Document], cutter: Cutter, way: str, seed: int) -> Iterator[Trace]:
    """Sequences of `cutter.length` tokens, in an order that does not depend on how many are taken.

    Args:
      way: `pieces`: consecutive pieces of each document, of all documents in turn, the pieces of
        each in an order of its own; what is left over at the end is left out, as are documents that
        are shorter. `first`: of those the first tokens only. `packed`: all documents one after
        another, with the end of a document between them.
    """
    if way == "packed":
        return _packed(documents, cutter)
    return _in_turn(documents, cutter, way == "first", seed)


def _in_turn(
    documents: Sequence[Document], cutter: Cutter, first: bool, seed: int
) -> Iterator[Trace]:
    waiting = documents
    kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # ids [pieces, tokens], and their order
    for turn in itertools.count():
        left = []
        for document in waiting:
            if turn == 0:
                ids = np.asarray(cutter.tokenize(document.text), np.int32)
                pieces = min(len(ids) // cutter.room, 1 if first else len(ids))
                if not pieces:
                    continue
                ids = ids[: pieces * cutter.room].reshape(pieces, cutter.room)
                rng = np.random.default_rng([seed, int(document.id, 16)])
                kept[document.id] = ids, rng.permutation(pieces)
            ids, order = kept[document.id]
            yield document, int(order[turn]), cutter.trace(ids[order[turn]])
            if turn + 1 < len(order):
                left.append(document)
            else:
                del kept[document.id]
        if not left:
            return
        waiting = left


def _packed(documents: Sequence[Document], cutter: Cutter) -> Iterator[Trace]:
    held: list[int] = []
    begun, piece = None, 0
    for document in documents:
        begun = begun if held else (document, 0)
        held += [*cutter.tokenize(document.text), *([] if cutter.end is None else [cutter.end])]
        start = 0
        while len(held) - start >= cutter.room:
            first, piece = begun
            yield first, piece, cutter.trace(held[start : start + cutter.room])
            start += cutter.room
            begun = (document, piece + 1 if first is document else 0)
        held = held[start:]
