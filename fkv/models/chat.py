"""Chat messages: what they may hold, the template that writes them as a prompt, and thoughts."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fkv import kinds
from fkv.errors import UserError
from fkv.kinds import said
from fkv.models.texts import CONFIG, TEMPLATE, reason, tokenize

Messages = Sequence[Mapping[str, Any]]
ROLES = ("system", "developer", "user", "assistant")
THINK, THOUGHT = "<think>", "</think>"
# Llama 3.2's template writes today's date unless given one: fixed, for reproducible prompts.
_DATE = "26 Jul 2024"
_ANSWER = "The answer is forty-two."
# Parameters of `apply_chat_template`, which are no variables of a template.
_RESERVED = frozenset((
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents",
    "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "self", "tokenize", "tokenizer_kwargs", "tools", "truncation",
))  # fmt: skip


def checked(messages: Any, what: str = "messages") -> list[dict[str, str]]:
    """The messages with plain text as contents, and only what templates may see.

    Args:
      messages: each a `role` and a `content`, which is text or a list of parts `{"type": "text",
        "text": ...}`, joined by line feeds. An assistant's may have `reasoning_content`. A `name`
        is left out, as are fields that are None; `developer` is another name of `system`.
      what: names them in errors.

    Raises:
      UserError: names the first message that is none.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError(f"{what} = {said(messages)} must be a list of at least one message")
    found = [_checked(one, f"{what}[{i}]") for i, one in enumerate(messages)]
    if not any(one["content"].strip() for one in found):
        raise UserError(f"{what} is empty: no message has a text")
    return found


def _checked(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} = {said(message)} must be an object with 'role' and 'content'")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    kinds.check(f"{where}.role", role, kinds.one_of(ROLES))
    known = {"role", "content", "name"} | ({"reasoning_content"} if role == "assistant" else set())
    if unknown := [key for key in given if key not in known]:
        raise UserError(f"{where}.{str(unknown[0])[:40]} is not supported: only text is")
    found = {"role": "system" if role == "developer" else role}
    found["content"] = _text(given.get("content"), f"{where}.content")
    if "reasoning_content" in given:
        kinds.check(f"{where}.reasoning_content", given["reasoning_content"], kinds.TEXT)
        found["reasoning_content"] = given["reasoning_content"]
    return found


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise UserError(f"{where} = {said(content)} must be text, or a list of parts of text")
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise UserError(f"{where}[{i}] = {said(part)} must be of the type 'text'")
        kinds.check(f"{where}[{i}].text", part.get("text"), kinds.TEXT)
    return "\n".join(part["text"] for part in content)


def render(
    tokenizer: Any,
    messages: str | Messages,
    name: str,
    template: Mapping[str, Any] | None = None,
    hide: Callable[[list[dict]], list[dict]] | None = None,
) -> str:
    """Messages, or a user's text, in the chat template, with the generation prompt.

    Args:
      messages: as `checked` returns them.
      name: the model's, for errors.
      template: values for variables of the template, as `{"enable_thinking": False}`.
      hide: changes the messages just before the template gets them.

    Raises:
      UserError: the tokenizer has no chat template, or it fails.
    """
    template = template or {}
    for key in template:
        if not isinstance(key, str) or key in _RESERVED:
            raise UserError(
                f"chat_template_kwargs: {said(key)} is an argument of apply_chat_template: give "
                "variables of the template only"
            )
    messages = asked(messages) if isinstance(messages, str) else list(messages)

    def ask(messages):
        return apply(tokenizer, messages, **template, add_generation_prompt=True)

    raw = "give the whole prompt as text, chat off"
    written = tokenizer.chat_template
    if not written:
        raise UserError(f"model {name} has no chat template: {raw}")
    if isinstance(written, dict) and "default" not in written:
        raise UserError(
            f"model {name}: none of its chat templates ({', '.join(written)}) is named 'default': "
            f"rename one in {CONFIG}, or {raw}"
        )
    try:
        whole, begin = ask(messages), tokenizer.bos_token
        text = messages[0]["content"]
        if begin and whole.lstrip().startswith(begin) and text.lstrip().startswith(begin):
            bare = text.lstrip().removeprefix(begin)
            messages = [{**messages[0], "content": bare}, *messages[1:]]
            whole = ask(messages)
        if hide:
            messages = hide(messages)
            whole = ask(messages)
        # A template may rewrite the text: escape it, or change its case.
        last = messages[-1]
        if last["content"].strip() not in whole:
            other = {**last, "content": last["content"] + _ANSWER}
            if whole == ask([*messages[:-1], other]):
                raise ValueError("its output does not contain the message")
    except Exception as error:  # a template is a program
        raise UserError(
            f"model {name}: its chat template fails ({reason(error)}): fix {TEMPLATE}, "
            f"'chat_template' of {CONFIG} or the GGUF file's, or {raw}"
        ) from error
    return whole


def asked(text: str) -> list[dict]:
    """A text as the user's message."""
    return [{"role": "user", "content": text}]


def apply(tokenizer: Any, messages: list[dict], **settings: Any) -> str:
    settings = {"date_string": _DATE, **settings}
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def end_of_answer(tokenizer: Any, stop: tuple[int, ...], chat: bool) -> int | None:
    """The token of `stop` with which the model ends an answer, or None.

    In a chat it is the one the template puts after an assistant message (Llama 3's `<|eot_id|>`,
    which is not its EOS); otherwise, or if no template tells, the tokenizer's EOS.
    """
    if chat and tokenizer.chat_template:
        messages = [*asked("What is six times seven?"), {"role": "assistant", "content": _ANSWER}]
        try:
            _, found, after = apply(tokenizer, messages).rpartition(_ANSWER)
            ids = tokenize(tokenizer, after, continued=False) if found else []
            ended = [x for x in ids if x in stop]
        except Exception:  # some templates refuse assistant messages
            ended = []
        if ended:
            return ended[0]
    end = tokenizer.eos_token_id
    return end if end in stop else stop[0] if stop else None


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends in a thought's beginning, as some templates have it."""
    return re.search(rf"{THINK}\s*$", prompt) is not None


def continues_thought(before: str, answer: str) -> str:
    """The answer without a `<think>` that the preceding text has already opened."""
    opened = re.search(r"<think>(\s*)$", before)
    opens = re.match(r"\s*<think>(\s*)", answer)
    if not opened or not opens:
        return answer
    given, wanted = opened[1], opens[1]
    rest = wanted[len(given) :] if wanted.startswith(given) else ""
    return rest + answer[opens.end() :]


class Thoughts:
    """Splits an answer that comes in pieces into its thought and what follows `</think>`.

    White space around `<think>` and `</think>` belongs to neither. Text without a thought passes
    unchanged.

    Args:
      opened: the prompt has opened the thought.
    """

    def __init__(self, opened: bool = False):
        self._held, self._opened, self._at = "", opened, "start"

    def add(self, piece: str, last: bool = False) -> tuple[str, str]:
        """The thought and the text that are sure now, both possibly empty.

        Args:
          last: nothing follows.
        """
        self._held, thought = self._held + piece, ""
        if self._at == "start":
            bare = self._held.lstrip()
            if not bare.startswith(THINK) and THINK.startswith(bare) and not last:
                return "", ""
            thinks = self._opened or bare.startswith(THINK)
            self._at = "opening" if thinks else "text"
            self._held = bare.removeprefix(THINK) if thinks else self._held
        if self._at == "opening":
            self._held = self._held.lstrip()
            if not self._held:
                return "", ""
            self._at = "thought"
        if self._at == "thought":
            found, ended, after = self._held.partition(THOUGHT)
            if not ended:
                thought = found[: len(found) - (0 if last else unsure(found, THOUGHT))].rstrip()
                self._held = found[len(thought) :]
                return thought, ""
            thought, self._held, self._at = found.rstrip(), after, "closing"
        if self._at == "closing":
            self._held = self._held.lstrip()
            if not self._held:
                return thought, ""
            self._at = "text"
        text, self._held = self._held, ""
        return thought, text


def unsure(text: str, *wanted: str) -> int:
    """How many characters at the end of a text may begin one of these."""
    most = min(len(text), max((len(x) for x in wanted), default=1) - 1)
    ends = (n for n in range(most, 0, -1) if any(x.startswith(text[-n:]) for x in wanted))
    return next(ends, 0)
