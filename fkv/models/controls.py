"""Control tokens, such as `<|im_end|>`: chat templates write them, contents of messages can't.

A tokenizer finds these tokens wherever their text is, in what a user wrote as in what the template
wrote: a message could end its turn and speak as the system. Here their text in messages is
tokenized as any other text is. Ids of messages without such a text are the tokenizer's own.

Control tokens are the special ones, and others that were added to the vocabulary if the template
writes them around messages (DeepSeek's `<｜User｜>`). `<think>` and `</think>` are none: clients
send thoughts back in messages, and a template may look for them. Roles that a template marks by
ordinary text (`USER:`, Llama 2's `[INST]`) can't be told from a user's text.
"""

import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fkv.errors import UserError
from fkv.kinds import said
from fkv.models import texts

_KEPT = ("<think>", "</think>")
# Characters of marks: letters without case, which neither templates nor tokenizers rewrite.
_FIRST, _LETTERS = 0xA000, 1165  # Yi syllables
Messages = list[dict[str, str]]


def ids(tokenizer: Any, messages: Messages, render: Callable[..., str], what: str) -> list[int]:
    """Token ids of messages in their template.

    Args:
      render: called with messages, and with a function that is to change them before the template
        writes them; returns what it writes.
      what: names the messages in errors.

    Raises:
      UserError: a message has the text of a control token, and the tokenizer can't read it as text.
    """
    special = _added(tokenizer)
    found = _texts_of(messages, special)
    if found:
        bare = render([{**one, **dict.fromkeys(_contents(one), "x")} for one in messages])
        found = {x for x in found if special[x] or x in bare}
    if not found:
        return texts.tokenize(tokenizer, render(messages), continued=False)
    try:
        guard = _guard(tokenizer, len(tokenizer))
    except Exception as error:  # whatever there is no way to rebuild
        raise UserError(
            f"{what}: {said(min(found))} is a control token, which this model's tokenizer can't "
            f"read as text ({texts.reason(error)}): leave it out"
        ) from error
    return guard.ids(render(messages, lambda given: guard.hidden(given, found)))


def _added(tokenizer: Any) -> dict[str, bool]:
    """Texts of added tokens, and whether they are special."""
    found = _tokens(tokenizer)
    return {text: x.special for text, (_, x) in found.items() if text not in _KEPT}


def _tokens(tokenizer: Any) -> dict[str, tuple[int, Any]]:
    """Ids of added tokens, by text. White space controls nothing; no single word is a control."""
    added = tokenizer.added_tokens_decoder.items()
    return {x.content: (i, x) for i, x in added if x.content.strip() and not x.single_word}


def _contents(message: Mapping[str, str]) -> list[str]:
    return [name for name in ("content", "reasoning_content") if name in message]


def _texts_of(messages: Messages, wanted: Iterable[str]) -> set[str]:
    pattern = _any(wanted)
    if pattern is None:
        return set()
    return {x for one in messages for name in _contents(one) for x in pattern.findall(one[name])}


def _any(some: Iterable[str]) -> re.Pattern | None:
    """The longest of these at each place, as tokenizers find them."""
    longest_first = sorted(some, key=lambda x: (-len(x), x))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


class _Guard:
    """A tokenizer whose added tokens have other texts, which nobody can guess.

    Args:
      tokenizer: with a backend of `tokenizers`.
    """

    def __init__(self, tokenizer: Any):
        from tokenizers import Tokenizer

        tokens = _tokens(tokenizer)
        hidden, written = ([secrets.randbelow(_LETTERS) for _ in range(8)] for _ in range(2))
        self._hidden = {x: _mark(hidden, i) for i, x in enumerate(tokens)}
        self._written = {x: _mark(written, i) for i, x in enumerate(tokens)}
        self._shown = {mark: x for x, mark in self._hidden.items()}
        data = _renamed(json.loads(tokenizer.backend_tokenizer.to_str()), self._written)
        self._tokenizer = Tokenizer.from_str(json.dumps(data))
        for text, (id, _) in tokens.items():
            if self._tokenizer.token_to_id(self._written[text]) != id:
                raise ValueError(f"{text!r} would get another id")

    def hidden(self, messages: Messages, found: set[str]) -> Messages:
        """Messages with marks in place of these texts."""
        pattern = _any(found)

        def hide(text):
            return pattern.sub(lambda x: self._hidden[x[0]], text)

        return [one | {name: hide(one[name]) for name in _contents(one)} for one in messages]

    def ids(self, text: str) -> list[int]:
        """Of what a template wrote: only marks are text of messages, whatever they stand for."""
        text = _any(self._written).sub(lambda x: self._written[x[0]], text)
        text = _any(self._shown).sub(lambda x: self._shown[x[0]], text)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


# A copy of a vocabulary takes some megabytes, and a second to make.
@functools.lru_cache(maxsize=2)
def _guard(tokenizer: Any, _: int) -> _Guard:
    return _Guard(tokenizer)


def _mark(secret: list[int], index: int) -> str:
    return "".join(chr(_FIRST + x) for x in (*secret, *divmod(index, _LETTERS)))


def _renamed(data: dict[str, Any], new: Mapping[str, str]) -> dict[str, Any]:
    """A `tokenizer.json` in which tokens have other texts and the same ids."""
    model = data["model"]

    def named(text):
        return new.get(text, text)

    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {named(text): id for text, id in vocab.items()}
    else:  # a unigram model's
        model["vocab"] = [[named(text), score] for text, score in vocab]
    if "merges" in model:
        pairs = [x.split(" ", 1) if isinstance(x, str) else x for x in model["merges"]]
        model["merges"] = [
            x for x in pairs if not {*x, "".join(x)} & new.keys()
        ]  # those would make the token of text
    if model.get("unk_token") is not None:
        model["unk_token"] = named(model["unk_token"])
    for token in data["added_tokens"]:
        token["content"] = named(token["content"])
    data["truncation"] = data["padding"] = None
    return data
