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
      prompt_n: how many of these are the prompt, which the model did not write, int32.
      skipped: how many were left out because they are not longer than `B + L`.
    """

    token_nt: np.ndarray
    length_n: np.ndarray
    prompt_n: np.ndarray
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.length_n)


def collect(
    sequences: Sequence[np.ndarray],
    longer_than: int,
    pad_to: int,
    where: str,
    prompts: Sequence[int] | None = None,
) -> Traces:
    """Keeps the sequences with more than `longer_than` tokens and pads them to one length.

    Args:
      longer_than: `B + L`; nothing that a token sees is evicted from shorter ones.
      pad_to: the padded length is rounded up to a multiple of this.
      where: names the source in errors.
      prompts: tokens of each sequence's prompt; none when not given.

    Raises:
      UserError: no sequence is long enough, or a prompt is as long as its sequence.
    """
    prompts = [0] * len(sequences) if prompts is None else prompts
    for i, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        if not 0 <= prompt < max(len(sequence), 1):
            raise UserError(
                f"{where}: trace {i} has {len(sequence)} tokens and a prompt of {prompt}"
            )
    chosen = [i for i, s in enumerate(sequences) if len(s) > longer_than]
    kept = [sequences[i] for i in chosen]
    if not kept:
        longest = max((len(s) for s in sequences), default=0)
        raise UserError(
            f"{where}: none of the {len(sequences)} traces (longest: {longest} tokens) is longer "
            f"than budget + interval = {longer_than}; use longer traces or a smaller budget"
        )
    longest = max(len(s) for s in kept)
    token, length = ledger.pad(kept, -(-longest // pad_to) * pad_to)
    prompt = np.array([prompts[i] for i in chosen], np.int32)
    return Traces(token, length, prompt, len(sequences) - len(kept))


def embedded(
    seed: int, split: str, count: int, spec: ledger.Spec
) -> tuple[list[np.ndarray], list[int]]:
    """Prompt, reference chain of thought and answer of `count` problems of the embedded task.

    Returns:
      The sequences, and the length of each prompt.
    """
    problems = ledger.problems(seed, split, 0, count, spec)
    return [p.tokens for p in problems], [len(p.prompt) for p in problems]


def read(
    path: str,
    column: str = "input_ids",
    prompt_column: str = "",
    corrupt: list[tuple[int, str]] | None = None,
) -> tuple[list[np.ndarray], list[int] | None]:
    """Token ids, and lengths of prompts, from columns of a Parquet or JSONL file or a directory.

    Args:
      prompt_column: of prompt lengths; none when empty.
      corrupt: takes in (row, what is wrong) of rows that can't be used, which are then left out.

    Returns:
      The sequences, and the length of each one's prompt or None.

    Raises:
      UserError: the file is missing, can't be read or lacks a column; or, without `corrupt`, an
        entry is no list of token ids or no length.
    """
    rows = sources.open_file(path)
    entries = sources.column(rows, column, path)
    lengths = sources.column(rows, prompt_column, path) if prompt_column else [0] * len(rows)
    sequences, prompts = [], []
    for row, (entry, length) in enumerate(zip(entries, lengths, strict=True)):
        ids, wrong = _ids(entry), ""
        if ids is None:
            wrong = f"row {row} of {column!r} is not a list of token ids (0, 1, ...)"
        elif type(length) is not int:
            wrong = f"row {row} of {prompt_column!r} is {length!r}, not a whole number"
        if not wrong:
            sequences.append(ids)
            prompts.append(length)
        elif corrupt is None:
            raise UserError(f"{path}: {wrong}")
        else:
            corrupt.append((row, wrong))
    return sequences, prompts if prompt_column else None


def _ids(entry) -> np.ndarray | None:
    """The entry as token ids; None if it is something else."""
    try:
        x = np.asarray(entry)
    except (ValueError, OverflowError):
        return None
    limit = np.iinfo(np.int32).max
    if x.ndim != 1 or (x.size and (x.dtype.kind not in "iu" or x.min() < 0 or x.max() > limit)):
        return None
    return x.astype(np.int32)


def batches(traces: Traces, batch: int, seed: int) -> grain.MapDataset:
    """Endless shuffled batches; entry `i` is the batch of step `i`, whatever came before.

    Returns:
      A random-access dataset of (token_bt, length_b).
    """
    rows = batch_rows(traces, batch, seed)
    return rows.map(lambda row: (traces.token_nt[row], traces.length_n[row]))


def batch_rows(traces: Traces, batch: int, seed: int) -> grain.MapDataset:
    """Which traces these batches consist of: entry `i` holds `batch` indices."""
    if batch > len(traces):
        raise UserError(f"batch = {batch} is larger than the {len(traces)} traces at hand")
    return grain.MapDataset.range(len(traces)).seed(seed).shuffle().repeat().batch(batch)
