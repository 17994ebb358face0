"""What notebooks call: models with tokenizers, text in and out, scorers of a run."""

import dataclasses
import inspect
import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

import fkv
from fkv import api, models, policies
from fkv.cache.cadence import Cadence
from fkv.engine.batch import Batch
from fkv.engine.replay import replay
from fkv.errors import UserError
from fkv.models import texts
from fkv.policies import scorer
from fkv.runs import checkpoint
from tests import oracles
from tests.serve import fake

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
    models.save(directory, oracles.make_lm())
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
    models.save(directory, oracles.make_lm())
    return fkv.load(directory)


# ---- loading


def test_the_embedded_model():
    model = fkv.load()
    assert model.name == "embedded" and model.config.family == "qwen3"
    assert model.stop == (model.tokenizer.eos_token_id,)
    assert len(model.tokenizer) <= model.config.vocab_size
    dtypes = {x.dtype.name for x in jax.tree.leaves(fkv.load(dtype="bfloat16").lm)}
    assert dtypes == {"bfloat16"}
    assert fkv.load(cache_dtype="int8").config.cache_dtype == "int8" != model.config.cache_dtype
    with pytest.raises(UserError, match=r"cache_dtype = 'int4' must be '' .* or 'int8'"):
        fkv.load(cache_dtype="int4")


def test_a_directory_with_a_tokenizer(words, tmp_path):
    lm = oracles.make_lm()
    assert words.lm.config == lm.config and words.stop == (1,)
    want = models.separate(lm, consume=False).params
    jax.tree.map(np.testing.assert_array_equal, words.lm.params, want)
    assert api.encode(words, "w0 w32 w5").tolist() == [4, 36, 9]
    assert api.encode(words, [7, 8]).tolist() == [7, 8]
    assert api.encode(words, "w0 w1", chat=True).tolist() == [2, 4, 5, 3]
    assert api.decode(words, [4, 5, 1]) == "w0 w1"  # no special tokens
    assert api.encode(words, "w0").dtype == np.int32


def test_stop_tokens_come_from_the_nearest_file(tmp_path):
    directory = save_words(tmp_path)

    def stop():
        return texts.stop_tokens(directory, texts.load_tokenizer(directory), 37)

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


def test_what_is_no_mesh_is_refused():
    with pytest.raises(UserError, match=r"mesh = 3 must be devices, from fkv.runs.parallel"):
        fkv.load(mesh=3)


def test_words_that_the_tokenizer_does_not_know_are_warned_of(words, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts_of(words, ["w0 w1", "<unk> w0", [0, 4]], monkeypatch)  # asked for by name, or id
    says = "prompt 1: 2 of its 3 tokens are '<unk>', for words that the tokenizer does not know"
    with pytest.warns(UserWarning, match=says) as warned:
        prompts_of(words, ["w0", "zero w0 one"], monkeypatch)
    assert len(warned) == 1
    # Its tokenizer has such a token, and does not say so.
    with pytest.warns(UserWarning, match="5 of its 5 tokens are '<pad>'"):
        next(fkv.stream(fkv.load(), "Hello, how are you ?", "full", 32, 16, 16))


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
            assert x.evictions == Cadence(16, 8).evictions_generating(prompt, len(x.tokens))


def test_ids_are_taken_as_they_are(words, bare):
    ids = [api.encode(words, text).tolist() for text in ("w3 w1 w4", "w1 w5 " * 10)]
    by_text = fkv.generate(words, ["w3 w1 w4", "w1 w5 " * 10], "snapkv", samples=2, **SIZES)
    by_id = fkv.generate(words, ids, "snapkv", samples=2, **SIZES)
    for a, b in zip(itertools.chain(*by_text), itertools.chain(*by_id), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.text == b.text
    # Without a tokenizer there is no text, nor a stop token.
    [[x]] = fkv.generate(bare, ids[:1], policies.get("full"), **SIZES)
    assert x.text == "" and len(x.tokens) == 20 and x.truncated and bare.stop == ()


def prompts_of(words, prompts, monkeypatch, call=fkv.generate, **settings):
    """What reaches the decoder."""
    requests = fake.instead(monkeypatch, api, script=[1])
    found = call(words, prompts, **SIZES | settings)
    if call is fkv.stream:
        list(found)
    else:
        assert len(found) == len(requests)
    return [one.prompt.tolist() for one in requests]


ONE_PROMPT = {
    "text": "w0 w1",
    "NumPy's text": np.str_("w0 w1"),
    "ids": [4, 5],
    "a tuple": (4, 5),
    "NumPy's numbers": [np.int64(4), np.uint8(5)],
    "an array": np.array([4, 5], np.uint16),
    "an array of JAX": jnp.array([4, 5]),
    "its numbers": list(jnp.array([4, 5])),
    "a range": range(4, 6),
}


@pytest.mark.parametrize("name", ONE_PROMPT)
def test_a_prompt_is_text_or_ids(words, name, monkeypatch):
    prompt = ONE_PROMPT[name]
    for given in (prompt, [prompt], (prompt,)):
        assert prompts_of(words, given, monkeypatch) == [[4, 5]]
        assert prompts_of(words, given, monkeypatch, fkv.stream) == [[4, 5]]
    several = [prompt, "w2", [7, 8, 9]]
    assert prompts_of(words, several, monkeypatch) == [[4, 5], [6], [7, 8, 9]]
    assert prompts_of(words, several[::-1], monkeypatch) == [[7, 8, 9], [6], [4, 5]]
    assert api.encode(words, prompt).tolist() == [4, 5]


def test_torch_s_ids_are_a_prompt(words, monkeypatch):
    torch = pytest.importorskip("torch")
    for given in (torch.tensor([4, 5]), torch.tensor([[4, 5]]), list(torch.tensor([4, 5]))):
        assert prompts_of(words, given, monkeypatch) == [[4, 5]]
    for given in (torch.tensor([4.0, 5.0]), torch.ones(2, requires_grad=True)):
        with pytest.raises(UserError, match="a prompt is text, a flat list"):
            fkv.generate(words, given, **SIZES)


def test_rows_of_an_array_are_prompts(words, monkeypatch):
    rows = np.array([[4, 5], [6, 7]])
    assert prompts_of(words, rows, monkeypatch) == rows.tolist()
    assert prompts_of(words, rows[:1], monkeypatch, fkv.stream) == [[4, 5]]
    assert prompts_of(words, np.array(["w0 w1", "w2"]), monkeypatch) == [[4, 5], [6]]
    with pytest.raises(UserError, match="stream takes one prompt, not 2: use generate"):
        next(fkv.stream(words, rows, **SIZES))


NO_PROMPT = {
    "None": (None, "the prompt is None, and a prompt is text, a flat list of"),
    "a number": (5, "the prompt is 5, and"),
    "NumPy's number": (np.int64(5), "and a prompt is"),
    "bytes": (b"w0", "the prompt is b'w0', and"),
    "a set": ({4, 5}, "the prompt is {4, 5}, and"),
    "a generator": ((x for x in [4]), "the prompt is <generator"),
    "a float": ([5.7], "prompt 0 is 5.7, and"),
    "whole floats": (np.array([4.0, 5.0]), "prompt 0 is 4.0, and"),
    "a float among ids": ([4, 5.7], "prompt 0 has an entry that is 5.7, and"),
    "not a number": ([[4, float("nan")]], "prompt 0 has an entry that is nan, and"),
    "truths": ([True, False], "prompt 0 is True, and"),
    "truths of NumPy": (np.array([True]), "prompt 0 is True, and"),
    "a truth among ids": ([4, True], "prompt 0 has an entry that is True, and"),
    "None among ids": ([4, None], "prompt 0 has an entry that is None, and"),
    "None among prompts": (["w0", None], "prompt 1 is None, and"),
    "text among ids": ([4, "w0"], "prompt 0 has an entry that is 'w0', and"),
    "ids among prompts": (["w0", 4], "prompt 1 is 4, and"),
    "too deep": ([[["w0"]]], r"prompt 0 has an entry that is \['w0'\], and"),
    "ids too deep": ([[[4]]], r"prompt 0 has an entry that is \[4\], and"),
    "an array too deep": (np.ones((1, 1, 2), int), r"prompt 0 has an entry that is \[1, 1\], and"),
    "a batch of texts in a batch": ([["w0", "w1"]], "prompt 0 has an entry that is 'w0', and"),
    "masked ids": (np.ma.array([4, 5], mask=[0, 1]), "the prompt is masked_array"),
    "nobody": ([], "no prompts given: a prompt is"),
    "no rows": (np.zeros((0, 3), int), "no prompts given"),
    "no text": ("", "prompt 0 is empty"),
    "no ids": (["w0", []], "prompt 1 is empty"),
    "white space": (" \n", "prompt 0 is empty"),
    "negative": ([4, -1], "prompt 0 has token -1, and the model's are 0 to 36"),
    "beyond": (["w0", [37]], "prompt 1 has token 37, and the model's are 0 to 36"),
    "beyond int32": ([2**40], "prompt 0 has token 1099511627776, and"),
    "beyond int64": ([2**70], "prompt 0 has token 1180591620717411303424, and"),
    "wraps around": ([2**32 + 4], "prompt 0 has token 4294967300, and"),
    "a message": ({"role": "user", "content": "w0"}, "a message in a list of messages"),
    "messages among ids": ([4, {"role": "user"}], "prompt 0 has an entry that is {'role': 'user'}"),
    "a tool's message": (
        [{"role": "tool", "content": "w0"}],
        r"prompt 0\[0\].role = 'tool' must be",
    ),
    "an empty message": ([[{"role": "user", "content": ""}]], "prompt 0 is empty: no message has"),
}


@pytest.mark.parametrize("name", NO_PROMPT)
def test_what_is_no_prompt_is_refused_in_one_line(words, name):
    prompt, says = NO_PROMPT[name]
    for call in (fkv.generate, lambda *args, **sizes: next(fkv.stream(*args, **sizes))):
        with pytest.raises(UserError, match=says) as caught:
            call(words, prompt, **SIZES)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        if inspect.isgenerator(prompt):
            break


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_message_is_no_prompt(words, text):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        fkv.generate(words, ["w0", text], chat=True, **SIZES)


def test_what_a_tokenizer_returns_is_no_prompt(words, monkeypatch):
    found = words.tokenizer(["w0 w1"])
    with pytest.raises(UserError, match=r"of what a tokenizer returns give \['input_ids'\]"):
        fkv.generate(words, found, **SIZES)
    assert prompts_of(words, found["input_ids"], monkeypatch) == [[4, 5]]


def changed(model, **fields):
    """The same with another config."""
    config = dataclasses.replace(model.config, **fields)
    return dataclasses.replace(model, lm=model.lm.replace(config=config))


def test_a_tokenizer_of_another_model_is_refused(words):
    small = changed(words, vocab_size=5)
    with pytest.raises(UserError, match="prompt 0 has token 5, and the model's are 0 to 4: "):
        fkv.generate(small, "w0 w1", **SIZES)


def test_more_tokens_than_the_model_was_made_for_are_warned_of_once(words, monkeypatch):
    short = changed(words, max_positions=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts_of(short, ["w0 " * 20, "w1"], monkeypatch)
    for call, prompts in ((fkv.generate, ["w0 " * 21, "w1 " * 25, "w2"]), (fkv.stream, "w0 " * 25)):
        with pytest.warns(
            UserWarning, match="new_tokens = 45 .* max_position_embeddings = 40"
        ) as w:
            prompts_of(short, prompts, monkeypatch, call)
        assert len(w) == 1 and "\n" not in str(w[0].message)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({}, 100),
        ({"rope_type": "linear", "factor": 2.0}, 200),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, 200),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20}, 100),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 20}, 100),
    ],
)
def test_scaled_positions_reach_further(words, scaling, positions):
    config = dataclasses.replace(
        words.config, max_positions=100, rope_scaling=tuple(sorted(scaling.items()))
    )
    assert config.beyond(positions, "a trace") == ""
    warning = config.beyond(positions + 1, "a trace")
    assert f"a trace = {positions + 1} tokens" in warning and "= 100" in warning
    assert (f"scaled to {positions}" in warning) == (positions > 100)


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
    for every, count in ((3, 7), (8, 3), (100, 3)):  # at most up to a border
        pieces = list(fkv.stream(free, "w3 w1 w4", "full", every=every, **SIZES))
        assert "".join(pieces) == fkv.generate(free, "w3 w1 w4", "full", **SIZES)[0][0].text
        assert len([x for x in pieces if x]) == count, every


def test_a_conversation_is_a_prompt(words, bare, monkeypatch):
    talk = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w1"},
        {"role": "user", "content": [{"type": "text", "text": "w4"}]},
    ]
    ids = [2, 7, 2, 5, 2, 8, 3]
    for call in (fkv.generate, fkv.stream):
        assert prompts_of(words, talk, monkeypatch, call) == [ids]
        assert prompts_of(words, [talk], monkeypatch, call) == [ids]
    assert prompts_of(words, [talk, "w0", talk[:1], [5]], monkeypatch) == [ids, [4], [2, 7, 3], [5]]
    assert prompts_of(words, [talk[:1], "w0"], monkeypatch, chat=True) == [[2, 7, 3], [2, 4, 3]]
    with pytest.warns(UserWarning, match="prompt 0: 1 of its 3 tokens are '<unk>'"):
        prompts_of(words, [{"role": "user", "content": "what"}], monkeypatch)
    with pytest.raises(UserError, match="has no tokenizer: give prompts as token ids"):
        fkv.generate(bare, talk, **SIZES)
    with pytest.raises(UserError, match="chat_template_kwargs: 'tokenize' is an argument"):
        fkv.generate(words, talk, chat_template_kwargs={"tokenize": True}, **SIZES)


def test_a_stop_string_ends_an_answer_and_is_not_shown(words):
    free = dataclasses.replace(words, stop=())
    [[whole]] = fkv.generate(free, "w3", **SIZES)
    assert whole.finish == "length" and whole.prompt_tokens == 1
    spoken = whole.text.split()
    stop = " ".join(spoken[8:10])  # of two tokens
    end = whole.text.index(stop)
    for given in (stop, [stop], ["no such text", stop, spoken[9] + " "]):
        [[x]] = fkv.generate(free, "w3", stop=given, **SIZES)
        assert x.text == whole.text[:end] and x.finish == "stop" and not x.truncated
        assert x.tokens.tolist() == whole.tokens[: len(x.tokens)].tolist()
        assert api.decode(words, x.tokens).endswith(stop)
        pieces = fkv.stream(free, "w3", stop=given, **SIZES)
        assert "".join(pieces) == x.text
    [[x]] = fkv.generate(free, "w3", stop="no such text", **SIZES)
    assert x.text == whole.text
    for given in ("", [""], [3], 3, None, b"w1", ["w1"] * 17, "x" * 1025):
        with pytest.raises(UserError, match="stop"):
            fkv.generate(words, "w3", stop=given, **SIZES)


def test_logprobs_are_those_of_the_model(words):
    [[plain]] = fkv.generate(words, "w3", "full", **SIZES)
    [[x]] = fkv.generate(words, "w3", "full", logprobs=True, top_logprobs=3, **SIZES)
    assert plain.logprobs is None is plain.top and x.tokens.tolist() == plain.tokens.tolist()
    ids, logprobs = x.top
    assert ids.shape == logprobs.shape == (len(x.tokens), 3)
    token = jnp.asarray([4 + 3, *x.tokens[:-1]])[None]
    lm = oracles.make_lm()
    replayed = replay(lm, Batch.of(token, jnp.array([token.shape[1]])), policies.get("full"),
                      Cadence(16, 8))[0]  # fmt: skip
    want = jax.nn.log_softmax(models.unembed(lm, replayed).astype(jnp.float32))[0]
    drawn = np.asarray(want)[np.arange(len(x.tokens)), x.tokens]
    np.testing.assert_allclose(x.logprobs, drawn, atol=1e-4)
    np.testing.assert_allclose(logprobs, -np.sort(-np.asarray(want))[:, :3], atol=1e-4)
    with pytest.raises(UserError, match="logprobs = 99 must be"):
        fkv.generate(words, "w3", top_logprobs=99, **SIZES)


def test_what_a_generation_says_of_its_cache(words):
    config = words.config
    entry, sums = 2 * config.head_dim * 4 + 4, 2 * config.group_size * 4
    for policy, slots, size in (
        ("snapkv", 16 + 8, entry), ("full", 30 + 20, entry), ("h2o", 16 + 8, entry + sums),
        ("ada", 2 * 16 + 8, entry),
    ):  # fmt: skip
        [[x]] = fkv.generate(dataclasses.replace(words, stop=()), "w1 w5 " * 15, policy, **SIZES)
        assert x.prompt_tokens == 30
        assert x.cache_bytes == config.layers * config.kv_heads * slots * size


def test_a_stream_never_cuts_a_character(tmp_path):
    # One token a byte: most random bytes are no whole character.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    save_tokenizer(tmp_path, tokenizer)
    config = dataclasses.replace(oracles.make_model()[0], vocab_size=256)
    model = api.Model(models.LM({}, config), texts.load_tokenizer(tmp_path), (), "bytes")
    text = "aé€𝄞" * 5
    tokens = api.encode(model, text)
    assert len(tokens) == 50 and api.decode(model, tokens) == text

    def streamed(tokens, size):
        with pytest.MonkeyPatch.context() as patch:
            fake.instead(patch, api, script=tokens)
            return list(fkv.stream(model, "a", new_tokens=len(tokens), every=size))

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
    with pytest.raises(UserError, match="'snapvk' is not known; choose from"):
        fkv.generate(words, "w1", "snapvk", **SIZES)
    for name, values in {
        "samples": (0, 1.0, "2", None, True, 10**9),
        "new_tokens": (0, 1.5, "4", None, True),
        "budget": (0, 16.0, "16", None),
        "interval": (0, 8.0, "8", None, True),
    }.items():
        for value in values:
            with pytest.raises(UserError, match=f"{name} = .* must be a whole number from 1 to"):
                fkv.generate(words, "w1", **SIZES | {name: value})
    with pytest.raises(UserError, match="new_tokens = None must be a whole number"):
        next(fkv.stream(words, "w1", **SIZES | {"new_tokens": None}))
    with pytest.raises(UserError, match="top_p = 2 must be a number above 0"):
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


def test_tab_shows_what_there_is_and_imports_nothing():
    assert {"load", "generate", "stream", "load_scorer"} < set(dir(fkv)) <= set(fkv.__all__)
    for name in dir(fkv):
        assert getattr(fkv, name) is not None
