"""The ledger walk: a synthetic reasoning task with a long chain of thought and a checkable answer.

The prompt is a shuffled ledger: facts `a b c ;` (after node `a` comes node `b`, carried by `c`),
of which only those on a hidden path will matter, some with a mark (`a b m1 c ;`); remarks
(`note x y ;`) that never matter; and the fee of every carrier (`c = 7 ;`), which is needed again
and again. Then comes the start node. The chain of thought walks from there until it is `home`:
before each hop one to three filler words that no one can predict, then the fact restated, the
fee, and the running sum of the fees modulo 10; where the fact has a mark, the mark and the sum
so far are then written down. At the end the marks are recalled and the total given: the answer.

What a KV cache must keep is therefore known. A fact is needed once, at a time nobody can foresee,
and is dead afterwards; fees are needed all the time; remarks never; marks are written by the trace
itself and are needed at the very end. Facts never looked at before they are needed make the task
deliberately hard for rules that keep what past queries attended to (H2O, SnapKV).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fkv import hub
from fkv.errors import UserError

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


@dataclasses.dataclass(frozen=True)
class Spec:
    """The sizes of a problem; each is an inclusive range that is drawn from uniformly.

    Attributes:
      facts: entries of the ledger, on the path or not (at most 36).
      hops: length of the path (at most `facts`; cut to the drawn number of facts).
      remarks: entries that never matter.
      marks: facts on the path whose running sum must be recalled at the end (at most 3).
      fillers: filler words before a hop.
    """

    facts: tuple[int, int] = (20, 28)
    hops: tuple[int, int] = (12, 18)
    remarks: tuple[int, int] = (2, 6)
    marks: tuple[int, int] = (2, 3)
    fillers: tuple[int, int] = (1, 3)

    def __post_init__(self):
        most = {"facts": len(NODES), "marks": len(MARKS)}
        for field in dataclasses.fields(self):
            low, high = getattr(self, field.name)
            least = 1 if field.name in ("facts", "hops") else 0
            if not least <= low <= high <= most.get(field.name, high):
                limit = f" and at most {most[field.name]}" if field.name in most else ""
                raise UserError(
                    f"task.{field.name} = {(low, high)} must be a range (low, high) of at least "
                    f"{least}{limit}"
                )

    def max_new_tokens(self) -> int:
        """No solution of a problem of this spec is longer."""
        marks = self.marks[1]
        trace = self.hops[1] * (self.fillers[1] + 5) + 3 * marks
        return trace + 1 + 2 * marks + 2 + 1

    def max_tokens(self) -> int:
        """No problem of this spec, with its solution, is longer."""
        prompt = 4 * self.facts[1] + self.marks[1] + 4 * self.remarks[1] + 4 * len(CARRIERS)
        return 1 + prompt + 3 + self.max_new_tokens()


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem and its reference solution, as words."""

    prompt: tuple[str, ...]
    thought: tuple[str, ...]
    answer: tuple[str, ...]

    @property
    def tokens(self) -> np.ndarray:
        """Prompt, chain of thought and answer as token ids [t], int32."""
        return encode((*self.prompt, *self.thought, *self.answer))


def encode(words: Sequence[str]) -> np.ndarray:
    """Words to token ids, int32."""
    return np.array([ID[word] for word in words], np.int32)


def decode(ids: Sequence[int]) -> list[str]:
    """Token ids to words."""
    return [VOCABULARY[int(i)] for i in ids]


def tokenizer():
    """The vocabulary as a tokenizer of `transformers`: words between blanks."""
    import tokenizers  # takes seconds

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return hub.transformers().PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"
    )


def sample(rng: np.random.Generator, spec: Spec) -> Problem:
    """Draws one problem."""

    def draw(bounds):
        return int(rng.integers(bounds[0], bounds[1] + 1))

    facts = draw(spec.facts)
    hops = min(draw(spec.hops), facts)
    marks = min(draw(spec.marks), hops)
    nodes = [NODES[i] for i in rng.permutation(len(NODES))]
    path = [*nodes[:hops], "home"]
    carriers = [CARRIERS[i] for i in rng.integers(0, len(CARRIERS), facts)]
    marked = dict(zip(sorted(rng.choice(hops, marks, replace=False)), MARKS, strict=False))
    fees = dict(zip(CARRIERS, rng.integers(0, 10, len(CARRIERS)), strict=True))

    # Every node is at most one fact's source and one fact's target, so a look-up has one answer.
    others = [node for node in nodes if node not in path[1:]]
    targets = path[1:] + [others[i] for i in rng.permutation(len(others))]

    entries = []
    for i in range(facts):
        mark = (marked[i],) if i in marked else ()
        entries.append((nodes[i], targets[i], *mark, carriers[i], ";"))
    for _ in range(draw(spec.remarks)):
        entries.append(("note", *(FILLERS[i] for i in rng.integers(0, len(FILLERS), 2)), ";"))
    entries = [entries[i] for i in rng.permutation(len(entries))]
    entries += [(c, "=", str(fees[c]), ";") for c in CARRIERS]
    prompt = ["<bos>", *(w for entry in entries for w in entry), "start", path[0], "<think>"]

    thought, total, recall = [], 0, []
    for i in range(hops):
        thought += [FILLERS[j] for j in rng.integers(0, len(FILLERS), draw(spec.fillers))]
        total = (total + int(fees[carriers[i]])) % 10
        mark = [marked[i]] if i in marked else []
        thought += [path[i], path[i + 1], *mark, carriers[i], str(fees[carriers[i]]), str(total)]
        if mark:
            thought += [*mark, str(total)]
            recall += [*mark, str(total)]
    answer = ["</think>", *recall, "total", str(total), "<eos>"]
    return Problem(tuple(prompt), tuple(thought), tuple(answer))


def problem(seed: int, split: str, index: int, spec: Spec) -> Problem:
    """Problem `index` of a split; the same arguments give the same problem anywhere."""
    return sample(np.random.default_rng([seed, *split.encode(), index]), spec)


def problems(seed: int, split: str, start: int, count: int, spec: Spec) -> list[Problem]:
    """Problems `start ... start + count - 1` of a split."""
    return [problem(seed, split, i, spec) for i in range(start, start + count)]


def correct(generated: Sequence[int], reference: Problem) -> bool:
    """Whether generated ids (after the prompt) end in exactly the reference's answer."""
    words = decode(generated)
    if "</think>" not in words:
        return False
    answer = words[words.index("</think>") :]
    if "<eos>" in answer:
        answer = answer[: answer.index("<eos>") + 1]
    return tuple(answer) == reference.answer


def pad(sequences: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads id sequences to [n, length]; returns ids and lengths, both int32."""
    ids = np.full((len(sequences), length), PAD, np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids, np.array([len(s) for s in sequences], np.int32)
