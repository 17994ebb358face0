"""Traces: the token sequences that policies are trained and evaluated on."""

import dataclasses
import hashlib
import itertools
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fkv import files, kinds
from fkv.data import sources
from fkv.errors import UserError
from fkv.tasks import ledger

if TYPE_CHECKING:  # slow to import
    import grain

# Of the files that `launch.traces` writes.
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # of the question, or of the document
        ("sample", pa.int32()),  # of the answer, or of the piece
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("source", pa.string()),
        ("kind", pa.string()),
    ]
)
_EPOCHS = 2**40  # as good as endless; batches of one overflow grain's endless repetition
_KEYS = pa.schema([SCHEMA.field(name) for name in ("id", "sample")])


@dataclasses.dataclass(frozen=True)
class Traces:
    """Right-padded traces, each long enough that a token attends after an eviction; int32."""

    token_nt: np.ndarray  # ids [n, t]
    length_n: np.ndarray  # tokens of each
    prompt_n: np.ndarray  # how many of these are the prompt, which the model did not generate
    padded_n: np.ndarray  # width of each trace's bucket, equal within a batch
    skipped: int = 0  # traces left out as no longer than `B + L`

    def __len__(self) -> int:
        return len(self.length_n)

    def __repr__(self) -> str:
        least, most = self.length_n.min(initial=2**31 - 1), self.length_n.max(initial=0)
        lengths = f" of {least:,} to {most:,} tokens" if len(self) else ""
        skipped = f", {self.skipped:,} skipped" if self.skipped else ""
        return f"Traces({len(self):,} traces{lengths}{skipped})"

    def digests(self) -> list[str]:
        """A digest per trace: its index, and a hash of its prompt length and tokens."""
        columns = zip(self.prompt_n, self.token_nt, self.length_n, strict=True)
        data = [np.array([p, *token_t[:n]], "<i4").tobytes() for p, token_t, n in columns]
        return [f"{i}-{hashlib.sha256(x).hexdigest()[:16]}" for i, x in enumerate(data)]

    def rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [b, t] of these traces, as wide as the widest of their buckets, and the lengths
        of the traces and of their prompts."""
        width = self.padded_n[ids].max()
        return self.token_nt[ids, :width], self.length_n[ids], self.prompt_n[ids]


def collect(
    sequences: Sequence[np.ndarray],
    longer_than: int,
    pad_to: int,
    where: str,
    prompts: Sequence[int] | None = None,
    buckets: int = 1,
    at_least: int = 1,
) -> Traces:
    """Keeps the sequences with more than `longer_than` tokens and pads them to a few lengths.

    Args:
      longer_than: `B + L`; in shorter ones no token attends after an eviction.
      pad_to: padded lengths are rounded up to a multiple of this.
      where: names the source in errors.
      prompts: number of prompt tokens of each sequence; by default none.
      buckets: most padded lengths: that of the longest trace, half of it, a quarter, ...
      at_least: buckets with fewer traces (say, a batch) are merged into the next longer one.

    Raises:
      UserError: no sequence is long enough.
    """
    kinds.check("data.buckets", buckets, kinds.whole(1))
    chosen = [i for i, s in enumerate(sequences) if len(s) > longer_than]
    if not chosen:
        longest = max(map(len, sequences), default=0)
        raise UserError(
            f"{where}: none of the {len(sequences)} traces (longest: {longest} tokens) is longer "
            f"than budget + interval = {longer_than}; use longer traces or a smaller budget"
        )
    widest = -(-max(len(sequences[i]) for i in chosen) // pad_to) * pad_to
    token, length = ledger.pad([sequences[i] for i in chosen], widest)
    prompt = np.array([prompts[i] if prompts else 0 for i in chosen], np.int32)
    widths = {-(-widest // (2**i * pad_to)) * pad_to for i in range(buckets)}
    padded = _bucket_widths(length, np.array(sorted(widths), np.int32), at_least)
    return Traces(token, length, prompt, padded, len(sequences) - len(chosen))


def _bucket_widths(length_n: np.ndarray, widths: np.ndarray, at_least: int) -> np.ndarray:
    """Width of the bucket of each trace."""
    width_n, widest = widths[np.searchsorted(widths, length_n)], widths[-1]
    for width, longer in itertools.pairwise(widths):
        if (width_n == width).sum() < at_least:
            width_n[width_n == width] = longer
    while (width_n == widest).sum() < min(at_least, len(width_n)):
        width_n[width_n == width_n[width_n < widest].max()] = widest
    return width_n


def embedded(seed: int, split: str, count: int, spec: ledger.Spec) -> tuple[list, list[int]]:
    """Solved problems of the embedded task: their tokens, and the lengths of their prompts."""
    problems = ledger.problems(seed, split, 0, count, spec)
    return [p.tokens for p in problems], [len(p.prompt) for p in problems]


def read(
    path: str,
    column: str = "input_ids",
    prompt_column: str = "",
    corrupt: list[tuple[int, str]] | None = None,
    vocabulary: int = 2**31,
) -> tuple[list[np.ndarray], list[int] | None]:
    """Token ids, and lengths of prompts, from columns of a Parquet or JSONL file or a directory.

    Args:
      prompt_column: of prompt lengths; empty for none, and None in the result.
      corrupt: collects (row, reason) of unusable rows; without it, they are an error.
      vocabulary: ids must be below this.

    Raises:
      UserError: the file can't be read, lacks a column, has unusable rows (see `corrupt`), or no
        usable one.
    """
    rows = sources.open_file(path)
    entries = sources.column(rows, column, path)
    lengths = sources.column(rows, prompt_column, path) if prompt_column else [0] * len(rows)
    sequences, prompts = [], []
    for row, (entry, length) in enumerate(zip(entries, lengths, strict=True)):
        ids, prompt = _ids(entry), _whole(length)
        if ids is None:
            wrong = f"{column!r} is not a list of token ids (0, 1, ...)"
        elif len(ids) and ids.max() >= vocabulary:
            wrong = f"{column!r} has token id {ids.max()}, beyond the model's {vocabulary} tokens"
        elif prompt is None:
            wrong = f"{prompt_column!r} is {reprlib.repr(length)}, not a whole number"
        elif not 0 <= prompt < max(len(ids), 1):
            wrong = f"{prompt_column!r} is {prompt}, not a prompt length for {len(ids)} tokens"
        else:
            sequences.append(ids)
            prompts.append(prompt)
            continue
        if corrupt is None:
            raise UserError(f"{path}: row {row} of {wrong}")
        corrupt.append((row, f"row {row} of {wrong}"))
    if corrupt and not sequences:
        raise UserError(f"{path}: none of its {len(rows)} rows can be used ({corrupt[0][1]})")
    return sequences, prompts if prompt_column else None


def _ids(entry: Any) -> np.ndarray | None:
    """The entry as token ids; None if it is something else."""
    if isinstance(entry, list) and any(isinstance(x, bool) for x in entry):
        return None  # NumPy would take it for a number
    try:
        x = np.asarray(entry)
    except (ValueError, OverflowError):
        return None
    limit = np.iinfo(np.int32).max
    if x.ndim != 1 or (x.size and (x.dtype.kind not in "iu" or x.min() < 0 or x.max() > limit)):
        return None
    return x.astype(np.int32)


def _whole(value: Any) -> int | None:
    """The integer, also if stored as a float (in a column with gaps); else None."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return int(value)
    return value if type(value) is int else None


def write(path: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Writes rows of `SCHEMA` as a Parquet file, atomically, with the config that made them."""
    about = {"fkv": json.dumps(settings)}
    columns = [pa.array([row[f.name] for row in rows], f.type) for f in SCHEMA]
    table = pa.table(columns, schema=SCHEMA.with_metadata(about))
    with files.whole(path) as temporary:
        pq.write_table(table, temporary)


def written(path: Path) -> list[tuple[str, int]]:
    """(id, sample) of the traces in a file by `write`; UserError if it can't be read."""
    try:
        table = pq.read_table(path, schema=_KEYS)
        table.validate(full=True)
        if any(column.null_count for column in table.columns):
            raise pa.ArrowInvalid("rows without id or sample")
    except (OSError, pa.ArrowException) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} can't be read ({reason}): delete it, and rerun") from error
    ids, samples = (table.column(name).to_pylist() for name in _KEYS.names)
    return list(zip(ids, samples, strict=True))


def batches(traces: Traces, batch: int, seed: int) -> "grain.MapDataset":
    """Endless shuffled batches: entry `i` holds the indices of the traces of batch `i`.

    The traces of a batch share a bucket; buckets alternate in proportion to their sizes.

    Raises:
      UserError: a batch is larger than the number of traces.
    """
    if batch > len(traces):
        raise UserError(f"batch = {batch} is larger than the number of traces, {len(traces)}")
    import grain

    parts, shares = [], []
    for width in np.unique(traces.padded_n):
        ids = np.flatnonzero(traces.padded_n == width)
        rows = grain.MapDataset.range(len(ids)).seed(seed).shuffle().repeat(_EPOCHS).batch(batch)
        parts.append(rows.map(lambda row, ids=ids: ids[row]))
        shares.append(len(ids) / len(traces))
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, shares)


def iterate(batches: "grain.MapDataset", state: dict | None = None) -> "grain.DatasetIterator":
    """An iterator over the batches, from the start or from the state of another."""
    import grain

    # No prefetching: rows are in memory, and the state is that of the last batch taken.
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0)))
    if state is not None:
        iterator.set_state(state)
    return iterator
