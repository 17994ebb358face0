"""Traces to train on, in Parquet files: the model's own answers to questions, or plain text."""

import collections
import dataclasses
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from fkv import api, policies
from fkv.api import Model
from fkv.cache.cadence import FULL, Cadence
from fkv.data import benchmarks, sources, traces
from fkv.engine.requests import Plan
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.jobs import answering, common, groups, text_traces
from fkv.keys import Purpose, key_of
from fkv.models import chat as chats
from fkv.models import texts
from fkv.runs import parallel, preemption, provenance
from fkv.runs.rundir import open_run
from fkv.tasks import ledger

# What a run may be asked for more of.
MAY_DIFFER = (*common.other_jobs("traces"), "traces.count", "traces.samples", "traces.batch")


@dataclasses.dataclass(frozen=True)
class Question:
    """What is answered.

    Attributes:
      id: its row.
      prompt, response: token ids; the response is given where a column has it.
    """

    id: str
    prompt: np.ndarray
    response: np.ndarray | None = None


def run(config: ConfigDict, workdir: str) -> int:
    """Samples answers with the full cache, or reads those of a column, and writes them as traces.

    `workdir` gets a Parquet file of `traces.SCHEMA` a batch, each written atomically: set
    `data.path` to it and `data.prompt_column` to `prompt_tokens`. Resumes. Several processes take
    turns, and write files of their own. For plain text (`traces.text`) see `text_traces`.

    Returns:
      The number of traces that this process wrote.
    """
    groups.check(config, "traces")
    settings = config.traces
    if settings.text:
        return text_traces.run(config, workdir)
    common.announce("traces", config, workdir, common.model_config(config), ["full cache"])
    model = common.load_language_model(config)
    questions = _questions(config, model)
    new_tokens = answering.new_tokens(config, "traces", settings.questions == api.EMBEDDED)
    width = max(len(q.prompt) for q in questions)
    shape = answering.Shape(settings.batch, width, new_tokens)
    longest = width + new_tokens
    if settings.response:
        longest = max(len(q.prompt) + len(q.response) for q in questions)
    common.warn_of_length(model.config, longest, "the longest prompt and answer")
    asked = ((q.prompt, q.id, q.response) for q in questions)
    inputs = common.language_inputs(model)
    inputs["traces.questions: questions"] = provenance.of_questions(asked)
    run = open_run(workdir, config, MAY_DIFFER, inputs)

    done, first = _done(run.path)
    parallel.barrier("traces, before the first is written")  # so that all find the same done
    samples = 1 if settings.response else settings.samples
    todo = [
        (question, i, j)
        for i, question in enumerate(questions)
        for j in range(samples)
        if (question.id, j) not in done
    ]
    index, count = jax.process_index(), jax.process_count()
    batches = [todo[i : i + settings.batch] for i in range(0, len(todo), settings.batch)]
    mine = [(n, one) for n, part in enumerate(batches) if n % count == index for one in part]
    # A file has the answers of a batch, whenever they end.
    missing = collections.Counter(n for n, _ in mine)
    ready: dict[int, dict[int, dict]] = collections.defaultdict(dict)
    written = truncated = tokens = 0
    left = len(mine)

    def write(n):
        nonlocal written, truncated, tokens
        rows = [row for _, row in sorted(ready.pop(n).items())]
        traces.write(run.path / f"traces-{index:03d}-{first + n:05d}.parquet", rows, run.config)
        written += len(rows)
        truncated += sum(row["truncated"] for row in rows)
        tokens += sum(row["tokens"] for row in rows)

    bar = common.progress(total=len(mine), desc="traces")
    with bar, preemption.noticed() as asked_to_end:
        for ended in _answers(config, model, [one for _, one in mine], shape):
            for at, answer in ended:
                n, (question, _, sample) = mine[at]
                ready[n][at] = _row(config, model, question, sample, answer)
                if len(ready[n]) == missing[n]:
                    write(n)
            bar.update(len(ended))
            left -= len(ended)
            # Processes need not agree: each has written its answers.
            if asked_to_end() and left:
                for n in list(ready):
                    write(n)
                run.close()
                raise preemption.Preempted(f"{len(done) + written} traces are in {workdir}")
    # One may have longer answers than the others.
    parallel.barrier("traces, after the last is written", seconds=12 * parallel.DEADLINE)
    counts = parallel.share([[written, truncated, tokens]])
    all_written, truncated, tokens = map(sum, zip(*counts, strict=True))
    common.say(
        f"{all_written} traces of {tokens / max(all_written, 1):.0f} tokens written to {workdir}, "
        f"{truncated} of them cut off; {len(done)} were done before"
    )
    run.close()
    return written


def _questions(config: ConfigDict, model: Model) -> list[Question]:
    settings = config.traces
    if settings.questions == api.EMBEDDED:
        common.check_vocabulary(config, model.config.vocab_size)
        count, spec = settings.count or 256, common.spec(config)
        found = ledger.problems(config.seed, settings.split, 0, count, spec)
        return [Question(str(i), ledger.encode(p.prompt)) for i, p in enumerate(found)]

    where = settings.questions
    with common.of_field("traces.questions"):
        rows = sources.open_rows(where, settings.split, settings.subset)
    asked = sources.column(rows, settings.question, where)
    given = sources.column(rows, settings.response, where) if settings.response else asked
    end = None
    if settings.response and model.tokenizer is not None:
        end = chats.end_of_answer(model.tokenizer, model.stop, settings.chat)
    questions, encoded, unusable = [], [], 0
    for i, values in enumerate(zip(asked, given, strict=True)):
        if settings.count and len(questions) == settings.count:
            break
        text, response = found = [benchmarks.words(value) for value in values]
        if None in found:
            j = found.index(None)
            name = (settings.question, settings.response)[j]
            common.say(f"{where}: row {i} left out, {name} is {reprlib.repr(values[j])}")
            unusable += 1
            continue
        asked_for = f"{settings.instruction} {text}".strip()
        prompt = api.encode(model, asked_for, settings.chat, f"{where}: row {i}")
        encoded.append((f"{where}: row {i}", asked_for, prompt))
        answer = None
        if settings.response:
            answer = _answer(model, prompt, response, end, f"{where}: the answer of row {i}")
            encoded.append((f"{where}: the answer of row {i}", response, answer))
        questions.append(Question(str(i), prompt, answer))
    if unusable:
        common.say(f"{where}: {unusable} rows left out")
    if not questions:
        raise UserError(f"{where}: none of its {len(rows)} rows can be used")
    common.warn_of_unknown(model, encoded)
    return questions


def _answer(model: Model, prompt: np.ndarray, text: str, end: int | None, what: str) -> np.ndarray:
    """Token ids of a given answer, begun and ended as the model would.

    Args:
      end: the token that ends it; None for none.
      what: names the answer in errors.
    """
    text = chats.continues_thought(api.decode(model, prompt[-32:], special=True), text)
    ids = texts.tokenize(model.tokenizer, text.rstrip(), continued=False)
    if not ids or ids[-1] not in model.stop:
        ids = texts.tokenize(model.tokenizer, text, continued=False)
    while ids and ids[-1] in model.stop:
        ids.pop()
    ids += [] if end is None else [end]
    if ids:
        api.check_known(model, ids, what)
    return np.asarray(ids, np.int32)


def _answers(
    config: ConfigDict, model: Model, asked: Sequence, shape: answering.Shape
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Answers as they end: indices and token ids."""
    if config.traces.response:
        yield from ([(i, question.response)] for i, (question, _, _) in enumerate(asked))
        return
    sampling, cadence = Sampling.of(config.traces), Cadence.of(FULL, config.interval)
    plan = Plan(cadence, sampling, model.stop)
    given = [(q.prompt, key_of(config.seed, Purpose.TRACE, i, j)) for q, i, j in asked]
    yield from answering.queue(model, policies.get("full"), plan, shape, given)


def _row(config, model, question: Question, sample: int, answer: np.ndarray) -> dict:
    ids = np.concatenate([question.prompt, answer])
    return {
        "id": question.id,
        "sample": sample,
        "input_ids": ids,
        "prompt_tokens": len(question.prompt),
        "tokens": len(ids),
        "truncated": not len(answer) or int(answer[-1]) not in model.stop,
        "source": config.traces.questions,
        "kind": "answers",
    }


def _done(path: Path) -> tuple[set[tuple[str, int]], int]:
    """(id, sample) of the traces written before, and the next number for a file."""
    done, last = set(), -1
    for file in sorted(path.glob("traces-*.parquet")):
        keys = set(traces.written(file))
        number = re.fullmatch(r"traces-[0-9]+-([0-9]+)", file.stem)
        if number is None or done & keys:
            raise UserError(f"{file} is not one of this run's files, or is a copy: move it away")
        done |= keys
        last = max(last, int(number[1]))
    return done, last + 1
