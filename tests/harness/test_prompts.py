"""Texts and settings of harnesses as tokens, by hand and beside lm-eval's own functions."""

import numpy as np
import pytest

from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.harness import prompts
from fkv.harness.asking import reading
from fkv.models import LM, ModelConfig
from fkv.models.named import Model
from tests.models.test_texts import IDS, make

CONFIG = ModelConfig("qwen3", 64, 16, 2, 2, 1, 8, 16)


def model(single="", **special):
    return Model(LM({}, CONFIG), make(None, single, **special), (IDS["</s>"],), "x")


@pytest.mark.parametrize(
    ("given", "limit", "temperature", "until"),
    [
        ({}, 7, 0, ()),
        ({"until": "a"}, 7, 0, ("a",)),
        ({"until": ["a", "", "b"], "max_gen_toks": 3}, 3, 0, ("a", "b")),
        ({"max_new_tokens": 5, "max_gen_toks": 4, "num_beams": 1}, 4, 0, ()),
        ({"do_sample": False, "temperature": 0.7}, 7, 0, ()),
        ({"do_sample": True, "temperature": 0.7}, 7, 0.7, ()),
        ({"temperature": 0.7}, 7, 0.7, ()),
        ({"do_sample": True}, 7, 0, ()),
        ({"max_tokens": None, "until": None}, 7, 0, ()),
    ],
)
def test_generation_settings_mean_what_they_do_in_lm_eval(given, limit, temperature, until):
    ends = prompts.ends(given, 7, "task x")
    assert ends == prompts.Ends(limit, Sampling(temperature), until)
    if "until" not in given:  # which it returns as it came
        utils = pytest.importorskip("lm_eval.models.utils")
        theirs = utils.normalize_gen_kwargs(given, 7)
        assert (theirs["max_gen_toks"], theirs.get("temperature", 0)) == (limit, temperature)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "the generation setting num_beams = 4 is not supported"),
        ({"best_of": 2}, "the generation setting best_of = 2 is not supported"),
        ({"until": 3}, "until = 3 must be text, or a list of texts"),
        ({"until": ["a", 3]}, r"until = \['a', 3\] must be text"),
        ({"max_gen_toks": 0}, "max_gen_toks = 0 must be a whole number from 1"),
        ({"max_gen_toks": "many"}, "max_gen_toks = 'many' must be a whole number from 1"),
        ({"temperature": -1}, "temperature = -1 must be a number"),
        ({"top_p": 2}, "top_p = 2 must be a number"),
        ({"temperature": "hot"}, "temperature = 'hot' must be a number"),
    ],
)
def test_generation_settings_that_are_refused(given, message):
    with pytest.raises(UserError, match=f"^task x: {message}"):
        prompts.ends(given, 7, "task x")


def test_a_prompt_leaves_room_for_its_answer():
    ends = prompts.Ends(3, Sampling(0.0), ("one", "</s>", "<eot>"))
    one = prompts.writing(model(), [8, 9, 10, 8, 9], ends, 7, "x")
    assert one.prompt.tolist() == [9, 10, 8, 9] and one.cut == 1
    assert one.until == ("one", "<eot>")  # what no text shows is a token
    assert one.stop == (IDS["</s>"],) * 2
    with pytest.raises(UserError, match=r"x: 3 new tokens leave no room .* max_length = 3"):
        prompts.writing(model(), [8], ends, 3, "x")
    with pytest.raises(UserError, match="x: the prompt is empty"):
        prompts.writing(model(), [], ends, 7, "x")


@pytest.mark.parametrize("single", ["", "<s> $A"])
@pytest.mark.parametrize(
    ("context", "continuation", "count"),
    [("one two", " six", 2), ("one two  ", "six", 2), ("<s> one", " two", 2), ("", "one", 1),
     (" \n", "one six", 1), ("", "<s> one", 1)],
)  # fmt: skip
def test_a_continuation_begins_where_its_context_ends(single, context, continuation, count):
    ids, at = prompts.pair(model(single), context, continuation)
    words = (context + continuation).split()
    bos = [] if words[0] == "<s>" or (not single and context.strip()) else [IDS["<s>"]]
    assert ids == [*bos, *(IDS[x] for x in words)]
    assert at == count + len(bos) * bool(context.strip())


def test_what_begins_a_text_without_context():
    assert prompts.prefix(model()) == IDS["<s>"]
    assert prompts.prefix(model(bos_token=None)) == IDS["</s>"]
    none = Model(LM({}, CONFIG), make(bos_token=None, eos_token=None), (), "x")
    with pytest.raises(UserError, match="model x: its tokenizer has no BOS and no EOS"):
        prompts.prefix(none)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 30])
def test_windows_are_lm_eval_s(most):
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(10, 18))
    theirs = utils.get_rolling_token_windows(tokens, 0, most, 1)
    theirs = [(a + b, len(a)) for a, b in map(utils.make_disjoint_window, theirs)]
    assert [(x.tolist(), n) for x, n in prompts.windows(tokens, 0, most)] == theirs
    assert list(prompts.windows([], 0, most)) == []


def test_a_likelihood_is_of_the_last_tokens():
    one = reading([1, 2, 3, 4, 5], 3, 3, "x")
    ((tokens, context),) = one.windows
    assert (tokens.tolist(), context, one.cut) == ([2, 3, 4, 5], 2, 1)
    assert tokens.dtype == np.int32
    with pytest.raises(UserError, match="x: the tokenizer makes no tokens of the continuation"):
        reading([1, 2], 2, 5, "x")
    with pytest.raises(UserError, match="x has a continuation of 3 tokens, and the model reads 2"):
        reading([1, 2, 3, 4], 1, 2, "x")
