"""Rows that come and go: requests of any length in a batch of fixed shape.

A row has the same size whatever its prompt and its age, so a request is read into a free row at the
next border, `L` steps apart, and nothing is compiled for it. Its prompt is read in pieces between
the steps of the others, and always cut the same way. What a request is answered depends on its own
prompt, key and settings only: the same tokens, to the bit, whatever else is in the batch, and
whenever it came.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from fkv import kinds, models
from fkv.cache.cadence import Cadence
from fkv.engine import replay, steps
from fkv.engine.replay import Site
from fkv.engine.sampling import FREE, Sampling, Samplings
from fkv.engine.steps import NO_TOKEN, NOT_FINITE, SHALLOW, Program
from fkv.errors import UserError
from fkv.models import LM
from fkv.policies.base import Policy

PIECE = 1024  # tokens of a prompt that are read between steps, by default
_STOPS = 64  # a request's stop tokens, at most


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be answered.

    Attributes:
      prompt: token ids, int32, at least one.
      key: PRNG key: equal keys and prompts, equal tokens.
      limit: new tokens, at most.
      sampling: of the tokens.
      stop: tokens that end the answer, at most 64.
      logprobs: so many of the likeliest tokens beside each, at most the batcher's `top`.
    """

    prompt: np.ndarray
    key: Array
    limit: int
    sampling: Sampling = FREE
    stop: tuple[int, ...] = ()
    logprobs: int = 0


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step brought for a request.

    Attributes:
      id: as `submit` gave it.
      tokens: ids since its last event, int32 [n]; a stop token is the last.
      logprobs: of each, by the model's own distribution, before temperature or top-k: float32 [n];
        NaN in a batcher that computes none.
      top: of the likeliest tokens ids and logprobs, [n, logprobs] each; None if not asked for.
      finish: None while it goes on; `stop`, `length`, `cancelled`, or `error` where the logits are
        NaN or infinite.
      evictions: of a head so far, those after which a token attends.
    """

    id: int
    tokens: np.ndarray
    logprobs: np.ndarray
    top: tuple[np.ndarray, np.ndarray] | None
    finish: str | None
    evictions: int


@dataclasses.dataclass
class _Row:
    """A request on its way.

    Attributes:
      key: of its request, as integers.
      tokens: how many were drawn.
      newest: the last of them.
      new: what was drawn since the last event, arrays [n, ...].
    """

    id: int
    request: Request
    key: np.ndarray
    tokens: int = 0
    newest: int = 0
    finish: str | None = None
    new: list[steps.Drawn] = dataclasses.field(default_factory=list)

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
        self.new.append(jax.tree.map(lambda x: x[:count], drawn))
        self.tokens += count
        self.newest = last
        if last in self.request.stop:
            self.finish = "stop"
        elif not self.finish and self.tokens == self.request.limit:
            self.finish = "length"


@dataclasses.dataclass
class _Reading:
    """A prompt that is being read.

    Attributes:
      row: whose it is.
      pieces: tokens and positions [1, t] of those to come.
      rows: what its request sets, as arrays of one row.
      held: what was read, per layer.
    """

    row: _Row
    pieces: collections.deque
    rows: steps.Rows
    held: list[Any]


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
        interval = cadence.interval
        self._lm, self._policy = models.separate(lm, consume=False), policy
        self._cadence, self._length, self._top = cadence, length, top
        self._piece = -(-(piece or PIECE) // interval) * interval
        self._queue: collections.deque[_Row] = collections.deque()
        self._reading: _Reading | None = None
        self._ready: collections.deque[_Reading] = collections.deque()
        self._rows: list[_Row | None] = [None] * rows
        self._ended: list[_Row] = []  # their last event is due
        self._ids = 0
        self._start = 0  # steps since the last border
        self._mesh, dtype = steps.mesh_of(lm), lm.params["embed_vm"].dtype
        self._room = max(length, interval)
        sizes = rows, lm.config, cadence, self._room, dtype, self._mesh
        self._caches, self._asked = steps.empty(policy, *sizes)
        self._settings: steps.Rows | None = None  # None where rows have changed

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._queue) + len(self._ready) + (self._reading is not None)

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
        _check(request, self._lm.config.vocab_size, self._length, self._top)
        key = np.asarray(jax.random.key_data(request.key))
        self._queue.append(_Row(self._ids, request, key))
        self._ids += 1
        return self._ids - 1

    def cancel(self, id: int) -> None:
        """Ends a request, whose row is free at the next step; of one that has ended, nothing."""
        reading = [self._reading] if self._reading else []
        found = [*self._queue, *(one.row for one in [*reading, *self._ready]), *self._rows]
        row = next((row for row in found if row is not None and row.id == id), None)
        if row is None:
            return
        row.finish = "cancelled"
        self._ended.append(row)
        self._queue = collections.deque(one for one in self._queue if one is not row)
        self._ready = collections.deque(one for one in self._ready if one.row is not row)
        self._rows = [None if one is row else one for one in self._rows]
        if reading and reading[0].row is row:
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
        if not self.live:
            self._start = 0  # nothing in the rings is needed any more
        self._read()
        if self._start == 0:
            while self._ready:
                self._place(self._ready.popleft(), self._rows.index(None))
        if self.live:
            self._decode(min(tokens or interval, interval - self._start))
        return self._events()

    # ---- reading prompts

    def _read(self) -> None:
        """Reads about a piece; more while nobody waits for the next step."""
        budget = self._piece * (1 if self.live else len(self._rows))
        while budget > 0:
            if self._reading is None:
                if not self._queue or self.idle <= len(self._ready):
                    return
                self._reading = self._begin(self._queue.popleft())
            one = self._reading
            budget -= one.pieces[0][0].shape[1]
            drawn = self._read_piece(one)
            if not one.pieces:
                self._reading = None
                one.row.take(jax.tree.map(lambda x: x[0], jax.device_get(drawn)))
                if one.row.finish:
                    self._ended.append(one.row)
                else:
                    self._ready.append(one)

    def _begin(self, row: _Row) -> _Reading:
        pieces = collections.deque(cut(row.request.prompt, self._cadence.interval, self._piece))
        return _Reading(row, pieces, self._settings_of([row]), [None] * self._lm.config.layers)

    def _read_piece(self, one: _Reading) -> steps.Drawn | None:
        """Reads the next piece; after the last one, draws a token."""
        token, position = one.pieces.popleft()
        hidden = steps.embed(self._lm, token)
        room = steps.room_to_read(self._room, self._piece)
        for layer in range(self._lm.config.layers):
            site = self._site(layer, one.rows)
            hidden, one.held[layer] = steps.read_layer(
                self._lm.params["layers"][layer], self._policy, site, hidden, position,
                one.held[layer], room,
            )  # fmt: skip
        if one.pieces:
            return None
        return steps.first_token(self._lm, one.rows, hidden, position, self._top)

    def _place(self, one: _Reading, index: int) -> None:
        caches, index_0 = list(self._caches), np.int32(index)
        for layer, held in enumerate(one.held):
            site, one.held[layer] = self._site(layer, one.rows), None
            caches[layer] = steps.place_layer(self._policy, caches[layer], held, site, index_0)
        self._caches, self._settings = tuple(caches), None
        self._rows[index] = one.row

    def _site(self, layer: int, rows: steps.Rows) -> Site:
        return Site(self._lm.config, self._cadence, np.int32(layer), rows.key_b, rows.prompt_b)

    def _settings_of(self, some: Sequence[_Row | None]) -> steps.Rows:
        """What these rows' requests set, as arrays."""
        stop = np.full((len(some), _STOPS), NO_TOKEN, np.int32)
        for i, row in enumerate(some):
            if row is not None:
                stop[i, : len(row.request.stop)] = row.request.stop
        none = next(row for row in some if row is not None).key * 0
        key = np.stack([none if row is None else row.key for row in some])
        prompt = np.array([0 if row is None else len(row.request.prompt) for row in some], np.int32)
        greedy = Sampling(0.0)
        how = Samplings.of([greedy if row is None else row.request.sampling for row in some])
        made = steps.Rows(jax.random.wrap_key_data(key), prompt, stop, how)
        if self._mesh is None:
            return jax.device_put(made)
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
        whole = not self._start and self._lm.config.layers <= SHALLOW
        run = steps.one_chunk if whole else steps.steps
        state, drawn = run(self._lm, self._policy, program, state, rows, np.int32(start))
        if not whole and not self._start:
            state = steps.evict(self._lm.config, self._policy, self._cadence, state, rows)
        self._caches, self._asked = state.caches, state.asked
        drawn = jax.device_get(drawn)  # evictions may still run
        for i, row in enumerate(self._rows):
            if row is not None:
                row.take(jax.tree.map(lambda x, i=i: x[i], drawn))
                if row.finish:
                    self._ended.append(row)
                    self._rows[i] = None

    # ---- what comes of it

    def _events(self) -> list[Event]:
        rows = [row for row in [*(one.row for one in self._ready), *self._rows] if row is not None]
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
        evictions = 0
        if self._policy.evicts and row.tokens:
            evictions = self._cadence.evictions_generating(len(row.request.prompt), row.tokens)
        return Event(row.id, new.token, logprob, top, row.finish, evictions)


def _nothing(top: int | None) -> steps.Drawn:
    """No tokens."""
    token, logprob = np.zeros(0, np.int32), np.zeros(0, np.float32)
    if not top:
        return steps.Drawn(token, None if top is None else logprob)
    return steps.Drawn(token, logprob, np.zeros((0, top), np.int32), np.zeros((0, top), np.float32))


def cut(prompt: np.ndarray, interval: int, piece: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A prompt in pieces: tokens and positions [1, t] of each.

    All but the first have `piece` tokens. The first is padded on the left, to one of few widths:
    1, 2, 3, 4, 6, 8, 12, 16 ... chunks.
    """
    count = (len(prompt) - 1) % piece + 1
    chunks = -(-count // interval)
    unit = 1 << max((chunks - 1).bit_length() - 2, 0)
    width = min(-(-chunks // unit) * unit * interval, piece)
    token = np.concatenate([np.zeros(width - count, np.int32), np.asarray(prompt, np.int32)])
    position = np.maximum(np.arange(len(token), dtype=np.int32) - (width - count), -1)
    ends = range(width, len(token) + 1, piece)
    starts = [0, *ends][:-1]
    return [(token[None, i:j], position[None, i:j]) for i, j in zip(starts, ends, strict=True)]


def _check(request: Request, vocab: int, length: int, top: int | None) -> None:
    """Refuses a request that could never be answered."""
    prompt = np.asarray(request.prompt)
    if prompt.ndim != 1 or not prompt.size:
        raise UserError("the prompt is empty: give at least one token")
    if prompt.dtype.kind not in "iu":
        raise UserError(f"the prompt has {prompt.dtype} entries: give whole token ids")
    unknown = prompt[(prompt < 0) | (prompt >= vocab)]
    if unknown.size:
        raise UserError(f"the prompt has token {unknown[0]}, beyond the model's {vocab}")
    kinds.check("limit", request.limit, kinds.whole(1))
    if len(prompt) + request.limit > length:
        raise UserError(
            f"{len(prompt)} tokens of the prompt and limit = {request.limit} are more than the "
            f"{length} that a row has room for: shorten either"
        )
    if not isinstance(request.sampling, Sampling):
        raise UserError(f"sampling = {kinds.said(request.sampling)} must be a Sampling")
    if len(request.stop) > _STOPS:
        raise UserError(f"stop has {len(request.stop)} tokens, and {_STOPS} are the most")
    for token in request.stop:
        kinds.check("stop: a token", token, kinds.whole(0))
    kinds.check("logprobs", request.logprobs, kinds.whole(0))
    if request.logprobs > (top or 0):
        raise UserError(f"logprobs = {request.logprobs} must be at most {top or 0}")
    key = request.key
    is_key = isinstance(key, Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape:
        raise UserError(f"key = {kinds.said(key)} must be one PRNG key of jax.random.key")
