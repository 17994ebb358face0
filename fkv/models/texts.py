"""Tokenizers and chat templates, those of `transformers`, and the ids that end an answer."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fkv import files, hub
from fkv.errors import UserError
from fkv.kinds import said

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
# All may be absent, but for one of the first two.
_FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json")
# Llama 3.2's template writes today's date unless told one. With its own default, prompts are the
# same tomorrow.
_DATE = "26 Jul 2024"
_ANSWER = "The answer is forty-two."


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint; None where the directory has none.

    Raises:
      UserError: one of its files is damaged, or is not of this tokenizer.
    """
    found = {name: directory / name for name in _FILES if (directory / name).exists()}
    if not found.keys() & set(_FILES[:2]):
        return None
    found = {name: files.read_json(path) for name, path in found.items()}
    for name in (_CONFIG, "special_tokens_map.json"):
        _check_fields(directory / name, found.get(name, {}))
    if (path := directory / _TEMPLATE).exists():
        _check_text(path)

    try:
        return hub.transformers().AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    # Whatever transformers and tokenizers raise over files that are not theirs.
    except Exception as error:
        reason = f"{', '.join(name for name in found if name != _FILES[0])}: {_reason(error)}"
        if _FILES[0] in found:
            import tokenizers

            try:
                tokenizers.Tokenizer.from_file(str(directory / _FILES[0]))
            except Exception as inner:
                reason = f"{_FILES[0]}: {_reason(inner)}"
        raise UserError(f"{directory}: its tokenizer can't be loaded ({reason})") from error


def _check_fields(path: Path, config: Mapping) -> None:
    """Refuses fields of a tokenizer's files that transformers trips over without their names."""

    def refuse(key, wanted):
        raise UserError(f"{path}: the field {key!r} must be {wanted}, not {said(config[key])}")

    def is_token(value):
        value = value.get("content") if isinstance(value, dict) else value
        return isinstance(value, str)

    for key, value in config.items():
        if re.fullmatch(r"add_\w+_token", key):
            if not isinstance(value, bool | None):
                refuse(key, "true or false")
        elif key.endswith("_token") and not (value is None or is_token(value)):
            refuse(key, "a token")
    for key, kinds, wanted in (
        ("tokenizer_class", str | None, "a name"),
        ("auto_map", dict, "an object"),
        ("added_tokens_decoder", dict, "an object of tokens by their ids"),
        ("model_max_length", int | float | None, "a number"),
        ("split_special_tokens", bool, "true or false"),
        ("extra_special_tokens", list | dict | None, "a list or an object"),
        ("additional_special_tokens", list | dict | None, "a list or an object"),
    ):
        value = config.get(key)
        ok = isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))
        if key in config and not ok:
            refuse(key, wanted)
    if not all(
        key.isdecimal() and isinstance(value, dict) and is_token(value)
        for key, value in config.get("added_tokens_decoder", {}).items()
    ):
        refuse("added_tokens_decoder", "an object of tokens by their ids")
    template = config.get("chat_template")
    if isinstance(template, list):
        texts = [
            one.get(k) if isinstance(one, dict) else None
            for one in template
            for k in ("name", "template")
        ]
    else:
        texts = template.values() if isinstance(template, dict) else [template or ""]
    if not all(isinstance(text, str) for text in texts):
        refuse("chat_template", "a template, or a list of objects with 'name' and 'template'")


def _check_text(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: not a regular file")
    try:
        path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def stop_tokens(directory: Path, tokenizer: Any, vocabulary: int) -> tuple[int, ...]:
    """Ids that end a text: of the generation config where there is one, else of the tokenizer.

    An empty list there says that none does.

    Args:
      vocabulary: ids must be below this.

    Raises:
      UserError: a file is damaged, or what it says is no id of the model.
    """
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        found = files.read_json(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(x) is int and 0 <= x < vocabulary for x in ids):
                raise UserError(
                    f"{path}: the field 'eos_token_id' must be a token id from 0 to "
                    f"{vocabulary - 1}, or a list of them, not {said(found)}"
                )
            return tuple(dict.fromkeys(ids))
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and not 0 <= end < vocabulary:
        raise UserError(
            f"{directory}: its tokenizer's 'eos_token' {tokenizer.eos_token!r} has the id {end}, "
            f"but config.json a 'vocab_size' of {vocabulary}: take the files of one checkpoint"
        )
    return () if end is None else (end,)


def tokenize(tokenizer: Any, text: str, continued: bool = True) -> list[int]:
    """Token ids of a text.

    Args:
      continued: the text is the beginning of one: what the tokenizer puts in front (a BOS) comes
        in front of it, unless the text has it, and what it puts at the end does not come.

    Raises:
      UserError: the tokenizer fails.
    """
    ids = _ids(tokenizer, text, False)
    if not continued or not ids:
        return ids
    whole = _ids(tokenizer, text, True)
    starts = range(len(whole) - len(ids) + 1)
    start = next((i for i in starts if whole[i : i + len(ids)] == ids), None)
    if start is None:  # special tokens change the others
        return whole
    if start and _begins_with(tokenizer, text, ids, whole[start - 1]):
        start -= 1
        return whole[:start] + ids
    return whole[: start + len(ids)]


def unknown(tokenizer: Any, text: str, ids: Sequence[int]) -> str:
    """A warning if words of a text became the token for what the tokenizer does not know.

    Args:
      ids: what became of the text.
    """
    inner = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    token = getattr(tokenizer, "unk_token", None) or getattr(inner, "unk_token", None)
    # Where it has other uses, the tokenizer knows all text (GPT-2's, byte by byte).
    if not token or token in (tokenizer.bos_token, tokenizer.eos_token):
        return ""
    count = list(ids).count(tokenizer.convert_tokens_to_ids(token)) - text.count(token)
    if count <= 0:
        return ""
    return (
        f"{count} of its {len(ids)} tokens are {token!r}, for words that the tokenizer does not "
        "know: the model can't tell these apart"
    )


def _begins_with(tokenizer: Any, text: str, ids: list[int], token: int) -> bool:
    name = tokenizer.convert_ids_to_tokens(token)
    return ids[0] == token or text.lstrip().startswith(name)


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:
        raise UserError(f"the tokenizer can't read {said(text)} ({_reason(error)})") from error


def render(tokenizer: Any, text: str, name: str) -> str:
    """The text as a user's message in the chat template, ready for the answer.

    Args:
      name: of the model, for errors.

    Raises:
      UserError: there is no chat template, or it fails.
    """
    template = tokenizer.chat_template
    if not template:
        raise UserError(
            f"model {name} has no chat template: give the whole prompt as text, chat off"
        )
    if isinstance(template, dict) and "default" not in template:
        raise UserError(
            f"model {name}: none of its chat templates ({', '.join(template)}) is the 'default': "
            f"name one so in {_CONFIG}, or give the whole prompt as text, chat off"
        )
    try:
        whole = _render(tokenizer, _asked(text), True)
        begin = tokenizer.bos_token
        if begin and whole.lstrip().startswith(begin) and text.lstrip().startswith(begin):
            text = text.lstrip().removeprefix(begin)
            whole = _render(tokenizer, _asked(text), True)
        # It may write the text in its own way: escaped, or in upper case.
        if text.strip() not in whole and whole == _render(tokenizer, _asked(text + _ANSWER), True):
            raise ValueError("what it makes of a message does not have the message in it")
    except Exception as error:  # a template is a program
        raise UserError(
            f"model {name}: its chat template fails ({_reason(error)}): mend {_TEMPLATE}, or "
            f"'chat_template' of {_CONFIG}, or give the whole prompt as text, chat off"
        ) from error
    return whole


def _asked(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _render(tokenizer: Any, messages: list[dict], answering: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=answering, tokenize=False, date_string=_DATE
    )


def end_of_answer(tokenizer: Any, stop: tuple[int, ...], chat: bool) -> int | None:
    """The token among `stop` that the model ends an answer with; None where nothing ends it.

    In a chat it is the one that the template has after an assistant's message (`<|eot_id|>` of
    Llama 3, which ends texts with another); else, and where no template says, the tokenizer's EOS.
    """
    if chat and tokenizer.chat_template:
        messages = [*_asked("What is six times seven?"), {"role": "assistant", "content": _ANSWER}]
        try:
            _, found, after = _render(tokenizer, messages, False).rpartition(_ANSWER)
            ended = [x for x in _ids(tokenizer, after, False) if x in stop] if found else []
        except Exception:  # some templates take no answers
            ended = []
        if ended:
            return ended[0]
    end = tokenizer.eos_token_id
    return end if end in stop else stop[0] if stop else None


def continues_thought(before: str, answer: str) -> str:
    """The answer without the `<think>` that the text before it has opened already."""
    opened = re.search(r"<think>(\s*)$", before)
    opens = re.match(r"\s*<think>(\s*)", answer)
    if not opened or not opens:
        return answer
    given, wanted = opened[1], opens[1]
    rest = wanted[len(given) :] if wanted.startswith(given) else ""
    return rest + answer[opens.end() :]
