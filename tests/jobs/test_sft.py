"""The supervised job from a config to a table, on a reasoner too small to reason."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fkv
from configs import tiny
from fkv import models
from fkv.cache.cadence import Cadence
from fkv.data import traces
from fkv.errors import UserError
from fkv.jobs import common, sft, training
from fkv.learning import fit
from fkv.learning import sft as stage
from fkv.models import ModelConfig
from fkv.runs import checkpoint, parallel, preemption
from fkv.runs.rundir import open_run, read_inputs
from fkv.tasks import ledger
from launch import app, flags
from tests import figures

SEED = 3  # what takes 0 for it is noticed


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A Hugging Face directory of a random decoder with the ledger's vocabulary."""
    config = ModelConfig(
        "qwen3", len(ledger.VOCABULARY), 16, 2, 2, 1, 8, 16, qk_norm=True, tied_embeddings=True
    )
    path = tmp_path_factory.mktemp("model")
    models.save(path, models.LM(jax.device_get(models.init(jax.random.key(0), config)), config))
    ledger.tokenizer().save_pretrained(path)
    return str(path)


def small(model_dir, **changes):
    """The tiny recipe, tinier; `changes` are dotted overrides with `__` for the dot."""
    config = tiny.get_config()
    config.seed = SEED
    config.model = model_dir
    config.budget = 16
    config.interval = 8
    config.task.facts, config.task.hops = (4, 6), (3, 4)
    config.task.remarks, config.task.marks = (0, 1), (0, 1)
    config.data.traces = 16
    config.sft.steps, config.sft.batch, config.sft.checkpoint_every = 6, 2, 2
    config.sft.warmup, config.sft.log_every = 1, 1
    config.eval.budgets, config.eval.traces, config.eval.batch = (16, 24), 6, 4
    config.eval.policies = ("snapkv", "random")
    for name, value in changes.items():
        *path, leaf = name.split("__")
        group = config
        for part in path:
            group = group[part]
        group[leaf] = value
    return config


def uneven(model_dir, **changes):
    """The same with traces of 46 to 98 tokens, in two buckets."""
    mixed = dict(task__facts=(2, 8), task__hops=(1, 6), data__buckets=2)
    return small(model_dir, **mixed, **changes)


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """A finished run, not to be changed, and its results."""
    path = tmp_path_factory.mktemp("finished")
    return path, sft.run(uneven(model_dir), str(path))


@pytest.fixture
def finished_copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def test_a_run_that_diverges_ends_in_one_line(model_dir, tmp_path, monkeypatch, capsys):
    step = stage.train_step

    def poisoned(*args, **kwargs):
        states, (metrics,) = step(*args, **kwargs)
        late = states[0].step == 3
        return states, [{**metrics, "grad_norm": jnp.where(late, jnp.inf, 1.0)}]

    monkeypatch.setattr(stage, "train_step", poisoned)
    with pytest.raises(SystemExit) as end:
        app.guard(lambda _: sft.run(small(model_dir), str(tmp_path)), [])
    assert end.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        "error: grad_norm of step 3 (traces [5, 3]) is NaN or infinite: set sft.learning_rate "
        f"lower, or dtype to one with a wider range, and use another --workdir; the checkpoints in "
        f"{tmp_path} are intact"
    )
    assert checkpoint.latest_step(tmp_path) == 2


def test_run_writes_all_that_it_promises(finished):
    path, results = finished

    names = ["full", "golden", "foresight", "snapkv", "random"]
    assert [(r.policy, r.budget) for r in results] == [(n, b) for b in (16, 24) for n in names]
    assert all(np.isfinite(r.ratio()).all() and r.ratio()[0] > 0 for r in results)
    table = (path / "loss_ratio.txt").read_text()
    assert all(name in table for name in names)
    assert len((path / "loss_ratio.csv").read_text().splitlines()) == 1 + len(results)
    assert (path / "loss_ratio.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((path / "config.json").read_text())["budget"] == 16
    assert (path / "commit.txt").read_text().strip()
    assert list((path / "tb").iterdir())
    times = [json.loads(line) for line in (path / "times.jsonl").open()]
    assert all(x["seconds"] > 0 and x["traces_per_second"] > x["steps_per_second"] for x in times)
    steps = [json.loads(line)["step"] for line in (path / "metrics.jsonl").open()]
    assert [x["step"] for x in times] == steps
    assert steps == [1, 2, 3, 4, 5, 6]
    saved = checkpoint.load(path)
    assert saved.step == 6 and saved.info["data"] == {"next_index": 6}


FIGURES = {
    "loss": [2.228517, 1.989918, 2.017133, 1.889919, 1.923734, 1.878608],
    "overlap": [0.4453125, 0.5236607, 0.53125, 0.546875, 0.5347222, 0.5178571],
    "grad_norm": [2.036395, 1.834898, 1.618019, 0.888815, 1.44189, 1.112987],
    "full, 16": [0.0, 0.0, 0.0],
    "golden, 16": [-0.07921267, -0.08435266, -0.05670599, 1.0],
    "foresight, 16": [0.07059003, 0.1000066, -0.05820599, 0.5504093],
    "snapkv, 16": [0.01080905, 0.023042, -0.04275049, 0.5375537],
    "random, 16": [0.04992626, 0.09243407, -0.1361885, 0.5017155],
    "full, 24": [0.0, 0.0, 0.0],
    "golden, 24": [-0.02417023, -0.02749243, -0.009624894, 1.0],
    "foresight, 24": [0.03430321, 0.03886428, 0.01433558, 0.3584202],
    "snapkv, 24": [-0.02143998, -0.03080943, 0.01958455, 0.3879465],
    "random, 24": [-0.00456257, 0.009461391, -0.06596318, 0.3489335],
}  # fmt: skip


def test_figures_of_a_seeded_run(finished):
    path, results = finished
    rows = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    found = {name: figures.column(rows, name) for name in ("loss", "overlap", "grad_norm")}
    for r in results:  # nats added per token of all kinds, and the golden overlap
        numbers = [*(r.added(kind)[0] for kind in range(3)), r.mean_overlap()[0]]
        found[f"{r.policy}, {r.budget}"] = [x for x in numbers if np.isfinite(x)]
    figures.check(found, FIGURES)


def test_both_lengths_are_trained_on(model_dir, finished):
    config = uneven(model_dir)
    found = common.load_traces(config, "train", 16, 16, len(ledger.VOCABULARY), 2)
    order = traces.batches(found, config.sft.batch, config.seed)
    assert {int(found.padded_n[order[i]].max()) for i in range(6)} == {56, 104}


def test_interrupted_and_resumed_equals_uninterrupted(
    model_dir, finished, tmp_path, sigterm_in, capsys
):
    straight, broken = finished[0], tmp_path
    config = uneven(model_dir)

    sigterm_in(fit, "micro_batches", 3)  # once a step
    with pytest.raises(preemption.Preempted) as ended:
        sft.run(config, str(broken))
    assert ended.value.code == 143  # as a process that SIGTERM has ended: there is more to do
    assert f"step 3 is saved in {broken}; rerun the same command" in capsys.readouterr().out
    assert checkpoint.latest_step(broken) == 3
    sigterm_in.undo()
    sft.run(config, str(broken))

    for name in ("metrics.jsonl", "loss_ratio.csv", "loss_ratio.txt"):
        assert (straight / name).read_text() == (broken / name).read_text(), name
    one, two = (checkpoint.load(path).state for path in (straight, broken))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def same_training(path, other, step, names, **tolerance):
    """Two runs that differ by rounding: their scorers, and these metrics of every step."""
    one, two = (checkpoint.load(x).state for x in (path, other))
    assert one["step"] == two["step"] == step
    for name, x in two["params"].items():
        np.testing.assert_allclose(one["params"][name], x, rtol=1e-4, atol=1e-6, err_msg=name)
    rows, whole = (
        [json.loads(line) for line in (x / "metrics.jsonl").open()] for x in (path, other)
    )
    assert [r["step"] for r in rows] == [r["step"] for r in whole]
    for a, b in zip(rows, whole, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], **tolerance), name


def test_a_batch_in_parts_is_the_batch(model_dir, finished, tmp_path):
    sft.run(uneven(model_dir, sft__at_once=1), str(tmp_path))
    same_training(tmp_path, finished[0], 6, ("loss", "overlap", "grad_norm"), rel=1e-4)


def same_updates(one, two):
    """Whether two optimisers make the same of gradients of all sizes."""
    states = [x.init(jnp.zeros(2)) for x in (one, two)]
    for size in (9.0, 0.1, 3.0, 0.4):
        found = [
            x.update(jnp.full(2, size), state) for x, state in zip((one, two), states, strict=True)
        ]
        np.testing.assert_array_equal(found[0][0], found[1][0])
        states = [state for _, state in found]


def test_the_step_is_that_of_the_config():
    config = small("", budget=24)
    config.sft.update(learning_rate=0.2, warmup=2, clip=0.5, margin=0.3, weighting="plain")
    plan = sft.plan_of(config, parallel.make_mesh())
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.2, 2, 6)
    same_updates(plan.optimiser, optax.chain(optax.clip_by_global_norm(0.5), optax.adam(schedule)))
    assert plan.loss == stage.LossConfig(0.3, "plain") and plan.cadence == Cadence(24, 8)


def test_trained_scorers_load_as_a_policy(finished):
    policy = fkv.load_scorer(finished[0])
    assert policy.config.norm == "rms"
    # layers, KV heads, key + value + 8 features for each of 2 query heads, hidden
    assert policy.params["w1"].shape == (2, 1, 8 + 8 + 8 * 2, 16)


def test_short_traces_are_skipped_and_counted(capsys):
    config = small("", task__facts=(2, 8), task__hops=(1, 8))
    lengths = [len(s) for s in traces.embedded(SEED, "train", 64, common.spec(config))[0]]
    longer = sum(length > 72 for length in lengths)
    assert 0 < longer < 64
    found = common.load_traces(config, "train", 64, 64, len(ledger.VOCABULARY))
    assert len(found) == longer and found.skipped == 64 - longer
    assert f"embedded task, train: skipped {64 - longer} of 64 traces" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(budget=8), "budget = 8 must be larger than interval = 8"),
        (dict(budget=20), "budget = 20 must be a multiple of interval = 8"),
        (dict(eval__budgets=(16, 20)), "eval.budgets: budget = 20 must be a multiple"),
        (dict(budget=4096), "longer than budget"),
        (dict(eval__policies=("snapkw",)), "choose from ada, expected_attention, forced,"),
        (dict(eval__policies=("forced",)), "policy 'forced' needs position_yebkl"),
        (dict(scorer__norm="layer"), "scorer.norm = 'layer' must be one of none, rms"),
        (dict(sft__weighting="no"), "weighting = 'no' must be one of plain, sqrt_gap"),
        (dict(model="nowhere/at/all"), "nowhere/at/all"),
        (dict(data__path="gone.parquet", data__eval_path="gone.parquet"), "gone.parquet"),
        (dict(sft__warmup=6), "sft.warmup = 6 must be less than sft.steps = 6"),
        (dict(sft__at_once=4), "sft.at_once: micro-batches of 4 must divide the batch of 2"),
        (dict(sft__batch=64), "batch = 64 is larger than the number of traces, 16"),
    ],
)
def test_bad_input_is_refused_before_work_starts(model_dir, tmp_path, change, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as raised:
        sft.run(small(model_dir, **change), str(tmp_path / "run"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_config_that_does_not_fit_the_checkpoint(model_dir, finished_copy):
    with pytest.raises(UserError, match=r"scorer\.hidden: 16 -> 8"):
        sft.run(uneven(model_dir, scorer__hidden=8), str(finished_copy))


def test_a_damaged_checkpoint_costs_its_steps_only(model_dir, finished, finished_copy, capsys):
    files = (finished_copy / "checkpoints" / "6" / "state").rglob("*")
    largest = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(UserError, match=r"checkpoints/6 is damaged .* rerun the job that made it"):
        fkv.load_scorer(finished_copy)
    sft.run(uneven(model_dir), str(finished_copy))
    said = capsys.readouterr().out
    assert "checkpoints/6 is damaged" in said and "resuming from step 4 in" in said
    for name in ("metrics.jsonl", "loss_ratio.csv"):
        assert (finished_copy / name).read_bytes() == (finished[0] / name).read_bytes(), name
    one, two = (checkpoint.load(path).state for path in (finished[0], finished_copy))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        fkv.load_scorer(tmp_path)


def test_command_line(model_dir, finished, tmp_path):
    """The very command of the README, at the smallest size: what `run` does, from a shell."""
    overrides = (
        f"seed={SEED}", f"model={model_dir}", "budget=16", "interval=8",
        "task.facts=(2, 8)", "task.hops=(1, 6)",
        "task.remarks=(0, 1)", "task.marks=(0, 1)", "data.traces=16", "data.buckets=2",
        "sft.steps=6", "sft.batch=2", "sft.warmup=1", "sft.log_every=1",
        "sft.checkpoint_every=2", "eval.budgets=(16, 24)",
        "eval.traces=6", "eval.batch=4", "eval.policies=('snapkv', 'random')",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "launch.sft", "--config=configs/tiny.py", f"--workdir={tmp_path}",
         *(f"--config.{o}" for o in overrides)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "golden" in done.stdout and "foresight" in done.stdout
    assert "sft: 100%" in done.stderr
    for name in ("config.json", "metrics.jsonl", "loss_ratio.csv"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_errors_of_the_command_line_are_one_line(capsys):
    command = ["launch/sft.py", "--config=configs/tiny.py", "--config.bugdet=3"]
    with pytest.raises(SystemExit) as end:
        app.guard(lambda argv: sft.run(*flags.parse(argv)), command)
    assert end.value.code == 2
    error = "error: config has no field 'bugdet': did you mean budget?\n"
    assert capsys.readouterr() == ("", error)


def test_traces_and_weights_that_were_replaced_are_refused(model_dir, finished, tmp_path):
    """When all steps are done, too: the table would be of scorers that have not seen them."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    rows = [
        {"input_ids": sequence.tolist(), "prompt": length}
        for sequence, length in zip(
            *traces.embedded(0, "x", 12, common.spec(small(""))), strict=True
        )
    ]
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"

    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(train, rows[:8])
    write(held_out, rows[8:])
    config = small(str(model), data__path=str(train), data__eval_path=str(held_out))
    config.data.prompt_column, config.eval.budgets, config.eval.policies = "prompt", (16,), ()
    path = str(tmp_path / "run")
    inputs = training.training_inputs(
        config,
        *(common.load_traces(config, split, 16, 16, 10**6) for split in ("train", "eval")),
    )
    open_run(path, config, (), inputs)  # as if all had been done

    changed = [{**rows[0], "input_ids": rows[0]["input_ids"][::-1]}, *rows[1:8]]
    for file, new, message in (
        (train, changed, "data.path: traces"),
        (train, rows[:7], "data.path: traces"),
        (train, rows[:9], "data.path: traces"),
        (train, [{**row, "prompt": 3} for row in rows[:8]], "data.path: traces"),
        (held_out, rows[9:], "data.eval_path: held-out traces"),
    ):
        old = file.read_text()
        write(file, new)
        with pytest.raises(UserError, match=rf"changed since \({message}\): use another"):
            sft.run(config, path)
        file.write_text(old)
    models.save(model, jax.device_get(jax.tree.map(lambda x: -x, models.load(model))))
    with pytest.raises(UserError, match=r"changed since \(model: its weights\): use another"):
        sft.run(config, path)


def test_what_was_used_is_recorded(model_dir, finished):
    assert set(read_inputs(finished[0])) == {
        "model: its weights", "data.path: traces", "data.eval_path: held-out traces",
    }  # fmt: skip
