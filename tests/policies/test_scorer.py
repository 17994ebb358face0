import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv.cache import attention
from fkv.errors import UserError
from fkv.models import rotate
from fkv.policies import scorer
from tests import oracles
from tests.policies.test_policies import random_view, state_of

DIM = 8
BUDGET, INTERVAL = 80, 40  # more queries than the longest window


# Compiled whole: one operation after another, that takes many times as long.
features_fn = jax.jit(scorer.features, static_argnums=0)


@functools.partial(jax.jit, static_argnames="form")
def statistics_of(view, form):
    query, position, cache = view.query_blhd, view.query_position_bl, view.cache
    seen = attention.visible(position, cache.position_bks)
    lse = attention.attend(query, cache.key_bksd, cache.value_bksd, seen)[1]
    return attention.statistics(query, position, cache.key_bksd, cache.position_bks, lse, form)


def view_of(form="windowed", heads=4, kv_heads=2, rows=2, empty=0):
    view = random_view(1, rows, BUDGET, INTERVAL, heads, kv_heads, empty)
    return view.replace(statistics=statistics_of(view, form))


def by_position(view, row, head, feature_bknf):
    """Features of one group in the order of positions, as the oracles have them."""
    position = np.asarray(view.cache.position_bks[row, head, :BUDGET])
    order = np.argsort(position)[(position < 0).sum() :]
    return np.asarray(feature_bknf)[row, head][order]


@pytest.mark.parametrize("inputs", ["both", "attention", "kv"])
@pytest.mark.parametrize(("form", "kv_heads"), [("windowed", 2), ("reference", 1)])
def test_features_are_their_definition(form, kv_heads, inputs):
    view = view_of(form, kv_heads=kv_heads)
    model, _ = oracles.make_model(heads=4, kv_heads=kv_heads)
    config = scorer.ScorerConfig(inputs=inputs, form=form)
    assert config.statistics == (None if inputs == "kv" else form)
    if config.statistics is None:  # what was not asked for is not looked at
        view = view.replace(statistics=None)
    feature = features_fn(config, view)
    group = 4 // kv_heads
    size = {"both": 2 * DIM + 8 * group, "attention": 8 * group, "kv": 2 * DIM}[inputs]
    assert feature.shape == (2, kv_heads, BUDGET, size) and feature.dtype == jnp.float32
    assert scorer.feature_size(model, config) == size
    columns = {"both": slice(None), "attention": slice(2 * DIM, None), "kv": slice(2 * DIM)}[inputs]
    for row, head in np.ndindex(2, kv_heads):
        want = oracles.features(state_of(view, row, head), BUDGET, form)[:, columns]
        got = by_position(view, row, head, feature)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-10)  # minima are tiny


def expected_logits(view, row, head, horizon):
    """Of each head of a group [g, n]: mean and half the variance over the queries of the logits."""
    state, config = state_of(view, row, head), view.config
    ahead = state.query_positions.max() + 1 + np.arange(horizon)

    def turned(x_d, positions, sign=1):  # the mean rotation
        inv, _ = config.inv_frequencies()
        angle = sign * np.asarray(positions, float)[:, None] * np.asarray(inv)[None]
        cos, sin = np.cos(angle).mean(0), np.sin(angle).mean(0)
        low, high = np.split(x_d, 2)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin])

    found = []
    for g in range(state.queries.shape[1]):
        queries = [
            turned(turned(q, [p], -1), ahead)
            for q, p in zip(state.queries[:, g], state.query_positions, strict=True)
        ]
        logits = np.stack(queries) @ state.keys.T / DIM**0.5
        found.append(logits.mean(0) + logits.var(0) / 2)
    return np.stack(found)


@pytest.mark.parametrize("empty", [0, 33])
def test_parts_are_their_definition(empty):
    view, number = view_of(empty=empty), BUDGET - empty
    parts = ["content", "log_attention", "expected", "age"]
    config = scorer.ScorerConfig(inputs="+".join(parts))
    feature = features_fn(config, view)
    sizes = [DIM, 16, 2 * len(scorer.HORIZONS), 3]
    model, _ = oracles.make_model(heads=4, kv_heads=2)
    assert feature.shape[-1] == scorer.feature_size(model, config) == sum(sizes)

    def standardised(blocks):
        return np.concatenate([(x - x.mean()) / np.sqrt(x.var() + 1e-6) for x in blocks], axis=1)

    for row, head in np.ndindex(2, 2):
        state = state_of(view, row, head)
        got = by_position(view, row, head, feature)
        content, logs, expected, age = np.split(got, np.cumsum(sizes)[:-1], axis=1)
        position = state.positions[:number]
        again = rotate(content[None, :, None], jnp.asarray(position)[None], view.config)
        np.testing.assert_allclose(again[0, :, 0], state.keys[:number], atol=1e-5)
        attention = np.log(oracles.features(state, number)[:, 2 * DIM :] + 1e-5)
        want = standardised(np.split(attention, 8, axis=1))
        np.testing.assert_allclose(logs, want, rtol=1e-3, atol=1e-4)
        logits = [expected_logits(view, row, head, n)[:, :number].T for n in scorer.HORIZONS]
        np.testing.assert_allclose(expected, standardised(logits), rtol=1e-3, atol=1e-4)
        newest = state.query_positions.max()
        logs = [np.log1p(newest - position) / 4, np.log1p(position) / 4, 4 / (4 + position)]
        np.testing.assert_allclose(age, np.stack(logs, axis=1), rtol=1e-5)


def test_parts_come_in_the_order_given_and_statistics_only_where_asked_for():
    view = view_of()
    one, other = (
        features_fn(scorer.ScorerConfig(inputs=inputs, norm="rms"), view)
        for inputs in ("age+value", "value+age")
    )
    np.testing.assert_array_equal(one[..., 3:], other[..., :DIM])
    np.testing.assert_array_equal(one[..., :3], other[..., DIM:])
    both = scorer.ScorerConfig(inputs="key+value+attention", norm="rms")
    same = features_fn(dataclasses.replace(both, inputs="both"), view)
    np.testing.assert_array_equal(features_fn(both, view), same)
    assert both.statistics == "windowed"
    assert scorer.ScorerConfig(inputs="content+expected+age").statistics is None


@pytest.mark.parametrize("inputs", ["", "+", "key+key", "key+", "Key", "both+age", "key + value"])
def test_refuses_other_inputs(inputs):
    with pytest.raises(
        UserError, match=r"^scorer.inputs = .* must be one of both, attention, kv, "
    ):
        scorer.ScorerConfig(inputs=inputs)


def test_the_windows_differ_and_the_reference_has_none():
    def windows(form):
        config = scorer.ScorerConfig(inputs="attention", form=form)
        feature = features_fn(config, view_of(form))
        return [feature[..., 2 * i : 2 * i + 2] for i in (2, 3, 4, 5)]  # all, 16, 8, 32

    total, last_16, last_8, last_32 = windows("windowed")
    assert (last_8 < last_16).all() and (last_16 < last_32).all() and (last_32 < total).all()
    for x in windows("reference"):
        np.testing.assert_array_equal(x, total)


@pytest.mark.parametrize("empty", [0, 33])
def test_rms_norm_divides_each_part_by_its_rms_over_the_candidates(empty):
    """Empty slots, which hold keys of padding or of what was dropped, are none."""
    view = view_of(empty=empty)
    feature = features_fn(scorer.ScorerConfig(norm="rms"), view)
    for row, head in np.ndindex(2, 2):
        x = oracles.features(state_of(view, row, head), BUDGET - empty)
        parts = np.split(x, [DIM, 2 * DIM, *range(18, 32, 2)], axis=1)
        want = np.concatenate([x / np.sqrt((x**2).mean()) for x in parts], axis=1)
        got = by_position(view, row, head, feature)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_rms_norm_leaves_zeros():
    view = view_of()
    zeros = jax.tree.map(jnp.zeros_like, view.statistics)
    feature = scorer.features(
        scorer.ScorerConfig(inputs="attention", norm="rms"), view.replace(statistics=zeros)
    )
    assert (feature[..., :12] == 0).all() and jnp.isfinite(feature).all()


def test_features_of_half_precision_caches_are_float32():
    view = view_of()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), view.cache.key_bksd)
    view = view.replace(cache=view.cache.replace(key_bksd=half))
    for norm in scorer.NORMS:
        feature = features_fn(scorer.ScorerConfig(inputs="kv", norm=norm), view)
        assert feature.dtype == jnp.float32
    rms = jnp.sqrt((feature[..., :DIM] ** 2).mean((-2, -1)))
    np.testing.assert_allclose(rms, 1, rtol=1e-6)  # half precision would miss by 1e-3


@pytest.mark.parametrize("hidden", [16, 5])
def test_apply_is_the_mlp_with_exact_gelu(hidden):
    layers, kv_heads, size = 3, 2, 24
    rng = np.random.default_rng(0)
    shapes = {"w1": (size, hidden), "b1": (hidden,), "w2": (hidden,), "b2": ()}
    params = {
        name: rng.normal(size=(layers, kv_heads, *shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    params["w1"] /= size**0.5  # where the approximate GELU is wrong by 1e-3
    feature = rng.normal(size=(2, kv_heads, 20, size)).astype(np.float32)
    config = scorer.ScorerConfig(hidden=hidden)
    for layer in range(layers):
        own = {name: x[layer] for name, x in params.items()}
        importance = scorer.apply(config, own, feature)
        assert importance.shape == (2, kv_heads, 20) and importance.dtype == jnp.float32
        for row, head in np.ndindex(2, kv_heads):
            want = oracles.mlp(params, layer, head, feature[row, head])
            np.testing.assert_allclose(importance[row, head], want, atol=1e-5)


@pytest.mark.parametrize(("inputs", "size"), [("both", 32), ("attention", 16), ("kv", 16)])
def test_init(inputs, size):
    model, _ = oracles.make_model(heads=4, kv_heads=2, layers=3)
    config = scorer.ScorerConfig(hidden=64, inputs=inputs)
    params = scorer.init(jax.random.key(0), model, config)
    assert {name: (x.shape, x.dtype) for name, x in params.items()} == {
        "w1": ((3, 2, size, 64), jnp.float32),
        "b1": ((3, 2, 64), jnp.float32),
        "w2": ((3, 2, 64), jnp.float32),
        "b2": ((3, 2), jnp.float32),
    }
    assert not params["b1"].any() and not params["b2"].any()
    np.testing.assert_allclose(params["w1"].std((-2, -1)) * size**0.5, 1, atol=0.15)
    np.testing.assert_allclose(params["w2"].std() * 64**0.5, 1, atol=0.2)
    # Every layer and head starts elsewhere, and so does every key.
    assert len(np.unique(params["w1"])) > 0.99 * params["w1"].size
    again, other = (scorer.init(jax.random.key(i), model, config) for i in (0, 1))
    np.testing.assert_array_equal(again["w1"], params["w1"])
    assert (other["w1"] != params["w1"]).any()


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("inputs", "both, attention, kv, or some of .* joined by .+"),
        ("norm", "none, rms"),
        ("form", "windowed, reference"),
    ],
)
def test_refuses_unknown_settings(field, known):
    with pytest.raises(UserError, match=f"^scorer.{field} = 'all' must be one of {known}$"):
        scorer.ScorerConfig(**{field: "all"})


def test_refuses_the_reference_form_for_large_groups():
    # The released code's windows are slices of the head axis: the same sums up to 8 heads only.
    config = scorer.ScorerConfig(form="reference")

    def shapes(config, view):
        return jax.eval_shape(functools.partial(scorer.features, config), view)

    shapes(config, view_of("reference", 8, 1))
    with pytest.raises(UserError, match="at most 8 query heads per group"):
        shapes(config, view_of("reference", 9, 1))
    shapes(scorer.ScorerConfig(), view_of("windowed", 9, 1))
