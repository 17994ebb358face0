"""Scorers that learn side by side from one golden pass: each as if it had been alone."""

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from fkv.errors import DivergedError, UserError
from fkv.evaluation import loss_ratio, plots
from fkv.jobs import common, groups, sft, variants
from fkv.learning import fit
from fkv.learning import sft as stage
from fkv.runs import checkpoint, preemption
from tests import kill
from tests.jobs import test_sft

# Between them, every field that variants may change. Two share the golden states.
VARIANTS = (
    "keys:scorer.inputs=kv,scorer.norm=none,sft.scorer_seed=1,sft.states=own",
    "small:scorer.hidden=4,sft.margin=0.3,sft.weighting=plain",
    "attention:scorer.inputs=attention,sft.updates=eviction,sft.learning_rate=0.1,sft.warmup=2,"
    "sft.clip=0.01",
)
NAMES = [text.partition(":")[0] for text in VARIANTS]
# Two are enough for what does not depend on the fields; and compiling takes the time.
PAIR = ("plain", VARIANTS[1])
PAIRED = ("plain", NAMES[1])


model_dir = test_sft.model_dir


def several(model_dir, names=PAIR):
    # In micro-batches, which updates at evictions can't be.
    at_once = 0 if names is VARIANTS else 1
    config = test_sft.uneven(model_dir, sft__variants=names, sft__at_once=at_once)
    # Compiling takes the time: one width of batches, one budget in the table.
    config.data.buckets, config.eval.budgets = 1, (16,)
    return config


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """A finished run of the pair, not to be changed, and its results."""
    path = tmp_path_factory.mktemp("finished") / "run"
    return path, sft.run(several(model_dir), str(path))


def same(one, two, without=()):
    """Run directories whose files, but those of TensorBoard, are equal to the byte."""
    a, b = kill.contents(one), kill.contents(two)
    assert a.keys() == b.keys() and len([x for x in a if "checkpoints" in x]) > 20
    assert [name for name in a if a[name] != b[name] and name not in without] == []


def fake_measure(lm, named, traces, cadence):
    """Losses that tell scorers apart: compiling the real ones for each run takes the time."""

    def loss(policy):
        params = jax.tree.leaves(policy)
        return 1 + abs(sum(float(np.asarray(x, np.float64).sum()) for x in params))

    ones = np.ones((len(traces.batch.length_b), 3))
    return [
        loss_ratio.Losses(name, cadence.budget, cadence.interval, loss(policy) * ones, ones, ones)
        for name, policy in {"full": (), "golden": (), **named}.items()
    ]


def run_all(model_dir, root):
    """All variants side by side, and each as a run of its own."""
    config = several(model_dir, VARIANTS)
    config.eval.policies = ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_ratio, "measure", fake_measure)
        patch.setattr(plots, "loss_ratios", lambda results, path, *title: path.touch())
        sft.run(config, str(root / "together"))
        for name, one in variants.resolve(config, groups.FIELDS).items():
            assert one.sft.variants == () and one.is_locked
            sft.run(one, str(root / "alone" / name))


SCRIPT = """
import sys
from pathlib import Path
from tests.jobs import test_variants

test_variants.run_all(sys.argv[1], Path(sys.argv[2]))
"""


def test_a_variant_is_the_run_that_it_would_be_alone(model_dir, tmp_path):
    """To the last bit, as XLA compiles by default: what tests turn off decides how it fuses."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")
    command = [sys.executable, "-c", SCRIPT, model_dir, str(tmp_path)]
    subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, check=True)
    for name in NAMES:
        same(tmp_path / "together" / name, tmp_path / "alone" / name)


def test_the_fields_of_variants_are_their_own(model_dir):
    found = variants.resolve(several(model_dir, VARIANTS), groups.FIELDS)
    changed = {x.partition("=")[0] for text in VARIANTS for x in text.partition(":")[2].split(",")}
    assert changed - {""} == {*variants.FIELDS}
    keys, small, attention = (found[name] for name in NAMES)
    assert (keys.scorer.inputs, keys.scorer.norm, keys.sft.scorer_seed) == ("kv", "none", 1)
    assert keys.sft.states == "own"
    assert (small.scorer.hidden, small.sft.margin, small.sft.weighting) == (4, 0.3, "plain")
    a = attention.sft
    assert (a.learning_rate, a.warmup, a.clip) == (0.1, 2, 0.01)
    plain = variants.resolve(several(model_dir), groups.FIELDS)["plain"]
    assert plain.sft.to_dict() == {**several(model_dir).sft.to_dict(), "variants": ()}


def test_one_table_has_them_all_and_the_baselines_once(finished):
    path, results = finished
    names = ["full", "golden", *PAIRED, "snapkv", "random"]
    assert [(r.policy, r.budget) for r in results] == [(n, 16) for n in names]
    lines = (path / "loss_ratio.csv").read_text().splitlines()
    assert len(lines) == 1 + len(results)
    own = (path / "small" / "loss_ratio.csv").read_text().splitlines()
    assert set(line.replace("foresight", "small") for line in own) < {*lines}
    ratios = {r.policy: r.ratio()[0] for r in results if r.budget == 16}
    assert len({ratios[name] for name in PAIRED}) == len(PAIRED)
    assert not (path / "checkpoints").exists()


def test_points_of_a_sweep_run_together(model_dir, finished, tmp_path, monkeypatch):
    """As `launch.sweep` starts them: each in its directory, and no table beside them."""
    path, values = tmp_path / "some.py", []
    for text in PAIR:
        name, _, changes = text.partition(":")
        pairs = [x.split("=") for x in changes.split(",") if x]
        values.append((name, {k: int(v) if v.isdigit() else v for k, v in pairs}))
    path.write_text(
        "from fkv.runs.sweep import Point\nfrom tests.jobs import test_variants\n"
        f"get_config = lambda: test_variants.several({model_dir!r}, ())\n"
        f"sweep = lambda: [Point('sft', *x) for x in {values!r}]\n"
    )
    options = [f"--config={path}", f"--workdir={tmp_path}/s", f"--points={','.join(PAIRED)}"]
    monkeypatch.setattr(sys, "argv", ["launch/sweep.py", *options, "--together"])
    runpy.run_module("launch.sweep", run_name="__main__")
    for name in PAIRED:
        same(finished[0] / name, tmp_path / "s" / name)
    assert {x.name for x in (tmp_path / "s").iterdir()} == {*PAIRED}


# ---- interrupted


def test_all_are_resumed_after_sigterm(model_dir, finished, tmp_path, sigterm_in, capsys):
    config, path = several(model_dir), tmp_path / "run"
    sigterm_in(fit, "micro_batches", 3)
    with pytest.raises(preemption.Preempted):
        sft.run(config, str(path))
    assert f"step 3 is saved in {path}/plain and 1 more" in capsys.readouterr().out
    assert {checkpoint.latest_step(path / name) for name in PAIRED} == {3}
    sigterm_in.undo()
    sft.run(config, str(path))
    assert f"resuming from step 3 in {path}/plain and 1 more" in capsys.readouterr().out
    same(finished[0], path)


@pytest.mark.parametrize("call", [1, 3])
def test_a_kill_between_two_saves(model_dir, finished, tmp_path, monkeypatch, call):
    """Some have a checkpoint of the step then, others not yet; all go on from the one before."""
    config, path = several(model_dir), tmp_path / "run"
    save, calls = checkpoint.save, []

    def stopping(*args, **kwargs):
        save(*args, **kwargs)
        calls.append(args)
        if len(calls) == call:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stopping)
        with pytest.raises(InterruptedError):
            sft.run(config, str(path))
    if call == 3:  # the other lacks step 4
        steps = [checkpoint.latest_step(path / name) for name in PAIRED]
        assert steps == [4, 2] and checkpoint.common_step([path / x for x in PAIRED]) == 2
    sft.run(config, str(path))
    same(finished[0], path)


def test_a_damaged_checkpoint_costs_all_its_steps(model_dir, finished, tmp_path, capsys):
    path = shutil.copytree(finished[0], tmp_path / "run")
    file = path / "small" / "checkpoints" / "6" / "info.json"
    file.write_text(file.read_text() + " ")
    sft.run(several(model_dir), str(path))
    said = capsys.readouterr().out
    assert "small/checkpoints/6 is damaged (info.json: does not match" in said
    assert "resuming from step 4 in" in said
    same(finished[0], path)


def test_an_interrupted_variant_resumes_alone(model_dir, finished, tmp_path, sigterm_in, capsys):
    config, path = several(model_dir, PAIR[:1]), tmp_path / "run"
    sigterm_in(fit, "micro_batches", 4)
    with pytest.raises(preemption.Preempted):
        sft.run(config, str(path))
    sigterm_in.undo()
    sft.run(variants.resolve(config, groups.FIELDS)["plain"], str(path / "plain"))
    assert f"resuming from step 4 in {path}/plain" in capsys.readouterr().out
    runs = [x / "plain" for x in (finished[0], path)]
    rows = [(x / "metrics.jsonl").read_text().splitlines() for x in runs]
    assert [json.loads(row)["step"] for row in rows[0]] == [json.loads(x)["step"] for x in rows[1]]
    tables = [list(csv.DictReader((x / "loss_ratio.csv").open())) for x in runs]
    some, others = ({x["policy"]: float(x["ratio"]) for x in table} for table in tables)
    assert some == pytest.approx(others, rel=1e-4) and len(some) == 5


def test_the_one_that_diverges_is_named(model_dir, tmp_path, monkeypatch):
    step = stage.train_step

    def poisoned(*args, **kwargs):
        states, metrics = step(*args, **kwargs)
        metrics[1]["loss"] *= np.nan
        return states, metrics

    monkeypatch.setattr(stage, "train_step", poisoned)
    with pytest.raises(
        DivergedError, match=rf"^{tmp_path}/small: loss of step 1 .* is NaN or infin"
    ):
        sft.run(several(model_dir), str(tmp_path))


# ---- refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "a:scorer.hidden=4"), "'a:scorer.hidden=4': two variants have this name"),
        (("a", "A:scorer.hidden=4"), "'A:scorer.hidden=4': two variants have this name"),
        (("a", "b:scorer.hidden=16"), "'a' and 'b' are the same: leave one out"),
        (("../a",), "'../a': a name has at most 100 letters, digits and _ + -"),
        (("",), "'': a name has at most 100 letters"),
        (("a b",), "'a b': a name has"),
        (("a" * 101,), "a name has at most 100"),
        (("checkpoints",), "'checkpoints': 'checkpoints' is the name of a folder"),
        (("snapkv",), "'snapkv': 'snapkv' is the name of a row of the table"),
        (("golden:scorer.hidden=4",), "'golden' is the name of a row of the table"),
        (("a:scorer.hiden=4",), "can't change 'scorer.hiden': did you mean scorer.hidden"),
        (("a:hidden=4",), "can't change 'hidden': did you mean scorer.hidden?"),
        (("a:scorer.form=reference",), "can't change 'scorer.form'"),
        (("a:budget=32",), "can't change 'budget': choose from scorer.inputs, scorer.hidden"),
        (("a:seed=1",), "can't change 'seed': choose from scorer.inputs"),
        (("a:scorer.hidden",), "'scorer.hidden' must be of the form field=value"),
        (("a:scorer.hidden=4,scorer.hidden=8",), "scorer.hidden is given twice"),
        (("a:scorer.hidden=many",), "scorer.hidden = 'many' must be a whole number from 1"),
        (("a:scorer.hidden=1.5",), "scorer.hidden = '1.5' must be a whole number"),
        (("a:sft.learning_rate=0",), "sft.learning_rate = 0.0 must be a number above 0"),
        (("a:sft.clip=nan",), "sft.clip = nan must be a number above 0"),
        (("a:scorer.inputs=keys",), "scorer.inputs = 'keys' must be one of both, attention, kv"),
        (("a:sft.warmup=6", "b"), "/a: sft.warmup = 6 must be less than sft.steps = 6"),
        (("a",) * 2, "two variants have this name"),
    ],
)
def test_impossible_variants_are_refused_before_work_starts(tmp_path, monkeypatch, names, message):
    monkeypatch.setattr(common, "load_model", None)
    monkeypatch.setattr(common, "model_config", None)
    with pytest.raises(UserError) as error:
        sft.run(several("nowhere", names), str(tmp_path / "run"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_other_variants_need_another_directory(model_dir, finished):
    with pytest.raises(UserError, match=r"sft\.variants: .* use another --workdir"):
        sft.run(several(model_dir, VARIANTS[:2]), str(finished[0]))


def test_a_seed_of_the_scorers_changes_nothing_else(model_dir):
    config = several(model_dir, ("a", "b:sft.scorer_seed=4"))
    a, b = variants.resolve(config, groups.FIELDS).values()
    assert (variants.scorer_seed(a), variants.scorer_seed(b)) == (a.seed, a.seed + 4)
    a.unlock().seed += 4
    assert variants.scorer_seed(a) == variants.scorer_seed(b)
    assert variants.shared(a) != variants.shared(b)
    a.seed -= 4
    assert variants.shared(a) == variants.shared(b)
