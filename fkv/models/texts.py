"""Tokenizers of `transformers`, and the ids that end an answer."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fkv import files, hub, kinds
from fkv.errors import UserError
from fkv.kinds import Kind, said
from fkv.models import gguf_texts

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
# All optional, except that one of the first two is needed.
_FILES = ("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json")
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


def _instance(what: str, *types: type) -> Kind:
    return Kind(what, lambda x: isinstance(x, types) and (bool in types or type(x) is not bool))


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _are_templates(value: Any) -> bool:
    if isinstance(value, list):
        named = all(isinstance(one, dict) for one in value)
        return named and all(isinstance(x.get(k), str) for x in value for k in ("name", "template"))
    texts = value.values() if isinstance(value, dict) else [value or ""]
    return all(isinstance(text, str) for text in texts)


def _are_added_tokens(value: Any) -> bool:
    tokens = value.values() if isinstance(value, dict) else [None]
    named = all(isinstance(token, dict) and _is_token(token) for token in tokens)
    return named and all(key.isdecimal() for key in value)


_NULL = type(None)
_SPECIAL = _instance("a list or an object", list, dict, _NULL)
# Fields of a tokenizer's files on which transformers fails without naming them.
_KINDS = {
    r"add_\w+_token": _instance("true or false", bool, _NULL),
    r"(?!add_).*_token": Kind("a token", lambda value: value is None or _is_token(value)),
    "tokenizer_class": _instance("a name", str, _NULL),
    "auto_map": _instance("an object", dict),
    "added_tokens_decoder": Kind("an object of tokens by their ids", _are_added_tokens),
    "model_max_length": _instance("a number", int, float, _NULL),
    "split_special_tokens": kinds.SWITCH,
    "extra_special_tokens": _SPECIAL,
    "additional_special_tokens": _SPECIAL,
    "chat_template": Kind("text, or a list of objects with 'name' and 'template'", _are_templates),
}


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint, a directory or a GGUF file; None if it has none.

    Raises:
      UserError: one of its files is damaged, or does not belong to this tokenizer.
    """
    if directory.is_file():
        return gguf_texts.load_tokenizer(directory)
    found = {name: directory / name for name in _FILES if (directory / name).exists()}
    if not found.keys() & set(_FILES[:2]):
        return None
    for name, path in found.items():
        fields = files.read_json(path)
        if name in (CONFIG, "special_tokens_map.json"):
            _check_fields(path, fields)
    if (path := directory / TEMPLATE).exists():
        files.read_text(path)
    try:
        return hub.transformers().AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    # Whatever transformers and tokenizers raise on damaged files.
    except Exception as error:
        why = f"{', '.join(name for name in found if name != _FILES[0])}: {reason(error)}"
        if _FILES[0] in found:
            import tokenizers

            try:
                tokenizers.Tokenizer.from_file(str(directory / _FILES[0]))
            except Exception as inner:
                why = f"{_FILES[0]}: {reason(inner)}"
        raise UserError(f"{directory}: its tokenizer can't be loaded ({why})") from error


def _check_fields(path: Path, fields: Mapping) -> None:
    for key, value in fields.items():
        for name, kind in _KINDS.items():
            if re.fullmatch(name, key):
                kinds.check(f"{path}: {key}", value, kind)


def reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def stop_tokens(directory: Path, tokenizer: Any, vocabulary: int) -> tuple[int, ...]:
    """Ids of the stop tokens, from the generation config or else the tokenizer.

    An empty list in the config means that there are none. Of a GGUF file, from its metadata.

    Args:
      vocabulary: ids must be below this.

    Raises:
      UserError: a file is damaged, or gives an id outside the vocabulary.
    """
    if directory.is_file():
        return gguf_texts.stop_tokens(directory, vocabulary)

    def fits(value):
        ids = value if isinstance(value, list) else [value]
        return all(type(x) is int and 0 <= x < vocabulary for x in ids)

    kind = Kind(f"a token id from 0 to {vocabulary - 1}, or a list of them", fits)
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        found = files.read_json(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            kinds.check(f"{path}: eos_token_id", found, kind)
            return tuple(dict.fromkeys(found if isinstance(found, list) else [found]))
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and not 0 <= end < vocabulary:
        raise UserError(
            f"{directory}: its tokenizer's 'eos_token' {tokenizer.eos_token!r} has the id {end}, "
            f"but config.json a 'vocab_size' of {vocabulary}: use the files of one checkpoint"
        )
    return () if end is None else (end,)


def tokenize(tokenizer: Any, text: str, continued: bool = True) -> list[int]:
    """Token ids of a text.

    Args:
      continued: for a prompt: leading special tokens (a BOS) are added unless the text has them,
        trailing ones are not.

    Raises:
      UserError: the tokenizer fails.
    """
    ids = _ids(tokenizer, text, False)
    if not continued or not ids:
        return ids
    whole = _ids(tokenizer, text, True)
    starts = range(len(whole) - len(ids) + 1)
    start = next((i for i in starts if whole[i : i + len(ids)] == ids), None)
    if start is None:  # special tokens change how the text is tokenized
        return whole
    front = whole[:start]
    if front:
        name = tokenizer.convert_ids_to_tokens(front[-1])
        if ids[0] == front[-1] or text.lstrip().startswith(name):
            del front[-1]
    return front + ids


def unknown(tokenizer: Any, text: str, ids: Sequence[int]) -> str:
    """A warning if words of a text, tokenized as `ids`, map to the tokenizer's unknown token."""
    inner = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    token = getattr(tokenizer, "unk_token", None) or getattr(inner, "unk_token", None)
    # Where it doubles as another token, the tokenizer encodes any text (GPT-2's, by bytes).
    if not token or token in (tokenizer.bos_token, tokenizer.eos_token):
        return ""
    count = list(ids).count(tokenizer.convert_tokens_to_ids(token)) - text.count(token)
    if count <= 0:
        return ""
    return (
        f"{count} of its {len(ids)} tokens are {token!r}, for words that the tokenizer does not "
        "know: the model can't tell these apart"
    )


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except Exception as error:
        raise UserError(f"the tokenizer can't read {said(text)} ({reason(error)})") from error


def end_of_text(tokenizer: Any) -> int | None:
    """The token between two texts: of chat models not the EOS, which ends a message."""
    known = tokenizer.get_vocab()
    return next((known[x] for x in _ENDS_OF_TEXT if x in known), tokenizer.eos_token_id)


def front(tokenizer: Any) -> list[int]:
    """The special tokens (a BOS) that the tokenizer puts before a text."""
    bare = tokenize(tokenizer, "a", continued=False)
    return tokenize(tokenizer, "a")[: -len(bare)] if bare else []
