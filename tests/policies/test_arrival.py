"""Numbers of entries from when they came: they travel with them, and cost nothing else."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import api, policies
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine import beginnings, replay
from fkv.errors import UserError
from tests import oracles

CADENCE = Cadence(16, 8)
LM = oracles.make_lm()
LENGTHS = [60, 33, 9]


def shuffled(view):
    """An importance of positions that has no order."""
    return jnp.sin(view.cache.position_bks * 78.233) * 43758.5453 % 1.0


class Probe(policies.Policy):
    """Keeps of every entry all that can be asked for."""

    def arrive(self, arrival):
        lead = arrival.key_btkd.shape[:3]

        def each(x):
            return jnp.broadcast_to(x[:, :, None], (*lead, *x.shape[2:]))

        return {
            "value": arrival.value_btkd,
            "key": arrival.rotated_key_btkd,
            "unrotated": arrival.key_btkd,
            "query": each(arrival.query_bthd),
            "hidden": each(arrival.hidden_btm),
            "normed": each(arrival.normed_btm),
            "position": each(arrival.position_bt.astype(jnp.float32)),
            "layer": each(jnp.full(lead[:2], arrival.layer, jnp.float32)),
        }

    def score(self, view):
        return shuffled(view)


def seen(acc, policy, view, evict):
    return acc, (view.cache.position_bks, view.key_bksd, view.value_bksd, view.arrived)


@functools.cache
def probed(cache_dtype=""):
    """What a probe sees at every eviction: chunk by chunk, in one pass, and from a beginning."""
    lm = LM.replace(config=LM.config.replace(cache_dtype=cache_dtype)) if cache_dtype else LM
    batch = oracles.make_batch(lm.config, LENGTHS)

    @jax.jit
    def run(lm, batch):
        key_b = replay.row_keys(jax.random.key(0), len(LENGTHS))
        slow = oracles.replay_by_chunks(lm, batch, Probe(), CADENCE, key_b, seen)[1]
        fast = replay.replay(lm, batch, Probe(), CADENCE, key_b, seen)[2]
        begun = beginnings.begin(lm, batch, Probe(), CADENCE)
        return slow, fast, beginnings.replay_from(lm, batch, begun, Probe(), key_b, seen)[2]

    return run(lm, batch), batch


@pytest.mark.parametrize("way", ["chunk by chunk", "in one pass", "from a beginning"])
def test_what_arrived_stays_with_its_entry(way):
    found, _batch = probed()
    position, key, value, arrived = found[
        ["chunk by chunk", "in one pass", "from a beginning"].index(way)
    ]
    held = np.asarray(position) >= 0
    assert position.shape[:3] == (2, 5, 3) and held[:, 2:].any() and not held.all()
    for name, want in (("key", key), ("value", value)):
        np.testing.assert_allclose(arrived[name][held], want[held], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(arrived["position"])[held], np.asarray(position)[held])
    layer = np.broadcast_to(np.arange(2)[:, None, None, None, None], position.shape)
    np.testing.assert_array_equal(np.asarray(arrived["layer"])[held], layer[held])


def test_what_arrives_is_what_the_layer_computes():
    """Of the first layer, whose hidden states no eviction changes: against NumPy, by position."""
    (_, found, _), batch = probed()
    position, _, _, arrived = jax.tree.map(lambda x: np.asarray(x)[0, :, 0], found)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), LM.params)
    w = {name: x[0] for name, x in params["layers"].items()}
    hidden = params["embed_vm"][np.asarray(batch.token_bt[0])]
    normed = oracles.rms_norm(hidden, w["attn_norm_m"], LM.config.rms_eps)
    query, key, value = (
        np.einsum("tm,hdm->thd", normed, w[name]) for name in ("q_hdm", "k_kdm", "v_kdm")
    )
    query, key = (
        oracles.rms_norm(x, w[name], LM.config.rms_eps)
        for x, name in ((query, "q_norm_d"), (key, "k_norm_d"))
    )
    for event, head in np.ndindex(position.shape[:2]):
        at = position[event, head]
        got = {name: x[event, head] for name, x in arrived.items()}
        wanted = {
            "hidden": hidden[at], "normed": normed[at], "query": query[at],
            "unrotated": key[at, head], "value": value[at, head],
        }  # fmt: skip
        for name, want in wanted.items():
            np.testing.assert_allclose(got[name], want, atol=2e-5, err_msg=name)


def test_the_rotation_of_cached_keys_can_be_undone():
    (_, (position, key, _, arrived), _), _ = probed()
    held = np.asarray(position[0, 1]) >= 0
    cache = kv.Cache(key[0, 1], key[0, 1], position[0, 1])
    view = policies.View(cache, None, None, None, None, None, CADENCE, config=LM.config)
    np.testing.assert_allclose(
        view.unrotated_key_bksd[held], arrived["unrotated"][0, 1][held], atol=1e-5
    )


class Late(policies.Policy):
    """Judges entries by their values when it evicts."""

    def score(self, view):
        return (view.value_bksd.astype(jnp.float32) ** 2).sum(-1)


class Early(policies.Policy):
    """The same when they come."""

    def arrive(self, arrival):
        return {"energy": (arrival.value_btkd.astype(jnp.float32) ** 2).sum(-1)}

    def score(self, view):
        return view.arrived["energy"]


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: policies.Prompt(policies.Ada(x), tokens=4)]
)
def test_decoding_keeps_what_arrived(wrap):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(37, size=n).astype(np.int32) for n in (40, 5, 17)]
    model = api.Model(LM, None, (), "a model")

    def answers(policy):
        found = api.generate(model, prompts, wrap(policy), 16, 8, new_tokens=30, temperature=0.8)
        return [one.tokens.tolist() for (one,) in found]

    assert answers(Late()) == answers(Early()) != answers(policies.Knorm())


def test_the_policy_of_the_readme_runs():
    readme = (Path(policies.__file__).parent / "README.md").read_text()
    code = next(x for x in readme.split("```python\n") if x.startswith("class Loud"))
    made = {"policies": policies, "jnp": jnp, "__name__": "notebook"}
    exec(code.split("```")[0], made)
    replay.check(made["Loud"](), LM.config, CADENCE)


def program(policy):
    """The compiled replay under a policy."""
    batch = oracles.make_batch(LM.config, LENGTHS)
    run = jax.jit(lambda lm, batch: replay.replay(lm, batch, policy, CADENCE)[0])
    return run.lower(LM, batch).compile().as_text()


def test_nothing_is_computed_or_held_for_what_is_not_asked_for():
    class Hidden(Late):
        """Asks for three numbers that are there anyway."""

        def arrive(self, arrival):
            x = arrival.hidden_btm[:, :, None, :3]
            return {"first": jnp.broadcast_to(x, (*arrival.key_btkd.shape[:3], 3))}

        def score(self, view):
            return super().score(view) + view.arrived["first"].sum(-1)

    nothing, hidden = map(program, (Late(), Hidden()))
    for operation in ("dot", "cosine", "sine", "sort"):
        counts = [len(re.findall(rf" {operation}\(", text)) for text in (nothing, hidden)]
        assert counts[0] == counts[1] > 0, operation
    of_slots = r"f32\[3,2,24,\d+\]"
    assert {*re.findall(of_slots, nothing)} == {"f32[3,2,24,8]"}  # keys and values
    assert {*re.findall(of_slots, hidden)} == {"f32[3,2,24,8]", "f32[3,2,24,3]"}
    empty = jax.eval_shape(lambda: replay.init_cache(Late(), 1, LM.config, CADENCE, jnp.float32))
    assert len(jax.tree.leaves(empty)) == 3  # keys, values and positions


@pytest.mark.parametrize(
    ("arrive", "message"),
    [
        (lambda a: a.value_btkd, r"arrive gives .* but must give arrays by name"),
        (lambda a: {}, "arrive gives {}, but must give arrays by name"),
        (lambda a: {"x": a.hidden_btm}, r"arrive gives 'x': float32 \[1, 1, 32\], but must give"),
        (lambda a: {"x": a.position_bt[..., None]}, r"arrive gives 'x': int32 \[1, 1, 1\], but"),
        (lambda a: {"x": 3}, "arrive gives 'x': 3, but must give floats"),
        (lambda a: {3: a.value_btkd}, r"arrive gives 3: float32 \[1, 1, 2, 8\], but must"),
    ],
)
def test_what_is_no_number_of_an_entry_is_refused_before_a_pass(arrive, message):
    body = {"arrive": lambda self, a: arrive(a), "score": lambda self, view: shuffled(view)}
    policy = type("Mine", (policies.Policy,), {"__module__": __name__, **body})()
    with pytest.raises(UserError, match=f"Mine: {message}") as error:
        replay.check(policy, LM.config, CADENCE)
    assert "\n" not in str(error.value)


def test_what_was_not_asked_for_is_named():
    class Forgetful(policies.Policy):
        def score(self, view):
            return view.arrived["x"]

    with pytest.raises(UserError, match=r"view.arrived is kept for policies that define arrive"):
        replay.check(Forgetful(), LM.config, CADENCE)


def test_a_beginning_without_it_is_refused():
    batch = oracles.make_batch(LM.config, LENGTHS)
    begun = jax.eval_shape(lambda: beginnings.begin(LM, batch, Late(), CADENCE))
    with pytest.raises(ValueError, match=r"began without \['arrived'\]"):
        jax.eval_shape(lambda begun: beginnings.replay_from(LM, batch, begun, Early()), begun)
