"""Digests of what results depend on: they change exactly when that does."""

import dataclasses
import importlib.util
import os
import struct
import sys
import textwrap

import flax.struct
import jax
import numpy as np
import pytest

from fkv import models, policies
from fkv.data import traces
from fkv.models import ModelConfig
from fkv.policies import base, scorer
from fkv.runs import provenance
from tests.policies import BY_NAME

MODEL = ModelConfig("qwen3", 29, 16, 2, 2, 1, 8, 16, qk_norm=True, tied_embeddings=True)


# ---- code

MINE = """
    import functools
    import flax.struct
    import jax
    import jax.numpy as jnp
    import numpy as np
    import {helpers}
    from {helpers} import scale
    from fkv.policies.base import Policy

    WEIGHT = 2.0
    TABLE = {{"a": [1, 2], "b": (3.0, {{4, 5}})}}
    ARRAY = np.array([1.5, 2.5])
    PART = functools.partial(max, 9)

    class Helper:
        def lift(self, x):
            return x + 6

    HELPER = Helper()

    def power_of(power):
        return lambda x: x**power

    CUBE = power_of(3)

    @jax.jit
    def compiled(x):
        return x * WEIGHT

    class Mixin:
        power = 1

        @property
        def twice(self):
            return 2 * self.power

    @flax.struct.dataclass
    class Mine(Mixin, Policy):
        \"\"\"Keeps what it likes.\"\"\"
        mix: float = 0.5

        def score(self, view):
            "Scores."
            key = view.key_bksd.astype(jnp.float32)
            more = ARRAY.sum() + PART(1) + HELPER.lift(2) + CUBE(2)
            return inner(key) + len(TABLE) + {helpers}.shift(key) + more

        def unused(self):
            return self.twice

    def inner(key):
        def within(x):
            "Inside."
            return compiled(x).sum(-1)
        return within(key) * scale(3)

    def nothing_to_do_with_it():
        return 1
"""
HELPERS = """
    LIMIT = 7

    def scale(x, by=2, *, least=0):
        return max(min(x * by, LIMIT), least)

    def shift(x):
        return 0

    def nobody_calls_this():
        return 1
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that imports these two texts as files, under names that are used once."""
    monkeypatch.syspath_prepend(tmp_path)
    count = iter(range(100))

    def write(mine=MINE, helpers=HELPERS):
        names = f"mine_{os.getpid()}", f"helpers_{os.getpid()}"
        for name, text in zip(names, (mine.replace("{helpers}", names[1]), helpers), strict=True):
            text = text.replace("{{", "{").replace("}}", "}")
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text) + "\n" * next(count))
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module(names[0]).Mine()

    yield write
    for name in [name for name in sys.modules if name.endswith(f"_{os.getpid()}")]:
        del sys.modules[name]


def test_code_counts_wherever_it_is_reached(written):
    first = provenance.of_policy(written())
    assert provenance.of_policy(written()) == first
    for old, new in {
        ".sum(-1)": ".sum(-2)",  # in a function within a function
        "x * WEIGHT": "x - WEIGHT",  # under jax.jit
        "WEIGHT = 2.0": "WEIGHT = 3.0",
        '"a": [1, 2]': '"a": [1, 3]',
        "{{4, 5}}": "{{4, 6}}",
        "power = 1": "power = 2",  # of a base class
        "2 * self.power": "3 * self.power",  # of a property
        "+ len(TABLE)": "- len(TABLE)",
        "scale(3)": "scale(4)",
        "mix: float = 0.5": "mix: float = 0.25",  # a setting
        "[1.5, 2.5]": "[1.5, 3.5]",
        "(max, 9)": "(max, 8)",
        "x + 6": "x + 7",  # of an object's class
        "power_of(3)": "power_of(4)",  # in a closure
    }.items():
        assert old in MINE
        assert provenance.of_policy(written(MINE.replace(old, new))) != first, new
    for old, new in {
        "by=2": "by=3",  # a default
        "least=0": "least=1",
        "LIMIT = 7": "LIMIT = 8",  # of another file
        "return 0": "return 1",  # by way of the module
    }.items():
        assert provenance.of_policy(written(helpers=HELPERS.replace(old, new))) != first, new


SMALL = """
    import enum
    import functools
    import jax
    import flax.struct
    import {helpers}
    from fkv.policies.base import Policy

    @flax.struct.dataclass
    class Mine(Policy):
        def score(self, view):
            return f(view)
"""
# What else f may be, and then: the code of a line or more, and what to put for what.
KINDS = {
    "names of arguments": ("def g(a, b): return a - b\ndef f(x): return g(a=1, b=2)",
                           "g(a, b): return a - b", "g(b, a): return b - a"),
    "a star": ("def g(a): return len(a)\ndef f(x): return g(x)", "g(a)", "g(*a)"),
    "a module used twice": ("def f(x): return {helpers}.scale(x) + z(x)\n"
                            "def z(x): return {helpers}.shift(x)", "return 0", "return 1"),
    "an import where it runs": ("def f(x):\n    from {helpers} import LIMIT as most\n"
                                "    return most", "LIMIT = 7", "LIMIT = 8"),
    "a decorator": ("def more(g):\n    @functools.wraps(g)\n    def within(x): return g(x) + 1\n"
                    "    return within\n@more\ndef f(x): return x", "+ 1", "+ 2"),
    "what a library makes": ("def g(x): return x\nf = jax.vmap(g, in_axes=0)", "=0", "=1"),
    "functions by type": ("@functools.singledispatch\ndef f(x): return 1\n@f.register\n"
                          "def _(x: int): return 2", "return 2", "return 3"),
    "a cached property": ("class S:\n    @functools.cached_property\n    def one(self): return 1\n"
                          "s = S()\ndef f(x): return s.one", "return 1", "return 2"),
    "an object with slots": ("class S:\n    __slots__ = ('k',)\n"
                             "    def __init__(self, k): self.k = k\n"
                             "s = S(1)\ndef f(x): return s.k", "S(1)", "S(2)"),
    "a kind of number": ("class N(int):\n    def half(self): return self / 2\n"
                         "n = N(1)\ndef f(x): return n.half()", "/ 2", "/ 3"),
    "its value": ("class N(int): pass\nn = N(1)\ndef f(x): return n", "N(1)", "N(2)"),
    "the order of a dict": ("D = dict(a=1, b=2)\ndef f(x): return list(D)[0]",
                            "a=1, b=2", "b=2, a=1"),
    "an enumeration": ("class E(enum.IntEnum):\n    A = 1\ndef f(x): return E.A", "A = 1", "A = 2"),
}  # fmt: skip


@pytest.mark.parametrize(("code", "old", "new"), KINDS.values(), ids=KINDS.keys())
def test_code_counts_of_whatever_kind_it_is(written, code, old, new):
    mine, helpers = textwrap.dedent(SMALL) + code, textwrap.dedent(HELPERS)
    if "import LIMIT" in code:
        mine = mine.replace("import {helpers}\n", "", 1)
    first = provenance.of_policy(written(mine, helpers))
    assert provenance.of_policy(written(mine, helpers)) == first
    place = mine if old in code else helpers
    assert old in place
    changed = place.replace(old, new)
    both = (changed, helpers) if place is mine else (mine, changed)
    assert provenance.of_policy(written(*both)) != first


def test_what_is_not_run_does_not_count(written):
    first = provenance.of_policy(written())
    for old, new in {
        "Keeps what it likes.": "Keeps everything that it likes.",
        '"Scores."': '"Scores keys."',
        '"Inside."': '"Within."',
        "def nothing_to_do_with_it():\n        return 1": "def nothing():\n        return 2",
        "key = view": "# for this reason\n            key = view",
    }.items():
        assert old in MINE
        assert provenance.of_policy(written(MINE.replace(old, new))) == first, new
    quiet = HELPERS.replace("this():\n        return 1", "this():\n        return 2")
    assert quiet != HELPERS and provenance.of_policy(written(helpers=quiet)) == first


def test_code_of_an_installed_policy_counts_inside_a_wrapper_too(written, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_LIBRARIES", (*provenance._LIBRARIES, str(tmp_path)))
    for wrapped in (lambda policy: policy, policies.Ada):
        first = provenance.of_policy(wrapped(written()))
        changed = MINE.replace(".sum(-1)", ".sum(-2)")
        assert provenance.of_policy(wrapped(written())) == first
        assert provenance.of_policy(wrapped(written(changed))) != first


def test_code_without_a_file():
    """As in a notebook, or in a config file, which is no module that could be imported again."""

    def made(by):
        source = f"""
import flax.struct
from fkv.policies.base import Policy

def helper(x):
    return x * {by}

@flax.struct.dataclass
class Mine(Policy):
    def score(self, view):
        return helper(view.key_bksd[..., 0])
"""
        scope = {"__name__": "__main__"}
        exec(source, scope)
        return scope["Mine"]()

    assert provenance.of_policy(made(2)) == provenance.of_policy(made(2))
    assert provenance.of_policy(made(2)) != provenance.of_policy(made(3))


def test_settings_and_class_of_a_policy():
    names = ("rkv", "rkv:mix=0.2", "snapkv", "ada", "pyramid", "h2o", "full", "random")
    settings = {provenance.of_settings(policies.get(name)) for name in names}
    code = {provenance.of_policy(policies.get(name)) for name in names}
    assert len(settings) == len(code) == len(names)
    scorers = (np.zeros(2), np.ones(2), np.ones((2, 1)), np.ones(2, np.float32))
    scorers = [policies.Foresight({"w1": x}, scorer.ScorerConfig()) for x in scorers]
    assert len({provenance.of_settings(policy) for policy in scorers}) == len(scorers)
    for name in ("full", *BY_NAME):
        one, two = policies.get(name), policies.get(name)
        assert provenance.of_policy(one) == provenance.of_policy(two), name


def test_our_own_policies_count_by_their_code_too(monkeypatch):
    """A policy of one's own may be one small file in `fkv/policies`."""
    before = {name: provenance.of_policy(policies.get(name)) for name in ("knorm", "h2o")}
    monkeypatch.setattr(policies.get("knorm").__class__, "score", lambda self, view: 1.0)
    assert provenance.of_policy(policies.get("knorm")) != before["knorm"]
    assert provenance.of_policy(policies.get("h2o")) == before["h2o"]
    monkeypatch.setattr(base.Policy, "evict", lambda self, view: None)
    assert provenance.of_policy(policies.get("h2o")) != before["h2o"]


# ---- weights and tokenizers


@pytest.fixture
def model(tmp_path):
    params = jax.device_get(models.init(jax.random.key(0), MODEL))
    models.save(tmp_path, models.LM(params, MODEL))
    return tmp_path


def flip(path, at):
    data = bytearray(path.read_bytes())
    stat = path.stat()
    data[at] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither size nor time tells


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in part"])
def test_weights(model, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(provenance, "WHOLE", 0)
        monkeypatch.setattr(provenance, "_BLOCK", 16)
    path = model / "model.safetensors"
    first = provenance.of_weights(model)
    assert provenance.of_weights(model) == first
    (model / "notes.txt").write_text("not of the model")
    assert provenance.of_weights(model) == first
    size = path.stat().st_size
    header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    for at in (header, size - 1):  # the first and the last byte of a tensor
        flip(path, at)
        assert provenance.of_weights(model) != first
        flip(path, at)
    assert provenance.of_weights(model) == first
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"I32"'))  # of a header
    assert provenance.of_weights(model) != first
    path.write_bytes(data)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("10000", "20000"))
    assert provenance.of_weights(model) != first


def test_a_large_file_is_read_in_part_but_every_tensor(model, monkeypatch):
    before = provenance.of_weights(model)
    monkeypatch.setattr(provenance, "WHOLE", 0)
    assert provenance.of_weights(model) != before  # never taken for one another
    first = provenance.of_weights(model)
    lm = jax.device_get(models.load(model))
    for name, x in lm.params["layers"].items():
        layers = {**lm.params["layers"], name: x * np.float32(1.01)}
        models.save(model, lm.replace(params={**lm.params, "layers": layers}))
        assert provenance.of_weights(model) != first, name
    models.save(model, lm)
    assert provenance.of_weights(model) == first


def test_scorers():
    of = provenance.of_arrays
    first = of({"w1": np.zeros(2), "w2": np.ones(2)})
    assert of({"w2": np.ones(2), "w1": np.zeros(2)}) == first
    assert of({"w1": np.zeros(2), "w2": np.zeros(2)}) != first
    assert of({"w1": np.ones(2), "w2": np.ones(2)}) != first


def test_tokenizers(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    first = provenance.of_tokenizer(tmp_path)
    (tmp_path / "README.md").write_text("a model")
    assert provenance.of_tokenizer(tmp_path) == first
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
        assert provenance.of_tokenizer(tmp_path) != first, name
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert provenance.of_tokenizer(tmp_path) != first


# ---- traces and questions


def test_traces():
    rows = [np.arange(n, dtype=np.int32) for n in (20, 30)]
    find = lambda rows, prompts=None, **more: provenance.of_traces(  # noqa: E731
        traces.collect(rows, 8, 8, "here", prompts, **more)
    )
    first = find(rows, [2, 3])
    assert find(rows, [2, 3], buckets=2) == first
    found = traces.collect(rows, 8, 8, "here", [2, 3])
    wider = dataclasses.replace(found, token_nt=np.pad(found.token_nt, ((0, 0), (0, 8))))
    assert provenance.of_traces(wider) == first
    assert find([*rows, np.arange(4, dtype=np.int32)], [2, 3, 1]) == first  # too short to count
    assert find(rows, [2, 4]) != first
    assert find(rows[::-1], [3, 2]) != first
    assert find([rows[0], rows[1][:-1]], [2, 3]) != first
    assert find([rows[0], rows[1] + 1], [2, 3]) != first


def test_questions():
    one = (np.array([1, 2]), "a", "5", None)
    (first,) = provenance.of_questions([one])
    assert provenance.of_questions([one, (np.array([3]), "b", "5", None)])[0] == first
    for other in (
        (np.array([1, 3]), "a", "5", None),
        (np.array([1, 2]), "b", "5", None),
        (np.array([1, 2]), "a", "6", None),
        (np.array([1, 2]), "a", "5", np.array([7])),
    ):
        assert provenance.of_questions([other]) != [first]


def test_a_policy_registered_beside_it_is_none_of_a_policy_s_business(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    before = provenance.of_policy(policies.get("knorm")), provenance.of_policy(policies.get("rkv"))

    @policies.register("beside")
    @flax.struct.dataclass
    class Beside(policies.Policy):
        pass

    assert before == (
        provenance.of_policy(policies.get("knorm")), provenance.of_policy(policies.get("rkv")),
    )  # fmt: skip
