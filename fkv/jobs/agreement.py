"""Agreement with the full cache's greedy continuations of held-out prompts."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from fkv import api, kinds, policies
from fkv.api import Model
from fkv.cache.cadence import FULL, Cadence
from fkv.data.traces import Traces
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.engine.requests import Plan
from fkv.engine.sampling import Sampling
from fkv.evaluation import answers, recall, recall_table, tables
from fkv.jobs import answering, common, measuring
from fkv.jobs.measuring import CELL, COUNT, NATS, Job, Part
from fkv.keys import Purpose, key_of
from fkv.runs import parallel

CONTINUATIONS = "continuations.jsonl"
_IDS = kinds.several(COUNT, "token ids")
CONTINUATION = answers.Form(
    "a continuation", {"prompt": kinds.TEXT, "ids": _IDS, "text": kinds.TEXT}, ("prompt",)
)
AGREED = answers.Form(
    "a result",
    CELL | {"prompt": kinds.TEXT, "tokens": COUNT, "first": COUNT, "same": COUNT, "kl": NATS},
    ("policy", "budget", "prompt"),
)


def prompts(config: ConfigDict, model: Model) -> Traces:
    """Held-out traces of more tokens than a prompt."""
    settings, own = config.recall, ConfigDict(config).copy_and_resolve_references()
    own.protect_prompt = 0  # all traces have a prompt here, whatever the file says
    budget = settings.prompt_tokens - config.interval
    return common.load_traces(own, "eval", settings.prompts, budget, model.config.vocab_size)


def run(job: Job, held_out: Traces, at: Sequence[Cadence]) -> None:
    """Measures all policies along the continuations, and writes the tables."""
    settings, width = job.settings, job.settings.prompt_tokens
    names = held_out.digests()
    ids = [row[:width] for row in held_out.token_nt]
    store = job.store(CONTINUATIONS, CONTINUATION)
    keys = replay.row_keys(key_of(job.config.seed, Purpose.REPLAY), len(names))
    continued = {name: store.rows[name,]["ids"] for name in names}

    def part(members):
        whole = job.filled(members)
        token = np.zeros((len(whole), width + settings.new_tokens), np.int32)
        length = np.zeros(len(whole), np.int32)
        for row, i in enumerate(whole):
            both = [*ids[i], *continued[names[i]]]
            token[row, : len(both)], length[row] = both, len(both)
        rows = Batch.of(token, length, np.full(len(whole), width, np.int32))

        @functools.cache
        def full():
            return recall.full_hidden(job.model.lm, rows, settings.new_tokens)

        def measure(cadence, wanted):
            given = recall.Given(rows, keys[np.array(whole)], full())
            for one in recall.agree(job.model.lm, job.named, given, cadence, wanted):
                yield _agreed([names[i] for i in members], length - width, *one)

        return Part([names[i] for i in members], measure)

    parts = [part(members) for members in job.batches(range(len(names)))]
    results = job.store("agreement.jsonl", AGREED, interval=True)
    measuring.measure(job, parts, at, results)
    found = []
    for name, budget, about in measuring.cells(job, at):
        rows = [results.rows[name, budget, prompt] for prompt in names]
        columns = (np.array([r[x] for r in rows]) for x in ("tokens", "first", "same", "kl"))
        found.append(recall_table.Agreement(name, budget, *columns, **about))
    if parallel.first():
        note = (
            f"{len(names)} held-out prompts of {width} tokens, continued by the full cache's "
            f"{found[0].tokens_n.sum()} likeliest tokens; ± one standard error over prompts. "
            "Tokens to the first difference: of greedy decoding, all of them where there is none; "
            "same token, KL(full || policy) in nats: given the full cache's tokens so far. To "
            f"baseline: minus the KL of {job.baseline or 'the rule-based policy of lowest KL'}."
        )
        rows, csv = recall_table.agreement(found, job.baseline)
        path = job.run.path / "agreement"
        table = tables.write(path, recall_table.AGREEMENT_HEAD, rows, csv, note)
        common.say(f"\n{table}\n\n{note}\nwritten to {job.run.path}: agreement.(txt md csv jsonl)")


def continue_all(job: Job, held_out: Traces) -> None:
    """Lets the full cache continue the prompts that have no continuation yet."""
    settings, model = job.settings, job.model
    ids = (row[: settings.prompt_tokens] for row in held_out.token_nt)
    asked = dict(zip(held_out.digests(), ids, strict=True))
    store = job.store(CONTINUATIONS, CONTINUATION)
    plan = Plan(Cadence.of(FULL, job.config.interval), Sampling(temperature=0.0), model.stop)
    shape = answering.Shape(settings.batch, settings.prompt_tokens, settings.new_tokens)
    todo = [name for name in asked if (name,) not in store.rows]
    key = api.sample_key(job.config.seed, 0, 0)  # nothing is drawn
    mine = todo[jax.process_index() :: jax.process_count()]
    given = [(asked[name], key) for name in mine]
    answers, left = answering.queue(model, policies.get("full"), plan, shape, given), len(todo)
    while left:
        rows = [
            {"prompt": mine[i], "ids": ids.tolist(), "text": api.decode(model, ids)}
            for i, ids in next(answers, [])
        ]
        rows = parallel.share(rows)
        store.add(rows)
        left -= len(rows)
        job.check_end()
    rank = {(name,): i for i, name in enumerate(asked)}
    store.settle(lambda key: rank.get(key, len(rank)))


def _agreed(names, tokens_b, policy: str, hit_bc: np.ndarray, kl_bc: np.ndarray) -> list[dict]:
    """Rows of a policy; the batch may be longer than `names`."""
    found = []
    for name, n, hit, kl in zip(names, tokens_b.tolist(), hit_bc, kl_bc, strict=False):
        hit = hit[:n]
        first = n if hit.all() else int(hit.argmin())
        nats = max(float(kl[:n].astype(float).sum()), 0.0)  # rounding may go below
        row = {"policy": policy, "prompt": name, "tokens": n, "first": first}
        found.append(row | {"same": int(hit.sum()), "kl": nats})
    return found
