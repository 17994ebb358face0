"""Traces: the token sequences that policies are trained and measured on."""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from fkv.data import sources
from fkv.errors import UserError
from fkv.tasks import ledger


@dataclasses.dataclass(frozen=True)
class Traces:
    """Right-padded traces, all long enough for an eviction that a token sees.

    Attributes:
      token_nt: ids [n, t], int32.
      length_n: tokens of each, int32.
      skipped: how many were left out because they are not longer than `B + L`.
    """

    token_nt: np.ndarray
    length_n: np.ndarray
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.length_n)


def collect(sequences: Sequence[np.ndarray], longer_than: int, pad_to: int, where: str) -> Traces:
    """Keeps the sequences with more than `longer_than` tokens and pads them to one length.

    Args:
      longer_than: `B + L`; nothing that a token sees is evicted from shorter ones.
      pad_to: the padded length is rounded up to a multiple of this.
      where: names the source in errors.

    Raises:
      UserError: no sequence is long enough.
    """
    kept = [s for s in sequences if len(s) > longer_than]
    if not kept:
        longest = max((len(s) for s in sequences), default=0)
        raise UserError(
            f"{where}: none of the {len(sequences)} traces (longest: {longest} tokens) is longer "
            f"than budget + interval = {longer_than}; use longer traces or a smaller budget"
        )
    longest = max(len(s) for s in kept)
    token, length = ledger.pad(kept, -(-longest // pad_to) * pad_to)
    return Traces(token, length, len(sequences) - len(kept))


def embedded(seed: int, split: str, count: int, spec: ledger.Spec) -> list[np.ndarray]:
    """Prompt, reference chain of thought and answer of `count` problems of the embedded task."""
    return [p.tokens for p in ledger.problems(seed, split, 0, count, spec)]


def read(path: str, column: str = "input_ids") -> list[np.ndarray]:
    """Token ids from a column of a Parquet or JSONL file.

    Raises:
      UserError: the file is missing, can't be read, lacks the column, or an entry of it is no list
        of token ids.
    """

    def ids(row, entry):
        try:
            x = np.asarray(entry)
        except (ValueError, OverflowError):
            x = np.asarray(None)
        limit = np.iinfo(np.int32).max
        if x.ndim != 1 or (x.size and (x.dtype.kind not in "iu" or x.min() < 0 or x.max() > limit)):
            raise UserError(
                f"{path}: row {row} of {column!r} is not a list of token ids (0, 1, ...)"
            )
        return x.astype(np.int32)

    entries = sources.column(sources.open_file(path), column, path)
    return [ids(row, entry) for row, entry in enumerate(entries)]


def batches(traces: Traces, batch: int, seed: int) -> grain.MapDataset:
    """Endless shuffled batches; entry `i` is the batch of step `i`, whatever came before.

    Returns:
      A random-access dataset of (token_bt, length_b).
    """
    if batch > len(traces):
        raise UserError(f"batch = {batch} is larger than the {len(traces)} traces at hand")
    rows = grain.MapDataset.range(len(traces)).seed(seed).shuffle().repeat()
    return rows.batch(batch).map(lambda row: (traces.token_nt[row], traces.length_n[row]))
