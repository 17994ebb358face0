"""What differs by platform: one trace, of which each platform compiles its own part."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv.models import numerics

RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((3, 2, 4, 1, 8), (3, 2, 20, 8)))
SPEC = "bkgqd,bksd->bkgqs"
NARROW = [x.astype(jnp.bfloat16) for x in (X, Y)]
MANY = jnp.round(jnp.asarray(RNG.normal(size=(3, 1000)), jnp.float32), 1)  # ties, in many blocks
INTEGERS = (9 * Y).astype(jnp.int8)


def rows(x, y):
    return numerics.row_by_row(lambda x, y: {"sum": numerics.einsum_f32(SPEC, x, y).sum(3)}, x, y)


def groups(x, y):
    """Six heads a KV head."""

    def attend(q_bqhd, k_bksd):
        q = numerics.group_queries(q_bqhd, 2)
        product = jnp.einsum(SPEC, jnp.moveaxis(q, 1, 3), k_bksd)
        out = jnp.moveaxis(product[..., :8], 3, 1).reshape(q_bqhd.shape)
        return out, product.sum(-1)

    heads = jnp.concatenate([x, -2 * x, x + 1], axis=2)
    return numerics.whole_groups(attend, heads, y)


CASES = {
    "float32": (lambda x, y: numerics.einsum_f32(SPEC, x, y), X, Y),
    "bfloat16": (lambda x, y: numerics.einsum_f32(SPEC, x, y), *NARROW),
    "int8": (lambda x, y: numerics.einsum_int8(SPEC, x, y), X, INTEGERS),
    "heads": (lambda x, y: numerics.head_by_head(CASES["float32"][0], x, y), X, Y),
    "rows": (rows, X, Y),
    "most": (lambda x, y: numerics.top_k(x, 7), MANY, MANY),
    "log sums": (lambda x, y: numerics.log_sums_to_end(9 * x), X[:, :, :, 0], Y),
    "groups": (groups, X[:, :1, :, 0], Y),
    "few rows": (lambda x, y: numerics.linear("bthqd,ksd->bthqks", x, y), X, Y[0]),
}  # fmt: skip


def lines(traced, platform, word):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return [line for line in text.splitlines() if f"stablehlo.{word}" in line]


@pytest.mark.parametrize("name", CASES)
def test_platforms_give_the_same_whichever_way_they_go(name, monkeypatch):
    function, *inputs = CASES[name]
    here = jax.jit(function)(*inputs)
    compiled = jax.jit(function).lower(*inputs).compile().as_text()
    assert "conditional(" not in compiled
    looped = {name: len(lines(jax.jit(function).trace(*inputs), name, "while")) for name in LOOPS}
    assert looped == (LOOPS if name in ("int8", "rows") else dict.fromkeys(LOOPS, 0))

    def elsewhere(*x, cpu=None, cuda=None, tpu=None, default):
        return (tpu or cuda or default)(*x)

    monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)
    there = jax.jit(lambda *x: function(*x))(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), here, there)


LOOPS = {"cpu": 1, "cuda": 0, "tpu": 0}


def test_a_tpu_sums_without_a_window_of_the_whole_axis():
    """Of log-sum-exps, such a window takes its compiler minutes."""
    traced = jax.jit(CASES["log sums"][0]).trace(*CASES["log sums"][1:])
    assert not lines(traced, "tpu", "reduce_window")
    plain = jax.jit(lambda x: jax.lax.cumlogsumexp(x, axis=2)).trace(X[:, :, :, 0])
    assert lines(plain, "tpu", "reduce_window")


def test_only_a_cpu_casts_bfloat16():
    traced = jax.jit(CASES["bfloat16"][0]).trace(*NARROW)
    products = {name: lines(traced, name, "dot_general") for name in LOOPS}
    assert {name: "bf16" in x for name, [x] in products.items()} == {
        "cpu": False, "cuda": True, "tpu": True,
    }  # fmt: skip


@pytest.mark.parametrize("b, t, found", [(1, 1, 8), (3, 2, 8), (3, 3, 9), (7, 1, 8), (8, 1, 8)])
def test_a_tpu_multiplies_no_fewer_than_eight_rows(b, t, found):
    x, weight = jnp.zeros((b, t, 4)), jnp.zeros((4, 5))
    traced = jax.jit(lambda x, y: numerics.linear("btm,mf->btf", x, y)).trace(x, weight)
    for platform, rows in {"tpu": found, "cuda": b * t, "cpu": b * t}.items():
        [product] = lines(traced, platform, "dot_general")
        shape = re.search(r"-> tensor<([\dx]+)x5xf32>", product)[1]
        assert np.prod([int(n) for n in shape.split("x")]) == rows


@pytest.mark.parametrize("spec", ["btm,hdm->bthd", "btm,mf->btf", "bthd,hdm->btm", "bthd,mhd->btm"])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 1), (8, 4), (3, 11), (2, 17)])
def test_products_with_weights_are_those_of_einsum(spec, b, t):
    sizes = dict(b=b, t=t, m=24, h=3, d=8, f=40)
    x, weight = (
        jax.random.normal(jax.random.key(i), [sizes[letter] for letter in term])
        for i, term in enumerate(spec.partition("->")[0].split(","))
    )
    found = jax.jit(lambda x, y: numerics.linear(spec, x, y))(x, weight)
    want = np.einsum(spec, *(np.asarray(x, np.float64) for x in (x, weight)))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    narrow = [x.astype(jnp.bfloat16) for x in (x, weight)]
    found = jax.jit(lambda x, y: numerics.linear(spec, x, y, numerics.einsum_f32))(*narrow)
    want = np.einsum(spec, *(np.asarray(x, np.float64) for x in narrow))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("b", "t", "size"), [(2, 512, 512), (3, 300, 450), (1, 512, 0), (1, 521, 0)]
)
def test_a_cpu_takes_tokens_in_pieces(b, t, size, monkeypatch):
    monkeypatch.setattr(numerics, "_FITS", 0)
    x, y = jnp.arange(b * t * 4.0).reshape(b, t, 4), jnp.arange(1.0 * t).reshape(1, t)
    shapes = []

    def function(x, y):
        shapes.append(x.shape)
        return {"x": x * y[..., None], "y": x[..., 0] + y}

    traced = jax.jit(lambda x, y: numerics.in_pieces(function, x, y)).trace(x, y)
    assert {(1, size, 4), (b, t, 4)} - {(1, 0, 4)} == set(shapes)
    loops = {name: bool(lines(traced, name, "while")) for name in LOOPS}
    assert loops == {"cpu": size > 0, "cuda": False, "tpu": False}
    found = traced.lower().compile()(x, y)
    jax.tree.map(np.testing.assert_array_equal, found, function(x, y))


def test_the_largest_numbers_of_blocks_are_those_of_the_row(monkeypatch):
    at_most = jnp.where(RNG.random((3, 1000)) < 0.99, -jnp.inf, MANY)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cuda, default: cuda(*x))
    for x in (MANY, at_most, MANY[:, :897], jnp.zeros((2, 1024)), MANY.at[1, 999].set(9)):
        for found, want in zip(numerics.top_k(x, 7), jax.lax.top_k(x, 7), strict=True):
            np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("most, at_once", [(1, 1), (4, 3), (5, 3), (6, 6), (9, 6)])
def test_accelerators_take_as_many_rows_as_fit(most, at_once, monkeypatch):
    x, seen = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32), []

    def product(x, y):
        seen.append(len(x))
        return {"sum": jnp.sin(x) + y[:, None]}

    def run(x):
        return numerics.row_by_row(product, x, x[:, 0], row_bytes=2**26 // most)["sum"]

    loops = [len(lines(jax.jit(run).trace(x), name, "while")) for name in LOOPS]
    assert loops == [1, at_once < 6, at_once < 6]
    assert set(seen) == {1, at_once}
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x))
    np.testing.assert_array_equal(run(x), jnp.sin(x) + x[:, :1])


def test_rows_in_turn_have_gradients_and_go_through_other_loops():
    def loss(x):
        return (rows(x, Y)["sum"] ** 2).sum()

    def plain(x):
        return (numerics.einsum_f32(SPEC, x, Y).sum(3) ** 2).sum()

    want = jax.grad(plain)(X)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(X), want, rtol=1e-5, atol=1e-5)
    both = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([X, X]))
    np.testing.assert_allclose(both[1], want, rtol=1e-5, atol=1e-5)
    _, scanned = jax.jit(lambda x: jax.lax.scan(lambda c, x: (c, jax.grad(loss)(x)), 0, x))(X[None])
    np.testing.assert_allclose(scanned[0], want, rtol=1e-5, atol=1e-5)
