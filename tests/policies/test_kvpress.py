"""Kept positions beside those of NVIDIA's kvpress, on the keys, values and queries of its own run.

Needs the Python of an environment with kvpress 0.5.5 in FKV_KVPRESS: `pip install kvpress==0.5.5`.
"""

import functools
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
from fkv.engine.compressed import Newest
from fkv.models import ModelConfig, rotate

PYTHON = os.environ.get("FKV_KVPRESS", "")
TOKENS, KEPT, SINKS, LAG = 84, 40, 4, 8
THRESHOLD, WINDOW = 0.25, 8
CONFIG = ModelConfig("qwen3", 211, 32, 3, 4, 2, 8, 24, rope_theta=1e4, qk_norm=True)

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="FKV_KVPRESS names no Python of an environment with kvpress"
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    path = tmp_path_factory.mktemp("kvpress") / "kept.npz"
    script = Path(__file__).with_name("kvpress_peer.py")
    command = [PYTHON, script, path, TOKENS, KEPT, THRESHOLD, WINDOW]
    command = [str(x) for x in command]
    subprocess.run(command, check=True, timeout=500)
    model = fkv.load(path.with_name("model"))
    zap = {form: fkv.load_scorer(path.with_name(f"kvzap_{form}")) for form in ("linear", "mlp")}
    return dict(np.load(path)) | {"model": model, "kvzap": zap}


def view_of(theirs, layer, first=0):
    """The eviction of all but `KEPT` of a prompt, with the queries from token `first` on."""
    key, value = (jnp.asarray(theirs[name][layer])[None] for name in ("keys", "values"))
    query = jnp.moveaxis(jnp.asarray(theirs["queries"][layer])[None], 1, 2)
    at = jnp.arange(TOKENS)[None]
    query = rotate(query, at, CONFIG)[:, first:]
    cache = kv.Cache(key, value, jnp.broadcast_to(at[None], (1, 2, TOKENS)))
    cadence = Cadence(KEPT, TOKENS - KEPT if KEPT >= TOKENS - KEPT else LAG)
    random = jax.random.split(jax.random.key(0), 1)
    return policies.View(
        cache, query, at[:, first:], jnp.int32(9), random, None, cadence, jnp.int32(layer), CONFIG
    )


def free(policy):
    """A policy without protection of the newest, as presses are."""
    return Newest(policy, 0)


@functools.partial(jax.jit, static_argnums=0)
def kept_of(policy, view):
    rank = jnp.argsort(jnp.argsort(-policy.importance(view), axis=-1), axis=-1)
    return rank < KEPT


@pytest.mark.parametrize(
    ("name", "ours", "first"),
    [
        ("knorm", "knorm", 0),
        ("keydiff", "keydiff", 0),
        ("expected_attention", "expected_attention", SINKS),
        ("lagkv", f"lagkv:lag={LAG}", 0),
    ],
)
def test_the_same_positions_are_kept(theirs, name, ours, first):
    for layer in range(CONFIG.layers):
        kept = np.asarray(kept_of(free(policies.get(ours)), view_of(theirs, layer, first)))[0]
        want = theirs[f"kept {name}"][layer]
        if name == "lagkv":  # equal ranks of partitions are cut anywhere: as many of each partition
            kept, want = (x[:, SINKS:].reshape(2, -1, LAG)[:, :-1] for x in (kept, want))
            full = want.sum(-1).min()
            for head, part in np.ndindex(*want.shape[:2]):
                both = kept[head, part] & want[head, part]
                assert both.sum() >= min(kept[head, part].sum(), want[head, part].sum()), layer
            assert 0 < full < LAG
        else:
            np.testing.assert_array_equal(kept, want, err_msg=str(layer))


@pytest.mark.parametrize(
    ("name", "inner", "safeguard"), [("ada(keydiff)", "keydiff", 0.2), ("ada(knorm)", "knorm", 0.6)]
)
def test_heads_compete_for_the_same_entries(theirs, name, inner, safeguard):
    policy = policies.Ada(free(policies.get(inner)), safeguard=safeguard, room=2)
    uneven = False
    for layer in range(CONFIG.layers):
        view = view_of(theirs, layer)
        importance = policy.importance(view)
        keep = np.asarray(policy.keep(view, importance))[0]
        rank = np.argsort(np.argsort(-np.asarray(importance)[0], axis=-1), axis=-1)
        np.testing.assert_array_equal(rank < keep[:, None], theirs[f"kept {name}"][layer])
        uneven |= keep[0] != keep[1]
    assert uneven


def test_layers_have_the_same_budgets(theirs):
    policy = policies.Pyramid(policies.SnapKV(window=2), beta=10)
    ours = [
        int(policy.keep(view_of(theirs, layer), jnp.zeros((1, 2, TOKENS)))[0, 0])
        for layer in range(CONFIG.layers)
    ]
    assert ours == theirs["kept pyramid"].sum(-1)[:, 0].tolist()


@pytest.mark.parametrize(
    ("name", "ours", "newest"),
    [
        ("knorm", "knorm", 0),
        ("keydiff", "keydiff", 0),
        ("expected_attention", "expected_attention", 0),
        ("snapkv", f"snapkv:window={LAG},kernel=5,mean=True", None),
        ("ada(keydiff)", "ada(keydiff):safeguard=0.2", 0),
    ],
)
def test_contexts_evicted_at_their_end_keep_what_presses_keep(theirs, name, ours, newest):
    """The whole way: weights, a prefill with the full cache, one eviction down to the budget."""
    size = dict(budget=KEPT, interval=LAG, when="end", newest=newest)
    context = fkv.Context(theirs["model"], theirs["ids"], ours, **size)
    for layer, heads in enumerate(context.positions):
        for head, kept in enumerate(heads):
            want = np.flatnonzero(theirs[f"kept {name}"][layer, head])
            np.testing.assert_array_equal(kept, want, err_msg=f"{layer}, {head}")


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_surrogates_of_kvzap_keep_the_same(theirs, form):
    """Saved by their `KVzapModel`: by compression ratio, and what passes a threshold."""
    zap = theirs["kvzap"][form]
    assert ("w2" in zap.params) == (form == "mlp")
    by_ratio = fkv.Context(
        theirs["model"], theirs["ids"], zap, budget=KEPT, interval=LAG, when="end", newest=0
    )
    passing = policies.Threshold(zap, at=THRESHOLD)
    most = TOKENS - TOKENS % LAG  # more than pass
    by_threshold = fkv.Context(
        theirs["model"], theirs["ids"], passing, most, LAG, when="end", newest=WINDOW
    )
    counts = set()
    for layer, head in np.ndindex(CONFIG.layers, CONFIG.kv_heads):
        want = np.flatnonzero(theirs[f"kept kvzap {form}"][layer, head])
        np.testing.assert_array_equal(by_ratio.positions[layer][head], want)
        want = np.flatnonzero(theirs[f"kept threshold(kvzap {form})"][layer, head])
        np.testing.assert_array_equal(by_threshold.positions[layer][head], want)
        counts.add(len(want))
    assert len(counts) > 1 and max(counts) < most
