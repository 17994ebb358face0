"""The ledger walk: a synthetic reasoning task with a long chain of thought and a checkable answer.

The prompt is a shuffled ledger: facts `a b c ;` (node `b` follows node `a`, carried by `c`), of
which only those on a hidden path matter, some with a mark (`a b m1 c ;`); remarks (`note x y ;`),
which never matter; the fee of every carrier (`c = 7 ;`); and the start node. The chain of thought
walks from there until it is `home`: before each hop one to three unpredictable filler words, then
the fact restated, the fee, and the running sum of the fees modulo 10; if the fact has a mark, the
mark and the sum follow. The answer recalls the marks and gives the total.

So it is known what a KV cache must keep. A fact is needed once, at an unpredictable time; fees all
the time; remarks never; marks, which the trace itself writes, at the very end. Nothing attends to a
fact before it is needed: the task is deliberately hard for policies that keep what past queries
attended to (H2O, SnapKV).
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fkv import hub, kinds
from fkv.errors import UserError
from fkv.kinds import setting

_CONSONANTS, _VOWELS = "bdfgklmnprst", "aeo"
NODES = tuple(f"{c}{v}{'nl'[i % 2]}" for i, c in enumerate(_CONSONANTS) for v in _VOWELS)  # 36
CARRIERS = ("ox", "mule", "cart", "boat")
MARKS = ("m1", "m2", "m3")
FILLERS = ("so", "well", "then", "now", "hmm", "okay", "right", "next")
DIGITS = tuple("0123456789")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", ";", "=", "note", "start", "home")
VOCABULARY = (*SPECIAL, "total", *DIGITS, *CARRIERS, *MARKS, *FILLERS, *NODES)
ID = {word: i for i, word in enumerate(VOCABULARY)}
PAD, EOS = ID["<pad>"], ID["<eos>"]


RANGE = kinds.several(kinds.whole(0), "a range (low, high) of whole numbers", 2)


@dataclasses.dataclass(frozen=True)
class Spec(kinds.Settings):
    """The sizes of a problem; each is drawn uniformly from an inclusive range."""

    group: ClassVar[str] = "task"
    facts: tuple[int, int] = setting(RANGE, (20, 28))  # entries of the ledger, at most 36
    hops: tuple[int, int] = setting(RANGE, (12, 18))  # of the path, at most the facts
    remarks: tuple[int, int] = setting(RANGE, (2, 6))  # entries that never matter
    marks: tuple[int, int] = setting(RANGE, (2, 3))  # facts whose sum is recalled, at most 3
    fillers: tuple[int, int] = setting(RANGE, (1, 3))  # filler words before a hop

    def __post_init__(self):
        super().__post_init__()
        most = {"facts": len(NODES), "marks": len(MARKS)}
        for name, (low, high) in vars(self).items():
            least = 1 if name in ("facts", "hops") else 0
            if not least <= low <= high <= most.get(name, high):
                limit = f" and at most {most[name]}" if name in most else ""
                raise UserError(
                    f"task.{name} = {(low, high)} must be a range (low, high) of at least "
                    f"{least}{limit}"
                )

    def max_new_tokens(self) -> int:
        """Tokens of the longest possible solution."""
        return self.hops[1] * (self.fillers[1] + 5) + 5 * self.marks[1] + 4

    def max_tokens(self) -> int:
        """Tokens of the longest possible problem, with its solution."""
        entries = self.facts[1] + self.remarks[1] + len(CARRIERS)
        return 4 * entries + self.marks[1] + 4 + self.max_new_tokens()


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem and its reference solution, as words."""

    prompt: tuple[str, ...]
    thought: tuple[str, ...]
    answer: tuple[str, ...]

    @property
    def tokens(self) -> np.ndarray:
        """Prompt, chain of thought and answer as token ids [t], int32."""
        return encode(self.prompt + self.thought + self.answer)


def encode(words: Sequence[str]) -> np.ndarray:
    """Words to token ids, int32."""
    return np.array([ID[word] for word in words], np.int32)


def decode(ids: Sequence[int]) -> list[str]:
    """Token ids to words."""
    return [VOCABULARY[int(i)] for i in ids]


def tokenizer():
    """The vocabulary as a tokenizer of `transformers`: words separated by spaces."""
    import tokenizers  # takes seconds

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return hub.transformers().PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"
    )


def problem(seed: int, split: str, index: int, spec: Spec) -> Problem:
    """Problem `index` of a split; the same arguments give the same problem everywhere."""
    rng = np.random.default_rng([seed, *split.encode(), index])

    def draw(bounds):
        return int(rng.integers(bounds[0], bounds[1] + 1))

    facts = draw(spec.facts)
    hops = min(draw(spec.hops), facts)
    marks = min(draw(spec.marks), hops)
    nodes = [NODES[i] for i in rng.permutation(len(NODES))]
    path = [*nodes[:hops], "home"]
    carriers = [CARRIERS[i] for i in rng.integers(0, len(CARRIERS), facts)]
    marked = dict(zip(sorted(rng.choice(hops, marks, replace=False)), MARKS, strict=False))
    mark = [[marked[i]] if i in marked else [] for i in range(facts)]
    fees = dict(zip(CARRIERS, rng.integers(0, 10, len(CARRIERS)).tolist(), strict=True))

    # Every node is the source and target of at most one fact each, so a look-up has one answer.
    others = [node for node in nodes if node not in path[1:]]
    targets = path[1:] + [others[i] for i in rng.permutation(len(others))]

    entries = [[nodes[i], targets[i], *mark[i], carriers[i], ";"] for i in range(facts)]
    for _ in range(draw(spec.remarks)):
        entries.append(["note", *(FILLERS[i] for i in rng.integers(0, len(FILLERS), 2)), ";"])
    entries = [entries[i] for i in rng.permutation(len(entries))]
    entries += [[c, "=", str(fees[c]), ";"] for c in CARRIERS]
    prompt = ["<bos>", *(w for entry in entries for w in entry), "start", path[0], "<think>"]

    thought, total, recall = [], 0, []
    for i in range(hops):
        thought += [FILLERS[j] for j in rng.integers(0, len(FILLERS), draw(spec.fillers))]
        fee = fees[carriers[i]]
        total = (total + fee) % 10
        noted = [*mark[i], str(total)] if mark[i] else []
        thought += [path[i], path[i + 1], *mark[i], carriers[i], str(fee), str(total), *noted]
        recall += noted
    answer = ["</think>", *recall, "total", str(total), "<eos>"]
    return Problem(tuple(prompt), tuple(thought), tuple(answer))


def problems(seed: int, split: str, start: int, count: int, spec: Spec) -> list[Problem]:
    """Problems `start ... start + count - 1` of a split."""
    return [problem(seed, split, i, spec) for i in range(start, start + count)]


def correct(generated: Sequence[int], reference: Problem) -> bool:
    """Whether generated ids (after the prompt) end in exactly the reference's answer."""
    words = decode(generated)
    start = words.index("</think>") if "</think>" in words else len(words)
    end = words.index("<eos>", start) + 1 if "<eos>" in words[start:] else len(words)
    return tuple(words[start:end]) == reference.answer


def pad(sequences: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads id sequences to [n, length]; returns ids and lengths, both int32."""
    ids = np.full((len(sequences), length), PAD, np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids, np.array([len(s) for s in sequences], np.int32)
