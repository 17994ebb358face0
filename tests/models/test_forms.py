"""Stacked and separate layers: the same model, never two copies of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.models import forms
from fkv.models.decoder import param_shapes
from tests import oracles


def assert_same(some, others):
    assert jax.tree.structure(some) == jax.tree.structure(others)
    jax.tree.map(np.testing.assert_array_equal, some, others)


def test_both_forms_hold_the_same():
    lm = oracles.make_lm(layers=3)
    separate = models.separate(lm, consume=False)
    assert models.is_separate(separate) and not models.is_separate(lm)
    for i in range(3):
        want = {name: x[i] for name, x in lm.params["layers"].items()}
        assert_same(models.layer(lm, i), want)
        for name, x in want.items():
            np.testing.assert_array_equal(forms.parameter(separate, i, name), x)
    for form in (lm, separate):
        assert_same(models.stacked(form), lm.params["layers"])
    for form, one in ((False, lm), (True, separate)):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), param_shapes(lm.config, form, form))
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), one.params)
    assert forms.separate_shapes(lm) == jax.eval_shape(lambda: separate.params["layers"])
    assert models.separate(separate) is separate and models.stack(lm) is lm
    on_host = jax.device_get(lm)
    assert_same(models.separate(on_host).params, separate.params)
    assert_same(models.stack(jax.device_get(separate)).params, lm.params)


def buffers():
    """Bytes of all arrays by their places: several arrays may share one."""
    return {x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}


@pytest.mark.parametrize(("convert", "part"), [("separate", "_split"), ("stack", "_join")])
def test_one_kind_of_parameter_at_a_time_is_held_twice(convert, part, monkeypatch):
    others = jax.live_arrays()  # which stay alive
    before = {x.unsafe_buffer_pointer() for x in others}
    lm = oracles.make_lm(layers=4)
    if convert == "stack":
        lm = models.separate(lm)
    given, want, peak = jax.tree.leaves(lm.params["layers"]), jax.tree.map(np.array, lm), []
    real = getattr(forms, part)

    def held():
        return sum(size for where, size in buffers().items() if where not in before)

    def watched(*args):
        found = jax.block_until_ready(real(*args))
        peak.append(held())
        return found

    monkeypatch.setattr(forms, part, watched)
    size = sum(x.nbytes for x in jax.tree.leaves(lm))
    largest = max(x.nbytes for x in jax.tree.leaves(models.stacked(want)))
    assert held() == size
    found = getattr(models, convert)(lm)
    assert len(peak) == len(models.layer(found, 0)) and size < max(peak) <= size + largest
    assert all(x.is_deleted() for x in given) and held() == size
    assert_same(models.stacked(found), models.stacked(want))
    assert found.params["embed_vm"] is lm.params["embed_vm"]


def test_what_replays_takes_either_form():
    lm, cadence = oracles.make_lm(), Cadence(16, 8)
    batch = oracles.make_batch(lm.config, [40, 33])
    run = jax.jit(replay.replay, static_argnums=3)
    both = [run(x, batch, policies.get("knorm"), cadence)[0]
            for x in (lm, models.separate(lm, consume=False))]  # fmt: skip
    np.testing.assert_array_equal(*both)
    assert jnp.isfinite(both[0]).all()
