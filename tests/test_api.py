"""What notebooks call: models with tokenizers, text in and out, scorers of a run."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

import fkv
from fkv import api, checkpoint, decoding, models, policies, scorer
from fkv.errors import UserError
from tests import oracles

SIZES = {"budget": 16, "interval": 8, "new_tokens": 20}
WORDS = ["<unk>", "<eos>", "<user>", "<bot>", *(f"w{i}" for i in range(33))]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def save_tokenizer(directory, tokenizer, template=None, **special):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    fast.save_pretrained(directory)


def save_words(directory, template=None):
    """A tiny model and a tokenizer with one token a word."""
    models.save(directory, *oracles.make_model())
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save_tokenizer(directory, tokenizer, template, eos_token="<eos>", unk_token="<unk>")
    return directory


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return fkv.load(save_words(tmp_path_factory.mktemp("words"), TEMPLATE))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model without a tokenizer."""
    directory = tmp_path_factory.mktemp("bare")
    models.save(directory, *oracles.make_model())
    return fkv.load(directory)


# ---- loading


def test_the_embedded_model():
    model = fkv.load()
    assert model.name == "embedded" and model.config.family == "qwen3"
    assert model.stop == (model.tokenizer.eos_token_id,)
    assert len(model.tokenizer) <= model.config.vocab_size
    dtypes = {x.dtype.name for x in jax.tree.leaves(fkv.load(dtype="bfloat16").params)}
    assert dtypes == {"bfloat16"}
    assert fkv.load(cache_dtype="int8").config.cache_dtype == "int8" != model.config.cache_dtype
    with pytest.raises(UserError, match=r"cache_dtype = 'int4' must be '' .* or 'int8'"):
        fkv.load(cache_dtype="int4")


def test_a_directory_with_a_tokenizer(words, tmp_path):
    config, params = oracles.make_model()
    assert words.config == config and words.stop == (1,)
    for ours, theirs in zip(jax.tree.leaves(words.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert api.encode(words, "w0 w32 w5").tolist() == [4, 36, 9]
    assert api.encode(words, [7, 8]).tolist() == [7, 8]
    assert api.encode(words, "w0 w1", chat=True).tolist() == [2, 4, 5, 3]
    assert api.decode(words, [4, 5, 1]) == "w0 w1"  # no special tokens
    assert api.encode(words, "w0").dtype == np.int32


def test_stop_tokens_come_from_the_nearest_file(tmp_path):
    directory = save_words(tmp_path)

    def stop():
        return api._stop(directory, api._tokenizer(directory))

    assert stop() == (1,)  # the tokenizer's
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    assert stop() == (5,)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert stop() == (7, 8) == fkv.load(directory).stop
    (directory / "generation_config.json").write_text(json.dumps({"top_k": 3}))
    assert stop() == (5,)
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: not JSON"):
        fkv.load(directory)


def test_damaged_and_absent_models_are_refused(tmp_path):
    directory = save_words(tmp_path)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer can't be loaded"):
        fkv.load(directory)
    with pytest.raises(UserError, match="no such directory"):
        fkv.load(tmp_path / "nowhere at all")


# ---- generating


def test_one_text_or_several_with_samples(words):
    one = fkv.generate(words, "w3 w1 w4", "snapkv", samples=2, **SIZES)
    assert len(one) == 1 and len(one[0]) == 2
    texts = ["w3 w1 w4", "w1 w5 " * 10]
    two = fkv.generate(words, texts, "snapkv", samples=2, **SIZES)
    assert [len(x) for x in two] == [2, 2]
    # A sample does not depend on what else is asked for.
    for a, b in zip(one[0], two[0], strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.text == b.text
    rows = {tuple(x.tokens.tolist()) for found in two for x in found}
    assert len(rows) == 4
    for prompt, found in zip([3, 20], two, strict=True):
        for x in found:
            assert x.text == words.tokenizer.decode(x.tokens, skip_special_tokens=True)
            assert 0 < len(x.tokens) <= 20
            assert x.truncated == (x.tokens[-1] != 1) and (1 not in x.tokens[:-1])
            assert x.evictions == decoding.evictions(prompt, len(x.tokens), 16, 8)


def test_ids_are_taken_as_they_are(words, bare):
    ids = [api.encode(words, text).tolist() for text in ("w3 w1 w4", "w1 w5 " * 10)]
    by_text = fkv.generate(words, ["w3 w1 w4", "w1 w5 " * 10], "snapkv", samples=2, **SIZES)
    by_id = fkv.generate(words, ids, "snapkv", samples=2, **SIZES)
    for a, b in zip(itertools.chain(*by_text), itertools.chain(*by_id), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.text == b.text
    # Without a tokenizer there is no text, nor a stop token.
    [[x]] = fkv.generate(bare, ids[:1], policies.get("full"), **SIZES)
    assert x.text == "" and len(x.tokens) == 20 and x.truncated and bare.stop == ()


def test_same_seed_same_samples(words):
    def run(**change):
        found = fkv.generate(words, "w1 w2", "snapkv", samples=2, **SIZES | change)
        return [x.tokens.tolist() for x in found[0]]

    assert run(seed=1) == run(seed=1) != run(seed=2)
    greedy = run(temperature=0.0)
    assert greedy[0] == greedy[1]
    assert greedy == run(temperature=0.0, seed=2)


def test_chat_is_the_template_around_the_text(words):
    chat = fkv.generate(words, "w3 w1", chat=True, **SIZES)
    text = fkv.generate(words, "<user> w3 w1 <bot>", **SIZES)
    assert chat[0][0].tokens.tolist() == text[0][0].tokens.tolist()
    assert chat[0][0].evictions == 0  # the full cache


def test_a_stop_token_ends_an_answer(words):
    free = dataclasses.replace(words, stop=())
    tokens = fkv.generate(free, "w3", **SIZES)[0][0].tokens
    assert len(tokens) == 20
    stop = int(tokens[9])
    [[x]] = fkv.generate(dataclasses.replace(words, stop=(stop,)), "w3", **SIZES)
    assert x.tokens.tolist() == tokens[: tokens.tolist().index(stop) + 1].tolist()
    assert not x.truncated


def test_the_pieces_of_a_stream_are_the_whole(words):
    free = dataclasses.replace(words, stop=())
    pieces = list(fkv.stream(free, "w3 w1 w4", "full", **SIZES))
    assert "".join(pieces) == fkv.generate(free, "w3 w1 w4", "full", **SIZES)[0][0].text
    assert len([x for x in pieces if x]) == 3  # 8, 8 and 4 tokens


def test_a_stream_never_cuts_a_character(tmp_path):
    # One token a byte: most random bytes are no whole character.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    save_tokenizer(tmp_path, tokenizer)
    model = api.Model(None, None, api._tokenizer(tmp_path), (), "bytes")
    text = "aé€𝄞" * 5
    tokens = api.encode(model, text)
    assert len(tokens) == 50 and api.decode(model, tokens) == text

    def streamed(tokens, size):
        chunks = [[tokens[i : i + size]] for i in range(0, len(tokens), size)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "stream", lambda *_: iter(chunks))
            return list(fkv.stream(model, "a", new_tokens=len(tokens)))

    for size in (1, 3, 4, 7):
        pieces = streamed(tokens, size)
        assert "".join(pieces) == text and len(pieces) >= (20 if size == 1 else 2)
        assert not any("\N{REPLACEMENT CHARACTER}" in x for x in pieces)
    noise = np.random.default_rng(0).integers(256, size=60)
    for size in (1, 4, 7):
        assert "".join(streamed(noise, size)) == api.decode(model, noise)


def test_impossible_requests_are_refused(words, bare, tmp_path):
    with pytest.raises(UserError, match="has no tokenizer: give prompts as token ids"):
        fkv.generate(bare, "w1", **SIZES)
    with pytest.raises(UserError, match="has no tokenizer: there is no text to stream"):
        next(fkv.stream(bare, [1, 2], **SIZES))
    plain = fkv.load(save_words(tmp_path))
    with pytest.raises(UserError, match="has no chat template: give the whole prompt"):
        fkv.generate(plain, "w1", chat=True, **SIZES)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        fkv.generate(words, ["w1", ""], **SIZES)
    with pytest.raises(UserError, match="no prompts given"):
        fkv.generate(words, [], **SIZES)
    with pytest.raises(UserError, match="'snapvk' is not known; known are"):
        fkv.generate(words, "w1", "snapvk", **SIZES)
    with pytest.raises(UserError, match="samples = 0 must be at least 1"):
        fkv.generate(words, "w1", samples=0, **SIZES)
    with pytest.raises(UserError, match="top_p = 2 must be above 0"):
        fkv.generate(words, "w1", top_p=2, **SIZES)


# ---- scorers


def test_scorers_of_a_run_are_a_policy(words, tmp_path):
    rules = scorer.ScorerConfig(hidden=4, inputs="kv")
    params = scorer.init(jax.random.key(0), words.config, rules)
    info = {"config": {"scorer": dataclasses.asdict(rules)}}
    checkpoint.save(tmp_path, 3, {"params": params}, info)
    policy = fkv.load_scorer(tmp_path)
    assert policy.config == rules and policy.action == "top"
    for ours, theirs in zip(jax.tree.leaves(policy.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    found = fkv.generate(words, "w1 w5 " * 10, policy, **SIZES)
    same = policies.Foresight(params, rules)
    again = fkv.generate(words, "w1 w5 " * 10, same, **SIZES)
    assert found[0][0].tokens.tolist() == again[0][0].tokens.tolist()
    assert found[0][0].evictions > 0


def test_no_scorers_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in .*: give the --workdir of a run"):
        fkv.load_scorer(tmp_path)
