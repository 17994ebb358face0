"""The tokenizer of a GGUF file, its chat template and its stop tokens, built from the metadata."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from fkv import hub, kinds
from fkv.errors import UserError
from fkv.kinds import Kind, said
from fkv.models import gguf

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")


def _split(pattern: str) -> list:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def _gpt2(*before: Any) -> list:
    return [*before, pre_tokenizers.ByteLevel(add_prefix_space=False)]


# How a text is split, by `tokenizer.ggml.pre`: as in the model's own tokenizer.json.
_SPLITS = {
    **dict.fromkeys(("smollm",), lambda: _gpt2(pre_tokenizers.Digits(individual_digits=True))),
    **dict.fromkeys(("gpt-2", "gpt2"), _gpt2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), lambda: _split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), lambda: _split(_QWEN2)),
}
_COMPOSED = ("qwen2", "deepseek-r1-qwen")  # texts are in Unicode's composed form, NFC
_WHOLE = ("llama-bpe", "llama3", "llama-v3")  # a word of the vocabulary needs no merges
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Beside the EOS, the tokens that end answers in the families' generation configs.
_ENDS = {
    "llama": ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    "qwen2": ("<|im_end|>", "<|endoftext|>"),
    "qwen3": ("<|im_end|>", "<|endoftext|>"),
}
_TEXTS = Kind("a list of texts", lambda x: isinstance(x, list) and all(map(kinds.TEXT.fits, x)))


def load_tokenizer(path: Path) -> Any:
    """The tokenizer; None if the file has none.

    Raises:
      UserError: it is damaged, or of a kind that is not supported.
    """
    header = gguf.header(path)
    model = header.metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return None
    if model != "gpt2":
        raise UserError(f"{path}: tokenizer.ggml.model = {said(model)}, and only 'gpt2' is read")
    pre = header.get("tokenizer.ggml.pre", kinds.one_of(list(_SPLITS)), "default")
    tokens = _tokens(header)
    merges = [tuple(x.split(" ")) for x in header.get("tokenizer.ggml.merges", _TEXTS)]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise UserError(f"{path}: tokenizer.ggml.merges holds {said(' '.join(wrong))}, not a pair")
    ids = {token: i for i, token in enumerate(tokens)}
    template, named = header.get("tokenizer.chat_template", kinds.TEXT, ""), _named(header, tokens)
    try:
        bpe = tokenizers.models.BPE(ids, merges, ignore_merges=pre in _WHOLE)
        inner = tokenizers.Tokenizer(bpe)
        inner.normalizer = normalizers.NFC() if pre in _COMPOSED else None
        inner.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[pre]())
        inner.decoder = decoders.ByteLevel()
        _add_special(header, inner, tokens, set(named.values()))
        _add_ends(header, inner, named, ids)
        tokenizer = hub.transformers().PreTrainedTokenizerFast(
            tokenizer_object=inner, clean_up_tokenization_spaces=False, **named
        )
    except UserError:
        raise
    except Exception as error:  # whatever tokenizers raises on damaged merges and tokens
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: its tokenizer can't be built ({reason[:300]})") from None
    tokenizer.chat_template = template or None
    return tokenizer


def stop_tokens(path: Path, vocabulary: int) -> tuple[int, ...]:
    """Ids of the stop tokens: the EOS, those after a turn or a message, and those known by name.

    Args:
      vocabulary: ids must be below this.
    """
    header = gguf.header(path)
    found = []
    for name in ("eos", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in header.metadata:
            found.append(header.get(key, kinds.whole(0, vocabulary - 1)))
    if "tokenizer.ggml.tokens" in header.metadata:
        ids = {token: i for i, token in enumerate(_tokens(header))}
        found += [ids[end] for end in _ENDS[gguf.family_of(header)] if end in ids]
    return tuple(dict.fromkeys(found))


def _tokens(header: gguf.Header) -> list[str]:
    tokens = header.get("tokenizer.ggml.tokens", _TEXTS)
    rows = gguf.vocabulary(header)
    if len(tokens) > rows:
        raise UserError(
            f"{header.path}: tokenizer.ggml.tokens has {len(tokens)} entries, the vocabulary {rows}"
        )
    if len(set(tokens)) < len(tokens):
        seen = set()
        twice = next(x for x in tokens if x in seen or seen.add(x))
        raise UserError(f"{header.path}: tokenizer.ggml.tokens has {said(twice)} twice")
    return tokens


def _named(header: gguf.Header, tokens: list[str]) -> dict[str, str]:
    """The special tokens that have a role, such as the EOS."""
    found = {}
    for role, name in _NAMED.items():
        key = f"tokenizer.ggml.{name}_token_id"
        if key in header.metadata:
            found[role] = tokens[header.get(key, kinds.whole(0, len(tokens) - 1))]
    return found


def _add_special(
    header: gguf.Header, inner: tokenizers.Tokenizer, tokens: list[str], named: set[str]
) -> None:
    """Has tokens that are never made by merges found in a text as a whole."""
    fits = kinds.several(kinds.whole(0, 255), "a list of types, one a token", len(tokens))
    types = header.get("tokenizer.ggml.token_type", fits, [1] * len(tokens))
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL or t in named]
    others = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    plain = [tokenizers.AddedToken(t, normalized=False) for t in others if t not in named and t]
    inner.add_special_tokens(
        [tokenizers.AddedToken(t, normalized=False, special=True) for t in special if t]
    )
    inner.add_tokens(plain)


def _add_ends(
    header: gguf.Header, inner: tokenizers.Tokenizer, named: dict[str, str], ids: dict[str, int]
) -> None:
    """Has a text begin with the BOS, and end with the EOS, where the file says so."""
    pre = header.metadata["tokenizer.ggml.pre"]
    begins = header.get("tokenizer.ggml.add_bos_token", kinds.SWITCH, pre in _WHOLE)
    ends = header.get("tokenizer.ggml.add_eos_token", kinds.SWITCH, False)
    around = [("bos_token", begins), ("eos_token", ends)]
    for role, asked in around:
        if asked and role not in named:
            raise UserError(
                f"{header.path}: tokenizer.ggml.add_{role} is set, but the file names no such token"
            )
    front, back = (named[role] if asked else "" for role, asked in around)
    if begins or ends:
        inner.post_processor = processors.TemplateProcessing(
            single=[x for x in (front, "$A", back) if x],
            special_tokens=[(x, ids[x]) for x in {front, back} if x],
        )
