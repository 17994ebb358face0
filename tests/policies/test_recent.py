"""Policies with weights or draws of their own against their definitions, in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.errors import UserError
from fkv.policies.arrival import Arrival
from tests import oracles
from tests.policies import WEIGHTED, weighted
from tests.policies.test_policies import DIM, SIZES, random_view, state_of

CONFIG, _ = oracles.make_model()
LM = oracles.make_lm()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def arrival(seed=0):
    rng = np.random.default_rng(seed)
    c, b, t = CONFIG, 2, 5
    hidden, normed = rng.normal(size=(2, b, t, c.width))
    query = rng.normal(size=(b, t, c.heads, c.head_dim))
    key, value = rng.normal(size=(2, b, t, c.kv_heads, c.head_dim))
    arrays = (jnp.asarray(x, jnp.float32) for x in (hidden, normed, query, key, value))
    return Arrival(*arrays, jnp.arange(b * t).reshape(b, t), 1, CONFIG)


def sliced(policy):
    """The arrays of layer 1, as the engine passes them, and in float64."""
    one = jax.tree.map(lambda x: x[1], policy)
    return one, {name: np.asarray(x, np.float64) for name, x in one.params.items()}


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize("name", ["kvzap", "kvzap, linear"])
def test_kvzap_scores_normed_hidden_states_when_they_come(name):
    """As `KVzapModel` of kvpress: `nn.Linear`, or `nn.Linear`, `nn.GELU`, `nn.Linear`."""
    policy, w = sliced(weighted(name, CONFIG))
    come = arrival()
    x = np.asarray(come.normed_btm, np.float64) @ w["w1"] + w["b1"]
    want = gelu(x) @ w["w2"] + w["b2"] if "w2" in w else x
    np.testing.assert_allclose(policy.arrive(come)["score"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["rg", "rg2", "rg3"])
def test_trimkv_gates(form):
    """As `RetentionGate`, `RetentionGate2` and `RetentionGate3` of the released code."""
    policy, w = sliced(weighted("trimkv" + f", {form}" * (form != "rg"), CONFIG))
    come = arrival()
    x = np.asarray(come.normed_btm, np.float64)
    if form != "rg":
        x = np.zeros((2, 5, 2, 16))
        for b, t, k in np.ndindex(2, 5, 2):
            angle = int(come.position_bt[b, t]) * CONFIG.inv_frequencies()[0]
            low, high = np.split(np.asarray(come.key_btkd[b, t, k], np.float64), 2)
            z = (low + 1j * high) * np.exp(1j * angle)
            x[b, t, k] = np.concatenate([z.real, z.imag, come.value_btkd[b, t, k]])
        x = x.reshape(2, 5, -1)
    if form == "rg3":
        gate = x @ w["gate"]
        x = gate * sigmoid(gate) * (x @ w["up"]) @ w["down"]
    else:
        x = x @ w["w1"] + w["b1"]
        x = x * sigmoid(x) @ w["w2"]
    want = np.log(sigmoid(x + w["b2"]))
    np.testing.assert_allclose(policy.arrive(come)["log_beta"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("knorm", [False, True])
def test_trimkv_forgets_exponentially(knorm):
    view = random_view(3, 2, *SIZES[0])
    policy, _ = sliced(weighted("trimkv", CONFIG))
    policy = policy.replace(knorm=knorm)
    position = np.asarray(view.cache.position_bks)
    seen = int(view.query_position_bl.max()) + 1
    beta = np.exp(np.asarray(view.arrived["log_beta"], np.float64))
    want = beta ** (seen + 1 - position)
    if knorm:
        want *= np.linalg.norm(np.asarray(view.key_bksd, np.float64), axis=-1)
    np.testing.assert_allclose(np.exp(policy.score(view)), want, rtol=1e-4)
    # The newest go like all others, unless a window is protected.
    importance = np.asarray(policy.importance(view))
    assert np.isfinite(importance).all()
    importance = np.asarray(policy.replace(window=3).importance(view))
    assert (np.isposinf(importance).sum(-1) == 3).all() and np.isposinf(importance[..., -3:]).all()


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[2], SIZES[3]])
def test_triattention_by_its_series(sizes, yarn):
    """As `score_keys_for_round` of the released code, with scores standardised per query head."""
    _, _, h, kv_heads, _ = sizes
    config, _ = oracles.make_model(heads=h, kv_heads=kv_heads)
    if yarn:
        scaling = (("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 64))
        config = dataclasses.replace(config, rope_scaling=scaling)
    policy, w = sliced(weighted("triattention", config))
    policy = policy.replace(reach=100)
    view = random_view(3, 2, *sizes).replace(config=config)
    omega, scale = config.inv_frequencies()
    unrotated = np.asarray(view.unrotated_key_bksd, np.float64)
    got, group = np.asarray(policy.score(view)), h // kv_heads
    position = np.asarray(view.cache.position_bks)
    seen = int(view.query_position_bl.max()) + 1

    def pairs(x):
        return x[..., : DIM // 2] + 1j * x[..., DIM // 2 :]

    for row, head in np.ndindex(2, kv_heads):
        held = position[row, head] >= 0
        best = np.full(held.sum(), -np.inf)
        for g in range(head * group, (head + 1) * group):
            q, score = pairs(w["mean"][g]), []
            for key, at in zip(unrotated[row, head, held], position[row, head, held], strict=True):
                k, series = pairs(key), []
                for offset in (1, 2, 4, 8, 16, 32, 64):
                    phase = (seen - at + offset) * omega + np.angle(q * np.conj(k))
                    series.append((abs(q) * abs(k) * np.cos(phase)).sum())
                extra = ((w["norm"][g] - abs(q)) * abs(k)).sum()
                score.append(scale**2 * (np.mean(series) + extra))
            score = np.array(score)
            best = np.maximum(best, (score - score.mean()) / score.std())
        np.testing.assert_allclose(got[row, head, held], best, rtol=2e-3, atol=2e-3)


def test_triattention_leaves_protected_prompts_out_of_its_scale():
    view = random_view(3, 2, *SIZES[0]).replace(prompt_b=jnp.array([20, 0]))
    policy, _ = sliced(weighted("triattention", CONFIG))
    plain = np.asarray(policy.score(view))
    kept = np.asarray(policy.score(view.replace(protect_prompt=20)))
    assert (plain[1] == kept[1]).all() and not np.allclose(plain[0], kept[0])


@pytest.mark.parametrize("sizes", SIZES)
def test_vase_keeps_large_values_and_draws_the_rest(sizes):
    budget, interval, _h, kv_heads, empty = sizes
    policy, view = policies.get("vase:large=0.25,kernel=3,sinks=2"), random_view(3, 3, *sizes)
    position = np.asarray(view.cache.position_bks)
    evict = np.asarray(policy.evict(view))
    slots = budget + interval
    for row, head in np.ndindex(3, kv_heads):
        state = state_of(view, row, head)
        n = budget - empty
        at, value = state.positions[:n], state.values[:n]
        order = sorted(range(n), key=lambda i: (at[i] >= 2, np.ptp(-value[i])), reverse=False)
        sinks = [i for i in order if at[i] < 2]
        others = sorted(set(range(n)) - set(sinks), key=lambda i: -np.ptp(value[i]))
        large = {int(at[i]) for i in (sinks + others)[: round(budget / 4)]}
        dropped = position[row, head][evict[row, head]]
        assert not large & set(dropped.tolist())
        x = np.einsum("qgd,nd->gqn", state.queries, state.keys[:n]) / DIM**0.5
        p = np.pad(oracles.softmax(x).mean((0, 1)), 1)
        pooled = (p[:-2] + p[1:-1] + p[2:]) / 3
        gumbel = np.asarray(jax.random.gumbel(view.random_b[row], (kv_heads, slots)))[head]
        slot_of = {p: s for s, p in enumerate(position[row, head].tolist())}
        drawn = np.log(pooled) + [gumbel[slot_of[int(p)]] for p in at]
        rest = [i for i in range(n) if int(at[i]) not in large]
        assert (dropped[:empty] == -1).all()
        assert oracles.is_lowest(dropped[empty:], at[rest], drawn[rest], tie=1e-4)


def test_vase_draws_in_proportion_to_attention():
    """Gumbel top-k is sampling without replacement: the likeliest stay more often."""
    view = random_view(5, 1, 24, 4, 4, 2, 0)
    policy = policies.get("vase:large=0,sinks=0,kernel=1")
    keys = jax.random.split(jax.random.key(0), 3000)
    slots = np.asarray(
        jax.jit(jax.vmap(lambda key: policy.evict(view.replace(random_b=key[None]))))(keys)
    )[:, 0]
    for head in range(2):
        state = state_of(view, 0, head)
        x = np.einsum("qgd,nd->gqn", state.queries, state.keys[:24]) / DIM**0.5
        p = oracles.softmax(x).mean((0, 1))
        position = np.asarray(view.cache.position_bks)[0, head]
        count = np.bincount(position[slots[:, head]].ravel(), minlength=100)[state.positions[:24]]
        assert count[np.argsort(p)[:6]].mean() > 3 * count[np.argsort(p)[-6:]].mean()


def test_vase_dkv_by_its_projections():
    view, policy = random_view(3, 3, *SIZES[0]), policies.get("vase_dkv:rank=3,sinks=2")
    got, position = np.asarray(policy.score(view)), np.asarray(view.cache.position_bks)
    for row, head in np.ndindex(3, 2):
        g = np.asarray(jax.random.normal(view.random_b[row], (DIM, 3)), np.float64) / 3**0.5
        key, value = (
            np.asarray(x[row, head], np.float64) for x in (view.key_bksd, view.value_bksd)
        )
        want = ((key @ g) ** 2).sum(1) * ((value @ g) ** 2).sum(1)
        want[position[row, head] < 2] = np.inf
        np.testing.assert_allclose(got[row, head], want, rtol=1e-4)


class Given(policies.Policy):
    """Scores by the last digit of the position; of equal ones, the newer is more important."""

    def score(self, view):
        position = view.cache.position_bks
        return (position % 10 + position / 1000).astype(jnp.float32)


@pytest.mark.parametrize("room", [1.0, 2.0])
def test_what_passes_a_threshold_stays(room):
    policy = policies.Threshold(Given(), at=7.0, room=room)
    batch, cadence = oracles.make_batch(CONFIG, [70, 40]), Cadence(8, 4)

    def held(acc, policy, view, evict):
        return acc, view.cache.position_bks

    found = jax.jit(lambda lm, batch: replay.replay(lm, batch, policy, cadence, None, held)[2])
    position = np.asarray(found(LM, batch))  # before each eviction
    alive = set()
    for event in range(16):
        come = set(range(4 * event, 4 * event + 4))
        alive = alive | come  # what was kept, and the newest
        for head in range(2):
            at = position[0, event, 0, head]
            assert {int(p) for p in at if p >= 0} == alive, event
        kept = {p for p in alive - come if p % 10 >= 7} | come
        alive = set(sorted(kept, key=lambda p: (p not in come, -(p % 10), -p))[: int(8 * room)])


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_of_another_model_are_refused_before_a_pass(name):
    policy = weighted(name, CONFIG)
    replay.check(policy, CONFIG, Cadence(16, 8))
    where = name.split(",")[0]
    for change, message in (
        ({"width": 64} if where != "triattention" else {"heads": 8}, "but this model needs"),
        ({"kv_heads": 1}, "but this model needs") if where != "triattention" else ({}, None),
        ({"layers": 3}, r"is float32 \[2, .*, but this model needs floats \[3, "),
    ):
        other = dataclasses.replace(CONFIG, **change)
        if (message and not ("rg2" in name or "rg3" in name)) or change == {"layers": 3}:
            with pytest.raises(UserError, match=f"{where}: .*{message}") as error:
                replay.check(policy, other, Cadence(16, 8))
            assert "\n" not in str(error.value)
    for wrong, message in (
        ({}, f"{where}: params must hold .*, not nothing"),
        (3, f"{where}: params must hold .*, not 3"),
        ({**policy.params, "more": np.zeros(2)}, "params must hold .*, not .*, more"),
        ({k: x.astype(int) for k, x in policy.params.items()}, r"is int64 \["),
        ({k: x * np.nan for k, x in policy.params.items()}, "holds numbers that are not finite"),
    ):
        with pytest.raises(UserError, match=message):
            replay.check(policy.replace(params=wrong), CONFIG, Cadence(16, 8))


@pytest.mark.parametrize("name", ["kvzap", "trimkv", "triattention"])
def test_a_name_alone_has_no_weights(name):
    with pytest.raises(UserError, match=f"'{name}' needs params, which a name can't give"):
        policies.get(name)
