"""Prompts as people have them: text, token ids, chat messages, or several of these."""

import warnings
from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fkv.errors import UserError
from fkv.kinds import said
from fkv.models import chat as chats
from fkv.models import controls, texts
from fkv.models.named import Model

Prompt = str | Sequence[int] | np.ndarray | chats.Messages
_PROMPTS = (
    "a prompt is text, a flat list of whole token ids or a list of chat messages; several are a "
    "list of prompts, or an array of ids, a row each"
)


def encode(
    model: Model,
    prompt: Prompt,
    chat: bool = False,
    what: str = "the prompt",
    template: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Token ids of a prompt, int32.

    Args:
      prompt: text, ids that are taken as they are, or messages, see `chat.checked`. Text gets a BOS
        if the tokenizer adds one and the text has none, and no EOS; messages get what the model's
        chat template writes. The text of a special token is that token in a text, and text in a
        message, see `controls`.
      chat: put a text into the chat template as the user's message.
      what: names the prompt in errors.
      template: values for variables of the chat template.

    Raises:
      UserError: it is neither, is empty or has tokens that the model does not know, or there is no
        tokenizer or no chat template.
    """
    if not isinstance(prompt, str) and are_messages(prompt):
        messages = chats.checked(prompt, what)
        _needs_tokenizer(model)
        ids = _rendered(model, messages, template, what)
    elif not isinstance(prompt, str):
        ids = _listed(prompt, what)
        for entry in ids:
            if not _is_id(entry):
                raise _no_prompt(entry, f"{what} has an entry that is")
    else:
        _needs_tokenizer(model)
        if not chat:
            ids = texts.tokenize(model.tokenizer, prompt)
        else:  # of no text the template alone would have tokens
            asked = chats.asked(prompt)
            ids = _rendered(model, asked, template, what) if prompt.strip() else []
    if not len(ids):
        if isinstance(prompt, str) and prompt.strip():
            raise UserError(f"{what}: the tokenizer makes no tokens of {said(prompt)}")
        raise UserError(f"{what} is empty: give at least one token")
    check_known(model, ids, what)
    return np.asarray(ids, np.int32)


def encode_all(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    chat: bool = False,
    template: Mapping[str, Any] | None = None,
) -> list[np.ndarray]:
    """Token ids of one prompt or several.

    Warns:
      UserWarning: a prompt has words that the tokenizer does not know.
    """
    prompts = [prompts] if is_one(prompts) else _listed(prompts, "the prompt")
    if not len(prompts):
        raise UserError(f"no prompts given: {_PROMPTS}")
    found = []
    for i, prompt in enumerate(prompts):
        found.append(encode(model, prompt, chat, f"prompt {i}", template))
        if written := _written(prompt, f"prompt {i}"):
            if warning := texts.unknown(model.tokenizer, written, found[-1]):
                warnings.warn(f"prompt {i}: {warning}", stacklevel=3)
    return found


def is_one(prompts: Any) -> bool:
    """Whether this is one prompt, not a list of them."""
    if isinstance(prompts, str):
        return True
    listed = _listed(prompts, "the prompt")
    return len(listed) > 0 and (_is_id(listed[0]) or are_messages(listed))


def check_known(model: Model, ids: Sequence[int], what: str) -> None:
    """Refuses token ids that the model does not know."""
    for token in (min(ids), max(ids)):
        if not 0 <= token < model.config.vocab_size:
            raise UserError(
                f"{what} has token {token}, and the model's are 0 to "
                f"{model.config.vocab_size - 1}: are they of another tokenizer?"
            )


def _needs_tokenizer(model: Model) -> None:
    if model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer: give prompts as token ids")


def _rendered(model: Model, messages: list[dict[str, str]], template, what: str) -> list[int]:
    """What the template writes has the special tokens that belong there, a BOS included."""

    def render(messages, hide=None):
        return chats.render(model.tokenizer, messages, model.name, template, hide)

    return controls.ids(model.tokenizer, messages, render, what)


def _written(prompt: Prompt, what: str) -> str:
    """What of a prompt is text."""
    if isinstance(prompt, str):
        return prompt
    if are_messages(prompt):
        return "\n".join(one["content"] for one in chats.checked(prompt, what))
    return ""


def are_messages(value: Any) -> bool:
    """Whether a prompt is meant as chat messages; `chat.checked` tells whether they are any."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0
    return listed and isinstance(value[0], Mapping)


def _listed(value: Any, what: str) -> Sequence:
    """The entries of a list, a tuple or an array."""
    given = value
    if hasattr(value, "__array__") and not isinstance(value, np.generic):  # NumPy's, JAX's, torch's
        try:
            value = None if np.ma.is_masked(value) else np.asarray(value).tolist()
        except Exception:  # torch's on another device, or with gradients
            value = None
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        raise _no_prompt(given, f"{what} is")
    return value


def _is_id(value: Any) -> bool:
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool)
    # An element of an array of JAX or torch.
    return getattr(value, "shape", None) == () and "int" in str(getattr(value, "dtype", ""))


def _no_prompt(value: Any, where: str) -> UserError:
    hint = ""
    if isinstance(value, (Mapping, UserDict)):
        hint = (
            "; of what a tokenizer returns give ['input_ids'], and a message in a list of messages"
        )
    return UserError(f"{where} {said(value)}, and {_PROMPTS}{hint}")
