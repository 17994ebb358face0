"""Bodies of requests: what is read of good ones, and that bad ones are refused in one line."""

import json
import math

import numpy as np
import pytest

from fkv.engine.sampling import Sampling
from fkv.serve import protocol
from fkv.serve.protocol import Refused

DEFAULTS = Sampling(0.6, 20, 0.95)
TEXT = {"model": "m", "prompt": "one"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "one"}]}


def parse(body, chat=False):
    return protocol.parse(json.dumps(body).encode(), chat, DEFAULTS)


def test_what_a_request_says_and_what_it_leaves_open():
    asked = parse(TEXT | {"seed": 3})
    assert asked.prompts == ["one"] and asked.sampling == DEFAULTS and asked.limit is None
    assert (asked.n, asked.seed, asked.stop, asked.stream, asked.top) == (1, 3, (), False, 0)
    assert not asked.logprobs and not asked.usage and asked.session == ""
    more = {"temperature": 0, "top_p": 0.5, "top_k": -1, "n": 4, "max_tokens": 9, "stop": "x"}
    asked = parse(TEXT | more | {"logprobs": 0})
    assert asked.sampling == Sampling(0, 0, 0.5) and (asked.n, asked.limit) == (4, 9)
    assert asked.stop == ("x",) and asked.logprobs and asked.top == 0
    assert parse(TEXT | {"prompt": [1, 2]}).prompts == [[1, 2]]
    assert parse(TEXT | {"prompt": ["a", [1]]}).prompts == ["a", [1]]
    assert parse(TEXT).seed != parse(TEXT).seed
    chat = CHAT | {"logprobs": True, "top_logprobs": 2, "stream": True, "max_completion_tokens": 7,
                   "stream_options": {"include_usage": True}, "session": "me", "stop": ["a", "b"],
                   "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
    asked = parse(chat, chat=True)
    assert asked.prompts == [CHAT["messages"]] and (asked.top, asked.limit) == (2, 7)
    assert asked.usage and asked.stream and asked.session == "me" and asked.stop == ("a", "b")
    assert asked.template == {"enable_thinking": False}


def test_null_is_absent_and_what_changes_nothing_is_ignored():
    nothing = {name: None for name in (*protocol._COMMON, *protocol._NEUTRAL) if name != "model"}
    nothing |= {"user": "me", "store": True, "metadata": {"a": 1}, "service_tier": "auto"}
    nothing |= {
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "best_of": 1,
        "tools": [],
        "echo": False,
    }
    assert parse(TEXT | nothing | {"seed": 1}) == parse(TEXT | {"seed": 1})
    assert parse(TEXT | {"n": 3, "best_of": 3}).n == 3


BAD = {
    "model": (3, "", "x" * 257, ["m"], True),
    "prompt": (3, "", [], [[]], [1, "a"], [1.5], [True], {"a": 1}, [["a"]], [[1], 2]),
    "n": (0, -1, 129, 1.5, "2", True, 10**30),
    "stream": (1, "true"),
    "stream_options": ({"include_usage": True}, 3, {"x": True}),
    "stop": (3, "", [""], [3], ["a"] * 17, {"a": 1}, "x" * 1025),
    "seed": (-1, 2**32, 1.5, "1", True),
    "max_tokens": (0, -1, 1.5, "5", 2**40, True),
    "temperature": (-0.1, "1", True, False, [1], 1e-40, 1e30),
    "top_p": (0, 1.1, -1, "1"),
    "top_k": (-2, 1.5, "3", 2**40),
    "logprobs": (-1, 21, True, "1"),
    "session": (3, "", "x" * 257),
    "frequency_penalty": (0.5, "0", True, False),
    "logit_bias": ({"5": 3},),
    "best_of": (2, True),
    "echo": (True, 0),
    "suffix": ("x",),
    "repetition_penalty": (1.1,),
    "colour": (1,),
    "messages": (CHAT["messages"],),
}  # fmt: skip
BAD_CHAT = {
    "messages": (3, "one", [], [3], [{}], [{"role": "root", "content": "x"}], {"role": "user"}),
    "logprobs": (1, "true"),
    "top_logprobs": (21, -1, 2),  # without logprobs
    "max_completion_tokens": (0, "5"),
    "chat_template_kwargs": (3, {"tokenize": True}, {"enable_thinking": "no"},
                             {"enable_thinking": {"a": 1}}, {"chat_template": "{{ x }}"}),
    "tools": ([{"type": "function"}],),
    "response_format": ({"type": "json_object"},),
    "reasoning_effort": ("high",),
    "prompt": ("one",),
}  # fmt: skip


@pytest.mark.parametrize("chat", [False, True])
def test_bad_values_are_refused_by_the_field_s_name(chat):
    good, bad = (CHAT, BAD | BAD_CHAT) if chat else (TEXT, BAD)
    for name, values in bad.items():
        for value in values:
            if chat and name == "messages" and value is CHAT["messages"]:
                continue
            if name == "prompt" and value == "" and not chat:
                continue  # encoding tells
            with pytest.raises(Refused) as refused:
                parse(good | {name: value}, chat)
            error = refused.value
            assert error.status == 400 and name in error.message, (name, value, error.message)
            assert "\n" not in error.message and len(error.message) < 300
            assert error.param == name, (name, value, error.param)
    for name in good:
        with pytest.raises(Refused, match=f"{name} is missing"):
            parse({key: value for key, value in good.items() if key != name}, chat)


NO_JSON = [
    b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe{}", b'{"a": NaN}', b'{"a": Infinity}',
    b"[" * 100_000, b'{"a":' * 50_000, b'{"model": "m", "n": ' + b"9" * 5000 + b"}", b"\x00",
    b'{"a": 1} x', b"{'a': 1}", '{"a": "é'.encode("latin-1"), b'{"a" 1}',
]  # fmt: skip


@pytest.mark.parametrize("body", NO_JSON, ids=lambda x: str(x[:12]))
def test_what_is_no_json_object(body):
    with pytest.raises(Refused) as refused:
        protocol.parse(body, False, DEFAULTS)
    assert refused.value.status == 400 and refused.value.code == "invalid_json"
    assert "\n" not in refused.value.message and len(refused.value.message) < 300


def test_hundreds_of_hostile_values_never_fail_otherwise():
    """Whatever is where: a request is read, or refused."""
    rng = np.random.default_rng(0)
    deep = []
    for _ in range(200):
        deep = [deep]
    values = [
        None, True, False, 0, -1, 1, 2**31, 2**63, 10**300, -(10**300), 1.5, -0.0, 1e308, 5e-324,
        "", "x", "\ud800", "\x00", "x" * 10_000, "{{ 1 / 0 }}", "../../etc/passwd", "$(reboot)",
        [], [None], [[]], ["x"], [1], [-1], [2**70], [1, "x"], {}, {"role": "user"}, {"": {}}, deep,
        [{"role": "user", "content": "x"}], [{"role": "user", "content": ["x"]}],
        [{"role": ["user"], "content": {}}], {"include_usage": 1}, {"\ud800": 1},
    ]  # fmt: skip
    names = [*protocol._COMMON, *protocol._CHAT, *protocol._NEUTRAL, "prompt", "user", "\ud800", ""]
    read = refused = 0
    for _ in range(1500):
        chat = bool(rng.integers(2))
        body = dict(CHAT if chat else TEXT)
        for _ in range(rng.integers(1, 3)):
            body[names[rng.integers(len(names))]] = values[rng.integers(len(values))]
        try:
            asked = parse(body, chat)
        except Refused as error:
            assert "\n" not in error.message and len(error.message) < 400
            json.dumps(error.body())
            refused += 1
        else:
            assert asked.n >= 1 and math.isfinite(asked.sampling.temperature)
            read += 1
    assert read > 50 and refused > 500
