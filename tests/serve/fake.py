"""A batcher without a model: quick, and every token follows from the row's key and position."""

import jax
import numpy as np

from fkv.engine.requests import Event, Kept
from fkv.errors import UserError


def instead(patch, module, script=None):
    """Puts it in a module's place of the real one; returns the requests that it gets."""
    seen = []

    def make(lm, policy, cadence, rows, length, *, top=0, **_):
        made = Batcher(lm.config.vocab_size, rows, length, top or 0, script)
        made.seen, made.interval = seen, cadence.interval
        return made

    patch.setattr(module, "Batcher", make)
    return seen


class Batcher:
    """As `fkv.engine.batcher.Batcher`; `script` replaces the tokens of every row."""

    def __init__(self, vocabulary, rows, length, top=0, script=None):
        self.least = 1  # tokens that a kept cache can be cut to
        self.vocabulary, self.rows, self.length, self.top = vocabulary, rows, length, top
        self.script, self.count, self.queue, self.running = script, 0, [], {}
        self.gate = None  # an event that steps wait for
        self.seen, self.interval = [], 4

    waiting = property(lambda self: len(self.queue))
    live = property(lambda self: len(self.running))
    idle = property(lambda self: self.rows - len(self.running))

    def submit(self, request):
        if len(request.prompt) + request.limit > self.length:
            raise UserError("it is too long")
        self.count += 1
        self.seen.append(request)
        self.queue.append((self.count, request, self.drawn(request)))
        return self.count

    def cancel(self, id):
        self.queue = [x for x in self.queue if x[0] != id]
        self.running.pop(id, None)

    def drawn(self, request):
        """All tokens that the row will have."""
        if self.script is not None:
            tokens = list(self.script)
        else:
            seed = np.asarray(jax.random.key_data(request.key)).tolist() + request.prompt.tolist()
            rng = np.random.default_rng(seed)
            tokens = rng.choice([x for x in range(self.vocabulary) if x not in request.stop], 200)
            if request.stop:
                tokens[rng.random(200) < 0.03] = request.stop[0]
        tokens = [int(x) for x in tokens][: request.limit]
        ends = [i for i, x in enumerate(tokens) if x in request.stop]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        until = request.until() if request.until else lambda _: None
        for i, x in enumerate(tokens):
            if x not in request.stop and until([x]):
                return tokens[: i + 1]
        return tokens

    def step(self, tokens=None):
        tokens = tokens or self.interval
        if self.gate is not None:
            self.gate.wait()
        while self.queue and len(self.running) < self.rows:
            id, request, drawn = self.queue.pop(0)
            self.running[id] = (request, drawn, 0)
        events = []
        for id, (request, drawn, at) in list(self.running.items()):
            new = np.array(drawn[at : at + tokens], np.int32)
            at += len(new)
            finish = None
            if at == len(drawn):
                finish = (
                    "stop" if len(drawn) < request.limit or drawn[-1] in request.stop else "length"
                )
                del self.running[id]
            else:
                self.running[id] = (request, drawn, at)
            both = (new[:, None] + np.arange(self.top)) % self.vocabulary
            top = (both, -np.ones(both.shape, np.float32)) if request.logprobs else None
            kept = None
            if finish and request.keep:
                whole = np.concatenate([request.prompt, np.array(drawn[:-1], np.int32)])
                kept = Kept(whole, (), len(whole), at // 4, (), self.least)
            logprobs = np.full(len(new), -1.5, np.float32)
            events.append(Event(id, new, logprobs, top, finish, at // 4, kept))
        return events
