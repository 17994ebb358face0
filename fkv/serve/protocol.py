"""Requests of OpenAI's API as clients send them, checked field by field.

A field that is null counts as absent. One that would change the answer and is not supported is
refused unless its value changes nothing; one that never changes it (`user`, `store`, ...) is
ignored; an unknown one is refused by name, as OpenAI does.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any

from fkv import kinds
from fkv.engine.answers import stop_strings
from fkv.engine.sampling import Sampling
from fkv.errors import UserError, suggest
from fkv.kinds import SWITCH, TEXT, Kind, said
from fkv.models import chat as chats


class Refused(Exception):
    """A request that is answered by an error.

    Args:
      message: one line.
      status: of HTTP.
      param: the field it is about.
      code: a word for programs.
      headers: of the response.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind.get(self.status, default)}
        return {"error": {**error, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
      model: as a client names it.
      prompts: texts or ids, several; or of a chat one list of messages.
      chat: it is one.
      n: answers to each prompt.
      limit: most new tokens, None for what fits.
      sampling: of tokens.
      stop: strings that end an answer.
      seed: of the draws.
      logprobs: are asked for, and `top` of the likeliest tokens.
      stream, usage: send pieces, and at the end what they cost.
      session: of a conversation to continue and keep, or empty.
      template: values for variables of the chat template.
    """

    model: str
    prompts: list
    chat: bool
    n: int
    limit: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    seed: int
    logprobs: bool
    top: int
    stream: bool
    usage: bool
    session: str
    template: dict[str, bool]


_COUNT = kinds.whole(1)
_NAME = Kind("text of 1 to 256 characters", lambda x: TEXT.fits(x) and 0 < len(x) <= 256)
_OBJECT = Kind("an object", lambda x: isinstance(x, Mapping))
_WARM = kinds.number(1e-4, 100)  # others overflow in float32
_COMMON = {
    "model": _NAME,
    "n": kinds.whole(1, 128),
    "stream": SWITCH,
    "stream_options": _OBJECT,
    "stop": None,
    "seed": kinds.whole(0, 2**32 - 1),
    "max_tokens": _COUNT,
    "session": _NAME,
    "top_k": kinds.whole(-1),  # -1 is another way to write 0, all
    **{name: kind for name, kind in Sampling.kinds().items() if name != "top_k"},
    "temperature": Kind(
        "0, or a number from 0.0001 to 100",
        lambda x: _WARM.fits(x) or (type(x) in (int, float) and x == 0),
    ),
}
_CHAT = {
    "messages": None,
    "max_completion_tokens": _COUNT,
    "logprobs": SWITCH,
    "top_logprobs": kinds.whole(0, 20),
    "chat_template_kwargs": _OBJECT,
}
_TEXT = {"prompt": None, "logprobs": kinds.whole(0, 20)}
# What of `chat_template_kwargs` reaches a template: switches of thinking, under their two names.
TEMPLATE = ("enable_thinking", "thinking")
_IGNORED = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier",
    "store", "user",
)  # fmt: skip
# Not supported, and the values with which they change nothing.
_NEUTRAL = {
    "audio": (), "best_of": (1,), "echo": (False,), "frequency_penalty": (0,), "function_call":
    ("none", "auto"), "functions": ([],), "logit_bias": ({},), "modalities": (["text"],),
    "prediction": (), "presence_penalty": (0,), "reasoning_effort": (), "repetition_penalty": (1,),
    "response_format": ({"type": "text"},), "suffix": ("",), "tool_choice": ("none", "auto"),
    "tools": ([],), "verbosity": (), "web_search_options": (),
}  # fmt: skip


def read_json(body: bytes) -> Mapping[str, Any]:
    """The object in a body."""

    def refuse(word):
        raise ValueError(f"{word} is no number of JSON")

    try:
        found = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise Refused(f"the body is not JSON ({why})", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refused(f"the body must be a JSON object, not {said(found)}", code="invalid_json")
    return found


def parse(body: bytes, chat: bool, defaults: Sampling) -> Asked:
    """What a request asks for.

    Args:
      chat: of chat completions, otherwise of completions.
      defaults: sampling where a request says nothing.

    Raises:
      Refused: it is not JSON, or a field is unknown, missing or has a wrong value.
    """
    given = {key: value for key, value in read_json(body).items() if value is not None}
    known = {**_COMMON, **(_CHAT if chat else _TEXT)}
    for name, value in given.items():
        _check(name, value, known, given)
    field = "messages" if chat else "prompt"
    for name in ("model", field):
        if name not in given:
            raise Refused(f"{name} is missing", param=name, code="missing_required_parameter")
    sampling = {name: given.get(name, getattr(defaults, name)) for name in Sampling.kinds()}
    sampling["top_k"] = max(sampling["top_k"], 0)
    options = _options(given.get("stream_options", {}), given.get("stream", False))
    return Asked(
        model=given["model"],
        prompts=_messages(given[field]) if chat else _prompts(given[field]),
        chat=chat,
        n=given.get("n", 1),
        limit=given.get("max_completion_tokens", given.get("max_tokens")),
        sampling=Sampling(**sampling),
        stop=_of("stop", lambda: stop_strings(given.get("stop", ()))),
        seed=given.get("seed", secrets.randbits(32)),
        logprobs="logprobs" in given and given["logprobs"] is not False,
        top=_top(given, chat),
        stream=given.get("stream", False),
        usage=options.get("include_usage", False),
        session=given.get("session", ""),
        template=_template(given.get("chat_template_kwargs", {})),
    )


def _check(name: str, value: Any, known: Mapping[str, Kind | None], given: Mapping) -> None:
    if name in known:
        if kind := known[name]:
            _of(name, lambda: kinds.check(name, value, kind))
    elif name in _NEUTRAL:
        neutral = (*_NEUTRAL[name], *([given.get("n")] if name == "best_of" else []))
        if isinstance(value, bool) != any(isinstance(x, bool) for x in neutral) or (
            value not in neutral
        ):
            raise Refused(
                f"{name} = {said(value)} is not supported: leave it out", param=name,
                code="unsupported_parameter",
            )  # fmt: skip
    elif name not in _IGNORED:
        near = suggest(name[:64], [*known]) if len(name) <= 64 else ""
        near = near if "did you mean" in near else ""
        shown = said(name)
        raise Refused(f"unknown field {shown}{near}", param=name[:64], code="unknown_parameter")


def _of(name: str, call):
    """Turns the error of a value into that of its field."""
    try:
        return call()
    except UserError as error:
        raise Refused(str(error), param=name, code="invalid_value") from None


def _messages(value: Any) -> list:
    return [_of("messages", lambda: chats.checked(value))]


def _prompts(value: Any) -> list:
    """One prompt or several, each a text or ids."""

    def are_ids(x):
        return isinstance(x, list) and bool(x) and all(type(i) is int for i in x)

    given = [value] if isinstance(value, str) or are_ids(value) else value
    if not isinstance(given, list) or not given or not all(
        isinstance(x, str) or are_ids(x) for x in given
    ):  # fmt: skip
        told = f"prompt = {said(value)} must be text, a list of token ids, or a list of these"
        raise Refused(told, param="prompt", code="invalid_value")
    return given


def _top(given: Mapping[str, Any], chat: bool) -> int:
    if not chat:
        return given.get("logprobs", 0)
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise Refused("top_logprobs needs logprobs = true", param="top_logprobs")
    return given.get("top_logprobs", 0)


def _options(options: Mapping[str, Any], stream: bool) -> Mapping[str, Any]:
    if options and not stream:
        raise Refused("stream_options needs stream = true", param="stream_options")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation"):
            told = f"stream_options has no field {said(name)}"
            raise Refused(told, param="stream_options", code="unknown_parameter")
        where = f"stream_options.{name}"
        _of("stream_options", lambda where=where, value=value: kinds.check(where, value, SWITCH))
    return options


def _template(values: Mapping[str, Any]) -> dict[str, bool]:
    for name, value in values.items():
        if name not in TEMPLATE or not isinstance(value, bool):
            told = f"chat_template_kwargs: {said(name)} = {said(value)} is refused"
            known = f"{' and '.join(TEMPLATE)} are known, true or false"
            raise Refused(f"{told}: {known}", param="chat_template_kwargs", code="invalid_value")
    return dict(values)
