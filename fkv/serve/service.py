"""What is served: policies over one set of weights, their queues, and requests under way."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fkv import api
from fkv.engine.answers import Answer
from fkv.engine.requests import Request
from fkv.engine.sampling import Sampling
from fkv.errors import UserError, suggest
from fkv.kinds import said
from fkv.models import chat as chats
from fkv.models import detokenizing, prompts
from fkv.models.named import Model
from fkv.serve.engine import Engine, Failed, Ticket
from fkv.serve.metrics import Metrics
from fkv.serve.protocol import Asked, Refused
from fkv.serve.replies import Choice, Reply
from fkv.serve.sessions import Sessions


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
      rows: answers at a time, of each lane.
      queue: answers that may wait, of each lane.
      length: most tokens of a prompt and its answer.
      top: most of the likeliest tokens beside each.
      every: tokens between two pieces of a stream.
      seconds: of a request, from its body to its last token.
      body: bytes of a request's body.
      drain: seconds for running requests after the server was asked to end.
    """

    rows: int
    queue: int
    length: int
    top: int = 5
    every: int = 16
    seconds: float = 600.0
    body: int = 2**20
    drain: float = 30.0


class Work:
    """A request under way; its answers come out of `events`.

    Args:
      reply: is built from them.
      since: when it came, on the monotonic clock.
      deadline: when it must be over, on the event loop's clock.
    """

    def __init__(self, reply: Reply, since: float, deadline: float):
        self.reply, self.since, self.deadline = reply, since, deadline
        self.tickets: list[Ticket] = []
        self.queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()


class Service:
    """Takes requests that are checked, and yields what their answers add; used in one event loop.

    Args:
      model: the weights of all lanes.
      name: of the model in lists.
      lanes: what makes the batcher of each lane, `foresight-1024` or `full`; the first is the
        default.
      defaults: sampling where a request says nothing.
      limits: of requests.
      sessions: conversations whose caches are kept, at most.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        lanes: Mapping[str, Callable[[], Any]],
        defaults: Sampling,
        limits: Limits,
        sessions: int = 0,
    ):
        self.model, self.name, self.defaults, self.limits = model, name, defaults, limits
        self.created = int(time.time())
        self.lanes = {f"{name}/{lane}": lane for lane in lanes}
        self.metrics, self.sessions = Metrics(), Sessions(sessions)
        self.draining = False
        self._keeps = sessions > 0
        self._engine = Engine(lanes, limits.every, self._deliver)
        self._loop: asyncio.AbstractEventLoop | None = None
        # One thread: tokenizers are not made for several.
        self._texts = ThreadPoolExecutor(1, "fkv texts")
        self._pending = dict.fromkeys(lanes, 0)
        self._seconds = 1.0  # that an answer takes, about

    def warm(self) -> None:
        """Has the programs compiled that most requests need; before `start`."""
        settings = {"sampling": Sampling(0.5), "stop": self.model.stop}
        limit = min(self.limits.every + 1, self.limits.length - 1)
        prompt, key = np.zeros(1, np.int32), api.sample_key(0, 0, 0)
        self._engine.warm(Request(prompt=prompt, key=key, limit=limit, **settings))

    def start(self) -> None:
        """In the event loop that calls everything else."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    def stop(self) -> None:
        self._engine.stop(seconds=self.limits.drain)
        self._texts.shutdown(wait=False, cancel_futures=True)

    @property
    def pending(self) -> int:
        """Answers that wait or are generated."""
        return sum(self._pending.values())

    @property
    def healthy(self) -> bool:
        return self._engine.alive and not self.draining

    def gauges(self) -> dict[str, dict[str, int]]:
        """Queue and rows of each lane, by its name in lists."""
        counts = self._engine.counts()
        return {
            name: {**counts[lane], "rows": self.limits.rows} for name, lane in self.lanes.items()
        }

    # ---- requests

    async def begin(self, asked: Asked) -> Work:
        """Encodes the prompts and submits an answer of each.

        Raises:
          Refused: the model is unknown, the prompts can't be, or the queue is full.
          TimeoutError: encoding took longer than a request may take.
        """
        if self.draining:
            raise Refused("the server is shutting down", 503, headers={"Retry-After": "10"})
        if not self._engine.alive:
            raise Refused("the server has failed, see its log", 503)
        since, name = time.monotonic(), self._lane(asked.model)
        lane, rows = self.lanes[name], len(asked.prompts) * asked.n
        self._check(asked, rows)
        self._room(lane, rows)
        deadline = self._loop.time() + self.limits.seconds
        # Taken before anything is awaited, so that no other request gets it.
        self._pending[lane] += rows
        left = rows
        try:
            prepare = functools.partial(self._prepare, asked)
            async with asyncio.timeout_at(deadline):
                ids, requests, choices = await self._loop.run_in_executor(self._texts, prepare)
            cached = 0
            if asked.session and (kept := self.sessions.find(name, asked.session, ids[0])):
                cached = len(kept.tokens)
                requests = [dataclasses.replace(requests[0], kept=kept)]
            usage = sum(map(len, ids)), cached
            work = Work(Reply(asked.chat, name, choices, usage), since, deadline)
            for i, request in enumerate(requests):
                listen = functools.partial(self._listen, work, lane, asked, i)
                ticket = Ticket(lane, request, listen)
                ticket.evictions = request.kept.evictions if request.kept else 0
                work.tickets.append(ticket)
            left = 0
        finally:
            self._pending[lane] -= left
        self.metrics.prompt_tokens[name] += usage[0]
        for ticket in work.tickets:
            self._engine.submit(ticket)
        return work

    def _lane(self, model: str) -> str:
        if model == self.name:
            return next(iter(self.lanes))
        if model not in self.lanes:
            near = suggest(model, [*self.lanes])
            told = f"model {said(model)} is not served{near}"
            raise Refused(told, 404, param="model", code="model_not_found")
        return model

    def _check(self, asked: Asked, rows: int) -> None:
        limits = self.limits
        if rows > limits.rows + limits.queue:
            most = limits.rows + limits.queue
            told = f"{rows} answers asked for at once: at most {most} are allowed"
            raise Refused(told, param="n", code="invalid_value")
        if asked.top > limits.top:
            field = "top_logprobs" if asked.chat else "logprobs"
            raise Refused(f"{field} = {asked.top} must be at most {limits.top}", param=field)
        if asked.session and not self._keeps:
            raise Refused(
                "this server keeps no sessions (serve.sessions is 0): leave session out",
                param="session",
            )
        if asked.session and rows > 1:
            raise Refused("a session takes one prompt and one answer: n must be 1", param="session")

    def _room(self, lane: str, rows: int) -> None:
        """Refuses more than rows and queue hold."""
        over = self._pending[lane] + rows - self.limits.rows - self.limits.queue
        if over > 0:
            wait = max(1, min(60, round(self._seconds * over / self.limits.rows)))
            raise Refused(
                f"{self._pending[lane]} answers are running or queued: try again later", 429,
                code="queue_full", headers={"Retry-After": str(wait)},
            )  # fmt: skip

    def _prepare(self, asked: Asked):
        """In a thread of its own: ids of each prompt, and requests and choices of each answer."""
        field = "messages" if asked.chat else "prompt"
        try:
            ids = [
                prompts.encode(self.model, one, what=field, template=asked.template)
                for one in asked.prompts
            ]
            opened = None
            if asked.chat:
                before = api.decode(self.model, ids[0][-16:], special=True)
                opened = chats.opens_thought(before)
            top = asked.top if asked.logprobs else None
            choices = [
                Choice(self.model, Answer(self.model, asked.stop), opened, top)
                for _ in range(len(ids) * asked.n)
            ]
        except UserError as error:
            raise Refused(str(error), param=field, code="invalid_value") from None
        limits, until = [self._limit(asked, len(one), field) for one in ids], None
        if asked.stop:
            until = functools.partial(detokenizing.until, self.model.tokenizer, asked.stop)
        requests = [
            Request(
                prompt=one,
                key=api.sample_key(asked.seed, i, j),
                limit=limits[i],
                sampling=asked.sampling,
                stop=self.model.stop,
                logprobs=asked.top,
                keep=bool(asked.session),
                until=until,
            )
            for i, one in enumerate(ids)
            for j in range(asked.n)
        ]
        return ids, requests, choices

    def _limit(self, asked: Asked, prompt: int, field: str) -> int:
        """Most new tokens: what is asked for, or what fits; 16 in completions, as of OpenAI's."""
        most = self.limits.length - prompt
        if most < 1:
            raise Refused(
                f"{field} has {prompt} tokens: with its answer it may have at most "
                f"{self.limits.length}", param=field, code="context_length_exceeded",
            )  # fmt: skip
        if asked.limit is None:
            return most if asked.chat else min(most, 16)
        if asked.limit > most:
            raise Refused(
                f"{prompt} tokens of {field} and max_tokens = {asked.limit} are more than the "
                f"{self.limits.length} of a request", param="max_tokens",
                code="context_length_exceeded",
            )  # fmt: skip
        return asked.limit

    # ---- events

    def _deliver(self, pairs: Sequence[tuple[Callable, Any]]) -> None:
        """From the engine's thread to the event loop."""

        def run():
            for listener, event in pairs:
                listener(event)

        try:
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:  # the loop is closed: nobody listens
            return

    def _listen(self, work: Work, lane: str, asked: Asked, index: int, event: Any) -> None:
        ticket, name = work.tickets[index], f"{self.name}/{lane}"
        if isinstance(event, Failed) or event.finish is not None:
            self._over(ticket, work)
        if not isinstance(event, Failed):
            if len(event.tokens):
                if not ticket.began:
                    ticket.began = True
                    self.metrics.first_token(name, time.monotonic() - work.since)
                self.metrics.tokens[name] += len(event.tokens)
                self.metrics.rates[name].add(len(event.tokens))
            if asked.session and event.kept is not None:
                self.sessions.keep(name, asked.session, event.kept)
            self.metrics.evictions[name] += event.evictions - ticket.evictions
            ticket.evictions = event.evictions
        work.queue.put_nowait((index, event))

    def _over(self, ticket: Ticket, work: Work) -> None:
        """Gives back the place of an answer, once."""
        if not ticket.counted:
            ticket.counted = True
            self._pending[ticket.lane] -= 1
            self._seconds += 0.1 * (time.monotonic() - work.since - self._seconds)

    async def pieces(
        self, work: Work
    ) -> AsyncIterator[tuple[int, str, str, list[dict[str, Any]], str | None]]:
        """Index, thought, text, logprobs and finish of what each event adds.

        Raises:
          Refused: generation failed.
        """
        left = len(work.tickets)
        while left:
            index, event = await work.queue.get()
            if isinstance(event, Failed):
                raise Refused(event.message, 400 if event.clients else 500)
            if event.finish not in (None, "stop", "length"):
                raise Refused("the model's logits are NaN or infinite", 500)
            thought, text, logprobs = work.reply.choices[index].add(event)
            finish = event.finish
            left -= finish is not None
            if thought or text or logprobs or finish:
                yield index, thought, text, logprobs, finish

    def leave(self, work: Work) -> None:
        """Frees the rows of a request that is over, whatever the reason."""
        for ticket in work.tickets:
            if self._cancel(ticket, work):
                self.metrics.cancelled[f"{self.name}/{ticket.lane}"] += 1

    def _cancel(self, ticket: Ticket, work: Work) -> bool:
        """Frees the row of an answer; False if it was over."""
        if ticket.counted:
            return False
        self._engine.cancel(ticket)
        self._over(ticket, work)
        return True


def lane_name(policy: str, budget: int) -> str:
    """A lane's part of a model's name: `snapkv-1024`, or `full`."""
    return f"{policy}-{budget}" if budget else policy
