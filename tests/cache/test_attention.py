import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv.cache import attention
from fkv.cache import slots as kv
from tests import oracles


def random_qkv(rng, b, t, h, k, d=8, gain=2.0):
    q = gain * rng.normal(size=(b, t, h, d))
    key, value = rng.normal(size=(2, b, t, k, d))
    return [x.astype(np.float32) for x in (q, key, value)]


def plain_log_sum_exp(q_td, k_td):
    x = q_td @ k_td.T / q_td.shape[-1] ** 0.5
    return np.array([np.log(np.exp(x[i, : i + 1]).sum()) for i in range(len(x))])


@pytest.mark.parametrize(
    ("t", "block", "h", "k"),
    [
        (40, 256, 4, 2),
        (40, 8, 4, 2),
        (41, 16, 2, 2),
        (41, 40, 4, 1),
        (7, 1, 2, 1),
        (1, 4, 2, 2),
        (90, 12, 4, 2),
        (90, 2, 2, 1),
    ],
)
def test_full_attention_is_plain_attention(t, block, h, k):
    q, key, value = random_qkv(np.random.default_rng(t), 3, t, h, k)
    lengths = [t, max(1, t - 5), max(1, t // 2)]
    position = np.where(np.arange(t)[None] < np.array(lengths)[:, None], np.arange(t)[None], -1)
    out, lse = jax.jit(attention.full_attention, static_argnums=4)(q, key, value, position, block)
    assert out.shape == q.shape and lse.shape == (3, k, h // k, t)
    assert np.isfinite(out).all() and np.isfinite(lse).all()  # padding too
    for row, length in enumerate(lengths):
        rows = [x[row, :length].astype(np.float64) for x in (q, key, value)]
        want, _ = oracles.full_attention(*rows)
        np.testing.assert_allclose(out[row, :length], want, atol=2e-6)
        for head in range(h):
            group, member = divmod(head, h // k)
            want = plain_log_sum_exp(rows[0][:, head], rows[1][:, group])
            np.testing.assert_allclose(lse[row, group, member, :length], want, atol=1e-5)


@pytest.mark.parametrize("summed", [False, True])  # as on a GPU, as on a TPU
@pytest.mark.parametrize(
    ("t", "queries", "keys", "dtype"),
    [(41, 8, 16, "float32"), (50, 16, 7, "float32"), (1, 1, 1, "float32"), (33, 5, 8, "bfloat16")],
)
def test_tiles_of_accelerators_are_plain_attention(t, queries, keys, dtype, summed):
    q, key, value = (
        jnp.asarray(x, dtype) for x in random_qkv(np.random.default_rng(t), 3, t, 4, 2)
    )
    ends, starts = (
        np.array([t, max(1, t - 5), t]),
        np.array([0, 0, t // 3]),
    )  # padding, left padding
    at = np.arange(t)[None] - starts[:, None]
    position = np.where((at >= 0) & (np.arange(t)[None] < ends[:, None]), at, -1)
    arrays = q, *(jnp.moveaxis(x, 1, 2) for x in (key, value)), position
    tiles = functools.partial(attention._in_tiles, queries, keys, summed)
    out, lse = jax.jit(tiles)(*arrays)
    arrays = *arrays[:3], attention.visible(position, position[:, None])
    want, want_lse = attention.attend(*arrays)
    assert out.dtype == dtype and np.isfinite(out.astype(jnp.float32)).all()
    # Weights of a bfloat16 product are summed as they are rounded for it.
    atol, rounded = (1e-6, 2e-6) if dtype == "float32" else (0.02, 4e-3)
    for got, got_lse in ((out, lse), attention._attend(summed, *arrays)):
        pair = (np.asarray(x, np.float32)[position >= 0] for x in (got, want))
        np.testing.assert_allclose(*pair, atol=atol)
        pair = (np.moveaxis(x, 3, 1)[position >= 0] for x in (got_lse, want_lse))
        np.testing.assert_allclose(*pair, atol=rounded if summed else 2e-6)


@pytest.mark.parametrize(("t", "empty"), [(12, 3), (70, 33)])
def test_full_attention_sees_left_padding_as_empty(t, empty):
    q, key, value = random_qkv(np.random.default_rng(0), 1, t, 2, 1)
    position = np.array([[-1] * empty + [*range(t - empty)]])
    out, _ = attention.full_attention(q, key, value, position, 4)
    rows = [x[0, empty:].astype(np.float64) for x in (q, key, value)]
    np.testing.assert_allclose(out[0, empty:], oracles.full_attention(*rows)[0], atol=2e-6)


def products(jaxpr):
    """Multiplications in the matrix products of a program, each time a loop runs."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in summed)
            total += inner * math.prod(eqn.outvars[0].aval.shape)
        inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(eqn.params.values()))]
        times = eqn.params.get("length", 1)
        total += times * max([products(x) for x in inner if hasattr(x, "eqns")], default=0)
    return total


def test_full_attention_skips_most_of_what_no_query_sees(monkeypatch):
    monkeypatch.setattr(attention, "_KEYS", 32)

    def of(t, block):
        q, key, value = random_qkv(np.random.default_rng(0), 1, t, 2, 1)
        position = jnp.arange(t)[None]
        attend = functools.partial(attention.full_attention, block=block)
        return products(jax.make_jaxpr(attend)(q, key, value, position).jaxpr)

    everything = of(512, 4 * 512)
    assert everything == 2 * (8 + 8 + 1) * 512**2  # a TPU's column of ones
    assert of(512, 16) < 0.6 * everything


def test_full_attention_is_exact_for_large_logits():
    # Logits of several hundreds overflow a softmax that does not subtract the largest.
    q, key, value = random_qkv(np.random.default_rng(0), 1, 24, 2, 1, gain=200.0)
    position = np.arange(24)[None]
    out, lse = attention.full_attention(q, key, value, position, 8)
    rows = [x[0].astype(np.float64) for x in (q, key, value)]
    np.testing.assert_allclose(out[0], oracles.full_attention(*rows)[0], atol=1e-3)
    want = plain_log_sum_exp(rows[0][:, 0], rows[1][:, 0])
    np.testing.assert_allclose(lse[0, 0, 0], want, rtol=1e-5)


def test_softmax_is_float32_for_bfloat16_caches():
    q, key, value = random_qkv(np.random.default_rng(0), 1, 64, 2, 1, gain=0.1)
    position = np.arange(64)[None]
    q, key, value = (jnp.asarray(x, jnp.bfloat16) for x in (q, key, value))
    out, lse = attention.full_attention(q, key, value, position)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    rows = [np.asarray(x[0], np.float64) for x in (q, key, value)]
    want = plain_log_sum_exp(rows[0][:, 1], rows[1][:, 0])
    np.testing.assert_allclose(lse[0, 0, 1], want, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(out[0], np.float64), oracles.full_attention(*rows)[0], atol=0.02
    )


@functools.partial(jax.jit, static_argnames="form")
def statistics(q, query_position, key, key_position, form):
    lse = attention.attend(q, key, key, attention.visible(query_position, key_position))[1]
    return attention.statistics(q, query_position, key, key_position, lse, form)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 5e-6), (jnp.bfloat16, 0.05)])
def test_int8_is_attended_to_as_the_numbers_it_stands_for(dtype, atol):
    q, key, value = random_qkv(np.random.default_rng(0), 2, 24, 4, 2)
    q = jnp.asarray(q, dtype)
    small = [kv.quantise(jnp.asarray(x)) for x in (key, 3 * value)]
    position = np.stack([np.arange(24), np.maximum(np.arange(24) - 5, -1)])
    attend = jax.jit(lambda *entries: attention.full_attention(*entries, position, 9))
    got, got_lse = attend(q, *small)
    want, want_lse = attend(q.astype(jnp.float32), *map(kv.dense, small))
    assert got.dtype == dtype and got_lse.dtype == jnp.float32
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=atol)
    np.testing.assert_allclose(got_lse, want_lse, atol=1e-5)


@pytest.mark.parametrize("form", ["windowed", "reference"])
@pytest.mark.parametrize(("budget", "interval"), [(144, 72), (12, 4)])
def test_statistics_are_those_of_the_definition(form, budget, interval):
    h, k, d, slots = 4, 2, 8, budget + interval
    rng = np.random.default_rng(budget)
    q, _, _ = random_qkv(rng, 3, interval, h, k)
    key = rng.normal(size=(3, k, slots, d)).astype(np.float32)
    start = 2 * slots  # of the newest L; the kept entries are scattered over what was before
    kept = [[rng.permutation(start)[:budget] for _ in range(k)] for _ in range(3)]
    newest = np.broadcast_to(np.arange(start, start + interval), (3, k, interval))
    position = np.concatenate([kept, newest], axis=-1)
    query_position = newest[:, 0].copy()
    position[1, :, ::5] = -1  # empty slots
    query_position[2, : interval // 2] = -1  # padding, as in front of a short prompt
    position[2, :, budget : budget + interval // 2] = -1
    got = statistics(q, query_position, key, position, form)

    for row, head in np.ndindex(3, k):
        slot = np.flatnonzero(position[row, head] >= 0)
        real = np.flatnonzero(query_position[row] >= 0)
        p = np.zeros((h // k, interval, slots))
        for g in range(h // k):
            p[g][np.ix_(real, slot)] = oracles.probabilities(
                q[row, real, head * (h // k) + g].astype(np.float64),
                key[row, head, slot].astype(np.float64),
                query_position[row, real],
                position[row, head, slot],
            )
        last = {n: p[:, -n:].sum(1) for n in (8, 16, 32)}
        if form == "reference":
            last = dict.fromkeys(last, p.sum(1))
        want = {
            "largest": p.max(1),
            "smallest": p[:, real].min(1),
            "total": p.sum(1),
            **{f"last_{n}": x for n, x in last.items()},
        }
        for name, x in want.items():
            ours = np.asarray(getattr(got, name))[row, head]
            np.testing.assert_allclose(ours.T[:, slot], x[:, slot], atol=2e-6, err_msg=name)
            assert (ours[position[row, head] < 0] == 0).all(), name


def test_statistics_are_causal_inside_the_window():
    q, key, _ = random_qkv(np.random.default_rng(0), 1, 4, 1, 1)
    position = np.arange(4)[None]
    got = statistics(q, position, np.moveaxis(key, 1, 2), position[:, None], "windowed")
    # Only the last query sees the last key, and the first key is all that the first query sees.
    assert got.total[0, 0, 3, 0] == got.largest[0, 0, 3, 0] < 1
    assert got.largest[0, 0, 0, 0] == 1
    assert got.smallest[0, 0, 1:].tolist() == [[0], [0], [0]]
