"""Look-ups in held-out text: which of them policies still answer."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from fkv import api, kinds
from fkv.api import Model
from fkv.cache.cadence import FULL, Cadence
from fkv.data import documents, lookups
from fkv.errors import UserError
from fkv.evaluation import answers, recall, recall_table, tables
from fkv.evaluation.answers import Samples
from fkv.jobs import common, measuring, text_traces
from fkv.jobs.measuring import CELL, NATS, Job, Part
from fkv.keys import Purpose, key_of
from fkv.models import texts
from fkv.runs import parallel

CANDIDATES, MOST = 12, 6  # of a context, and those of them that become look-ups
CANDIDATE = answers.Form(
    "a candidate",
    {"lookup": kinds.TEXT, "document": kinds.TEXT, "kind": kinds.one_of(tuple(lookups.KINDS))}
    | {"source": kinds.TEXT, "question": kinds.TEXT, "answer": kinds.TEXT}
    | {"right": kinds.SWITCH, "bare": kinds.SWITCH},
    ("lookup",),
)
LOOKED_UP = answers.Form(
    "a result",
    CELL | {"lookup": kinds.TEXT, "right": kinds.SWITCH, "nll": NATS},
    ("policy", "budget", "lookup"),
)


def documents_of(config: ConfigDict, model: Model, own: Path) -> list[documents.Document]:
    """The held-out documents of `traces.text`; none if no look-ups are asked for.

    Args:
      own: the run directory, whose files are no text.
    """
    if not config.recall.lookups:
        return []
    if not config.traces.text:
        common.say("no look-ups: set traces.text to text whose held-out documents have them")
        return []
    if model.tokenizer is None:
        raise UserError(f"model {config.model} has no tokenizer: set recall.lookups to 0")
    return text_traces.of_split(config, "heldout", own)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A context and the look-ups about it.

    Attributes:
      index: of the context, among all with candidates.
      ids: names of the look-ups.
    """

    index: int
    context: lookups.Context
    ids: tuple[str, ...]


def _contexts(job: Job, found: Sequence[documents.Document]) -> Iterable[lookups.Context]:
    """Contexts with candidates whose question and answer fit into an interval."""
    tokenizer = job.model.tokenizer
    maker = lookups.Maker(
        lambda text: texts.tokenize(tokenizer, text, continued=False),
        job.settings.context, job.config.interval, CANDIDATES, tuple(texts.front(tokenizer)),
    )  # fmt: skip
    return lookups.contexts(found, maker, job.config.seed)


def _choose(
    job: Job, found: Sequence[documents.Document], store: Samples
) -> tuple[list[Chosen], list[dict]]:
    """The look-ups: candidates that the full cache answers, but not without their lines.

    Returns:
      These, by context, and the rows of all candidates that were tried for them.
    """
    settings, chosen, tried, count = job.settings, [], [], 0
    source = {document.id: document.source for document in found}
    several, waiting = jax.process_count(), enumerate(_contexts(job, found))
    with common.progress(total=settings.lookups, desc="candidates") as bar:
        while count < settings.lookups:
            together = list(itertools.islice(waiting, settings.batch * several))
            if not together:
                break
            lacking = [c for _, c in together if any((x,) not in store.rows for x in _names(c))]
            start = settings.batch * jax.process_index()
            rows = _candidates(job, lacking[start : start + settings.batch], source)
            rows = [row for row in parallel.share(rows) if (row["lookup"],) not in store.rows]
            store.add(rows)
            before = count
            for i, context in together:
                if count == settings.lookups:
                    break
                tried += [store.rows[name,] for name in _names(context)]
                named = zip(_names(context), context.lookups, strict=True)
                kept = [(name, one) for name, one in named if _is_lookup(store.rows[name,])]
                kept = kept[: min(MOST, settings.lookups - count)]
                if kept:
                    names, asked = zip(*kept, strict=True)
                    about = dataclasses.replace(context, lookups=asked)
                    chosen.append(Chosen(i, about, names))
                    count += len(kept)
            bar.update(count - before)
            job.check_end()
    return chosen, tried


def _is_lookup(row: dict) -> bool:
    return row["right"] and not row["bare"]


def _names(context: lookups.Context) -> list[str]:
    return [f"{context.document}-{context.piece}-{i}" for i in range(len(context.lookups))]


def _candidates(
    job: Job, contexts: Sequence[lookups.Context], source: dict[str, str]
) -> list[dict]:
    """Rows of all candidates of contexts."""
    if not contexts:
        return []
    shape = (job.settings.context, CANDIDATES, job.config.interval)
    found = recall.select(job.model.lm, job.filled(contexts), shape, job.config.interval)
    asked = [
        (name, context.document, one)
        for context in contexts
        for name, one in zip(_names(context), context.lookups, strict=True)
    ]
    return [
        {
            "lookup": name,
            "document": document,
            "kind": one.kind,
            "source": source[document],
            "question": api.decode(job.model, one.question),
            "answer": api.decode(job.model, one.answer),
            "right": right,
            "bare": bare,
        }
        for (name, document, one), (right, bare) in zip(asked, found, strict=False)
    ]


def run(job: Job, found: Sequence[documents.Document], at: Sequence[Cadence]) -> None:
    """Chooses the look-ups, measures all policies on them, and writes the tables."""
    candidates = job.store("candidates.jsonl", CANDIDATE)
    chosen, tried = _choose(job, found, candidates)
    names = [name for one in chosen for name in one.ids]
    if not names:
        raise UserError(
            f"traces.text: the full cache answers none of {len(tried)} candidates in "
            f"{len(found)} held-out documents: add text, or set recall.lookups to 0"
        )
    if len(names) < job.settings.lookups:
        common.say(f"{len(names)} look-ups found of {job.settings.lookups}: the text has no more")

    def part(members):
        whole = job.filled(members)
        shape = (job.settings.context, MOST, job.config.interval)
        asked = recall.ask(
            [one.context.ids for one in whole], [one.context.lookups for one in whole], shape
        )
        key_c = _keys(job.config.seed, [one.index for one in whole])
        ids = [name for one in members for name in one.ids]

        def measure(cadence, wanted):
            lm, named = job.model.lm, job.named
            for name, right, nll in recall.recall(lm, named, asked, key_c, cadence, wanted):
                flat = zip(asked.real(right), asked.real(nll), strict=True)
                yield [
                    {"policy": name, "lookup": i, "right": bool(ok), "nll": max(nats, 0.0)}
                    for i, (ok, nats) in zip(ids, flat, strict=False)
                ]

        return Part(ids, measure)

    parts = [part(members) for members in job.batches(chosen)]
    results = job.store("lookups.jsonl", LOOKED_UP, interval=True)
    measuring.measure(job, parts, at, results)
    if parallel.first():
        _write_lookups(job, tried, names, results, at)


def _keys(seed: int, index: Sequence[int]) -> Array:
    """The keys of contexts, whatever else is in their batch."""
    return jnp.stack([key_of(seed, Purpose.LOOKUP, i) for i in index])


def _write_lookups(
    job: Job, tried: Sequence[dict], names: Sequence[str], results: Samples, at: Sequence[Cadence]
) -> None:
    by_name = {row["lookup"]: row for row in tried}
    rows = [by_name[name] for name in names]
    of = [row["document"] for row in rows], [row["kind"] for row in rows]
    right = np.array([row["right"] for row in rows])
    found = [recall_table.Found("full", FULL, right, np.full(len(rows), np.nan), *of)]
    for name, budget, about in measuring.cells(job, at):
        mine = [results.rows[name, budget, lookup] for lookup in names]
        columns = (np.array([row[x] for row in mine]) for x in ("right", "nll"))
        found.append(recall_table.Found(name, budget, *columns, *of, **about))
    note = recall_table.note(tried, len(names))
    head, rows, csv = recall_table.lookups(found, job.baseline)
    table = tables.write(job.run.path / "lookups", head, rows, csv, note)
    common.say(
        f"\n{table}\n\n{note}\nwritten to {job.run.path}: lookups.(txt md csv jsonl), "
        "candidates.jsonl"
    )
