"""A process that measures many policies compiles ever more, and may map only so much memory."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import compressed, memory_maps, replay
from fkv.engine.batch import Batch
from fkv.engine.batcher import Batcher
from fkv.evaluation import diagnosis, loss_ratio, recall, scoring
from fkv.evaluation.retained import retained
from tests import oracles

CADENCE, MAPS = Cadence(16, 8), Path("/proc/self/maps")
# The second shares no beginning with others, and so runs apart.
NAMED = {name: policies.get(name) for name in ("knorm", "ada(knorm)")}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings are counted on Linux")


@pytest.fixture(scope="module")
def lm():
    return oracles.make_lm(heads=4, kv_heads=2)


@pytest.fixture
def limit(tmp_path, monkeypatch):
    """A function that sets how many mappings a process may have."""
    path = tmp_path / "max_map_count"
    monkeypatch.setattr(memory_maps, "_MOST", path)
    return lambda most: path.write_text(f"{most}\n")


def mapped():
    return MAPS.read_bytes().count(b"\n")


def test_programs_of_many_policies_do_not_pile_up(lm, limit):
    def measure():
        counts = []
        for name in ("snapkv", "knorm", "h2o", "keydiff", "tova", "streaming_llm"):
            scoring.score(lm, policies.get(name), CADENCE, [np.arange(30) % 7], [4], rows=1)
            counts.append(mapped())
        return counts

    jax.clear_caches()
    limit(10**9)
    one, *_, together = measure()
    assert together > one
    jax.clear_caches()
    limit(1)
    assert max(measure()) < (one + together) / 2


def rows(lm):
    token, length = map(np.asarray, oracles.make_tokens(lm.config, [40]))
    return Batch.of(token, length), replay.row_keys(jax.random.key(1), 1)


def losses(lm):
    batch, key_b = rows(lm)
    traces = loss_ratio.Traces(batch, key_b, np.full(1, 40), 0.2, 1)
    loss_ratio.measure(lm, NAMED, traces, CADENCE, alone=True)


def agreement(lm):
    batch, key_b = rows(lm)
    given = recall.Given(batch, key_b, recall.full_hidden(lm, batch, 8))
    list(recall.agree(lm, NAMED, given, CADENCE, list(NAMED)))


WORK = {
    "losses": losses,
    "attention retained": lambda lm: retained(lm, NAMED, *rows(lm)[:1], CADENCE, rows(lm)[1]),
    "agreement": agreement,
    "likelihoods": lambda lm: scoring.score(lm, NAMED["knorm"], CADENCE, [np.arange(30)], [4]),
    "answers": lambda lm: Batcher(lm, NAMED["knorm"], CADENCE, 1, 32),
    "contexts": lambda lm: compressed.compress(
        lm, NAMED["knorm"], CADENCE, np.arange(30), jax.random.key(0)
    ),
    "retention": lambda lm: diagnosis.retention(lm, NAMED, rows(lm)[0], CADENCE),
}


@pytest.mark.parametrize("what", WORK)
def test_what_runs_many_policies_makes_room(what, lm, limit, monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(what))
    limit(10**9)
    WORK[what](lm)
    assert not cleared
    limit(1)
    WORK[what](lm)
    assert len(cleared) == (2 if what in ("losses", "agreement") else 1)


def test_room_is_made_before_the_limit(limit, monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(None))
    limit(2 * mapped())
    memory_maps.make_room()
    assert not cleared
    limit(round(1.25 * mapped()))
    memory_maps.make_room()
    assert cleared


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory_maps, "_MOST", Path("/nowhere"))
    monkeypatch.setattr(jax, "clear_caches", lambda: pytest.fail("cleared"))
    memory_maps.make_room()
