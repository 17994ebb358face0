"""Text in pieces: whole characters, stop strings, and the text of all tokens at the end."""

import numpy as np
import pytest

pytest.importorskip("transformers")

import tokenizers
from tokenizers import decoders, pre_tokenizers

from fkv.models.detokenizing import Detokenizer
from tests.models.test_texts import IDS, make


@pytest.fixture(scope="module")
def letters():
    """One token a byte."""
    import transformers

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces(tokenizer, tokens, size, stop=()):
    """The pieces, and how many tokens belong to the answer."""
    text, found, count = Detokenizer(tokenizer, stop), [], 0
    for i in range(0, max(len(tokens), 1), size):
        piece, taken = text.add(tokens[i : i + size], last=i + size >= len(tokens))
        found.append(piece)
        count += taken
        if text.stopped:
            break
    return found, count


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pieces_are_whole_characters_and_together_the_text(letters, size):
    text = "aé€𝄞 b" * 6
    found, count = pieces(letters, ids(letters, text), size)
    assert "".join(found) == text and count == len(text.encode())
    assert not any("\N{REPLACEMENT CHARACTER}" in x for x in found)
    assert size > 10 or sum(map(bool, found)) > 6
    # A character of its own that stands for unknown ones doesn't wait for ever.
    unknown = "\N{REPLACEMENT CHARACTER}" * 9
    found, _ = pieces(letters, ids(letters, unknown), size)
    assert "".join(found) == unknown and (size > 7 or len([x for x in found if x]) > 1)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_noise_is_the_text_of_all_tokens(letters, size):
    noise = np.random.default_rng(size).integers(256, size=300).tolist()
    found, count = pieces(letters, noise, size)
    assert "".join(found) == letters.decode(noise) and count == 300


def test_words_keep_what_is_between_them():
    tokenizer = make()
    tokens = [IDS[x] for x in "<s> one </s> <s> two six </s> one one </s>".split()]
    for size in (1, 2, 3, 10):
        assert "".join(pieces(tokenizer, tokens, size)[0]) == "one two six one one"
    assert Detokenizer(None).add([1, 2]) == ("", 2)


STOPS = [
    ("one two", [" t"], "one", 5),
    ("one two", ["x", "wo"], "one t", 7),
    ("abcabd", ["abd"], "abc", 6),
    ("aab", ["ab"], "a", 3),
    ("ababac", ["abac"], "ab", 6),
    ("abc", ["abcd", "b"], "a", 2),  # the first that is complete
    ("xabc", ["abc", "c", "bc"], "x", 4),  # of these, the one that began first
    ("one", ["e!"], "one", 3),  # its beginning comes at the end
    ("one", ["one"], "", 3),
    ("a€b", ["€"], "a", 4),
    ("a€b", ["\ud800"], "a€b", 5),
]


@pytest.mark.parametrize(("text", "stop", "shown", "count"), STOPS)
def test_a_stop_string_is_never_shown_wherever_it_is_cut(letters, text, stop, shown, count):
    for size in range(1, len(text) + 3):
        found, taken = pieces(letters, ids(letters, text), size, stop)
        assert ("".join(found), taken) == (shown, count), size


def test_as_a_search_in_the_whole_text_says(letters):
    rng, stopped = np.random.default_rng(0), 0
    for _ in range(200):
        text = "".join(rng.choice(list("ab "), 12))
        stop = ["".join(rng.choice(list("ab "), rng.integers(1, 5))) for _ in range(2)]
        ends = [(i + len(x), i) for x in stop for i in range(12) if text.startswith(x, i)]
        want = (text[: min(ends)[1]], min(ends)[0]) if ends else (text, 12)
        found, taken = pieces(letters, ids(letters, text), int(rng.integers(1, 6)), stop)
        assert ("".join(found), taken) == want
        stopped += bool(ends)
    assert 20 < stopped < 190
