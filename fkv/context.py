"""Compress once, ask many: a long text that is read once under a policy, and questions about it.

context = fkv.Context(model, text, policy="snapkv", budget=1024, when="end")
print(context.ask("\nWho is the captain?", new_tokens=32, temperature=0).text)
print(context)
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fkv import kinds
from fkv.api import sample_key
from fkv.cache.cadence import Cadence
from fkv.engine import compressed
from fkv.engine.answers import Answer, Generation, Origin, dtype_of, pieces, stop_strings, until
from fkv.engine.batch import rounded
from fkv.engine.batcher import Batcher, Request
from fkv.engine.compressed import Reading
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.evaluation.losses import Loss, loss_of
from fkv.models import chat as chats
from fkv.models import controls, texts
from fkv.models.named import Model
from fkv.models.prompts import Prompt, are_messages, encode, is_one
from fkv.policies.base import Policy, name_of
from fkv.policies.fitting import for_model
from fkv.runs import costs

__all__ = ["Context"]
_QUESTION = "<fkv:question>"  # stands for a question while a template is filled in


class Context:
    """A text, read once under a policy; questions are asked on copies of its cache.

    Nothing of the cache depends on a question, as in benchmarks such as RULER that compress once
    and ask many. An answer depends on the context, the question, its place in a call of `ask`, and
    the seed; not on what was asked before.

    Attributes:
      model: as given.
      tokens: ids of the text, int32 [t].
      policy: that evicts.
      budget, interval: B and L.
      positions: of the entries of each layer and KV head, ascending int32 arrays.
      bytes: of the cache.
    """

    def __init__(
        self,
        model: Model,
        text: Prompt,
        policy: str | Policy = "full",
        budget: int = 1024,
        interval: int = 256,
        when: str = compressed.STREAM,
        room: int = 0,
        newest: int | None = None,
        seed: int = 0,
        chat: bool = False,
        protect_prompt: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        """Reads the text.

        Args:
          text: text, token ids, or chat messages that a question follows as the user's next one.
          policy: a name from `fkv.policies.names()`, or a policy; `full` keeps everything.
          budget, interval: B and L, KV pairs per head.
          when: `stream` evicts every L tokens as they come, as `fkv.generate` does, the last time
            at the end of the text; `end` reads with the full cache and evicts once, at the end of
            the text, as the prefill presses of kvpress do: their compression ratio is 1 - B / t.
          room: a head may hold so many tokens of a question and its answer beyond the budget before
            more is evicted; kvpress evicts nothing then.
          newest: with `end`, how many of the newest tokens stay whatever their scores; by default
            what the policy protects: L tokens, or its window. 0 for presses of kvpress that score
            all tokens.
          seed: of policies that draw.
          chat: put the text into the chat template, at the beginning of the user's message, which
            a question ends.
          protect_prompt: so many of the first tokens are never evicted; part of the budget.
          chat_template_kwargs: for the chat template, as of `fkv.generate`.

        Raises:
          UserError: the text is empty or no longer than the budget, the policy is unknown or a size
            is out of range.
        """
        cadence, reading = Cadence(budget, interval, protect_prompt), Reading(when, room, newest)
        self.model, self._template = model, chat_template_kwargs
        self._prefix: str | None = None  # in a template
        self.tokens = self._encoded(text, chat)
        if warning := model.config.beyond(len(self.tokens), "the text"):
            warnings.warn(f"model {model.name}: {warning}", stacklevel=2)
        policy = for_model(policy, model, cadence)
        key = sample_key(seed, 0, 0)
        self._read = compressed.compress(model.lm, policy, cadence, self.tokens, key, reading)
        self.policy, self.budget, self.interval, self.when = policy, budget, interval, when

    def _encoded(self, text: Prompt, chat: bool) -> np.ndarray:
        """Ids of the text, in a template up to where a question begins."""
        if not (are_messages(text) or (chat and isinstance(text, str))):
            return encode(self.model, text, what="the text")
        encode(self.model, text, chat, "the text", self._template)  # its errors are about the text
        self._before, self._begun = ([], text) if isinstance(text, str) else (list(text), "")
        self._prefix = self._rendered(self._messages([{"role": "user", "content": ""}]))[0]
        return self._ids([{"role": "user", "content": ""}], 0, "the text")

    def _messages(self, question: list[dict[str, str]]) -> list[dict[str, str]]:
        """The text and a question, which begins at the mark."""
        first, *rest = question
        content = f"{self._begun}{_QUESTION}{first['content']}"
        return [*self._before, {**first, "content": content}, *rest]

    def _rendered(self, messages: list[dict[str, str]], hide: Any = None) -> tuple[str, str]:
        """What the template writes before the mark, and after it."""
        model = self.model
        whole = chats.render(model.tokenizer, messages, model.name, self._template, hide)
        before, mark, after = whole.partition(_QUESTION)
        if not mark or _QUESTION in after:
            raise UserError(
                f"the chat template of model {model.name} has no place for a question after the "
                f"text, or the text or the question contains {_QUESTION!r}: set chat = False, or "
                "leave that out"
            )
        return before, after

    def _ids(self, question: list[dict[str, str]], part: int, what: str) -> np.ndarray:
        """Ids of the text (part 0) or the question (1)."""

        def render(messages, hide=None):
            if not any(_QUESTION in one["content"] for one in messages):  # contents were replaced
                template = self._template
                return chats.render(self.model.tokenizer, messages, self.model.name, template, hide)
            return self._rendered(messages, hide)[part]

        found = controls.ids(self.model.tokenizer, self._messages(question), render, what)
        return np.asarray(found, np.int32)

    def _question(self, question: Prompt, what: str) -> np.ndarray:
        """Ids of what follows the text."""
        if not isinstance(question, str) and not are_messages(question):
            return encode(self.model, question, what=what)
        if isinstance(question, str) and not question.strip():
            raise UserError(f"{what} is empty: give at least one token")
        if self.model.tokenizer is None:
            raise UserError(f"model {self.model.name} has no tokenizer: give {what} as token ids")
        if isinstance(question, str):
            if self._prefix is None:
                ids = texts.tokenize(self.model.tokenizer, question, continued=False)
                return np.asarray(ids, np.int32)
            return self._ids([{"role": "user", "content": question}], 1, what)
        if self._prefix is None:
            raise UserError(f"{what} is messages, and the text is not in a chat: set chat = True")
        asked = chats.checked(question, what)
        if self._rendered(self._messages(asked))[0] != self._prefix:
            raise UserError(f"{what}: the chat template writes the text anew: ask with text")
        return self._ids(asked, 1, what)

    @property
    def positions(self) -> list[list[np.ndarray]]:
        return self._read.positions()

    @property
    def bytes(self) -> int:
        return self._read.bytes

    def ask(
        self,
        questions: Prompt | Sequence[Prompt],
        new_tokens: int = 4096,
        temperature: float = 0.6,
        top_k: int = 20,
        top_p: float = 0.95,
        seed: int = 0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        logprobs: bool = False,
        top_logprobs: int = 0,
        batch: int = 64,
    ) -> Generation | list[Generation]:
        """Answers questions about the text.

        Args:
          questions: one, or a list of them: text that follows the context's text directly (begin it
            with a line break where that needs one), token ids, or messages, where the context's
            text is in a chat.
          others: as of `fkv.generate`.

        Returns:
          The answer, or a list of answers; `prompt_tokens` are those of text and question.

        Raises:
          UserError: a question is invalid or empty, or a size is out of range.
        """
        alone = is_one(questions)
        asked: list[Any] = [questions] if alone else list(questions)
        if not asked:
            raise UserError("no questions given: give text, token ids or messages, or several")
        kinds.check("batch", batch, kinds.whole(1))
        kinds.check("new_tokens", new_tokens, kinds.whole(1))
        kinds.check("top_logprobs", top_logprobs, kinds.whole(0, self.model.config.vocab_size))
        prompts = [
            np.concatenate([self.tokens, self._question(one, f"question {i}")])
            for i, one in enumerate(asked)
        ]
        top = top_logprobs if logprobs or top_logprobs else None
        model, read, longest = self.model, self._read, max(map(len, prompts))
        if warning := model.config.beyond(longest + new_tokens, "text + question + new_tokens"):
            warnings.warn(f"model {model.name}: {warning}", stacklevel=2)
        sampling, ends = Sampling(temperature, top_k, top_p, min_p), stop_strings(stop)
        answers = [Answer(model, ends) for _ in prompts]
        length = rounded(longest + new_tokens, self.interval)
        batcher = Batcher(
            model.lm, self.policy, read.cadence, min(batch, len(prompts)), length, top=top
        )
        settings: dict[str, Any] = dict(
            stop=model.stop,
            logprobs=top_logprobs,
            kept=batcher.kept(read),
            until=until(model, ends),
        )
        requests = [
            Request(prompt, sample_key(seed, i, 0), new_tokens, sampling, **settings)
            for i, prompt in enumerate(prompts)
        ]
        for _ in pieces(model, batcher, requests, answers, top):
            pass
        found = [self._said(*one) for one in zip(requests, answers, strict=True)]
        return found[0] if alone else found

    def _said(self, request: Request, answer: Answer) -> Generation:
        read, model, prompt = self._read, self.model, len(request.prompt)
        origin = Origin(
            model.full_name, request.prompt, self.policy, read.cadence, request.key, read
        )
        slots, fired, new = prompt + len(answer.tokens), 0, len(answer.tokens)
        if self.policy.evicts:
            slots = read.held[0].position_bks.shape[-1]
            question = prompt - len(read.tokens)
            # The cadence of decoding, as if the entries of the text were the first tokens.
            fired = read.evictions + sum(
                read.entries + end > read.cadence.budget
                for end in range(
                    (question - 1) % self.interval + 1, question + new - 1, self.interval
                )
            )
        size = costs.cache_bytes(model.config, slots, dtype_of(model), self.policy)
        return answer.generation(fired, prompt, size, origin)

    def loss(self, question: Prompt, answer: Prompt, full: bool = True, seed: int = 0) -> Loss:
        """How likely an answer to a question is on this cache.

        Args:
          question: as of `ask`.
          answer: text or token ids, all of which count.
          full: also with the full cache.
          seed: of policies that draw.

        Raises:
          UserError: either is invalid or empty.
        """
        asked = self._question(question, "the question")
        if isinstance(answer, str) and answer and self.model.tokenizer is not None:
            answer = texts.tokenize(self.model.tokenizer, answer, continued=False)
        told = encode(self.model, answer, what="the answer")
        prompt = np.concatenate([self.tokens, asked])
        read, key = self._read, sample_key(seed, 0, 0)
        origin = Origin(self.model.full_name, prompt, self.policy, read.cadence, key, read)
        return loss_of(self.model.lm, origin, told, full)

    def __repr__(self) -> str:
        held = [len(head) for layer in self.positions for head in layer]
        some = f"{min(held)}" if min(held) == max(held) else f"{min(held)} to {max(held)}"
        how = "" if not self.policy.evicts else f", B = {self.budget}, L = {self.interval}"
        return (
            f"Context({len(self.tokens)} tokens, {name_of(self.policy)}{how}, {self.when!r}: "
            f"{some} entries in each of {len(held)} heads, {self.bytes / 2**20:.1f} MiB)"
        )
