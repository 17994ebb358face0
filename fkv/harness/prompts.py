"""Texts and settings of harnesses as tokens and ours, in the way of lm-eval's own models."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fkv.api import Model
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.harness.asking import Writing
from fkv.kinds import said
from fkv.models import chat as chats
from fkv.models import texts

# Names of the most new tokens, the first of which counts.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
# Settings of other backends that change nothing at these values.
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1,
    "frequency_penalty": 0, "presence_penalty": 0, "return_full_text": False, "use_cache": True,
    "early_stopping": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ends:
    """What ends a text, and how it is drawn; see `Writing`."""

    limit: int
    sampling: Sampling
    until: tuple[str, ...]


def ends(settings: Mapping[str, Any], limit: int, where: str) -> Ends:
    """What a task's `generation_kwargs` ask for.

    Without `do_sample` or with it off, or without a temperature, the likeliest tokens are taken.
    Nothing else has a default: no top-k, whatever a model's own files say.

    Args:
      settings: as the task has them.
      limit: new tokens where they name none.
      where: names the task in errors.

    Raises:
      UserError: a setting is not supported, or invalid.
    """
    left = {key: value for key, value in settings.items() if value is not None}
    until = left.pop("until", ())
    until = (until,) if isinstance(until, str) else until
    if not isinstance(until, Sequence) or not all(isinstance(x, str) for x in until):
        raise UserError(f"{where}: until = {said(until)} must be text, or a list of texts")
    limits = [value for name in _LIMITS if (value := left.pop(name, None)) is not None]
    try:
        limit = int(limits[0]) if limits else limit
    except (TypeError, ValueError):
        limit = 0
    if limit < 1:
        raise UserError(f"{where}: {_LIMITS[0]} = {said(limits[0])} must be a whole number from 1")
    drawn = {name: left.pop(name, value) for name, value in _SAMPLING.items()}
    given = settings.get("temperature")
    sample = left.pop("do_sample", given is not None and given != 0)
    if not sample or given is None:
        drawn["temperature"] = 0.0
    if drawn["top_k"] == -1:  # of vLLM: all
        drawn["top_k"] = 0
    for name, value in left.items():
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise UserError(
                f"{where}: the generation setting {name} = {said(value)} is not supported: leave "
                "it out of the task's generation_kwargs"
            )
    try:
        return Ends(limit, Sampling(**drawn), tuple(x for x in until if x))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def writing(model: Model, prompt: Sequence[int], ends: Ends, most: int, what: str) -> Writing:
    """A text that is to go on, of which the beginning is cut off if need be.

    Args:
      prompt: token ids.
      most: tokens of a prompt and its answer together.
      what: names the request in errors.

    Raises:
      UserError: the prompt is empty, or there is no room for one.
    """
    room = most - ends.limit
    if room < 1:
        raise UserError(
            f"{what}: {ends.limit} new tokens leave no room for a prompt in max_length = {most}: "
            "ask for fewer, or raise max_length"
        )
    if not len(prompt):
        raise UserError(f"{what}: the prompt is empty: give at least one token")
    cut = max(len(prompt) - room, 0)
    until, stop = [], []
    end = getattr(model.tokenizer, "eos_token_id", None)
    for text in ends.until:
        token = _special(model.tokenizer, text)
        (until if token is None else stop).append(text if token is None else token)
    if end is not None:
        stop.append(end)
    return Writing(
        np.asarray(prompt[cut:], np.int32), ends.limit, ends.sampling, tuple(until), tuple(stop),
        cut=cut,
    )  # fmt: skip


def _special(tokenizer: Any, text: str) -> int | None:
    """The id of a text that is a special token, which no answer's text shows."""
    token = tokenizer.get_vocab().get(text)
    return token if token in tokenizer.all_special_ids else None


def pair(model: Model, context: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of a context and what follows it, and how many of them are the context.

    White space between them belongs to what follows. The context is tokenized by itself, too, which
    tells where it ends, as in lm-eval's own models. Without one there is the prefix token.
    """
    whole, bare = context + continuation, context.rstrip()
    if not bare:
        tokens, first = texts.tokenize(model.tokenizer, whole, continued=False), prefix(model)
        return (tokens, 1) if tokens[:1] == [first] else ([first, *tokens], 1)
    first = texts.tokenize(model.tokenizer, bare)
    return first + texts.tokenize(model.tokenizer, whole)[len(first) :], len(first)


def windows(tokens: Sequence[int], first: int, most: int) -> Iterator[tuple[np.ndarray, int]]:
    """A text in windows that the model can read, each token counted once.

    The last window keeps as much context as fits, as in lm-eval's own models.

    Args:
      first: a token before the first.
      most: tokens that the model reads.

    Yields:
      Token ids of a window, and how many of these are context.
    """
    text = np.array([first, *tokens], np.int32)
    for start in range(0, len(tokens), most):
        end = min(start + most, len(tokens))
        begin = max(end - most, 0)
        yield text[begin : end + 1], start - begin + 1


def prefix(model: Model) -> int:
    """The token before a text without context: the tokenizer's BOS, or else its EOS.

    Raises:
      UserError: it has neither.
    """
    tokenizer = model.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, *model.stop):
        if token is not None:
            return int(token)
    raise UserError(f"model {model.name}: its tokenizer has no BOS and no EOS to begin a text with")


def check_chat(model: Model, system: str, template: Mapping[str, Any]) -> None:
    """Refuses a chat template that is missing, or that fails on what the tasks will give it."""
    messages = [{"role": "user", "content": "What is six times seven?"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    chats.render(model.tokenizer, messages, model.name, template)


def rendered(
    model: Model, messages: Sequence[Mapping[str, str]], template: Mapping[str, Any], answer: bool
) -> str:
    """Messages in the chat template, as text.

    Args:
      template: values for its variables.
      answer: with the beginning of an answer; otherwise the last message, which is one, goes on.

    Raises:
      UserError: the template fails.
    """
    try:
        return chats.apply(
            model.tokenizer, list(messages), **template, add_generation_prompt=answer,
            continue_final_message=not answer,
        )  # fmt: skip
    except Exception as error:  # a template is a program
        raise UserError(
            f"model {model.name}: its chat template fails ({texts.reason(error)}): set harness.chat"
            " to False, or harness.system to ''"
        ) from error
