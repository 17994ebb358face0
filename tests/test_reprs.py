"""What notebooks show of objects: one line each, with what tells them apart, and no arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fkv
from fkv import policies
from fkv.cache import slots
from fkv.data.traces import Traces
from fkv.engine.answers import Generation
from fkv.engine.batch import Batch
from fkv.evaluation.accuracy import Accuracy
from fkv.evaluation.loss_ratio import Losses
from fkv.policies import foresight, scorer
from tests import oracles


@pytest.mark.parametrize("name", ["rkv:mix=0.05", "ada(pyramid(h2o)):room=1.5", "random:sinks=4"])
def test_a_policy_shows_all_its_settings(name):
    policy = policies.get(name)
    assert eval(repr(policy), vars(policies)) == policy


def test_scorers_show_what_they_were_trained_for():
    config, rules = oracles.make_model()[0], scorer.ScorerConfig(norm="rms")
    params = scorer.init(jax.random.key(0), config, rules)
    trained = foresight.Trained(source="runs/x", model="a/b", budget=64, interval=16)
    shown = repr(policies.Foresight(params, rules, trained=trained))
    count = sum(x.size for x in params.values())
    assert f"params=<4 arrays of {count:,} numbers>" in shown and "norm='rms'" in shown
    assert "trained=Trained(source='runs/x', model='a/b', budget=64, interval=16)" in shown
    assert "\n" not in shown and repr(foresight.Trained()) == "Trained()"


def test_a_policy_of_the_users_has_its_settings_or_its_own_text():
    class Mine(policies.Policy):
        size: int = 3

    class Own(policies.Policy):
        def __repr__(self):
            return "mine"

    assert repr(Mine(5)) == "Mine(size=5)" and repr(Own()) == "mine"


def test_models():
    model = fkv.load()
    about = "qwen3, 0.45 M parameters in float32, 3 layers of 2 KV heads"
    assert repr(model) == f"Model('embedded', {about}, vocabulary of 72)"
    assert repr(model.lm) == f"LM({about})"
    bare = oracles.make_lm()
    assert repr(bare.replace(params={})).endswith("parameters not loaded, 2 layers of 2 KV heads)")


def test_arrays_are_shown_by_their_shapes():
    batch = Batch.of(np.zeros((2, 5), np.int32), np.array([3, 5]))
    shown = "Batch(token_bt=int32[2,5], length_b=int64[2], prompt_b=int32[2], padding_b=int32[2])"
    assert repr(batch) == shown
    cache = slots.init(2, 3, 8, 4, jnp.float32, {"sums": {"x": jnp.zeros(5)}})
    assert "position_bks=int32[2,3,8], entry={sums: {x: float32[2,3,8,5]}})" in repr(cache)
    seen = []
    jax.jit(lambda x: seen.append(repr(Batch.of(x, x[:, 0]))))(jnp.zeros((2, 5), jnp.int32))
    assert seen[0].startswith("Batch(token_bt=int32[2,5], ")


def test_results():
    text = "so the answer is " * 9
    made = Generation(text, np.arange(1500), "length", 4, 20, 3 * 2**20)
    assert repr(made) == (
        "Generation('so the answer is so the answer is so the ...  the answer is ', 1,500 tokens, "
        "cut off, 4 evictions, 3.00 MiB of cache)"
    )
    ids = np.zeros((2, 9), np.int32)
    traces = Traces(ids, np.array([7, 9]), np.array([0, 0]), np.array([9, 9]), skipped=3)
    assert repr(traces) == "Traces(2 traces of 7 to 9 tokens, 3 skipped)"
    assert repr(Traces(ids[:0], *np.zeros((3, 0), int))) == "Traces(0 traces)"
    ones = np.ones((4, 3))
    losses = Losses("h2o", 64, 16, 2 * ones, ones, ones)
    assert repr(losses) == "Losses('h2o', B = 64, L = 16, 4 traces, loss ratio 2.000 ± 0.000)"
    right = Accuracy("full", 0, np.array([[True], [False]]), 9.0, 0.0, 0.0)
    assert repr(right) == "Accuracy('full', full cache, 2 problems, pass@1 50.0 %)"
