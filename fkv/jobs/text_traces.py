"""Traces of plain text: training and held-out ones, in kinds, with a card that says what of."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
COUNTS = {"train": "count", "dev": "dev_count", "heldout": "held_out_count"}  # their fields
MAY_DIFFER = (*common.other_jobs("traces"), *(f"traces.{name}" for name in COUNTS.values()))
ROWS = 16  # traces of a file
CARD = "README.md"


@dataclasses.dataclass(frozen=True)
class Place:
    """An entry of `traces.text`: the kind of text, where it is, and of what package."""

    entry: str
    kind: str
    where: str
    package: str
    paths: list[Path]


@dataclasses.dataclass(frozen=True)
class Part:
    """The traces of one kind of text in one split, as rows, and how many documents are in it."""

    split: str
    kind: str
    documents: int
    rows: list[dict]

    @property
    def used(self) -> int:
        """Documents that the traces are of."""
        return len({row["id"] for row in self.rows})


def run(config: ConfigDict, workdir: str) -> int:
    """Cuts text into traces of `traces.length` tokens.

    `workdir` gets `train/<kind>`, `dev/<kind>` and `heldout/<kind>`, with Parquet files of
    `traces.SCHEMA`, and a card: set `data.path` to `workdir/train` and `data.eval_path` to
    `workdir/heldout`, or to that of one kind. A document is held out by the hash of its words, so
    for all lengths and seeds. Resumes. Of several processes the first does it.

    Returns:
      The number of traces that were written, 0 on other processes.
    """
    settings, path = config.traces, rundir.check_path(workdir)
    _check(config)
    what = f"text of {len(settings.text)} places", f"{settings.length} tokens each"
    common.announce("traces", config, workdir, what=what)
    places = _find(settings.text, path)
    model = load_tokenizer(config)
    if settings.length <= (slots := config.budget + config.interval):
        common.say(
            f"warning: traces.length = {settings.length} is not above budget + interval = {slots}: "
            "no token would attend after an eviction"
        )
    column = settings.text_column
    reads = parallel.on_first(lambda: _read(places, column), "read the text") or []
    found: dict[str, list[documents.Document]] = {}
    for place, read in zip(places, reads, strict=bool(reads)):
        found.setdefault(place.kind, []).extend(read.documents)
    names = sorted(document.id for kind in found.values() for document in kind)
    inputs = {
        "model: its tokenizer": provenance.of_tokenizer(model.directory),
        "traces.text: documents": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }
    rundir.check_run(path, config, MAY_DIFFER, inputs)
    parts = parallel.on_first(lambda: _cut(config, model, found), "cut the text") or []
    run = rundir.open_run(path, config, MAY_DIFFER, inputs)

    def write():
        written = _write(path, parts, run.config)
        files.write_text(path / CARD, _card(config, inputs, zip(places, reads, strict=True), parts))
        return written

    written = parallel.on_first(write, "write the traces") or 0
    common.say(f"{written} traces written to {path}: {', '.join(_asked(settings))}, {CARD}")
    _report(settings, reads, parts)
    run.close()
    return written


def load_tokenizer(config: ConfigDict) -> Model:
    """The tokenizer of the config's model, without weights."""
    directory = models.find(common.model_path(config), common.revision(config))
    shape = models.read(directory)
    tokenizer = texts.load_tokenizer(directory)
    if tokenizer is None:
        raise UserError(f"model {config.model} has no tokenizer: it can't read text")
    stop = texts.stop_tokens(directory, tokenizer, shape.vocab_size)
    return Model(LM({}, shape), tokenizer, stop, config.model, directory, config.revision)


def _check(config: ConfigDict) -> None:
    settings = config.traces
    if settings.held_out + settings.dev >= 1:
        raise UserError(
            f"traces.held_out = {settings.held_out} and traces.dev = {settings.dev} leave no "
            "documents to train on: lower them"
        )
    if settings.prompt_tokens >= settings.length:
        raise UserError(
            f"traces.prompt_tokens = {settings.prompt_tokens} must be below traces.length = "
            f"{settings.length}"
        )


def _cut(
    config: ConfigDict, model: Model, found: Mapping[str, Sequence[documents.Document]]
) -> list[Part]:
    """The traces of all kinds of text, by split."""

    def tokenize(text):
        return texts.tokenize(model.tokenizer, text, continued=False)

    settings, seed = config.traces, config.seed
    front, end = texts.front(model.tokenizer), texts.end_of_text(model.tokenizer)
    cutter = pieces.Cutter(tokenize, settings.length, tuple(front), end)
    encoded = [(x[0].source, x[0].text, tokenize(x[0].text)) for x in found.values()]
    common.warn_of_unknown(model, encoded, "kinds")
    parts = []
    for kind, given in found.items():
        splits = [documents.split(x, settings.held_out, settings.dev) for x in given]
        for split, count in _asked(settings).items():
            chosen = [x for x, where in zip(given, splits, strict=True) if where == split]
            order = documents.shuffled(chosen, seed)
            cut = pieces.cut(order, cutter, settings.documents, seed)
            rows = [_row(settings, *one) for one in itertools.islice(cut, count or None)]
            if not rows:
                raise UserError(_why_none(settings, kind, split, len(chosen), len(given)))
            ids = np.stack([row["input_ids"] for row in rows])
            api.check_known(model, [ids.min(), ids.max()], f"text of kind {kind!r}")
            parts.append(Part(split, kind, len(chosen), rows))
    return parts


def _find(entries: Sequence[str], own: Path) -> list[Place]:
    """The files of all entries.

    Args:
      own: the run directory, whose files are no text, even if it is below an entry.
    """
    found = []
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
        paths = [path for path in paths if not path.resolve().is_relative_to(own.resolve())]
        found.append(Place(entry, kind, where, package, paths))
    return found


def _read(places: Sequence[Place], column: str) -> list[documents.Read]:
    """The documents of all places, each once; says which files and rows are left out."""
    found, seen = [], set()
    for place in places:
        with common.of_field(f"traces.text: {place.entry!r}"):
            read = documents.read(place.kind, place.paths, column, seen)
            if read.unusable:
                (source, why), more = read.unusable[0], len(read.unusable) - 1
                others = f", and {more} more files or rows" if more else ""
                common.say(f"traces.text: {source} left out ({why}){others}")
            if not read.documents:
                why = f"{read.copies} texts that were read before" if read.copies else "no text"
                raise UserError(f"{len(place.paths)} files with {why}")
        found.append(read)
    return found


def of_split(config: ConfigDict, split: str, own: Path) -> list[documents.Document]:
    """The documents of `traces.text` in a split, in a random order.

    Args:
      own: see `_find`.

    Raises:
      UserError: there are none, or a place can't be read.
    """
    settings = config.traces
    reads = _read(_find(settings.text, own), settings.text_column)
    found = [document for read in reads for document in read.documents]
    shares = settings.held_out, settings.dev
    chosen = [document for document in found if documents.split(document, *shares) == split]
    if not chosen:
        raise UserError(
            f"traces.text: none of {len(found)} documents is {split} at traces.held_out = "
            f"{settings.held_out}: raise it, or add text"
        )
    return documents.shuffled(chosen, config.seed)


def _asked(settings: ConfigDict) -> dict[str, int]:
    """How many traces of each kind are wanted, by split; 0 for all."""
    shares = {"train": 1.0, "dev": settings.dev, "heldout": settings.held_out}
    counts = {split: settings[field] for split, field in COUNTS.items() if shares[split]}
    return {split: n for split, n in counts.items() if n or split == "train"}


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
        packed = "" if settings.documents == "packed" else ", or set traces.documents to packed"
        return (
            f"traces.text: none of the {chosen} {split} documents of kind {kind!r} has "
            f"traces.length = {settings.length} tokens: lower it, add text{packed}"
        )
    fix = {"train": "lower both", "dev": "raise the latter", "heldout": "raise the former"}[split]
    return (
        f"traces.text: of {found} documents of kind {kind!r} none is in {split}, with "
        f"traces.held_out = {settings.held_out} and traces.dev = {settings.dev}: {fix}, or add text"
    )


def _write(path: Path, parts: Sequence[Part], settings: dict) -> int:
    """Writes the files that are not there yet, or have fewer traces; returns how many traces."""
    planned = {
        path / part.split / part.kind / f"traces-{i // ROWS:05d}.parquet": part.rows[i : i + ROWS]
        for part in parts
        for i in range(0, len(part.rows), ROWS)
    }
    there = {x: traces.written(x) for split in COUNTS for x in path.glob(f"{split}/*/*.parquet")}
    for file, keys in there.items():
        wanted = [(row["id"], row["sample"]) for row in planned.get(file, ())]
        if keys != wanted[: len(keys)] or not wanted:
            raise UserError(
                f"{file} is not one of this run's files, or has more traces than are asked for: "
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


def _report(settings: ConfigDict, reads: Sequence[documents.Read], parts: Sequence[Part]) -> None:
    """Prints what there is now."""
    for part in parts:
        asked, count = settings[COUNTS[part.split]], len(part.rows)
        short = f" (of {asked} asked for: the text has no more)" if count < asked else ""
        where, used = f"{part.split}/{part.kind}", f"{part.used} of {part.documents} documents"
        common.say(f"  {where}: {count} traces{short} of {used}")
    if copies := sum(read.copies for read in reads):
        common.say(f"  {copies} documents left out, as copies")


def _card(
    config: ConfigDict,
    inputs: Mapping[str, str],
    read: Iterable[tuple[Place, documents.Read]],
    parts: Sequence[Part],
) -> str:
    """What the traces are made of, in Markdown."""
    settings = config.traces
    lines = [
        "# Traces of text",
        "",
        f"Written by `python -m launch.traces` ({rundir.source_version()}): token ids of plain "
        f"text, {settings.length} per trace, the first {settings.prompt_tokens} of them a prompt.",
        "",
        "| split | kind | traces | tokens | documents used | documents |",
        "|---|---|---|---|---|---|",
    ]
    for part in parts:
        count = len(part.rows)
        lines.append(
            f"| {part.split} | {part.kind} | {count:,} | {count * settings.length:,} | "
            f"{part.used:,} | {part.documents:,} |"
        )
    lines += [
        "",
        "The split of a document is a hash of its words: with the same shares, no other traces "
        "made like this, of whatever length, seed and other text, train on what is held out here.",
        "",
        "| kind | text | of | files | documents | characters | copies left out | unusable |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for place, one in read:
        characters = sum(len(document.text) for document in one.documents)
        lines.append(
            f"| {place.kind} | `{place.where}` | {place.package} | {one.files:,} | "
            f"{len(one.documents):,} | {characters:,} | {one.copies:,} | {len(one.unusable):,} |"
        )
    shown = {"seed": config.seed, **{name: settings[name] for name in _SHOWN}}
    lines += [
        "",
        f"Tokenizer: that of `{config.model}` {config.revision}".rstrip()
        + f", SHA-256 {inputs['model: its tokenizer'][:16]}.",
        "",
        f"Settings: `{json.dumps(shown)}`.",
        "",
    ]
    return "\n".join(lines)


_SHOWN = (
    "text", "text_column", "length", "documents", "prompt_tokens", "count", "held_out",
    "held_out_count", "dev", "dev_count",
)  # fmt: skip
