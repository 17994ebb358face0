"""`launch.leaderboard` and `launch.advise` from a config to their files, on the embedded task."""

import json

import jax
import numpy as np
import pytest

from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import loss_ratio
from fkv.jobs import advise, common, leaderboard, losses
from fkv.runs import preemption
from fkv.tasks import REASONER
from tests.jobs.test_sft import small

BOARD = ("leaderboard.txt", "leaderboard.md", "leaderboard.csv", "leaderboard.json", "losses.jsonl",
         "retained.jsonl")  # fmt: skip
PICTURES = ("leaderboard.png", "leaderboard.pdf")


def recipe(batch, fields):
    config = small("embedded", **fields)
    config.eval.batch = batch
    return config


def board_recipe(**changes):
    """Two policies and golden eviction, losses only, on three traces in batches of two."""
    fields = dict(
        evaluate__benchmark="", evaluate__policies=("h2o", "ada(h2o)"), evaluate__scorers=(),
        evaluate__budgets=(16,), evaluate__traces=3, leaderboard__retained=2,
        leaderboard__calibrate=0,
    )  # fmt: skip
    return recipe(2, fields | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("board")
    return path, leaderboard.run(board_recipe(), str(path))


def test_every_policy_has_a_row_with_its_costs(finished):
    path, found = finished
    assert {e.policy for e in found} == {"full", "golden", "h2o", "ada(h2o)"}
    assert all((path / name).exists() for name in (*BOARD, *PICTURES))
    by_name = {e.policy: e for e in found}
    assert by_name["golden"].ratio.value < min(by_name[x].ratio.value for x in ("h2o", "ada(h2o)"))
    for name in ("golden", "h2o", "ada(h2o)"):
        assert 0 < by_name[name].retained.value < 1
        assert 0 < by_name[name].cost.share
    # Twice the slots but for the ring, and nothing else more.
    assert by_name["ada(h2o)"].cost.cache_bytes > 1.5 * by_name["h2o"].cost.cache_bytes
    assert by_name["h2o"].cost.cache_bytes > by_name["golden"].cost.cache_bytes  # sums
    assert by_name["ada(h2o)"].cost.flops > by_name["h2o"].cost.flops > 0
    assert by_name["h2o"].overlap is not None and by_name["ada(h2o)"].overlap is None


def test_losses_are_those_of_one_pass_over_all_traces(finished):
    path, _ = finished
    config = board_recipe()
    held_out = common.load_traces(config, "eval", 3, 16, 72)
    given = loss_ratio.Traces(
        Batch.of(held_out.token_nt, held_out.length_n, held_out.prompt_n),
        replay.row_keys(jax.random.key(0), 3),
        held_out.padded_n,
        at_once=2,  # as there: the same programs
    )
    lm = models.load(REASONER, "float32")
    want = loss_ratio.measure(lm, {"h2o": policies.get("h2o")}, given, Cadence(16, config.interval))
    rows = {(r["policy"], r["trace"]): r for r in map(json.loads, (path / "losses.jsonl").open())}
    for one in want[1:]:  # all but the full cache
        for i, trace in enumerate(held_out.digests()):
            row = rows[one.policy, trace]
            np.testing.assert_allclose(row["nll"], one.evicted[i], rtol=1e-5)
            np.testing.assert_array_equal(row["tokens"], one.tokens[i])


def test_resumed_equals_uninterrupted(finished, tmp_path, sigterm_in):
    sigterm_in(loss_ratio, "_run_golden", 2)
    with pytest.raises(preemption.Preempted):
        leaderboard.run(board_recipe(), str(tmp_path))
    sigterm_in.undo()
    assert not (tmp_path / "leaderboard.csv").exists()
    leaderboard.run(board_recipe(), str(tmp_path))
    for name in BOARD:
        ours, theirs = ((path / name).read_text() for path in (tmp_path, finished[0]))
        assert ours == theirs, name


def test_times_of_another_model_are_refused(tmp_path):
    config = board_recipe(leaderboard__benchmark=str(tmp_path))
    row = {
        "fits": True, "batch": 1, "length": 9, "policy": "h2o", "budget": 16, "tokens_per_s": 50.0,
    }  # fmt: skip
    about = {name: config[name] for name in ("model", "dtype", "interval")}
    file = tmp_path / "benchmark.json"
    file.write_text(json.dumps({"about": about, "decode": [row]}))
    assert leaderboard._times(config) == {("h2o", 16): 20.0}
    for name, other in (("model", "random-100m"), ("dtype", "bfloat16"), ("interval", 99)):
        file.write_text(json.dumps({"about": about | {name: other}, "decode": [row]}))
        with pytest.raises(UserError, match=f"was measured with {name} = {other!r}"):
            leaderboard._times(config)
    file.write_text(json.dumps({"about": about, "decode": [row | {"tokens_per_s": 0}]}))
    with pytest.raises(UserError, match="has no times of decoding"):
        leaderboard._times(config)


def test_what_does_not_fit_is_refused_before_anything_is_measured(tmp_path):
    for changes, message in (
        ({"evaluate__budgets": ()}, "evaluate.budgets"),
        ({"evaluate__traces": 0}, "evaluate.traces above 0"),
        ({"evaluate__policies": ("h2",)}, "'h2' is not known"),
        ({"eval__baseline": "snapkv"}, "eval.baseline = 'snapkv'"),
        ({"leaderboard__benchmark": str(tmp_path)}, "leaderboard.benchmark"),
        ({"leaderboard__retained": -1}, "leaderboard.retained = -1"),
    ):
        with pytest.raises(UserError, match=message):
            leaderboard.run(board_recipe(**changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---- advice


LIMITS = (20.0, 200.0, 240.0)


def advice_recipe(**changes):
    fields = dict(
        evaluate__scorers=(), advise__policies=("h2o",), advise__budgets=(16, 32),
        advise__percent=LIMITS, advise__halvings=1, advise__traces=3, advise__heads=2,
    )  # fmt: skip
    return recipe(3, fields | changes)


@pytest.fixture(scope="module")
def advised(tmp_path_factory):
    path = tmp_path_factory.mktemp("advice")
    return path, advise.run(advice_recipe(), str(path))


def brute_force(budgets, limits):
    """Loss added by every policy at every budget, in % of the full cache's on the same tokens."""
    config = advice_recipe()
    held_out = common.load_traces(config, "eval", 3, 16, 72)
    batch = Batch.of(held_out.token_nt, held_out.length_n, held_out.prompt_n)
    lm, full, added = models.load(REASONER, "float32"), None, {"golden": {}, "h2o": {}}
    for budget in budgets:
        given = loss_ratio.Traces(
            batch, replay.row_keys(jax.random.key(0), 3),
            held_out.padded_n, at_once=3,
        )  # fmt: skip
        rules = {"h2o": policies.get("h2o")}
        found = loss_ratio.measure(lm, rules, given, Cadence(budget, config.interval))
        for one in found[1:]:
            full = one.full[:, 0].sum() if full is None else full
            added[one.policy][budget] = 100 * (one.evicted - one.full)[:, 0].sum() / full
    return {
        (name, limit): next(
            (b for b in budgets if all(x[c] <= limit for c in budgets if c >= b)), None
        )
        for name, x in added.items()
        for limit in limits
    }


def test_the_budget_advised_is_that_of_trying_all(advised):
    _, found = advised
    want = brute_force(range(16, 33, 8), LIMITS)
    got = {(row["policy"], row["percent"]): row["budget"] for row in found}
    assert got == want and {None, 16} < {*want.values()}
    for row in found:
        assert row["group"] == "all" and row["traces"] == 3
        if row["budget"] is None:
            assert row["said"] == "more than 32" and "paste" not in row
        else:
            assert row["paste"] == f"--config.budget={row['budget']}"
            assert row["added_percent"]["value"] <= row["percent"] and row["cache_bytes"] > 0


def test_budgets_by_head_are_measured(advised):
    _, found = advised
    assert {row["policy"] for row in found if "heads" in row} == {"golden", "h2o"}
    for row in found:
        if row["budget"] is not None:
            heads = row["heads"]
            assert np.shape(heads["budgets"]) == (3, 2) and 16 <= heads["mean"] <= row["budget"]
            assert (heads["added_percent"] is None) == (row["policy"] == "golden")


def test_rerun_measures_nothing_and_says_the_same(advised, monkeypatch):
    path, _ = advised
    names = ["losses.jsonl", "retained.jsonl", *(f"advice.{x}" for x in ("txt", "csv", "json"))]
    assert all((path / f"advice.{x}").exists() for x in ("md", "png", "pdf"))
    before = {name: (path / name).read_bytes() for name in names}
    monkeypatch.setattr(loss_ratio, "measure", None)
    monkeypatch.setattr(losses, "retained", None)
    advise.run(advice_recipe(), str(path))
    assert before == {name: (path / name).read_bytes() for name in names}


def test_advice_refuses_what_it_cannot_measure(tmp_path):
    for changes, message in (
        ({"advise__policies": ()}, "advise.policies and evaluate.scorers are empty"),
        ({"advise__budgets": (48, 16)}, "advise.budgets = .* ascending"),
        ({"advise__percent": ()}, "advise.percent = .* ascending"),
        ({"advise__percent": (-1.0,)}, "advise.percent"),
        ({"advise__budgets": (17,)}, "advise.budgets: budget = 17 must be a multiple"),
        ({"advise__groups": ("x",)}, "'x' must be of the form name=traces"),
        ({"advise__groups": ("all=x",)}, "with a name other than 'all'"),
        ({"advise__groups": ("a=/nowhere",)}, "advise.groups: a=/nowhere: .*no such file"),
        ({"advise__traces": 1}, "an interval over traces needs at least two"),
    ):
        with pytest.raises(UserError, match=message):
            advise.run(advice_recipe(**changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
