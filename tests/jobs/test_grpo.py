"""The reinforcement job from a config to a table, on a reasoner too small to reason."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest

import fkv
from fkv.data.traces import Traces
from fkv.engine.sampling import Sampling
from fkv.errors import DivergedError, UserError
from fkv.jobs import answering, common, evaluate, sft
from fkv.jobs import grpo as job
from fkv.learning import fit, grpo
from fkv.models import LM
from fkv.runs import checkpoint, parallel, preemption, provenance, rundir
from tests import figures
from tests.jobs.test_evaluate import by_key
from tests.jobs.test_evaluate import samples as answers
from tests.jobs.test_sft import model_dir, same_training, same_updates, small

__all__ = ["model_dir"]  # a fixture


def shrink(config, scorer_dir):
    config.grpo.scorer = str(scorer_dir)
    config.grpo.steps, config.grpo.traces, config.grpo.rollouts = 4, 2, 3
    config.grpo.epochs, config.grpo.checkpoint_every, config.grpo.eta = 1, 2, 1e-4
    config.grpo.learning_rate, config.grpo.warmup, config.grpo.clip_norm = 1e-2, 2, 0.5
    config.grpo.answers = 0
    config.eval.budgets, config.eval.policies = (16,), ("random",)
    return config


@pytest.fixture(scope="module")
def supervised(model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("supervised")
    config = small(model_dir, sft__steps=2, eval__budgets=(16,), eval__policies=("random",))
    sft.run(config, str(path))
    return path


@pytest.fixture(scope="module")
def finished(model_dir, supervised, tmp_path_factory):
    """The run's directory, its results, and the batches of its steps."""
    path = tmp_path_factory.mktemp("finished")
    config, batches, make = shrink(small(model_dir), supervised), [], job._rollouts
    config.grpo.answers, config.evaluate.new_tokens = 3, 24
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_rollouts", lambda *args: batches.append(make(*args)) or batches[-1])
        return path, job.run(config, str(path)), batches


def test_run_writes_all_that_it_promises(finished, supervised):
    path, results, _ = finished
    assert [r.policy for r in results] == ["full", "golden", "supervised", "grpo", "random"]
    assert all((path / f"loss_ratio.{kind}").exists() for kind in ("txt", "md", "csv", "png"))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    told = {
        "reward", "reward_spread", "groups_without_spread", "clip_fraction", "kl", "entropy",
        "loss_ratio_low", "loss_ratio_high", "grad_norm", "loss", "ratio_off",
    }  # fmt: skip
    assert told <= rows[0].keys()
    assert all(row["ratio_off/epoch_0"] == 0 for row in rows)
    answers = list(csv.DictReader((path / "answers" / "accuracy.csv").open()))
    assert [(a["policy"], a["budget"], a["answers"]) for a in answers] == [
        ("full", "0", "3"), ("supervised", "16", "3"), ("grpo", "16", "3"),
    ]  # fmt: skip
    # Either stage's scorers load alike, and these have moved.
    before, after = fkv.load_scorer(supervised), fkv.load_scorer(path)
    inputs = rundir.read_inputs(path / "answers")
    for name, policy in (("supervised", before), ("grpo", after)):
        assert inputs[rundir.answers_of(name)] == provenance.of_arrays(policy.params)
    assert before.config == after.config
    assert abs(before.params["w1"] - after.params["w1"]).max() > 1e-4


FIGURES = {
    "reward": [-0.2062995, -0.26952, -0.4064125, -0.1249303],
    "reward_spread": [0.04622764, 0.04402908, 0.04709784, 0.01953065],
    "kl": [-1.034803e-10, 0.005303155, 0.04887793, 0.1272027],
    "clip_fraction": [0.0, 0.0, 0.0, 0.0],
    "entropy": [2.354861, 2.340837, 2.320787, 2.35243],
    "grad_norm": [0.6314532, 0.5953993, 0.5942366, 0.7528858],
    "loss_ratio_low": [0.9984843, 1.017207, 1.024525, 0.9765803],
    "loss_ratio_high": [0.9872386, 1.051772, 0.9926494, 0.9573084],
    "added_low": [-0.00703051, 0.08506147, 0.1125209, -0.1069512],
    "added_high": [-0.05908907, 0.2412071, -0.03563182, -0.203892],
    "table, full": [0.0, 0.0, 0.0],
    "table, golden": [-0.1057413, -0.1182745, -0.05231114],
    "table, supervised": [0.05324585, 0.07221768, -0.02763517],
    "table, grpo": [0.002062988, 0.02340717, -0.08892993],
    "table, random": [0.02292099, 0.05837405, -0.1282226],
}  # fmt: skip


def test_figures_of_a_seeded_run(finished):
    path, results, _ = finished
    rows = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    names = (
        "reward", "reward_spread", "kl", "clip_fraction", "entropy", "grad_norm",
        "loss_ratio_low", "loss_ratio_high", "added_low", "added_high",
    )  # fmt: skip
    found = {name: figures.column(rows, name) for name in names}
    # Nats added per token: of all, low- and high-entropy ones.
    found |= {f"table, {r.policy}": [r.added(kind)[0] for kind in range(3)] for r in results}
    figures.check(found, FIGURES)


def test_no_two_rollouts_of_a_run_draw_alike(finished):
    keys = np.concatenate([np.asarray(batch.random_b) for batch in finished[2]])
    assert len(keys) == 4 * 2 * 3
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_the_table_has_the_scorers_that_it_names(finished, supervised):
    # The supervised run has measured its own, on the same traces.
    rows = csv.DictReader((supervised / "loss_ratio.csv").open())
    ours, before = finished[1], {row["policy"]: float(row["ratio"]) for row in rows}
    ratio = {r.policy: r.ratio()[0] for r in ours}
    for name, measured in (("golden", "golden"), ("supervised", "foresight"), ("random", "random")):
        assert ratio[name] == pytest.approx(before[measured], rel=1e-5), name
    assert abs(ratio["grpo"] - ratio["supervised"]) > 1e-4


def test_rows_count_what_an_eviction_can_change_and_the_model_wrote(model_dir):
    config, rng = shrink(small(model_dir), ""), np.random.default_rng(0)
    token = rng.integers(9, size=(3, 48))
    # Prompts shorter than B + L = 24, longer, and of all but one token.
    length, prompt = np.array([30, 48, 40]), np.array([5, 33, 39])
    found = Traces(token, length, prompt, np.full(3, 48))
    full = rng.random((2, 3, 47))
    ids = np.array([2, 0, 1])
    plan = job.plan_of(config, parallel.make_mesh())
    rows = job._rollouts(plan, found, lambda ids: full[:, ids], ids, jax.random.key(0))
    batch, counted_bt = rows.batch, np.asarray(rows.batch.counted_bt(24))
    assert len(counted_bt) == 9  # three rollouts of each, side by side
    for row, i in enumerate(np.repeat(ids, 3)):
        np.testing.assert_array_equal(batch.token_bt[row], token[i])
        np.testing.assert_array_equal(rows.full_bt[row], full[0, i])
        np.testing.assert_array_equal(rows.entropy_bt[row], full[1, i])
        assert batch.length_b[row] == length[i]
        # Entry t is about token t + 1.
        counted = [t for t in range(47) if max(24, prompt[i]) <= t + 1 < length[i]]
        assert np.flatnonzero(counted_bt[row]).tolist() == counted
    assert len(np.unique(rows.random_b, axis=0)) == 9


def test_sums_become_ratios_of_the_tokens_that_there_are():
    sums = dict(reward=1.0, evicted_low=6.0, full_low=4.0, tokens_low=8.0)
    sums |= dict(evicted_high=9.0, full_high=3.0, tokens_high=2.0)
    low = dict(reward=1.0, loss_ratio_low=1.5, added_low=0.25)
    assert job._with_ratios(sums) == {**low, "loss_ratio_high": 3.0, "added_high": 3.0}
    nothing = dict(evicted_high=0.0, full_high=0.0, tokens_high=0.0)
    assert job._with_ratios({**sums, **nothing}) == low


def test_the_optimiser_is_that_of_the_config():
    config = small("")
    config.grpo.update(learning_rate=0.2, warmup=3, clip_norm=0.5)
    plan = job.plan_of(config, parallel.make_mesh())
    adam = optax.adam(optax.linear_schedule(0.2 / 4, 0.2, 3))
    same_updates(plan.optimiser, optax.chain(optax.clip_by_global_norm(0.5), adam))


def test_interrupted_and_resumed_equals_uninterrupted(
    model_dir, supervised, finished, tmp_path, sigterm_in
):
    config = shrink(small(model_dir), supervised)
    sigterm_in(fit, "micro_batches", 3)  # once a step
    with pytest.raises(preemption.Preempted):
        job.run(config, str(tmp_path))
    assert checkpoint.latest_step(tmp_path) == 3
    sigterm_in.undo()
    job.run(config, str(tmp_path))
    for name in ("metrics.jsonl", "loss_ratio.csv"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes(), name
    one, two = (checkpoint.load(path).state for path in (tmp_path, finished[0]))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_step_in_parts_is_the_step(model_dir, supervised, finished, tmp_path):
    config = shrink(small(model_dir), supervised)
    config.grpo.traces_at_once = 1
    job.run(config, str(tmp_path))
    with (finished[0] / "metrics.jsonl").open() as file:
        names = set(json.loads(next(file))) - {"step"}
    assert {"reward", "loss", "kl", "entropy", "grad_norm", "added_low", "reward_spread"} <= names
    same_training(tmp_path, finished[0], 4, names, rel=1e-3, abs=1e-6)


def test_infinity_stops_the_run_and_names_the_traces(model_dir, supervised, tmp_path, monkeypatch):
    step = grpo.train_step

    def poisoned(*args, **kwargs):
        state, metrics = step(*args, **kwargs)
        late = state.step == 3
        return state, {**metrics, "reward": jax.numpy.where(late, jax.numpy.nan, 0.0)}

    monkeypatch.setattr(grpo, "train_step", poisoned)
    with pytest.raises(DivergedError, match=r"reward of step 3 \(traces \[\d+, \d+.* is NaN or"):
        job.run(shrink(small(model_dir), supervised), str(tmp_path))
    assert checkpoint.latest_step(tmp_path) == 2
    assert fkv.load_scorer(tmp_path).params["w1"].shape == (2, 1, 32, 16)


def test_rewards_compare_with_the_model_itself_whatever_its_cache(model_dir):
    config, mesh = shrink(small(model_dir), ""), parallel.make_mesh()
    lm, plan = common.load_model(config), job.plan_of(config, mesh)
    found = common.load_traces(config, "train", 4, config.budget, lm.config.vocab_size)
    plain, int8 = (
        job.FullCache(
            plan, LM(lm.params, dataclasses.replace(lm.config, cache_dtype=name)), found, mesh
        )
        for name in ("", "int8")
    )
    jax.tree.map(np.testing.assert_array_equal, int8(np.arange(2)), plain(np.arange(2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grpo__scorer="nowhere"), r"grpo.scorer = 'nowhere': no checkpoint .* launch.sft"),
        (dict(scorer__hidden=8), r"holds scorers of .*hidden=16.* config.scorer is .*hidden=8"),
        (dict(grpo__reward="most"), "grpo.reward = 'most' must be one of"),
        (
            dict(grpo__traces=3, grpo__traces_at_once=2),
            "traces_at_once: micro-batches of 6 must divide",
        ),
        (dict(grpo__traces_at_once=1, grpo__epochs=2), "grpo.epochs must be 1 with micro-batches"),
        (dict(grpo__traces=64), "batch = 64 is larger than the number of traces, 16"),
        (dict(budget=12), "budget = 12 must be a multiple of interval = 8"),
    ],
)
def test_bad_input_is_refused_before_work_starts(model_dir, supervised, tmp_path, change, message):
    config = shrink(small(model_dir), supervised)
    for name, value in change.items():
        *path, leaf = name.split("__")
        group = config[path[0]] if path else config
        group[leaf] = value
    with pytest.raises(UserError, match=message):
        job.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_longer_run_answers_anew_where_its_scorers_have_changed(
    model_dir, supervised, finished, tmp_path, monkeypatch
):
    path = shutil.copytree(finished[0], tmp_path / "run")
    config = shrink(small(model_dir), supervised)
    config.grpo.answers, config.evaluate.new_tokens, config.grpo.steps = 3, 24, 5
    # What can't be gone on with in the end is refused before the first step.
    config.evaluate.temperature = 1.0
    monkeypatch.setattr(grpo, "train_step", None)
    with pytest.raises(
        UserError, match=r"answers holds .*temperature: 0.6 -> 1.0.* grpo.answers to"
    ):
        job.run(config, str(path))
    config.evaluate.temperature = 0.6
    monkeypatch.undo()

    job.run(config, str(path))
    old, new = (by_key(answers(x / "answers")) for x in (finished[0], path))
    assert old.keys() == new.keys()  # none is lost, none is there twice
    assert all(old[key] == new[key] for key in old if key[0] != "grpo")
    model, now = fkv.load(model_dir, "float32"), fkv.load_scorer(path)
    problems, shape = (
        evaluate._problems(config, model, None),
        answering.Shape(config.evaluate.batch, 64, 24),
    )
    sampling = Sampling(0.6, 20, 0.95)
    plan = evaluate.Plan({}, {}, model, None, problems, shape, sampling, None, [])
    for i in range(3):
        [[row]] = evaluate._answered(config, plan, ("grpo", 16, now), [(i, 0)])
        assert row["text"] == new["grpo", 16, str(i), 0]["text"]
    table = list(csv.DictReader((path / "answers" / "accuracy.csv").open()))
    assert [(a["policy"], a["answers"]) for a in table] == [
        ("full", "3"), ("supervised", "3"), ("grpo", "3"),
    ]  # fmt: skip


def test_other_scorers_to_start_from_are_refused(model_dir, supervised, finished, tmp_path):
    path, other = (shutil.copytree(x, tmp_path / x.name) for x in (finished[0], supervised))
    saved = checkpoint.load(other)
    saved.state["params"]["w1"] *= 2
    checkpoint.save(other, saved.step + 1, saved.state, saved.info)
    config = shrink(small(model_dir), supervised)
    changed = json.loads((path / "config.json").read_text())
    changed["grpo"]["scorer"] = config.grpo.scorer = str(other)
    (path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"\(grpo.scorer: scorers to start from\): use another"):
        job.run(config, str(path))
