"""Documents cut into sequences, against slow and obvious versions."""

import itertools

import numpy as np
import pytest

from fkv.data.documents import Document
from fkv.data.pieces import Cutter, cut

LENGTHS = (3, 25, 8, 0, 16, 7, 41)


def tokenize(text):
    return [int(x) for x in text.split()]


# Document i has the tokens 100 i, 100 i + 1, ...
DOCUMENTS = [
    Document("k", str(i), " ".join(str(100 * i + j) for j in range(n)))
    for i, n in enumerate(LENGTHS)
]


def made(way, seed=0, documents=DOCUMENTS, **settings):
    cutter = Cutter(tokenize, **{"length": 8} | settings)
    return [(d.source, i, ids.tolist()) for d, i, ids in cut(documents, cutter, way, seed)]


@pytest.mark.parametrize("front", [(), (9,)])
def test_pieces_are_consecutive_and_documents_take_turns(front):
    found, room = made("pieces", length=8 + len(front), front=front), 8
    wanted = {
        (str(i), j): [*front, *range(100 * i + room * j, 100 * i + room * (j + 1))]
        for i, n in enumerate(LENGTHS)
        for j in range(n // room)
    }
    assert {(source, j): ids for source, j, ids in found} == wanted and len(found) == len(wanted)
    order = [source for source, _, _ in found]
    assert order == ["1", "2", "4", "6", "1", "4", "6", "1", "6", "6", "6"]
    # Not always from the front.
    assert {tuple(j for x, j, _ in made("pieces", seed) if x == "6") for seed in range(4)} - {
        (0, 1, 2, 3, 4)
    }


def test_the_first_tokens_of_each_document():
    assert made("first") == [(str(i), 0, [*range(100 * i, 100 * i + 8)]) for i in (1, 2, 4, 6)]


@pytest.mark.parametrize(("end", "front"), [(None, ()), (77, ()), (77, (9,))])
def test_packed_documents_follow_one_another(end, front):
    found = made("packed", length=8 + len(front), front=front, end=end)
    stream = [x for d in DOCUMENTS for x in (*tokenize(d.text), *([] if end is None else [end]))]
    chunks = [stream[i : i + 8] for i in range(0, len(stream) - 7, 8)]
    assert [ids for _, _, ids in found] == [[*front, *chunk] for chunk in chunks]
    keys = [(source, i) for source, i, _ in found]
    assert len(set(keys)) == len(keys)
    for (source, _), chunk in zip(keys, chunks, strict=True):
        first = next(x for x in chunk if x != end)
        assert chunk[0] == end or int(source) == first // 100


@pytest.mark.parametrize("way", ["pieces", "packed"])
def test_what_comes_first_does_not_depend_on_how_much_is_taken(way):
    asked = []

    def counted(text):
        asked.append(text)
        return tokenize(text)

    taken = list(itertools.islice(cut(DOCUMENTS, Cutter(counted, 8), way, 0), 2))
    assert [ids.tolist() for _, _, ids in taken] == [ids for _, _, ids in made(way)[:2]]
    assert len(asked) < len(DOCUMENTS)  # those behind are not even tokenized
    assert all(ids.dtype == np.int32 for _, _, ids in taken)


@pytest.mark.parametrize("way", ["pieces", "first", "packed"])
def test_no_document_gives_nothing(way):
    assert made(way, documents=[]) == [] == made(way, documents=DOCUMENTS[:1])
