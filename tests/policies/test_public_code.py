"""Scores and kept positions beside those of the code that a policy's authors have published.

Each part needs a clone of one repository, and a Python of an environment with what that code needs;
it runs there, on a CPU, on random weights. Environment variables name both:

| variable | what it names |
|---|---|
| FKV_TRIMKV | a clone of github.com/ngocbh/trimkv |
| FKV_TRIMKV_PYTHON | a Python with torch and transformers 4.57 |
"""

import functools
import math
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import fkv
from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch

TOKENS, BUDGET, INTERVAL = 64, 16, 8
LAYERS, KV_HEADS = 3, 2


def run(script, variable, python, folder, *arguments):
    """What a script says of a clone, and its folder."""
    for name in (variable, python):
        if not os.environ.get(name):
            pytest.skip(f"{name} is not set")
    path = folder / "kept.npz"
    script = Path(__file__).with_name(script)
    command = [os.environ[python], "-P", script, os.environ[variable], path, *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([str(x) for x in command], check=True, timeout=500, env=environment)
    return dict(np.load(path))


@functools.partial(jax.jit, static_argnums=3)
def observed(lm, batch, policy, cadence):
    def observe(acc, policy, view, slots):
        return acc, (view.cache.position_bks, slots, view.cache.entry.get("arrived"))

    return replay.replay(lm, batch, policy, cadence, None, observe)[2]


def replayed(model, ids, policy, cadence, prompt=0):
    """Of every layer, eviction and head: what is held before it and freed, and what arrived."""
    batch = Batch.of(np.asarray(ids)[None], np.array([len(ids)]), np.array([prompt]))
    found = jax.device_get(observed(model.lm, batch, policy, cadence))
    return jax.tree.map(lambda x: x[:, :, 0], found)


def assert_kept_while_decoding(theirs, model, ids, policy, cadence=None, prompt=0):
    """Positions that stay after every eviction, [e, y, k, B], which all later ones rest on."""
    position, slots, _ = replayed(model, ids, policy, cadence or Cadence(BUDGET, INTERVAL), prompt)
    evictions = position.shape[1]
    assert evictions > 3 and evictions <= len(theirs)
    for event, layer, head in np.ndindex(evictions, LAYERS, KV_HEADS):
        at = layer, event, head
        kept = np.sort(np.delete(position[at], slots[at]))
        np.testing.assert_array_equal(kept, np.sort(theirs[event, layer, head]), err_msg=str(at))


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
    *_, arrived = replayed(model, more, gates[form], Cadence(TOKENS - INTERVAL, INTERVAL))
    want = trimkv[f"retention {form}"]
    np.testing.assert_allclose(arrived["log_beta"][:, 0], want, rtol=1e-4, atol=1e-6)


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
