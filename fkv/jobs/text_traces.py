"""Traces of plain text: training and held-out ones, in kinds, with a card that says what of."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from fkv import api, files, models
from fkv.api import Model
from fkv.data import corpora, documents, pieces, traces
from fkv.errors import UserError
from fkv.jobs import common
from fkv.models import LM, texts
from fkv.runs import parallel, provenance, rundir

# What a run may be asked for more of.
MAY_DIFFER = (*common.other_jobs("traces"), "traces.count", "traces.held_out_count")
SPLITS = ("train", "heldout")
ROWS = 16  # traces of a file
CARD = "README.md"


@dataclasses.dataclass
class Part:
    """What one entry of `traces.text` gave.

    Attributes:
      kind: of the text.
      where, package: the entry, and what it is of.
    """

    kind: str
    where: str
    package: str
    read: documents.Read


def run(config: ConfigDict, workdir: str) -> int:
    """Cuts text into traces of `traces.length` tokens.

    `workdir` gets `train/<kind>` and `heldout/<kind>`, with Parquet files of `traces.SCHEMA`, and a
    card: set `data.path` to `workdir/train` and `data.eval_path` to `workdir/heldout`, or to that
    of one kind. A document is held out by the hash of its words, so for all lengths and seeds.
    Resumes. Of several processes the first does it.

    Returns:
      The number of traces that were written, 0 on other processes.
    """
    settings = config.traces
    model = load_tokenizer(config)
    cutter = _cutter(config, model)
    common.say(
        f"traces: text of {len(settings.text)} places, {cutter.length} tokens each, in {workdir}"
    )
    if cutter.length <= config.budget + config.interval:
        common.say(
            f"warning: traces.length = {cutter.length} is not above budget + interval = "
            f"{config.budget + config.interval}: no token would attend after an eviction"
        )
    made = parallel.on_first(
        lambda: _make(config, rundir.check_path(workdir), model, cutter), "write traces of text"
    )
    return made or 0


def load_tokenizer(config: ConfigDict) -> Model:
    """The tokenizer of the config's model, without weights."""
    directory = models.find(common.model_path(config), common.revision(config))
    shape = models.read(directory)
    tokenizer = texts.load_tokenizer(directory)
    if tokenizer is None:
        raise UserError(f"model {config.model} has no tokenizer: it can't read text")
    stop = texts.stop_tokens(directory, tokenizer, shape.vocab_size)
    return Model(LM({}, shape), tokenizer, stop, config.model, directory, config.revision)


def _cutter(config: ConfigDict, model: Model) -> pieces.Cutter:
    settings = config.traces
    if settings.prompt_tokens >= settings.length:
        raise UserError(
            f"traces.prompt_tokens = {settings.prompt_tokens} must be below traces.length = "
            f"{settings.length}"
        )

    def tokenize(text):
        return texts.tokenize(model.tokenizer, text, continued=False)

    front, end = texts.front(model.tokenizer), texts.end_of_text(model.tokenizer)
    return pieces.Cutter(tokenize, settings.length, tuple(front), end)


def _make(config: ConfigDict, path: Path, model: Model, cutter: pieces.Cutter) -> int:
    settings = config.traces
    parts = _read(settings.text, settings.text_column, path)
    kinds = list(dict.fromkeys(part.kind for part in parts))
    first = {part.kind: part.read.documents[0] for part in reversed(parts)}.values()
    encoded = [(x.source, x.text, cutter.tokenize(x.text)) for x in first]
    common.warn_of_unknown(model, encoded, "kinds")
    names = sorted(document.id for part in parts for document in part.read.documents)
    inputs = {
        "model: its tokenizer": provenance.of_tokenizer(model.directory),
        "traces.text: documents": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }
    rundir.check_run(path, config, MAY_DIFFER, inputs)
    planned, counts = {}, {}
    for kind in kinds:
        found = [x for part in parts if part.kind == kind for x in part.read.documents]
        for split, count in zip(SPLITS, (settings.count, settings.held_out_count), strict=True):
            if split == "heldout" and not (count and settings.held_out):
                continue
            chosen = [
                x for x in found if documents.held_out(x, settings.held_out) == (split != "train")
            ]
            cut = pieces.cut(
                documents.shuffled(chosen, config.seed), cutter, settings.documents, config.seed
            )
            rows = [_row(settings, *one) for one in itertools.islice(cut, count or None)]
            if not rows:
                raise UserError(_why_none(settings, kind, split, len(chosen), len(found)))
            ids = np.stack([row["input_ids"] for row in rows])
            api.check_known(model, [ids.min(), ids.max()], f"text of kind {kind!r}")
            planned |= {
                path / split / kind / f"traces-{i // ROWS:05d}.parquet": rows[i : i + ROWS]
                for i in range(0, len(rows), ROWS)
            }
            counts[kind, split] = len(chosen), rows
    run = rundir.open_run(path, config, MAY_DIFFER, inputs)
    written = _write(path, planned, run.config)
    files.write_text(path / CARD, _card(config, run, parts, counts))
    common.say(_summary(parts, counts, written, settings, path))
    run.close()
    return written


def _read(entries: Sequence[str], column: str, own: Path) -> list[Part]:
    """The documents of all entries, each once; says which files and rows are left out.

    Args:
      own: the run directory, whose files are no text, even if it is below an entry.
    """
    found, seen = [], set()
    for entry in entries:
        kind, equals, where = entry.partition("=")
        if not equals or "/" in kind:
            kind, where = "text", entry
        with common.of_field(f"traces.text: {entry!r}"):
            if not re.fullmatch(r"\w[\w-]{,63}", kind):
                raise UserError(f"the kind {kind!r} must be a word: it names a folder")
            if not where.strip():
                raise UserError("no file, directory or pattern after the kind")
            paths, package = corpora.find(where)
            paths = [x for x in paths if not x.resolve().is_relative_to(own.resolve())]
            read = documents.read(kind, paths, column, seen)
            if read.unusable:
                (source, why), more = read.unusable[0], len(read.unusable) - 1
                others = f", and {more} more files or rows" if more else ""
                common.say(f"traces.text: {source} left out ({why}){others}")
            if not read.documents:
                why = f"{read.copies} texts that were read before" if read.copies else "no text"
                raise UserError(f"{len(paths)} files with {why}")
        found.append(Part(kind, where, package, read))
    return found


def _row(settings: ConfigDict, document: documents.Document, piece: int, ids) -> dict:
    return {
        "id": document.id,
        "sample": piece,
        "input_ids": ids,
        "prompt_tokens": settings.prompt_tokens,
        "tokens": len(ids),
        "truncated": True,
        "source": document.source,
        "kind": document.kind,
    }


def _why_none(settings: ConfigDict, kind: str, split: str, chosen: int, found: int) -> str:
    if chosen:
        return (
            f"traces.text: none of the {chosen} {split} documents of kind {kind!r} has "
            f"traces.length = {settings.length} tokens: add text, or set traces.documents = packed"
        )
    fix = "raise" if split == "heldout" else "lower"
    return (
        f"traces.text: of {found} documents of kind {kind!r} none is {split} at traces.held_out = "
        f"{settings.held_out}: {fix} it, or add text"
    )


def _write(path: Path, planned: dict[Path, list[dict]], settings: dict) -> int:
    """Writes the files that are not there yet, or have fewer traces; returns how many traces."""
    there = {x: traces.written(x) for split in SPLITS for x in path.glob(f"{split}/*/*.parquet")}
    for file, keys in there.items():
        wanted = [(row["id"], row["sample"]) for row in planned.get(file, ())]
        if keys != wanted[: len(keys)] or not wanted:
            raise UserError(
                f"{file} is none of this run's files, or has more traces than are asked for now: "
                "move it away, or use another --workdir"
            )
    written = 0
    for file, rows in planned.items():
        if len(there.get(file, ())) < len(rows):
            with files.writing(file.parent):
                file.parent.mkdir(parents=True, exist_ok=True)
            traces.write(file, rows, settings)
            written += len(rows) - len(there.get(file, ()))
    return written


def _summary(parts, counts, written: int, settings: ConfigDict, path: Path) -> str:
    lines = [f"{written} traces written to {path}: {', '.join(SPLITS)} and {CARD}"]
    for (kind, split), (chosen, rows) in counts.items():
        asked = settings.count if split == "train" else settings.held_out_count
        short = f" (of {asked} asked for: the text has no more)" if len(rows) < asked else ""
        used = len({row["id"] for row in rows})
        lines.append(f"  {split}/{kind}: {len(rows)} traces{short} of {used} of {chosen} documents")
    copies = sum(part.read.copies for part in parts)
    return "\n".join(
        [*lines, f"  {copies} documents left out, as copies" if copies else ""]
    ).rstrip()


def _card(config: ConfigDict, run: rundir.Run, parts: Sequence[Part], counts) -> str:
    settings = config.traces
    inputs = rundir.read_inputs(run.path)
    lines = [
        "# Traces of text",
        "",
        f"Written by `python -m launch.traces` ({rundir.source_version()}): token ids of plain "
        f"text, {settings.length} per trace, the first {settings.prompt_tokens} of them a prompt.",
        "",
        "| split | kind | traces | tokens | documents used | documents |",
        "|---|---|---|---|---|---|",
    ]
    for (kind, split), (chosen, rows) in counts.items():
        used, tokens = len({row["id"] for row in rows}), sum(row["tokens"] for row in rows)
        lines.append(f"| {split} | {kind} | {len(rows):,} | {tokens:,} | {used:,} | {chosen:,} |")
    lines += [
        "",
        "A document is held out by a hash of its words: none of its copies is trained on, in no "
        "corpus that is made like this, whatever its length of traces and seed.",
        "",
        "| kind | text | of | files | documents | characters | copies left out | unusable |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part in parts:
        read = part.read
        characters = sum(len(document.text) for document in read.documents)
        lines.append(
            f"| {part.kind} | `{part.where}` | {part.package} | {read.files:,} | "
            f"{len(read.documents):,} | {characters:,} | {read.copies:,} | {len(read.unusable):,} |"
        )
    shown = {name: run.config["traces"][name] for name in _SHOWN}
    lines += [
        "",
        f"Tokenizer: that of `{config.model}` {config.revision}".rstrip()
        + f", SHA-256 {inputs['model: its tokenizer'][:16]}.",
        "",
        f"Settings: `{json.dumps({'seed': config.seed, **shown})}`.",
        "",
    ]
    return "\n".join(lines)


_SHOWN = (
    "text", "text_column", "length", "documents", "prompt_tokens", "count", "held_out",
    "held_out_count",
)  # fmt: skip
