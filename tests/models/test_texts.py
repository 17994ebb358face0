"""Tokenizers and stop tokens: text to ids, and files that are refused."""

import json
import os
import shutil

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from fkv.errors import UserError  # noqa: E402
from fkv.models import texts  # noqa: E402

WORDS = [
    "<unk>", "<s>", "</s>", "<eot>", "<user>", "<bot>", "<think>", "</think>", "one", "two", "six",
]  # fmt: skip
IDS = {word: i for i, word in enumerate(WORDS)}
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eot> {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def make(template=None, single="", **special):
    """A tokenizer with one token a word; `single` is what is around a text, as in "<s> $A"."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if single:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[(w, IDS[w]) for w in ("<s>", "</s>")]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound")
    make().save_pretrained(path)
    return path


@pytest.fixture
def directory(sound, tmp_path):
    """A tokenizer to spoil."""
    return shutil.copytree(sound, tmp_path / "model")


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


def words(ids):
    return " ".join(WORDS[i] for i in ids)


# ---- texts to tokens


@pytest.mark.parametrize("single", ["", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("text", ["one two", "<s> one two", " \n<s> one", "<s>", "one <s> two"])
def test_a_text_has_one_bos_and_no_eos(single, text):
    """What stands in front of a text is put there unless the text has it; nothing at its end."""
    got = words(texts.tokenize(make(single=single), text))
    given = " ".join(text.split())
    front = single.partition("$A")[0].strip()
    if given.startswith("<s>"):
        front = front.removesuffix("<s>").strip()
    assert got == f"{front} {given}".strip()


def test_an_empty_text_is_no_bos():
    assert texts.tokenize(make(single="<s> $A"), "") == []
    assert texts.tokenize(make(single="<s> $A"), " \n") == []


def test_an_answer_is_no_beginning():
    assert words(texts.tokenize(make(single="<s> $A </s>"), "one", continued=False)) == "one"


def test_what_no_tokenizer_reads():
    assert "the tokenizer can't read" in refusal(texts.tokenize, make(), "\ud800")


# ---- files

NOT_JSON = [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"\x00", b'{"a": 1, "a": 2}']
NO_OBJECT = [b"[]", b"null", b"3", b'"text"']


@pytest.mark.parametrize("name", texts._FILES)
@pytest.mark.parametrize("content", NOT_JSON + NO_OBJECT, ids=lambda x: str(x[:8]))
def test_files_that_are_no_json_objects(directory, name, content):
    (directory / name).write_bytes(content)
    said = "not a JSON object" if content in NO_OBJECT else "not JSON"
    assert f"{directory / name}: {said}" in refusal(texts.load_tokenizer, directory)


@pytest.mark.parametrize("name", [*texts._FILES, "chat_template.jinja"])
@pytest.mark.parametrize("make_it", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_not_read(directory, name, make_it):
    (directory / name).unlink(missing_ok=True)
    make_it(directory / name)
    message = refusal(texts.load_tokenizer, directory)
    assert message.startswith(str(directory / name)) and "not a regular file" in message


def test_a_template_that_is_not_utf_8(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    message = refusal(texts.load_tokenizer, directory)
    assert f"{directory}/chat_template.jinja is not UTF-8 text" in message


KINDS = {
    "bos_token eos_token unk_token pad_token": (3, True, [], {}, {"content": None}, ["</s>"]),
    "add_bos_token split_special_tokens": (3, "true", [], {}),
    "chat_template": (3, True, [None], ["x"], {"default": 3}, [{"name": "a"}],
                      [{"name": None, "template": "a"}], [{"name": "a", "template": 3}]),
    "tokenizer_class": (3, True, [], {}),
    "auto_map": (None, 3, [], "x"),
    "added_tokens_decoder": (None, 3, [], {"a": {}}, {"1": 3}, {"1": {"content": 3}}),
    "model_max_length": ("x", True, [], {}),
    "additional_special_tokens extra_special_tokens": ("x", 3, True),
    "padding_side": ("x", 3),  # what only transformers knows of
}  # fmt: skip


@pytest.mark.parametrize("fields", KINDS)
def test_fields_of_the_wrong_kind_are_named(directory, fields):
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for field in fields.split():
        for value in KINDS[fields]:
            path.write_text(json.dumps(config | {field: value}))
            message = refusal(texts.load_tokenizer, directory)
            assert "tokenizer_config.json: " in message and str(directory) in message
            assert field in message.lower().replace(" ", "_"), message


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}},
        {"normalizer": 3},
        {"added_tokens": None},
        {"added_tokens": [{"id": "x"}]},
        {"post_processor": {}},
        {"version": "9"},
    ],
)
def test_tokenizer_json_of_another_kind(directory, change):
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = refusal(texts.load_tokenizer, directory)
    assert f"{directory}: its tokenizer can't be loaded (tokenizer.json: " in message


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ids", ["x", "</s>", True, -1, 11, 10**30, 1.0, [None], [[1]], {}])
def test_stop_tokens_that_are_no_ids(tmp_path, name, ids):
    path = tmp_path / name
    path.write_text(json.dumps({"eos_token_id": ids}))
    message = refusal(texts.stop_tokens, tmp_path, None, len(WORDS))
    assert message.startswith(f"{path}: eos_token_id = ")
    assert "must be a token id from 0 to 10" in message


def test_stop_tokens_that_are_ids(tmp_path):
    for ids, stop in (([2, 3, 2], (2, 3)), (10, (10,)), (0, (0,)), ([], ()), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert texts.stop_tokens(tmp_path, make(), len(WORDS)) == stop
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')  # comes second
    assert texts.stop_tokens(tmp_path, make(), len(WORDS)) == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert texts.stop_tokens(tmp_path, make(), len(WORDS)) == (3,)
    (tmp_path / "config.json").unlink()
    (tmp_path / "generation_config.json").write_text("{}")
    message = refusal(texts.stop_tokens, tmp_path, make(), 2)
    assert "'eos_token' '</s>' has the id 2, but config.json a 'vocab_size' of 2" in message
