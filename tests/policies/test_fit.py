"""Scorers and policies that don't fit are refused in one line, before any pass."""

import csv
import dataclasses
import io
import json
import re
import shutil
import warnings
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fkv
from configs import tiny
from fkv import api, kinds, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batcher import Batcher
from fkv.errors import UserError
from fkv.evaluation import accuracy, diagnosis, loss_ratio, loss_table
from fkv.jobs import benchmark, common, evaluate, generate, grpo, sft
from fkv.policies import scorer
from fkv.policies.base import _REGISTRY, check_given
from fkv.policies.foresight import Trained
from fkv.runs import checkpoint, sharing
from tests import oracles

LM = oracles.make_lm()  # of 2 layers, 2 KV heads, groups of 2
CONFIG = LM.config
MODEL = api.Model(LM, None, (), "owner/name")
RULES = scorer.ScorerConfig()
UNKNOWN = Trained()
BUDGET, INTERVAL = 16, 8
CADENCE = Cadence(BUDGET, INTERVAL)


def scorers(rules=RULES, trained=UNKNOWN, **fields):
    config, _ = oracles.make_model(**fields)
    params = jax.tree.map(np.asarray, scorer.init(jax.random.key(0), config, rules))
    return policies.Foresight(params, rules, trained=trained)


def spoiled(name, value, policy=None):
    policy = policy or scorers()
    x = policy.params[name].copy()
    x.flat[1] = value
    return policy.replace(params=policy.params | {name: x})


def one_line(error) -> str:
    assert error.type is UserError and "\n" not in str(error.value)
    return str(error.value)


def run_generate(policy):
    return fkv.generate(MODEL, [[1, 2, 3]], policy, BUDGET, INTERVAL, new_tokens=2)


def run_decoding(policy):
    return Batcher(LM, policy, CADENCE, rows=1, length=4)


def run_replay(policy):
    return replay.replay(LM, oracles.make_batch(CONFIG, [30]), policy, CADENCE)


def run_measure(policy):
    batch = jax.tree.map(np.asarray, oracles.make_batch(CONFIG, [60, 60]))
    keys = replay.row_keys(jax.random.key(0), 2)
    traces = loss_ratio.Traces(batch, keys, np.array([60, 60]), at_once=2)
    return loss_ratio.measure(LM, {"mine": policy}, traces, CADENCE)


def run_retention(policy):
    batch = oracles.make_batch(CONFIG, [30])
    return diagnosis.retention(LM, {"mine": policy}, batch, CADENCE)


ENTRIES = [run_generate, run_decoding, run_replay, run_measure, run_retention]
entries = pytest.mark.parametrize("entry", ENTRIES)


# ---- scorers


@entries
@pytest.mark.parametrize("layers", [1, 5])
def test_scorers_of_other_layers_are_refused_everywhere(entry, layers):
    """Their index would be clamped: the last scorers would stand in for those that are missing."""
    with pytest.raises(UserError) as error:
        entry(scorers(layers=layers, trained=Trained("runs/sft_x")))
    assert (
        f"runs/sft_x: scorers of {layers} layers x 2 KV heads with 32 features don't fit a model "
        "of 2 layers x 2 KV heads with 32 features"
    ) in one_line(error)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (scorers(kv_heads=4), "4 KV heads with 24 features don't fit .* 2 KV heads with 32"),
        (scorers(heads=8), "48 features don't fit .* 32 features"),
        (scorers(scorer.ScorerConfig(inputs="kv")).replace(config=RULES), "16 features don't fit"),
        (scorers(scorer.ScorerConfig(hidden=8)).replace(config=RULES), "with o = 16 hidden units"),
        (policies.Foresight({}, RULES), "are not the float32 w1"),
        (policies.Foresight(None, RULES), "are not the float32 w1"),
        (policies.Foresight(scorers().params | {"w3": np.zeros(2)}, RULES), "are not the float32"),
        (policies.Foresight(scorers().params | {"b2": [1.0]}, RULES), r"'b2': 'list\[\]'"),
        (
            policies.Foresight(jax.tree.map(lambda x: x[0], scorers().params), RULES),
            r"float32\[2, 32, 16\]",
        ),
        (
            policies.Foresight(jax.tree.map(lambda x: x.astype(int), scorers().params), RULES),
            "int64",
        ),
        (spoiled("w1", np.nan), "params w1 holds numbers that are not finite"),
        (spoiled("b2", np.inf), "params b2 holds numbers that are not finite"),
    ],
)
def test_scorers_of_another_shape_are_refused(policy, message):
    for entry in (run_generate, run_replay):
        with pytest.raises(UserError, match=message) as error:
            entry(policy)
        one_line(error)


def test_groups_that_reference_statistics_do_not_know_are_refused_before_a_pass():
    wide, _ = oracles.make_model(heads=9, kv_heads=1)
    policy = scorers(scorer.ScorerConfig(form="reference"), heads=9, kv_heads=1)
    with pytest.raises(UserError, match="at most 8 query heads per group"):
        replay.check(policy, wide, CADENCE)


def test_another_interval_is_refused_unless_asked_for():
    policy = scorers(trained=Trained("runs/sft_x", "owner/name", "", 48, 16))
    for entry in ENTRIES:
        with pytest.raises(UserError) as error:
            entry(policy)
        assert "runs/sft_x: trained at interval = 16, not 8: set interval to 16" in one_line(error)
    replay.check(policy, CONFIG, Cadence(32, 16))  # another budget is normal
    replay.check(policy.replace(any_interval=True), CONFIG, CADENCE)
    run_generate(scorers(trained=Trained("released")))  # which know no interval


def test_another_model_is_a_warning_that_names_both(tmp_path, monkeypatch):
    trained = Trained("runs/sft_x", "other/model", "v1")
    with pytest.warns(UserWarning, match="runs/sft_x: .* other/model@v1, and used with owner/name"):
        run_generate(scorers(trained=trained))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_generate(scorers(trained=Trained("runs/sft_x", "owner/name", "main")))
        run_generate(scorers())
    assert Trained(model="a/b", revision="x").other_model("a/b", None)
    assert not Trained(model="a/b").other_model("a/b", "main")
    # A directory is the same however it is written, and has no revision.
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not Trained(model="model", revision="x").other_model(f"{tmp_path}/model/", "y")
    assert "a/b" in Trained(model="model").other_model("a/b", "")


def test_scorers_of_one_shape_share_a_program_whatever_they_were_trained_for():
    traces = []

    @jax.jit
    def run(policy):
        traces.append(policy)
        return policy.params["b2"]

    run(scorers(trained=Trained("one", "a", "", 32, 8)))
    run(scorers(trained=Trained("two", "b", "", 64, 8)))
    assert len(traces) == 1


def test_streams_refuse_scorers_before_they_read_the_prompt():
    model = dataclasses.replace(MODEL, tokenizer=object())
    with pytest.raises(UserError, match=r"model owner/name: .*scorers of 5 layers"):
        next(fkv.stream(model, "text", scorers(layers=5), BUDGET, INTERVAL))


# ---- what scorers were trained for, in files


def shared(path, **about):
    known = {"model": "owner/name", "revision": "", "budget": 48, "interval": 16}
    sharing.export(scorers(), path, {**known, **about})
    return path


def test_what_scorers_were_trained_for_is_kept(tmp_path):
    config = tiny.get_config()
    config.model, config.revision, config.budget = "owner/name", "v2", 48
    info = {"config": json.loads(json.dumps(config.to_dict()))}
    checkpoint.save(tmp_path / "run", 3, {"params": scorers().params}, info)
    want = Trained(str(tmp_path / "run"), "owner/name", "v2", 48, 16)
    policy, about = sharing.load(tmp_path / "run")
    assert dataclasses.astuple(policy.trained) == dataclasses.astuple(want)
    assert not policy.any_interval and fkv.load_scorer(tmp_path / "run", None, True).any_interval
    sharing.export(policy, tmp_path / "out", about)
    again = sharing.load(tmp_path / "out")[0].trained
    want = dataclasses.replace(want, source=str(tmp_path / "out"))
    assert dataclasses.astuple(again) == dataclasses.astuple(want)


def test_a_directory_that_says_less_loads(tmp_path):
    path = shared(tmp_path, revision=None)
    about = json.loads((path / "scorer.json").read_text())
    for name in ("model", "budget", "interval"):
        del about[name]
    (path / "scorer.json").write_text(json.dumps(about))
    policy = fkv.load_scorer(path)
    assert dataclasses.astuple(policy.trained) == (str(path), "", "", 0, 0, 0)
    run_generate(policy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(interval="16"), r"scorer.json: interval = '16' must be a whole number"),
        (dict(interval=16.5), r"scorer.json: interval = 16.5 must be"),
        (dict(budget=True), r"scorer.json: budget = True must be"),
        (dict(budget=-1), r"scorer.json: budget = -1 must be"),
        (dict(protect_prompt=-1), r"scorer.json: protect_prompt = -1 must be"),
        (dict(model=3), r"scorer.json: model = 3 must be text"),
        (dict(scorer=dict(hidden=16)), r"scorer.json: scorer lacks 'form': it has form, hidden"),
        (dict(scorer=[1]), r"can't be read \(scorer.json does not describe .*: scorer is \[1\]\)"),
        (dict(scorer=None), r"can't be read \(scorer.json does not describe .*: scorer is None\)"),
        (dict(scorer=dict(dataclasses.asdict(RULES), depth=2)), "has an unknown 'depth'"),
        (dict(scorer=dict(dataclasses.asdict(RULES), hidden=0)), "json: scorer.hidden = 0 must be"),
        (dict(scorer=dict(dataclasses.asdict(RULES), inputs=None)), "scorer.inputs = None must be"),
        (dict(scorer=dict(dataclasses.asdict(RULES), hidden=8)), "with o = 8 hidden units"),
    ],
)
def test_a_wrong_record_is_named(tmp_path, change, message):
    path = shared(tmp_path)
    about = json.loads((path / "scorer.json").read_text())
    (path / "scorer.json").write_text(json.dumps(about | change))
    with pytest.raises(UserError, match=message) as error:
        fkv.load_scorer(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_scorers_that_are_not_finite_do_not_load(tmp_path, value, shared_reference):
    path = shared(tmp_path / "shared")
    tensors = load_file(path / "scorer.safetensors")
    save_file(spoiled("w2", value).params | {"w1": tensors["w1"]}, path / "scorer.safetensors")
    config = tiny.get_config()
    info = {"config": json.loads(json.dumps(config.to_dict()))}
    checkpoint.save(tmp_path / "run", 3, {"params": spoiled("w2", value).params}, info)
    released = tmp_path / "released"
    shutil.copytree(shared_reference / "qwen3_tiny", released, copy_function=shutil.copyfile)
    tensors = load_file(released / "model.safetensors")
    bias = "model.layers.1.self_attn.judge_model.fc2.bias"
    tensors[bias] = tensors[bias] + np.float32(value)
    save_file(tensors, released / "model.safetensors", {"format": "pt"})
    for source in (path, tmp_path / "run", released):
        with pytest.raises(UserError, match=r"(w2|b2) holds numbers that are not finite") as error:
            fkv.load_scorer(source)
        assert str(source) in one_line(error)


@pytest.mark.parametrize(
    "fields",
    [dict(hidden=0), dict(hidden=True), dict(hidden=16.0), dict(inputs=None), dict(norm=1)],
)
def test_a_scorer_config_is_of_the_right_kinds(fields):
    (name,) = fields
    with pytest.raises(UserError, match=rf"scorer\.{name} = .* must be"):
        scorer.ScorerConfig(**fields)


# ---- tables


def test_tables_say_at_which_budget_scorers_were_trained():
    trained = Trained("runs/x", "owner/name", "", 32, 8)
    found = run_measure(scorers(trained=trained))
    assert [r.trained for r in found] == ["", "", "32"]
    assert [loss_table.cells(r)[-1] for r in found] == ["", "", "32"]
    assert loss_table.HEAD[-1] == "trained at"
    full, _, mine = csv.DictReader(io.StringIO(loss_table.csv(found)))
    assert (full["trained_at"], mine["trained_at"]) == ("", "32")
    assert trained.at(8) == "32" and trained.at(16) == "32, L = 8" and Trained().at(8) == ""
    cells = accuracy.cells(accuracy.Accuracy("x", 16, np.ones((1, 1)), 1, 0, 0, trained="32"))
    assert dict(zip(accuracy.HEAD, cells, strict=True))["trained at"] == "32"


# ---- jobs


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a language model fails: what is wrong is to be found before."""

    def load(*args, **kwargs):
        raise AssertionError("the language model was loaded")

    monkeypatch.setattr(api.models, "load", load)


EMBEDDED = dict(layers=3, heads=4, kv_heads=2)


def job_config(**fields):
    config = tiny.get_config()
    for name, value in fields.items():
        group, _, field = name.partition("__")
        config[group][field] = value
    return config


def test_jobs_refuse_scorers_that_do_not_fit_before_they_load_a_model(tmp_path, no_weights):
    path = str(shared(tmp_path / "scorers"))
    fit = rf"{path}: scorers of 2 layers x 2 KV heads .* don't fit a model of 3 layers"
    config = job_config(evaluate__scorers=(f"mine={path}",), grpo__scorer=path,
                        generate__scorer=path, generate__policy="foresight",
                        scorer__norm="none")  # fmt: skip
    for job in (evaluate, grpo, generate):
        with pytest.raises(UserError, match=f"with model embedded: {fit}") as error:
            job.run(config, str(tmp_path / "out"))
        one_line(error)
    assert not (tmp_path / "out").exists()


def test_jobs_check_every_policy_at_every_budget_before_they_load_a_model(tmp_path, no_weights):
    name, message = "streaming_llm:sinks=40", "sinks = 40 must be at most 32"
    config = job_config(
        evaluate__scorers=(), evaluate__policies=("h2o", name), evaluate__budgets=(96, 48),
        eval__policies=("h2o", name), eval__budgets=(96, 48), generate__policy=name,
        benchmark__policies=("full", name), benchmark__budgets=(48,),
    )  # fmt: skip
    config.budget = 48
    for job in (evaluate, sft, generate, benchmark):
        with pytest.raises(UserError, match=message) as error:
            job.run(config, str(tmp_path / "out"))
        one_line(error)


def test_jobs_take_another_interval_when_asked_to(tmp_path, monkeypatch, capsys):
    embedded = common.model_config(tiny.get_config())
    params = scorer.init(jax.random.key(0), embedded, RULES)
    about = {"model": "other/model", "budget": 32, "interval": 8}
    sharing.export(policies.Foresight(params, RULES), tmp_path / "scorers", about)
    path = str(tmp_path / "scorers")
    config = job_config(generate__scorer=path, generate__policy="foresight", generate__new_tokens=1,
                        evaluate__scorers=(f"mine={path}",), grpo__scorer=path,
                        scorer__norm="none")  # fmt: skip
    for job in (evaluate, grpo, generate):
        with pytest.raises(UserError, match="trained at interval = 8, not 16: set interval to 8"):
            job.run(config, str(tmp_path / "out"))
    config.generate.any_interval = True

    def stream(*args, **more):
        yield ""
        return api.Generation("", np.zeros(1), True, 0)

    monkeypatch.setattr(api, "stream", stream)
    generate.run(config, str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert f"{path}: trained for model other/model, and used with embedded" in said
    assert "with compilation, scorers trained at B = 32, L = 8\n" in said


# ---- settings of policies


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("snapkv", dict(kernel=0), "snapkv: kernel = 0 must be an odd whole number"),
        ("snapkv", dict(kernel=4), "snapkv: kernel = 4 must be an odd"),
        ("snapkv", dict(kernel=True), "kernel = True"),
        ("snapkv", dict(kernel=7.0), "kernel = 7.0"),
        ("snapkv", dict(window=0), "snapkv: window = 0 must be a whole number from 1"),
        ("snapkv", dict(window=None), "window = None"),
        ("rkv", dict(mix=None), "rkv: mix = None must be a number of at least 0 and at most 1"),
        ("rkv", dict(mix=float("nan")), "mix = nan"),
        ("rkv", dict(mix=2), "mix = 2"),
        ("rkv", dict(threshold="x"), "rkv: threshold = 'x' must be a number"),
        ("rkv", dict(threshold=float("inf")), "threshold = inf"),
        ("rkv", dict(window=-1), "window = -1"),
        ("rkv", dict(kernel=2), "rkv: kernel = 2"),
        ("streaming_llm", dict(sinks=-1), "streaming_llm: sinks = -1 must be a whole number"),
        ("streaming_llm", dict(sinks=1.5), "sinks = 1.5"),
        ("expected_attention", dict(horizon=0), "horizon = 0 must be a whole number from 1"),
        ("expected_attention", dict(horizon=10**9), "horizon = 1000000000 must be"),
        ("expected_attention", dict(sinks="4"), "sinks = '4'"),
        ("lagkv", dict(lag=-1), "lagkv: lag = -1 must be"),
        ("lagkv", dict(sinks=None), "sinks = None"),
        ("ada", dict(safeguard=1.5), "ada: safeguard = 1.5 must be"),
        ("ada", dict(room=0.5), "ada: room = 0.5 must be"),
        ("ada", dict(kernel=0), "snapkv: kernel = 0 must be"),
        ("pyramid", dict(beta=0), "pyramid: beta = 0 must be"),
        ("pyramid", dict(window=False), "snapkv: window = False must be"),
        ("forced", dict(position_yebkl=None, statistics="all"), "forced: statistics = 'all' must"),
        ("foresight", dict(params={}, config=None), "foresight: config = None must be a Scorer"),
        ("foresight", dict(params={}, config=RULES, action=[1]), r"action = \[1\] must be one of"),
        ("foresight", dict(params={}, config=RULES, temperature="1"), "temperature = '1' must be"),
        ("foresight", dict(params={}, config=RULES, trained=3), "trained = 3 must be"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_where_the_policy_is_made(name, fields, message):
    with pytest.raises(UserError, match=message) as error:
        policies.get(name, **fields)
    one_line(error)


def test_settings_in_text_are_refused_alike():
    for text, message in {
        "snapkv:kernel=0": "kernel = 0 must be",
        "rkv:mix=None": "mix = None must be",
        "rkv:mix=0.5,mix=0.6": "'rkv': mix is given twice",
        "rkv:mix=1+'a'": "must be of the form field=number",
    }.items():
        with pytest.raises(UserError, match=message):
            policies.get(text)
    with pytest.raises(UserError, match=r"'foresight' needs params, config.*: make the object"):
        policies.get("foresight")
    with pytest.raises(UserError, match=r"policy 3 must be of the form .*; known names are"):
        policies.get(3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("streaming_llm:sinks=9", "sinks = 9 must be at most 8 at budget = 16, interval = 8"),
        ("random:sinks=9", "random: sinks = 9 must be at most 8 at budget = 16"),
        ("expected_attention:sinks=99", "sinks = 99 must be at most"),
        ("lagkv:sinks=1000", "sinks = 1000 must be at most"),
        ("lagkv:sinks=4,lag=11", "lag = 11 must be at most 10"),
        ("snapkv:kernel=47", "kernel = 47 must be at most 45"),
        ("rkv:kernel=1001", "kernel = 1001 must be at most 45"),
        ("ada:room=3", "room = 3 must be at most 2"),
    ],
)
def test_settings_beyond_the_cache_are_refused_before_a_pass(name, message):
    for entry in (run_generate, run_replay):
        with pytest.raises(UserError, match=message) as error:
            entry(policies.get(name))
        one_line(error)


def test_settings_that_just_fit_run():
    for name in ("streaming_llm:sinks=8", "lagkv:sinks=8", "lagkv:lag=10", "ada:room=2,kernel=45"):
        replay.check(policies.get(name), CONFIG, CADENCE)


@pytest.mark.parametrize("sizes", [(2, 1), (3, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("name", ["streaming_llm", "expected_attention", "lagkv", "rkv", "pyramid"])
def test_defaults_give_way_to_small_caches_and_nothing_else_does(name, sizes):
    policy, cadence = policies.get(name), Cadence(*sizes)
    replay.check(policy, CONFIG, cadence)
    field = "kernel" if name in ("rkv", "pyramid") else "sinks"
    with pytest.raises(UserError, match=f"{field} = 31 must be at most"):
        replay.check(policies.get(name, **{field: 31}), CONFIG, cadence)


@pytest.mark.parametrize("name", ["streaming_llm", "expected_attention", "lagkv"])
def test_as_many_sinks_as_fit_stay(name):
    """With more, they would be no more important than the newest, and go as the lowest slots."""
    run, batch = jax.jit(replay.replay, static_argnums=3), oracles.make_batch(CONFIG, [20])
    two, four = (
        np.asarray(run(LM, batch, policy, Cadence(4, 2))[0])
        for policy in (policies.get(name, sinks=2), policies.get(name))
    )
    np.testing.assert_array_equal(two, four)


# ---- policies of one's own


FINE = lambda view: view.key_bksd[..., 0]  # noqa: E731


@flax.struct.dataclass
class Plain(policies.Policy):
    stride: int = 4

    def score(self, view):
        return -view.cache.position_bks.astype(jnp.float32) % self.stride


@flax.struct.dataclass
class Weighted(policies.Policy):
    weight_y: jax.Array

    def score(self, view):
        return view.cache.position_bks * self.weight_y


def scoring(function, **methods):
    """A policy whose score is `function` of a view."""
    body = {"score": lambda self, view: function(view), "__module__": __name__, **methods}
    return flax.struct.dataclass(type("Mine", (policies.Policy,), body))()


@entries
def test_what_is_no_policy_is_refused_everywhere(entry):
    with pytest.raises(UserError, match=r"Knorm'> is not a policy: give an object, such as"):
        entry(policies.Knorm)
    if entry is not run_generate:
        with pytest.raises(UserError, match=r"'h2o' is not a policy: .* or policies.get\('h2o'\)"):
            entry("h2o")
    for wrong in (None, lambda view: 0, np.zeros((3, 3))):
        with pytest.raises(UserError, match=r"is not a policy: give an object, such as") as error:
            entry(wrong)
        one_line(error)


@entries
def test_a_plain_setting_must_be_static(entry):
    message = (
        r"Plain: stride = 4, but parameters are arrays with the model's 2 layers first; anything "
        r"else is static: stride: \.\.\. = flax.struct.field\(pytree_node=False, default=\.\.\.\)"
    )
    with pytest.raises(UserError, match=message):
        entry(Plain())
    for leaf in (np.float32(2), jnp.ones(3), jnp.ones((1, 2))):
        with pytest.raises(UserError, match=r"Weighted: weight_y has shape .* 2 layers first"):
            entry(Weighted(leaf))


@flax.struct.dataclass
class Listed(policies.Policy):
    strides: list = flax.struct.field(pytree_node=False, default_factory=list)

    def score(self, view):
        return FINE(view)


def test_a_field_may_be_called_name():
    @flax.struct.dataclass
    class Named(policies.Policy):
        name: str = flax.struct.field(pytree_node=False)

        def score(self, view):
            return FINE(view)

    assert Named("x").name == "x"
    replay.check(Named("x"), CONFIG, CADENCE)
    with pytest.raises(TypeError, match="name"):
        Named()


def test_a_static_setting_must_be_hashable():
    with pytest.raises(UserError, match=r"Listed: strides is static and can't be a list: make it"):
        run_generate(Listed())
    with pytest.raises(UserError, match=r"Listed: strides is static and can't be a \w*Array"):
        run_generate(Listed(jnp.zeros(3)))


def test_parameters_with_the_layers_first_run():
    run_replay(Weighted(jnp.ones(2)))
    replay.check(Weighted(np.ones(2, np.float32)), CONFIG, CADENCE)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda v: v.key_bksd.mean((-1, -2)), r"gives float32 \[\d, 2\], but must give float32 "),
        (lambda v: v.key_bksd[:, :, :16, 0], r"float32 \[\d, 2, 16\], but .* \[\d, 2, 24\]"),
        (lambda v: v.key_bksd[:, 0, :, 0], r"float32 \[\d, 24\], but"),
        (lambda v: v.key_bksd[:1, :1, :, 0], r"float32 \[1, 1, 24\], but"),
        (lambda v: v.key_bksd, r"float32 \[\d, 2, 24, 8\], but"),
        (lambda v: v.cache.position_bks, r"int32 \[\d, 2, 24\], but must give float32"),
        (lambda v: None, "score gives None, but must give float32"),
        (lambda v: 1.0, "score gives 1.0, but"),
    ],
)
def test_a_score_of_the_wrong_shape_is_named(function, message):
    for entry in (run_generate, run_replay):
        with pytest.raises(UserError, match=f"Mine: .*{message}") as error:
            entry(scoring(function))
        one_line(error)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            dict(protected=lambda self, view: 17),
            "protected.* = 17 must be a whole number from 0 to",
        ),
        (dict(protected=lambda self, view: 2.0), "protected.* = 2.0 must be"),
        (
            dict(capacity=lambda self, budget: 8),
            r"capacity\(16\) = 8 must be a whole number",
        ),
        (dict(capacity=lambda self, budget: 1.5 * budget), r"capacity\(16\) = 24.0 must be"),
        (dict(capacity=lambda self, budget: 20), r"has room for 20 entries .* define keep"),
        (
            dict(capacity=lambda self, budget: 20, keep=lambda self, view, importance: importance),
            r"keep gives float32 \[\d, 2, 28\], but must give int32 \[\d, 2\]",
        ),
        (
            dict(evict=lambda self, view: view.cache.position_bks),
            r"evict gives int32 \[\d, 2, 24\]",
        ),
        (dict(statistics="sum"), "statistics = 'sum' must be None, 'sums'"),
    ],
)
def test_other_methods_that_are_wrong_are_named(methods, message):
    for entry in (run_generate, run_replay):
        with pytest.raises(UserError, match=f"Mine.*{message}") as error:
            entry(scoring(FINE, **methods))
        one_line(error)


@pytest.mark.parametrize("name", ["cumulative", "decayed"])
def test_sums_that_nobody_asked_for_are_named(name):
    def score(view):
        return getattr(view, f"{name}_bksg").sum(-1)

    with pytest.raises(UserError, match=rf'view.{name}_bksg is kept for .* statistics = "sums"'):
        replay.check(scoring(score), CONFIG, CADENCE)
    replay.check(scoring(score, statistics="sums"), CONFIG, CADENCE)


@pytest.mark.parametrize("value", [np.array([1, None]), np.array(["a", "b"])])
def test_arrays_of_objects_are_no_parameters(value):
    with pytest.raises(UserError, match=r"Weighted: weight_y = array.*, but parameters are arrays"):
        replay.check(Weighted(value), CONFIG, CADENCE)


def test_a_field_may_not_be_called_kind():
    """It says of which class a policy is; a setting of that name would be lost."""
    for body in ({"kind": "x"}, {"__annotations__": {"kind": str}}):
        with pytest.raises(UserError, match="class Mine: kind is taken, give the field another"):
            type("Mine", (policies.Policy,), {"__module__": __name__, **body})


def evict_once(policy, empty=0):
    """One eviction at B = 4 and L = 2, of positions as slots: the slots, and what stays."""
    cadence = Cadence(4, 2)
    cache = replay.init_cache(policy, 1, CONFIG, cadence, jnp.float32)
    slots = cache.position_bks.shape[-1]
    position = jnp.where(jnp.arange(slots) < empty, -1, jnp.arange(slots))
    cache = cache.replace(position_bks=jnp.broadcast_to(position, (1, 2, slots)))
    query = jnp.zeros((1, 2, CONFIG.heads, CONFIG.head_dim))
    lse = jnp.zeros((1, 2, CONFIG.group_size, 2))
    chunk = replay.Chunk(query, lse, position[None, -2:], 0)
    site = replay.Site(CONFIG, cadence, 0, replay.row_keys(jax.random.key(0), 1), np.zeros(1, int))
    _, evicted, cache = replay.evict(policy, cache, chunk, site)
    held = np.asarray(cache.position_bks[0, 0])
    return evicted, sorted(held[held >= 0].tolist())


def test_a_score_that_is_nan_is_the_least_and_no_empty_slot_stays_for_it():
    one = scoring(lambda view: jnp.where(view.cache.position_bks == 3, jnp.nan, 0.0))
    assert evict_once(one, empty=2)[1] == [2, 3, 4, 5]
    assert evict_once(one)[1] == [1, 2, 4, 5]


def test_heads_that_keep_more_than_there_is_room_for_lose_the_least_important():
    def keep(self, view, importance):
        return jnp.full(importance.shape[:2], 99)

    def score(view):
        return -view.cache.position_bks.astype(jnp.float32)

    policy = scoring(score, keep=keep, capacity=lambda self, budget: budget + 1)
    assert evict_once(policy)[1] == [0, 1, 2, 5, 6]


def test_slots_of_a_small_type_are_counted_in_a_large_one():
    def evict(self, view):
        shape = (*view.cache.position_bks.shape[:2], view.interval)
        return jnp.broadcast_to(jnp.arange(view.interval, dtype=jnp.int8), shape)

    slots, held = evict_once(scoring(FINE, evict=evict))
    assert slots.dtype == jnp.int32 and held == [2, 3, 4, 5]


def test_a_policy_without_a_score_is_named():
    class Empty(policies.Policy):
        pass

    with pytest.raises(UserError, match=r"Empty defines no score\(view\)"):
        run_generate(Empty())


@pytest.mark.parametrize("decorator", [lambda cls: cls, flax.struct.dataclass])
def test_a_policy_needs_no_decorator_and_may_have_one(decorator):
    @decorator
    class Mine(policies.SnapKV):
        weight_y: jax.Array = None
        stride: int = policies.setting(kinds.whole(1), 4)

        def score(self, view):
            return super().score(view) * self.weight_y

    policy = Mine(weight_y=jnp.ones(2), stride=3, kernel=3)
    assert (policy.stride, policy.window, jax.tree.leaves(policy)[0].shape) == (3, 8, (2,))
    run_replay(policy)
    with pytest.raises(UserError, match="Mine: stride = 0 must be a whole number from 1"):
        policy.replace(stride=0)


def test_policies_within_a_policy_are_looked_at():
    both = loss_ratio.OneOf((policies.Knorm(), scorers(layers=5)), jnp.zeros(2, int))
    with pytest.raises(UserError, match="scorers of 5 layers"):
        run_replay(both)
    late = loss_ratio.OneOf((scorers(trained=Trained("x", interval=16)),), jnp.zeros(2, int))
    with pytest.raises(UserError, match="x: trained at interval = 16, not 8"):
        replay.check(late, CONFIG, CADENCE)


def test_forced_positions_that_do_not_fit_are_refused():
    def forced(y=2, b=1, k=2, dropped=INTERVAL, dtype=np.int32):
        return policies.Forced(np.zeros((y, 1, b, k, dropped), dtype))

    run_replay(forced())
    for policy, message in (
        (forced(y=3), "of 3 layers, 2 KV heads and interval = 8, the model of 2 layers"),
        (forced(k=1), "of 2 layers, 1 KV heads"),
        (forced(dropped=4), "interval = 4, the model"),
        (forced(b=3), "lists a batch of 3, this one has 1 rows"),
        (forced(dtype=np.float32), "must be whole numbers"),
        (policies.Forced([1]), r"position_yebkl = \[1\] must be whole numbers"),
    ):
        for entry in (run_generate, run_replay):
            with pytest.raises(UserError, match=message):
                entry(policy)


# ---- the registry


@pytest.fixture
def registry():
    before = dict(_REGISTRY)
    yield _REGISTRY
    _REGISTRY.clear()
    _REGISTRY.update(before)


def define(newest: bool):
    """What a notebook's cell does: a class of one name, with other code each time."""

    @policies.register("mine")
    @flax.struct.dataclass
    class Mine(policies.Policy):
        def score(self, view):
            position = view.cache.position_bks.astype(jnp.float32)
            return position if newest else -position

    return Mine


def test_a_cell_that_is_run_again_replaces_its_policy_and_its_programs(registry):
    """Structures of equal names would be equal, and the old program would run now and then."""
    run, batch = jax.jit(replay.replay, static_argnums=3), oracles.make_batch(CONFIG, [60])

    def result(policy):
        return np.asarray(run(LM, batch, policy, CADENCE)[0])

    # Hashes of the structures meet by chance only: often enough to tell.
    structures = [jax.tree.structure(define(i % 2 == 0)()) for i in range(50)]
    assert len(set(structures)) == 50
    assert all(one != other for one in structures for other in structures if one is not other)
    kept = []
    for newest in (True, False, True):
        define(newest)
        kept.append(result(policies.get("mine")))
    np.testing.assert_array_equal(kept[0], kept[2])
    assert np.abs(kept[0] - kept[1]).max() > 1e-3
    assert result(policies.StreamingLLM(0)) == pytest.approx(kept[0])


def test_a_name_is_of_one_class_alone(registry):
    mine = define(True)
    policies.register("mine")(mine)
    policies.register("h2o")(policies.H2O)
    with pytest.raises(
        UserError, match=r"'h2o' is registered twice, by fkv.policies.h2o.H2O and"
    ) as e:
        policies.register("h2o")(mine)
    one_line(e)
    assert type(policies.get("h2o")) is policies.H2O
    for wrong in (dict, define, 3):
        with pytest.raises(
            UserError, match=r"'other': .* is not a subclass of fkv.policies.Policy"
        ):
            policies.register("other")(wrong)
    for name in (mine, None, "", "a:b", "a b", "a\n", "a,b", "a(b)"):
        with pytest.raises(UserError, match=r'takes a name without spaces.*@register\("mine"\)'):
            policies.register(name)


def test_what_a_method_gives_is_said_by_axes():
    with pytest.raises(UserError) as error:
        check_given(policies.Knorm(), "score", jnp.zeros((3, 4)), (3, 2, 5), jnp.floating)
    assert one_line(error) == (
        "knorm: score gives float32 [3, 4], but must give float32 [3, 2, 5], "
        "[batch, KV heads, slots]"
    )


def test_the_policy_of_the_readme_runs(registry):
    readme = (Path(policies.__file__).parent / "README.md").read_text()
    exec(readme.split("```python\n")[1].split("```")[0], {"__name__": "notebook"})
    for name in ("strided", "ada(strided:stride=8)"):
        [[one]] = run_generate(policies.get(name))
        assert len(one.tokens) == 2
    assert evict_once(policies.get("strided:stride=2"))[1] == [0, 2, 4, 5]
    rows = [line.split("|") for line in readme.splitlines() if re.match(r"\| \[`\w+`\]", line)]
    assert sorted(row[1].split("`")[1] for row in rows) == sorted({*policies.names()} - {"strided"})
    for row in rows:
        name, fields = (
            row[1].split("`")[1],
            re.findall(r"\w+", row[4].split(" (")[0].replace("=", " ")),
        )
        known = [f.name for f in dataclasses.fields(registry[name]) if f.name != "kind"]
        assert [x for x in fields if x in known] == known
