"""Budgets that differ by layer or head, around any policy."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import api, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.errors import UserError
from fkv.evaluation import accuracy, loss_ratio, loss_table
from fkv.policies import scorer
from fkv.policies.foresight import Trained
from launch import flags
from tests import oracles
from tests.policies.test_policies import CONFIG, SIZES, h2o, random_view, state_of

BUDGET, INTERVAL, LAYERS = 24, 12, 3
LM = oracles.make_lm(layers=LAYERS)
CADENCE = Cadence(BUDGET, INTERVAL)
RULES = scorer.ScorerConfig()


def scorers(**fields):
    params = scorer.init(jax.random.key(0), LM.config, RULES)
    return policies.Foresight(params, RULES, **fields)


def policy_of(name):
    return policies.Ada(scorers()) if name == "ada(foresight)" else policies.get(name)


# ---- what is kept


def kept_of(name, batch):
    """A replay under a policy: before each eviction what is held and its importance; after, held.

    Returns:
      Arrays [layers, chunks, b, k, s]: positions and importances; the positions of the chunk after
      are what was kept, but for its own.
    """
    # A chunk of padding, as nothing looks at the eviction after the last chunk.
    batch = batch.replace(token_bt=jnp.pad(batch.token_bt, ((0, 0), (0, INTERVAL))))

    def look(acc, policy, view, evict):
        while isinstance(policy, policies.Wrapper):
            policy = policy.policy
        return acc, (view.cache.position_bks, policy.importance(view))

    call = jax.jit(replay.replay, static_argnums=3, static_argnames="observe")
    policy = policy_of(name)
    _, _, seen = call(LM, batch, policy, CADENCE, observe=look)
    return (np.asarray(x) for x in seen)


def pyramid_shares(importances, last=8):
    """Entries that each layer keeps: linear from `2 B - last` to `last`."""
    first = 2 * BUDGET - last
    return [
        [first - (first - last) * layer / (LAYERS - 1)] * len(heads)
        for layer, heads in enumerate(importances)
    ]


def ada_shares(importances, safeguard=0.2, room=2.0, budgets=(BUDGET,) * LAYERS, most=BUDGET):
    """Entries that each head keeps: its best few, then the layer's best whatever the head."""
    shares = []
    for heads, budget in zip(importances, budgets, strict=True):
        ranked = [sorted(scores, reverse=True)[: round(room * most)] for scores in heads]
        share = [min(round(safeguard * budget), len(scores)) for scores in ranked]
        rest = [(x, h) for h, scores in enumerate(ranked) for x in scores[share[h] :]]
        for _, head in sorted(rest, reverse=True)[: len(heads) * budget - sum(share)]:
            share[head] += 1
        shares.append(share)
    return shares


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("pyramid", {}),
        ("pyramid:beta=2", {"last": 12}),
        ("pyramid(h2o)", {"last": 12}),  # which protects the interval
        ("ada:safeguard=0.9", {"safeguard": 0.9}),
        ("ada:room=1.25", {"room": 1.25}),  # some heads want more than they have room for
        ("ada(h2o)", {}),
        ("ada(foresight)", {}),
        ("ada(pyramid(h2o))", {"budgets": (36, 24, 12), "most": 47}),
    ],
)
def test_uneven_budgets_keep_what_their_definition_keeps(name, settings):
    batch = oracles.make_batch(LM.config, [107, 60])
    position, importance = kept_of(name, batch)
    capacity = position.shape[-1] - INTERVAL
    shares = pyramid_shares if name.startswith("pyramid") else ada_shares
    evictions = uneven = 0
    for row, n in enumerate(batch.length_b.tolist()):
        for chunk in range(n // INTERVAL - 1 + (n % INTERVAL > 0)):
            # Of every layer and head: importance by position before, positions after.
            before = [
                [
                    dict(zip(p.tolist(), x.tolist(), strict=True))
                    for p, x in zip(position[y, chunk, row], importance[y, chunk, row], strict=True)
                ]
                for y in range(LAYERS)
            ]
            for heads in before:
                for held in heads:
                    held.pop(-1, None)
            want = shares([[list(held.values()) for held in heads] for heads in before], **settings)
            for y in range(LAYERS):
                total = 0
                for k, held in enumerate(before[y]):
                    after = position[y, chunk + 1, row, k, :capacity]
                    after = set(after[after >= 0].tolist())
                    assert len(after) == min(want[y][k], len(held)) and after <= set(held)
                    border = min(held[p] for p in after)
                    assert all(x <= border for p, x in held.items() if p not in after)
                    total += len(after)
                    evictions += len(after) < len(held)
                    uneven += len(after) not in (BUDGET, len(held))
                if shares is ada_shares:
                    held = sum(len(x) for x in before[y])
                    budget = settings.get("budgets", (BUDGET,) * LAYERS)[y]
                    assert total == min(held, LM.config.kv_heads * budget)
            if shares is pyramid_shares:
                assert sum(x[0] for x in want) == LAYERS * BUDGET
    assert evictions > 20 and uneven > 20


def test_without_room_ada_keeps_what_its_policy_keeps():
    batch = oracles.make_batch(LM.config, [107, 60])
    alone, shared = (np.sort(next(kept_of(name, batch))) for name in ("h2o", "ada(h2o):room=1"))
    np.testing.assert_array_equal(shared[:, BUDGET // INTERVAL :, ..., 1:], alone)  # from e = 0 on
    assert (shared[..., 0] == -1).all() and (alone[..., 0] >= 0).any()


def test_room_of_uneven_budgets():
    assert policies.get("pyramid").capacity(1024) == 2048 - 51
    assert policies.get("pyramid").capacity(24) == 48 - 8  # the window stays
    assert policies.get("pyramid(h2o)").capacity(24) == 48 - 1
    assert policies.get("ada:room=1.5").capacity(24) == 36
    assert policies.get("ada(pyramid):room=1.5").capacity(24) == 60
    assert policies.get("snapkv").capacity(24) == 24
    # A model of one layer has nothing to share.
    view = random_view(3, 1, *SIZES[0]).replace(config=dataclasses.replace(CONFIG, layers=1))
    assert policies.get("pyramid").keep(view, jnp.zeros((1, 2, 36))).tolist() == [[24, 24]]


# ---- what carries through


WRAPPED = ["ada", "pyramid", "ada(h2o)", "pyramid(rkv:mix=0.5)", "ada(pyramid(expected_attention))"]


@pytest.mark.parametrize("name", [*WRAPPED, "ada(random)"])
def test_rows_are_independent_of_the_batch(name):
    view = random_view(9, 3, 36, 12, 4, 2, 5).replace(cadence=Cadence(BUDGET, INTERVAL))
    drop = jax.jit(lambda view: policies.get(name).drop(view))
    together = np.asarray(drop(view))
    assert together.any() and not together.all()
    for row in range(3):
        alone = jax.tree.map(lambda x, r=row: x[r : r + 1] if x.ndim else x, view)
        np.testing.assert_array_equal(drop(alone)[0], together[row])


def test_wrappers_score_as_what_they_go_around():
    view = random_view(3, 2, *SIZES[0])
    policy = policies.get("ada(h2o)")
    score = np.asarray(policy.score(view))
    for row, head in np.ndindex(2, 2):
        positions, want = h2o(state_of(view, row, head), INTERVAL)
        slot = [np.flatnonzero(view.cache.position_bks[row, head] == p)[0] for p in positions]
        np.testing.assert_allclose(score[row, head, slot], want, rtol=1e-6)
    assert policy.statistics == "sums" and policies.get("ada").statistics is None
    assert policies.get("pyramid(rkv:window=3)").protected(view) == 3
    assert policies.get("ada(streaming_llm)").protected(view) == INTERVAL
    assert policies.Ada(scorers()).statistics == "windowed"


def test_wrappers_are_checked_with_what_they_go_around():
    other = scorers(trained=Trained("runs/x", interval=8))
    assert policies.Pyramid(other).trained.at(16) == other.trained.at(16)
    for policy, message in (
        (policies.Ada(other), "runs/x: trained at interval = 8, not 12"),
        (policies.Pyramid(policies.Foresight({}, RULES)), "are not the float32 w1"),
        (policies.get("ada(streaming_llm:sinks=13)"), "streaming_llm: sinks = 13 must be at most"),
        (policies.get("pyramid(rkv:kernel=99)"), "rkv: kernel = 99 must be at most 69"),
        (policies.get("ada(h2o):room=3"), "ada: room = 3 must be at most 2"),
    ):
        with pytest.raises(UserError, match=message):
            replay.check(policy, LM.config, CADENCE)
    model = api.Model(LM, None, (), "owner/name")
    with pytest.warns(UserWarning, match="trained for model other, and used with owner/name"):
        policy = policies.Ada(scorers(trained=Trained("runs/x", "other")))
        [[one]] = api.generate(model, [[1, 2, 3]], policy, BUDGET, INTERVAL, new_tokens=2)
    assert len(one.tokens) == 2


@flax.struct.dataclass
class Half(policies.Wrapper):
    """A wrapper of one's own."""

    policy: policies.Policy = policies.H2O()

    def keep(self, view, importance_bks):
        return jnp.full(importance_bks.shape[:2], view.budget // 2)

    def capacity(self, budget):
        return budget + 1


def test_a_wrapper_of_ones_own_runs():
    _, _, held = replay.replay(
        LM, oracles.make_batch(LM.config, [60]), Half(scorers()), CADENCE,
        observe=lambda acc, policy, view, evict: (acc, (view.cache.position_bks >= 0).sum(-1)),
    )  # fmt: skip
    assert held[0, :, 0, 0].tolist() == [12, 24, 24, 24]


# ---- names


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("ada", policies.Ada(policies.SnapKV())),
        ("ada(snapkv)", policies.Ada()),
        ("ada:window=4,room=1.5", policies.Ada(policies.SnapKV(window=4), room=1.5)),
        ("pyramid:kernel=3", policies.Pyramid(policies.SnapKV(kernel=3))),
        ("pyramid(rkv:mix=0.05,kernel=1)", policies.Pyramid(policies.RKV(mix=0.05, kernel=1))),
        ("ada(h2o):safeguard=0.5", policies.Ada(policies.H2O(), safeguard=0.5)),
        (" ada ( h2o ) : room = 1.5", policies.Ada(policies.H2O(), room=1.5)),
        (
            "ada(pyramid(rkv:mix=0.5):beta=4):room=1.5",
            policies.Ada(policies.Pyramid(policies.RKV(mix=0.5), beta=4), room=1.5),
        ),
    ],
)
def test_names_nest(name, policy):
    assert policies.get(name) == policy
    assert jax.tree.structure(policies.get(name)) == jax.tree.structure(policy)


def test_fields_may_be_given_beside_a_name():
    assert policies.get("ada", policy=policies.H2O()) == policies.get("ada(h2o)")
    assert policies.get("ada", window=3, room=1.5) == policies.get("ada:window=3,room=1.5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((x, r"of the form name:field=number,\.\.\. or wrapper\(name:\.\.\.\):field=number")
          for x in ("ada(", "ada(h2o", "ada(h2o))", "ada()", "ada(h2o)x", "(h2o)", "ada(h2o),rkv")),
        ("h2o(rkv)", "policy 'h2o' is not a wrapper: it can't wrap 'rkv'"),
        ("ada(h3o)", "policy 'h3o' is not known"),
        ("ada(h2o:x=1)", "policy 'h2o' has no field x"),
        ("ada(rkv):mix=1", "policy 'ada' has no field mix; it has policy, safeguard, room"),
        ("ada:mix=1", "has no field mix; it has policy, safeguard, room, window, kernel"),
        ("ada(h2o):policy=1", "policy is given twice"),
        ("ada(foresight)", "'foresight' needs params, config.*: make the object"),
        *((x, "must be a policy that scores each head by itself and shares the budget evenly")
          for x in ("ada(full)", "ada(tova)", "ada(ada)", "pyramid(ada)", "pyramid(pyramid)",
                    "ada(ada(pyramid))", "ada:policy=3")),
    ],
)  # fmt: skip
def test_names_that_do_not_nest_are_refused(name, message):
    with pytest.raises(UserError, match=message) as error:
        policies.get(name)
    assert "\n" not in str(error.value)


def test_names_come_back_from_command_lines_and_tables(tmp_path):
    names = ("ada(h2o)", "ada(rkv:mix=0.5,kernel=1):room=1.5")
    config, _ = flags.parse(["sft", "--config=configs/tiny.py", f"--config.eval.policies={names}"])
    assert config.eval.policies == names
    named = {name: policies.get(name) for name in names}
    batch = jax.tree.map(np.asarray, oracles.make_batch(LM.config, [60, 60]))
    width = np.full(2, batch.token_bt.shape[1])
    traces = loss_ratio.Traces(batch, jax.random.split(jax.random.key(0)), width, at_once=2)
    found = loss_ratio.measure(LM, named, traces, CADENCE)
    (tmp_path / "x").write_text(loss_table.traces_csv(found, ["a", "b"]))
    assert [r.policy for r in loss_table.read_traces(tmp_path / "x")[0]][2:] == list(names)
    cell = accuracy.cells(accuracy.Accuracy(names[1], 16, np.ones((1, 1)), 1, 0, 0))
    assert names[1] in cell and [loss_table.cells(r)[0] for r in found][2:] == list(names)
