"""Rows that come and go: requests of any length in a batch of fixed shape.

A row has the same size whatever its prompt and its age, so a request is read into a free row at the
next border, `L` steps apart, and nothing is compiled for it. Its prompt is read in pieces between
the steps of the others, and always cut the same way. What a request is answered depends on its own
prompt, key and settings only: the same tokens, to the bit, whatever else is in the batch, and
whenever it came.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fkv import kinds, models
from fkv.cache.cadence import Cadence
from fkv.engine import reading, replay, steps
from fkv.engine.compressed import Compressed, widened
from fkv.engine.memory_maps import make_room
from fkv.engine.replay import Site
from fkv.engine.requests import STOPS, Event, Kept, Request, check, cut, piece_of, together
from fkv.engine.sampling import Sampling, Samplings
from fkv.engine.steps import NO_TOKEN, NOT_FINITE, Program
from fkv.errors import UserError
from fkv.models import LM
from fkv.policies.base import Policy


@dataclasses.dataclass(eq=False)
class _Row:
    """A request on its way.

    Attributes:
      key: of its request, as integers.
      tokens: how many were drawn.
      newest: the last of them.
      new: what was drawn since the last event, arrays [n, ...].
      answer: the tokens of all events.
      held: at the end, what its cache holds, per layer.
      before: the cache at the end of its prompt, if it is to be kept.
    """

    id: int
    request: Request
    key: np.ndarray
    tokens: int = 0
    newest: int = 0
    finish: str | None = None
    new: list[steps.Drawn] = dataclasses.field(default_factory=list)
    answer: list[int] = dataclasses.field(default_factory=list)
    held: list[Any] | None = None
    before: Kept | None = None

    def __post_init__(self):
        self._until = self.request.until() if self.request.until else None

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return 0 if self.finish else self.request.limit - self.tokens

    @property
    def position(self) -> int:
        """Of the newest token."""
        return len(self.request.prompt) + self.tokens - 1

    def take(self, drawn: steps.Drawn) -> None:
        """Takes what a call drew, arrays [n, ...]."""
        count = int((drawn.token != NO_TOKEN).sum())
        if not count:
            return
        last = int(drawn.token[count - 1])
        if last == NOT_FINITE:
            self.finish, count = "error", count - 1
        elif last in self.request.stop:
            self.finish = "stop"
        if self._until:
            ended = self._until(drawn.token[: count - (self.finish == "stop")])
            if ended is not None:
                self.finish, count = "stop", ended
        self.new.append(jax.tree.map(lambda x: x[:count], drawn))
        self.tokens += count
        self.newest = last
        if not self.finish and self.tokens == self.request.limit:
            self.finish = "length"


@dataclasses.dataclass
class _Reading:
    """Prompts that are read together, of equal padded widths.

    Attributes:
      members: whose they are; None for those that have ended.
      pieces: tokens and positions [b, t] of those to come.
      rows: what their requests set.
      held: what was read, per layer.
    """

    members: list[_Row | None]
    pieces: collections.deque
    rows: steps.Rows
    held: list[Any]

    @property
    def live(self) -> list[_Row]:
        return [row for row in self.members if row is not None]


class Batcher:
    """Answers requests, so many rows at a time. One thread owns it."""

    def __init__(
        self,
        lm: LM,
        policy: Policy,
        cadence: Cadence,
        rows: int,
        length: int,
        *,
        piece: int | None = None,
        top: int | None = 0,
    ):
        """Allocates the caches.

        Args:
          lm: with separate layers, which are read in place; of stacked ones a copy is made.
          policy: any.
          cadence: of evictions; for a policy that does not evict, only the interval is used.
          rows: answered at a time.
          length: most tokens of a prompt and its answer; a full cache has room for so many.
          piece: tokens of a prompt that are read between steps, rounded up to whole chunks; by
            default 1024 or `L`, whichever is larger.
          top: likeliest tokens that a request may ask logprobs of; None computes no logprobs.

        Raises:
          UserError: the policy does not fit the model, or a size is out of range.
        """
        kinds.check("rows", rows, kinds.whole(1))
        kinds.check("length", length, kinds.whole(2))
        if piece is not None:
            kinds.check("piece", piece, kinds.whole(1))
        if top is not None:
            kinds.check("top", top, kinds.whole(0, lm.config.vocab_size))
        replay.check(policy, lm.config, cadence, rows)
        make_room()
        interval = cadence.interval
        self._lm, self._policy = models.separate(lm, consume=False), policy
        self._cadence, self._length, self._top = cadence, length, top
        self._piece = piece_of(interval, piece)
        self._queue: collections.deque[_Row] = collections.deque()
        self._reading: _Reading | None = None
        self._ready: collections.deque[_Reading] = collections.deque()
        self._rows: list[_Row | None] = [None] * rows
        self._ended: list[_Row] = []  # their last event is due
        self._ids = 0
        self._start = 0  # steps since the last border
        self._mesh, dtype = steps.mesh_of(lm), lm.params["embed_vm"].dtype
        self._room = max(length, interval)
        self._made = policy, cadence, (self._room, self._piece)
        sizes = rows, lm.config, cadence, self._room, dtype, self._mesh
        self._caches, self._asked = steps.empty(policy, *sizes)
        self._settings: steps.Rows | None = None  # None where rows have changed

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._queue) + len(self._begun)

    @property
    def _begun(self) -> list[_Row]:
        """Rows whose prompts are read, or were, and have no place yet."""
        begun = [self._reading, *self._ready]
        return [row for one in begun if one is not None for row in one.live]

    @property
    def live(self) -> int:
        """Rows that are decoded."""
        return len(self._rows) - self._rows.count(None)

    @property
    def idle(self) -> int:
        """Rows that are free."""
        return self._rows.count(None)

    def submit(self, request: Request) -> int:
        """Queues a request.

        Returns:
          Its id, which events bear.

        Raises:
          UserError: it could never be answered; one line that says why.
        """
        check(request, self._lm.config.vocab_size, self._length, self._top)
        if request.kept is not None and not _same(request.kept.made_by, self._made):
            raise UserError(
                "kept is of another policy, cadence, length or piece than this batcher's"
            )
        key = np.asarray(jax.random.key_data(request.key))
        self._queue.append(_Row(self._ids, request, key))
        self._ids += 1
        return self._ids - 1

    def kept(self, read: Compressed) -> Kept:
        """The cache of a text that was read before, for requests that go on from it.

        Raises:
          ValueError: it is of another policy or cadence.
        """
        if read.policy is not self._policy or read.cadence != self._cadence:
            raise ValueError("the text was read under another policy or cadence")
        held = read.held
        if not self._policy.evicts:
            room = reading.room_to_read(self._room, self._piece)
            held = tuple(widened(one, room) for one in held)
        return Kept(read.tokens, held, read.entries, read.evictions, self._made)

    def cancel(self, id: int) -> None:
        """Ends a request, whose row is free at the next step; of one that has ended, nothing."""
        found = [*self._queue, *self._begun, *self._rows]
        row = next((row for row in found if row is not None and row.id == id), None)
        if row is None:
            return
        row.finish = "cancelled"
        self._ended.append(row)
        self._queue = collections.deque(one for one in self._queue if one is not row)
        self._rows = _without(row, self._rows)
        for one in [self._reading, *self._ready]:
            if one is not None:
                one.members = _without(row, one.members)
        self._ready = collections.deque(one for one in self._ready if one.live)
        if self._reading and not self._reading.live:
            self._reading = None

    def step(self, tokens: int | None = None) -> list[Event]:
        """Reads a piece of the prompts that wait, then decodes every row.

        Args:
          tokens: so many steps, at most those up to the next border; by default up to there.

        Returns:
          What this brought, an event per request of which there is news.
        """
        interval = self._cadence.interval
        if tokens is not None:
            kinds.check("tokens", tokens, kinds.whole(1))
        self.read()
        if self.live:
            self._decode(min(tokens or interval, interval - self._start))
        return self._events()

    def wait(self) -> None:
        """Returns when all that was begun is done: programs run while the host goes on."""
        jax.block_until_ready((self._caches, self._asked))

    # ---- reading prompts

    def read(self) -> None:
        """Reads a piece of the prompts that wait, and at a border gives them rows; see `step`."""
        if not self.live:
            self._start = 0  # nothing in the rings is needed any more
        self._place_ready()
        self._read()

    def _read(self) -> None:
        """Reads about a piece; more while nobody waits for the next step."""
        budget = self._piece * (1 if self.live else len(self._rows))
        while budget > 0:
            if self._reading is None:
                room = self.idle - len(self._begun)
                if not self._queue or room <= 0:
                    return
                self._reading = self._begin(room)
            one = self._reading
            budget -= one.pieces[0][0].size
            drawn = self._read_piece(one)
            if not one.pieces:
                self._reading, drawn = None, jax.device_get(drawn)
                for i, row in enumerate(one.members):
                    if row is not None:
                        row.take(jax.tree.map(lambda x, i=i: x[i], drawn))
                        self._is_read(one, i)
                if one.live:
                    self._ready.append(one)
                self._place_ready()  # at once, as what is read ahead takes memory of its own

    def _is_read(self, one: _Reading, index: int) -> None:
        """Keeps what is to be kept of a row's prompt, and ends a row that needs no step."""
        row = one.members[index]
        if row.request.keep:
            held = jax.tree.map(lambda x: x[index : index + 1], one.held)
            if self._policy.evicts:  # evictions mix the answer into what is kept at its end
                row.before = self._kept(row, held)
            row.held = held if row.finish else None
        if row.finish:
            one.members[index] = None
            self._ended.append(row)

    def _begin(self, room: int) -> _Reading:
        """Begins to read the next prompt, and those behind it that can be read with it."""
        some, pieces = [self._queue[0]], self._cut(self._queue[0])
        kept, held = some[0].request.kept, [None] * self._lm.config.layers
        if kept is not None:
            first = np.int32(len(kept.tokens))
            held = [reading.continue_layer(one, first) for one in kept.held]
        elif len(pieces) == 1:
            width = pieces[0][0].shape[1]
            for row in itertools.islice(self._queue, 1, room):
                other = self._cut(row)
                if row.request.kept is None and len(other) == 1 and other[0][0].shape[1] == width:
                    some, pieces = [*some, row], [*pieces, *other]
            count = together(len(some), width, self._piece)
            some = some[:count]
            pieces = [tuple(np.concatenate(x) for x in zip(*pieces[:count], strict=True))]
        for row in some:
            self._queue.remove(row)
        return _Reading(some, collections.deque(pieces), self._settings_of(some), held)

    def _cut(self, row: _Row) -> list[tuple[np.ndarray, np.ndarray]]:
        """What is to be read of a row's prompt, in pieces."""
        request, first = row.request, 0
        if request.kept is not None:
            first = len(request.kept.tokens)
        return cut(request.prompt[first:], self._cadence.interval, self._piece, first)

    def _read_piece(self, one: _Reading) -> steps.Drawn | None:
        """Reads the next piece; after the last one, draws a token."""
        token, position = one.pieces.popleft()
        hidden = reading.embed(self._lm, token)
        room = reading.room_to_read(self._room, self._piece)
        for layer in range(self._lm.config.layers):
            site = self._site(layer, one.rows)
            hidden, one.held[layer] = reading.read_layer(
                self._lm.params["layers"][layer], self._policy, site, hidden, position,
                one.held[layer], room,
            )  # fmt: skip
        if one.pieces:
            return None
        last = hidden[:, -1], position[:, -1]  # of any width, so nothing is compiled for it
        return reading.first_token(self._lm, one.rows, *last, self._top)

    def _place_ready(self) -> None:
        """At a border, gives rows to what has been read."""
        while self._ready and self._start == 0:
            self._place(self._ready.popleft())

    def _place(self, one: _Reading) -> None:
        """Gives rows to prompts that have been read."""
        free = [i for i, row in enumerate(self._rows) if row is None]
        places = [(i, free.pop(0)) for i, row in enumerate(one.members) if row is not None]
        for i, index in places:
            self._rows[index] = one.members[i]
        places += places[-1:] * (len(one.members) - len(places))  # the last one again
        read, index = np.array(places, np.int32).T
        caches = list(self._caches)
        for layer, held in enumerate(one.held):
            site, one.held[layer] = self._site(layer, one.rows), None
            caches[layer] = reading.place_layer(
                self._policy, caches[layer], held, site, read, index
            )
        self._caches, self._settings = tuple(caches), None

    def _site(self, layer: int, rows: steps.Rows) -> Site:
        return Site(self._lm.config, self._cadence, np.int32(layer), rows.key_b, rows.prompt_b)

    def _settings_of(self, some: Sequence[_Row | None]) -> steps.Rows:
        """What these rows' requests set, as arrays."""
        stop = np.full((len(some), STOPS), NO_TOKEN, np.int32)
        for i, row in enumerate(some):
            if row is not None:
                stop[i, : len(row.request.stop)] = row.request.stop
        none = next(row for row in some if row is not None).key * 0
        key = np.stack([none if row is None else row.key for row in some])
        prompt = np.array([0 if row is None else len(row.request.prompt) for row in some], np.int32)
        greedy = Sampling(0.0)
        how = Samplings.of([greedy if row is None else row.request.sampling for row in some])
        made = steps.Rows(jax.random.wrap_key_data(key), prompt, stop, how)
        if self._mesh is None:  # those of one row are used once or twice
            return made if len(some) == 1 else jax.device_put(made)
        return jax.device_put(made, NamedSharding(self._mesh, PartitionSpec()))

    # ---- decoding

    def _decode(self, count: int) -> None:
        if self._settings is None:
            self._settings = self._settings_of(self._rows)
        sizes = [(0, 0, 0) if r is None else (r.newest, r.position, r.left) for r in self._rows]
        token, position, left = np.array(sizes, np.int32).T
        state = steps.State(self._caches, self._asked, token, position, left)
        program, rows = Program(self._cadence, count, self._top), self._settings
        start, self._start = self._start, (self._start + count) % self._cadence.interval
        start = np.int32(start)
        state, drawn = steps.steps(self._lm, self._policy, program, state, rows, start)
        keep = any(row is not None and row.request.keep for row in self._rows)
        if not keep:  # evictions run while the host sees what was drawn
            state = self._border(state)
        drawn = jax.device_get(drawn)
        for i, row in enumerate(self._rows):
            if row is not None:
                row.take(jax.tree.map(lambda x, i=i: x[i], drawn))
                if row.finish:
                    self._ended.append(row)
                    self._rows[i] = None
                    if row.request.keep and row.finish != "error":
                        row.held = self._take(state, i)
        if keep:
            state = self._border(state)
        self._caches, self._asked = state.caches, state.asked

    def _border(self, state: steps.State) -> steps.State:
        if self._start:
            return state
        rows, lm = self._settings, self._lm
        return steps.evict(lm.config, self._policy, self._cadence, state, rows)

    def _take(self, state: steps.State, index: int) -> list[Any]:
        """What a row holds, per layer."""
        room, row = reading.room_to_read(self._room, self._piece), np.int32(index)
        site = self._site(0, self._settings)
        asked = state.asked or [None] * len(state.caches)
        return [
            reading.take_layer(self._policy, cache, one, site, row, room)
            for cache, one in zip(state.caches, asked, strict=True)
        ]

    # ---- what comes of it

    def _events(self) -> list[Event]:
        rows = [row for row in [*self._begun, *self._rows] if row is not None]
        ended, self._ended = self._ended, []
        return [self._event(row) for row in [*ended, *rows] if row.new or row.finish]

    def _event(self, row: _Row) -> Event:
        new, top = row.new or [_nothing(self._top)], None
        new = jax.tree.map(lambda *x: np.concatenate(x), *new)
        logprob = new.logprob
        if logprob is None:
            logprob = np.full(len(new.token), np.nan, np.float32)
        if n := row.request.logprobs:
            top = new.top_token[:, :n], new.top_logprob[:, :n]
        row.new = []
        row.answer += new.token.tolist()
        (entries, evictions), kept = self._counts(row), None
        if row.request.keep and row.finish in ("stop", "length"):
            kept = dataclasses.replace(self._kept(row, row.held), before=row.before)
        return Event(row.id, new.token, logprob, top, row.finish, evictions, kept, entries)

    def _kept(self, row: _Row, held: Sequence[Any]) -> Kept:
        """The cache of the prompt and what is answered, all of it but the newest token."""
        tokens = np.concatenate([row.request.prompt, row.answer[:-1]]).astype(np.int32)
        least = 1
        if self._policy.evicts:
            position = np.asarray(held[0].chunk.position_bl)
            least = int(position[position >= 0].min()) + 1
        return Kept(tokens, tuple(held), *self._counts(row), self._made, least)

    def _counts(self, row: _Row) -> tuple[int, int]:
        """Entries that a head with an even budget holds, and evictions a token attended after."""
        prompt, kept, budget = len(row.request.prompt), row.request.kept, self._cadence.budget
        held, fired = (kept.entries, kept.evictions) if kept else (0, 0)
        new = prompt - (len(kept.tokens) if kept else 0) + max(row.tokens - 1, 0)
        if not self._policy.evicts:
            return held + new, 0
        if not row.tokens:
            return held, fired
        interval = self._cadence.interval
        chunk = (prompt - (len(kept.tokens) if kept else 0) - 1) % interval + 1
        while new > 0:
            fired, held = fired + (held > budget), min(held, budget) + min(chunk, new)
            new, chunk = new - chunk, interval
        return held, fired


def _without(row: _Row, rows: Sequence[_Row | None]) -> list[_Row | None]:
    return [None if one is row else one for one in rows]


def _same(some: tuple, others: tuple) -> bool:
    return some[0] is others[0] and some[1:] == others[1:]


def _nothing(top: int | None) -> steps.Drawn:
    """No tokens."""
    token, logprob = np.zeros(0, np.int32), np.zeros(0, np.float32)
    if not top:
        return steps.Drawn(token, None if top is None else logprob)
    return steps.Drawn(token, logprob, np.zeros((0, top), np.int32), np.zeros((0, top), np.float32))
