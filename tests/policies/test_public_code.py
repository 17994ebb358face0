"""Scores and kept positions beside those of the code that a policy's authors have published.

Each part needs a clone of one repository, and a Python of an environment with what that code needs;
it runs there, on a CPU, on random weights. Environment variables name both:

| variable | what it names |
|---|---|
| FKV_TRIMKV | a clone of github.com/ngocbh/trimkv |
| FKV_TRIMKV_PYTHON | a Python with torch and transformers 4.57 |
| FKV_TRIATTENTION | a clone of github.com/WeianMao/triattention |
| FKV_VASE | a clone of github.com/terarachang/VaSE |
| FKV_KVPRESS | a Python with torch and transformers 5.2, as of kvpress 0.5.5 |
"""

import functools
import math
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fkv
from fkv import policies
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine import calibration, replay
from fkv.engine.batch import Batch
from fkv.models import ModelConfig

TOKENS, BUDGET, INTERVAL = 64, 16, 8
LAYERS, KV_HEADS = 3, 2


def run(script, variable, python, folder, *arguments):
    """What a script says of a clone, and its folder."""
    for name in (variable, python):
        if not os.environ.get(name):
            pytest.skip(f"{name} is not set")
    path = folder / "kept.npz"
    script = Path(__file__).with_name(script)
    command = [os.environ[python], script, os.environ[variable], path, *arguments]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run(map(str, command), check=True, timeout=500, env=os.environ | quiet)
    return dict(np.load(path))


@functools.partial(jax.jit, static_argnums=3)
def observed(lm, batch, policy, cadence):
    def observe(acc, policy, view, slots):
        return acc, (view.cache.position_bks, slots, policy.score(view), view.cache.entry)

    return replay.replay(lm, batch, policy, cadence, None, observe)[2]


def replayed(model, ids, policy, cadence, prompt=0):
    """Of every layer and eviction: what is held before it [k, s], freed, scored, and arrived."""
    batch = Batch.of(np.asarray(ids)[None], np.array([len(ids)]), np.array([prompt]))
    found = jax.device_get(observed(model.lm, batch, policy, cadence))
    return jax.tree.map(lambda x: x[:, :, 0], found)


def assert_kept_while_decoding(theirs, model, ids, policy, prompt=0):
    """Positions that stay after every eviction, [e, y, k, B], which all later ones rest on."""
    position, slots, *rest = replayed(model, ids, policy, Cadence(BUDGET, INTERVAL), prompt)
    evictions = position.shape[1]
    assert evictions > 3 and evictions <= len(theirs)
    for event, layer, head in np.ndindex(evictions, LAYERS, KV_HEADS):
        at = layer, event, head
        kept = np.sort(np.delete(position[at], slots[at]))
        np.testing.assert_array_equal(kept, np.sort(theirs[event, layer, head]), err_msg=str(at))
    return position, *rest


def kept_at_end(model, ids, policy, budget=BUDGET, newest=0):
    size = dict(budget=budget, interval=INTERVAL, when="end", newest=newest)
    return fkv.Context(model, ids, policy, **size).positions


@pytest.fixture(scope="module")
def trimkv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trimkv")
    sizes = TOKENS, BUDGET, INTERVAL
    found = run("trimkv_peer.py", "FKV_TRIMKV", "FKV_TRIMKV_PYTHON", folder, *sizes)
    gates = {form: fkv.load_scorer(folder / form) for form in ("rg", "rg2", "rg3")}
    model = fkv.load(folder / "base", separate=False)
    return found | {"model": model, "gates": gates}


FORMS = pytest.mark.parametrize("form", ["rg", "rg2", "rg3"])
WAYS = {"alpha": {}, "knorm_alpha": {"knorm": True}, "window": {"window": 3}}


@FORMS
def test_gates_of_trimkv_retain_as_much(trimkv, form):
    model, ids, gates = (trimkv[name] for name in ("model", "ids", "gates"))
    more = np.pad(ids, (0, INTERVAL))
    *_, entry = replayed(model, more, gates[form], Cadence(TOKENS - INTERVAL, INTERVAL))
    want = trimkv[f"retention {form}"]
    np.testing.assert_allclose(entry["arrived"]["log_beta"][:, 0], want, rtol=1e-4, atol=1e-6)


@FORMS
@pytest.mark.parametrize("way", WAYS)
def test_trimkv_keeps_the_same_while_decoding(trimkv, form, way):
    """The whole way: their model and cache, token by token, and our replay of the same tokens."""
    policy = trimkv["gates"][form].replace(**WAYS[way])
    theirs = trimkv[f"decoding {form} {way}"]
    assert_kept_while_decoding(theirs, trimkv["model"], trimkv["ids"], policy)


@FORMS
@pytest.mark.parametrize("way", WAYS)
def test_trimkv_keeps_the_same_of_a_prompt(trimkv, form, way):
    policy = trimkv["gates"][form].replace(**WAYS[way])
    newest = WAYS[way].get("window", 0)
    kept = kept_at_end(trimkv["model"], trimkv["ids"], policy, newest=newest)
    np.testing.assert_array_equal(kept, trimkv[f"end {form} {way}"])


@FORMS
@pytest.mark.parametrize("way", ["layer_wise_alpha", "layer_wise_knorm_alpha", "alpha_threshold"])
def test_heads_of_trimkv_keep_as_many(trimkv, form, way):
    gates, budget = trimkv["gates"][form].replace(knorm="knorm" in way), BUDGET
    policy = policies.Ada(gates, safeguard=0.0)
    if "threshold" in way:  # with room for all
        policy, budget = policies.Threshold(gates, math.log(trimkv["at"]), 2.0), TOKENS // 2
    kept = kept_at_end(trimkv["model"], trimkv["ids"], policy, budget)
    counts = set()
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        want = np.flatnonzero(trimkv[f"uneven {form} {way}"][layer, head])
        np.testing.assert_array_equal(kept[layer][head], want)
        counts.add(len(want))
    assert len(counts) > 3


@pytest.fixture(scope="module")
def triattention(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triattention")
    sizes = TOKENS, BUDGET, INTERVAL
    found = run("triattention_peer.py", "FKV_TRIATTENTION", "FKV_KVPRESS", folder, *sizes)
    names = "base", "yarn", "plain"
    found |= {name: fkv.load(folder / name, separate=False) for name in names}
    return found | {x: fkv.load_scorer(folder / f"{x}.pt") for x in ("statistics", "calibrated")}


@pytest.mark.parametrize("way", ["near", "far", "prompt", "yarn"])
def test_triattention_keeps_the_same_while_decoding(triattention, way):
    """The whole way, by heads that prune for themselves: `per_layer_perhead_pruning`."""
    theirs, policy = triattention, triattention["statistics"]
    policy = policy if way == "far" else policy.replace(reach=100)
    policy = policies.Prompt(policy, tokens=INTERVAL) if way == "prompt" else policy
    model, kept = theirs["yarn" if way == "yarn" else "base"], theirs[f"kept {way}"]
    position, score, _ = assert_kept_while_decoding(kept, model, theirs["ids"], policy, INTERVAL)
    for layer, event, head in np.ndindex(*position.shape[:3]):
        scored = theirs[f"scored {way}"][event, layer, head]
        x = theirs[f"scores {way}"][event, layer].reshape(KV_HEADS, -1, len(scored))[head]
        want = ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)).max(0)
        at = position[layer, event, head]
        place = [np.flatnonzero(at == p).item() for p in scored]
        atol = 2e-3 if way == "far" else 1e-4  # their phases are float32, of 2^16 radians
        np.testing.assert_allclose(score[layer, event, head][place], want, rtol=0, atol=atol)


def test_queries_are_calibrated_as_triattention_does(triattention):
    """On a model without a norm of queries, which their script leaves out."""
    ids, model = triattention["ids"][None], triattention["plain"]
    found = calibration.query_statistics(model.lm, Batch.of(ids, np.array([TOKENS])))
    want = triattention["calibrated"].params
    assert found.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


VASE = Cadence(32, INTERVAL)
LARGE = 10


@pytest.fixture(scope="module")
def vase(tmp_path_factory):
    sizes = 80, VASE.budget, VASE.interval, LARGE
    return run("vase_peer.py", "FKV_VASE", "FKV_KVPRESS", tmp_path_factory.mktemp("vase"), *sizes)


def views_of(theirs, mode):
    """Every eviction of every layer, on the keys, values and queries of their cache then."""
    config = ModelConfig("qwen3", 211, 32, 3, 4, 2, 8, 24, rope_theta=1e4, qk_norm=True)
    evictions, layers = theirs[f"key {mode}"].shape[:2]
    assert evictions == 6
    for event, layer in np.ndindex(evictions, layers):
        of = {name: theirs[f"{name} {mode}"][event, layer][None] for name in STATE}
        position = of["position"].astype(np.int32)
        newest = position[:, 0, -VASE.interval :]
        held = VASE.slots + event * VASE.interval  # so many tokens have come
        np.testing.assert_array_equal(newest[0], np.arange(held - VASE.interval, held))
        cache = kv.Cache(*map(jnp.asarray, (of["key"], of["value"], position)))
        query, key = np.moveaxis(of["query"], 1, 2), jax.random.split(jax.random.key(0), 1)
        index = jnp.int32(VASE.fill_chunks + event)
        layer_of = jnp.int32(layer)
        view = policies.View(
            cache, query, newest, index, key, None, VASE, layer_of, config, jnp.zeros(1, jnp.int32)
        )
        yield view, (event, layer), of["kept"][0]


STATE = "key", "value", "position", "query", "kept"


def kept_of(policy, view):
    """Positions in ascending order, [k, B]."""
    slots, position = policy.evict(view)[0], np.asarray(view.cache.position_bks[0])
    return np.stack([np.sort(np.delete(*x)) for x in zip(position, slots, strict=True)])


@pytest.mark.parametrize("mode", ["sample", "smooth"])
def test_vase_draws_the_same(vase, mode, monkeypatch):
    """Weights of the draw; and with the same random numbers, the same positions."""
    kernel = 5 if mode == "smooth" else 1
    policy = policies.get(f"vase:large={LARGE / VASE.budget},kernel={kernel}")
    for view, at, kept in views_of(vase, mode):
        if kernel > 1 and at[0]:  # from then on they pool over slots in no order
            continue
        weights, noise = (vase[f"{x} {mode}"][at] for x in ("weights", "noise"))
        number = weights.shape[-1]
        monkeypatch.setattr(jax.random, "gumbel", lambda key, shape: jnp.zeros(shape))
        score = np.asarray(policy.score(view))[0, :, :number]
        large = score > 1e5
        np.testing.assert_array_equal(large, weights == 0)  # theirs are not drawn
        np.testing.assert_array_equal(large.sum(-1), LARGE)
        np.testing.assert_allclose(np.exp(score[~large]), weights[~large], rtol=1e-4)
        gumbel = np.pad(-np.log(noise), ((0, 0), (0, VASE.interval)))
        monkeypatch.setattr(jax.random, "gumbel", lambda key, shape, x=gumbel: jnp.asarray(x))
        np.testing.assert_array_equal(kept_of(policy, view), np.sort(kept), err_msg=str(at))


def test_vase_projects_the_same(vase, monkeypatch):
    policy = policies.get("vase_dkv")
    for view, at, kept in views_of(vase, "projected"):
        draw = vase["projection projected"][at] * policy.rank**0.5
        monkeypatch.setattr(jax.random, "normal", lambda key, shape, x=draw: jnp.asarray(x))
        np.testing.assert_array_equal(kept_of(policy, view), np.sort(kept), err_msg=str(at))
