"""Answers as OpenAI's clients expect them: whole, and in pieces."""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from fkv.engine.answers import Answer
from fkv.models.chat import Thoughts
from fkv.models.named import Model

_LEAST = -9999.0  # stands for the logprob of what has no probability


class Choice:
    """One answer of a reply.

    Args:
      model: its tokenizer writes the tokens of logprobs.
      answer: takes the tokens.
      opened: whether the prompt has opened a thought, or None where thoughts are not split off.
      top: so many of the likeliest tokens beside each.
    """

    def __init__(self, model: Model, answer: Answer, opened: bool | None, top: int | None):
        self.answer, self.top, self._model = answer, top, model
        self._thoughts = None if opened is None else Thoughts(opened)
        self.thought: list[str] = []
        self.text: list[str] = []
        self.logprobs: list[dict[str, Any]] = []

    def add(self, event: Any) -> tuple[str, str, list[dict[str, Any]]]:
        """The thought, the text and the logprobs that an event adds."""
        before = len(self.answer.tokens)
        logprobs = None if self.top is None else event.logprobs
        piece = self.answer.add(event.tokens, event.finish, logprobs, None)
        thought, text = "", piece
        if self._thoughts is not None:
            thought, text = self._thoughts.add(piece, self.answer.finish is not None)
        said = []
        if self.top is not None:
            count = len(self.answer.tokens) - before
            said = [self._logprob(event, i) for i in range(count)]
        self.thought.append(thought)
        self.text.append(text)
        self.logprobs += said
        return thought, text, said

    def _logprob(self, event: Any, at: int) -> dict[str, Any]:
        found = self._token(event.tokens[at], event.logprobs[at])
        found["top_logprobs"] = []
        if self.top and event.top is not None:
            ids, logprobs = (np.asarray(x[at])[: self.top] for x in event.top)
            both = zip(ids, logprobs, strict=True)
            found["top_logprobs"] = [self._token(i, x) for i, x in both]
        return found

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        tokenizer = self._model.tokenizer
        text = tokenizer.decode([int(token)]) if tokenizer else str(int(token))
        broken = "\N{REPLACEMENT CHARACTER}" in text  # a part of a character
        value = float(logprob)
        return {
            "token": text,
            "logprob": value if math.isfinite(value) else _LEAST,
            "bytes": None if broken else list(text.encode("utf-8", "replace")),
        }


def flat(said: Sequence[dict[str, Any]], offset: int) -> dict[str, Any]:
    """Logprobs in the form of completions; `offset` counts the characters before."""
    offsets = []
    for one in said:
        offsets.append(offset)
        offset += len(one["token"])
    return {
        "tokens": [one["token"] for one in said],
        "token_logprobs": [one["logprob"] for one in said],
        "top_logprobs": [{x["token"]: x["logprob"] for x in one["top_logprobs"]} for one in said],
        "text_offset": offsets,
    }


class Reply:
    """What a request gets.

    Args:
      chat: in the form of chat completions.
      model: its name.
      choices: in order.
      usage: tokens of the prompts, and of these how many came from a kept cache.
    """

    def __init__(self, chat: bool, model: str, choices: Sequence[Choice], usage: tuple[int, int]):
        self.chat, self.choices, self._usage = chat, choices, usage
        kind = "chat.completion" if chat else "text_completion"
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": model}
        self._offsets = [0] * len(choices)

    def usage(self) -> dict[str, Any]:
        prompt, cached = self._usage
        made = sum(len(choice.answer.tokens) for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def whole(self) -> dict[str, Any]:
        found = []
        for i, choice in enumerate(self.choices):
            one = {"index": i, "finish_reason": choice.answer.finish}
            text, thought = "".join(choice.text), "".join(choice.thought)
            if self.chat:
                message = {"role": "assistant", "content": text}
                if thought:
                    message["reasoning_content"] = thought
                one |= {"message": message, "logprobs": self._said(choice, choice.logprobs, i)}
            else:
                one |= {"text": text, "logprobs": self._said(choice, choice.logprobs, i)}
            found.append(one)
        return {**self._head, "choices": found, "usage": self.usage()}

    def _said(self, choice: Choice, said: list[dict[str, Any]], index: int) -> Any:
        if choice.top is None:
            return None
        if self.chat:
            return {"content": said, "refusal": None}
        before = self._offsets[index]
        self._offsets[index] += sum(len(one["token"]) for one in said)
        return flat(said, before)

    def first(self, index: int) -> dict[str, Any]:
        """The chunk before an answer of a chat."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def piece(
        self, index: int, thought: str, text: str, said: list[dict[str, Any]], finish: str | None
    ) -> dict[str, Any]:
        """The chunk of an event."""
        logprobs = self._said(self.choices[index], said, index)
        if not self.chat:
            return self._chunk(index, {"text": text}, logprobs, finish)
        delta = {"content": text} if text or not thought else {}
        if thought:
            delta["reasoning_content"] = thought
        return self._chunk(index, {"delta": delta}, logprobs, finish)

    def last(self) -> dict[str, Any]:
        """The chunk that says what it cost."""
        return {**self._chunk_head(), "choices": [], "usage": self.usage()}

    def _chunk(self, index: int, what: dict, logprobs: Any, finish: str | None) -> dict[str, Any]:
        one = {"index": index, **what, "logprobs": logprobs, "finish_reason": finish}
        return {**self._chunk_head(), "choices": [one]}

    def _chunk_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": kind}
