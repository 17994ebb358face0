"""Scorers that are shared come back as they were; the released layout is read by PyTorch."""

import errno
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fkv
from configs import tiny
from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.errors import UserError
from fkv.jobs import export
from fkv.policies import scorer
from fkv.runs import checkpoint, parallel, sharing
from tests import oracles
from tests.models import torch_model

ABOUT = {"model": "owner/name", "revision": "abc", "budget": 64, "interval": 16}


def scorers(norm="rms", seed=0, **fields):
    config, _ = oracles.make_model(**fields)
    rules = scorer.ScorerConfig(norm=norm)
    params = scorer.init(jax.random.key(seed), config, rules)
    # Biases start as zeros, which would hide a lost sign.
    params = jax.tree.map(lambda x: np.asarray(x + 0.1), params)
    return policies.Foresight(params, rules)


def assert_same(one, other):
    assert one.params.keys() == other.params.keys()
    for name, x in one.params.items():
        np.testing.assert_array_equal(other.params[name], x, err_msg=name)


def test_a_shared_directory_gives_the_scorers_back(tmp_path):
    policy = scorers()
    sharing.export(policy, tmp_path, ABOUT, "| a table |")
    again, about = sharing.load(tmp_path)
    assert_same(policy, again)
    assert again.config == policy.config and ABOUT.items() <= about.items()
    assert_same(policy, fkv.load_scorer(str(tmp_path)))
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: fkv\nbase_model: owner/name\n")
    assert "| a table |" in card and "| budget | 64 |" in card and "| norm | rms |" in card
    assert not list(tmp_path.glob("*.tmp"))
    sharing.export(policy, tmp_path, ABOUT | {"model": "owner/name/x.gguf"})
    card = (tmp_path / "README.md").read_text()
    assert "base_model: owner/name\n" in card and "owner/name/x.gguf" in card
    # It acts alike.
    lm = oracles.make_lm()
    batch = oracles.make_batch(lm.config, [50])
    call = jax.jit(replay.replay, static_argnums=3)
    both = [call(lm, batch, p, Cadence(32, 16))[0] for p in (policy, again)]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "scorer.json").unlink(), "can't be read"),
        (lambda path: (path / "scorer.json").write_text("{"), "can't be read"),
        (lambda path: (path / "scorer.safetensors").write_bytes(b"no"), "can't be read"),
        (lambda path: (path / "scorer.safetensors").unlink(), "can't be read"),
        (
            lambda path: save_file({"w1": np.zeros(3)}, path / "scorer.safetensors"),
            r"are not the float32 w1 \[y, k, f, o\]",
        ),
    ],
)
def test_damage_is_named(tmp_path, spoil, message):
    sharing.export(scorers(), tmp_path, ABOUT)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        sharing.load(tmp_path)


def test_what_is_no_scorer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in .*nowhere"):
        sharing.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint in"):
        sharing.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # a run that has saved nothing yet
    with pytest.raises(UserError, match="no checkpoint in"):
        sharing.load(tmp_path)
    with pytest.raises(UserError, match="no checkpoint in"):  # and is not looked for on the hub
        sharing.load("runs/not_there")


@pytest.mark.parametrize("released", [False, True])
def test_where_scorers_can_not_be_written_is_one_line(base, tmp_path, monkeypatch, released):
    """A file, below a file, where nobody may write, a run's own directory, a full disk."""

    def write(directory):
        if released:
            sharing.export_released(scorers("none"), base[0], directory)
        else:
            sharing.export(scorers(), directory, ABOUT)

    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=f"cannot write {path} .Not a directory|File exists"):
            write(path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"run (exists already|holds other files \(config.json\))"):
        write(tmp_path / "run")
    for code in (errno.EROFS, errno.EACCES):  # root may write anywhere, so that has to be played

        def refuse(path, *args, code=code, **kwargs):
            raise OSError(code, os.strerror(code), str(path))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refuse)
            with pytest.raises(UserError, match=f"cannot write .*/out .{os.strerror(code)}"):
                write(tmp_path / "out")

    def disk_full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(sharing.loading, "save_file", disk_full)
        name = "scorers" if released else "scorers/scorer.safetensors"
        with pytest.raises(UserError, match=f"cannot write .*out/{name} .No space left on device"):
            write(tmp_path / "out" / "scorers")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.rglob("*")) in (
        ["config.json", "file", "out", "run"],
        ["config.json", "file", "out", "run", "scorers"],
    )
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    write("~/scorers")
    assert sharing.load("~/scorers")[0].params["w1"].shape == (2, 2, 32, 16)
    assert sharing.load(tmp_path / "me" / "scorers")


@pytest.mark.parametrize("file", ["scorer.safetensors", "scorer.json", "README.md"])
def test_an_export_over_another_is_whole(tmp_path, file):
    """Weights of one beside the description of another would be read without a word."""
    sharing.export(scorers("none"), tmp_path, ABOUT)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / f"{file}.tmp").symlink_to("/dev/full")
    if file == "scorer.safetensors":  # whose writer takes the place of what is there
        (tmp_path / f"{file}.tmp").unlink()
        (tmp_path / f"{file}.tmp").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        sharing.export(scorers("rms", seed=1), tmp_path, ABOUT)
    for name, data in before.items():
        assert (tmp_path / name).read_bytes() == data


# ---- the layout of the released code


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path, lm = tmp_path_factory.mktemp("base"), oracles.make_lm()
    models.save(path, lm)
    return path, lm


def test_the_released_layout_gives_the_scorers_back(base, tmp_path):
    source, lm = base
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    policy = scorers("none")
    sharing.export_released(policy, source, tmp_path / "out")
    again, _ = sharing.load(tmp_path / "out")
    assert_same(policy, again)
    assert again.config == scorer.ScorerConfig(form="reference")
    same = models.load(tmp_path / "out", "float32")
    assert same.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, same.params, lm.params)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    # Their sign: an eviction score.
    tensors = load_file(tmp_path / "out" / "model-judges.safetensors")
    fc2 = tensors["model.layers.1.self_attn.judge_model.fc2.weight"]
    np.testing.assert_array_equal(fc2[..., 0], -policy.params["w2"][1])
    with pytest.raises(UserError, match="out exists already"):
        sharing.export_released(policy, source, tmp_path / "out")
    with pytest.raises(UserError, match="has scorers of its own"):
        sharing.export_released(policy, tmp_path / "out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_released_checkpoint_survives_the_round_trip(shared_reference, tmp_path):
    """Import, export, import: the very tensors, so the reference check of either is the same."""
    source = shared_reference / "qwen3_tiny"
    policy, _ = sharing.load(source)
    stored = load_file(source / "model.safetensors")
    bare = {name: x for name, x in stored.items() if "judge_model" not in name}
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    (tmp_path / "bare" / "config.json").write_bytes((source / "config.json").read_bytes())
    sharing.export_released(policy, tmp_path / "bare", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys()
    for name, file in index["weight_map"].items():
        if "feature_norm" not in name:  # never applied, so not kept
            again = load_file(tmp_path / "out" / file)[name]
            np.testing.assert_array_equal(again, stored[name], err_msg=name)


def test_pytorch_reads_the_released_layout(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    reference = torch_model("qwen3", eos_token_id=None, bos_token_id=None, pad_token_id=None)
    reference.save_pretrained(tmp_path / "base")
    config = models.load(tmp_path / "base", "float32").config
    rules = scorer.ScorerConfig()
    policy = policies.Foresight(scorer.init(jax.random.key(0), config, rules), rules)
    sharing.export_released(policy, tmp_path / "base", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("fields", [{"norm": "rms"}, {"inputs": "kv"}, {"hidden": 8}])
def test_scorers_that_the_released_code_does_not_know_are_refused(base, tmp_path, fields):
    config = base[1].config
    rules = scorer.ScorerConfig(**fields)
    policy = policies.Foresight(scorer.init(jax.random.key(0), config, rules), rules)
    with pytest.raises(UserError, match="16 hidden units on plain features"):
        sharing.export_released(policy, base[0], tmp_path / "out")


def test_scorers_of_another_model_are_not_put_into_this_one(base, tmp_path):
    with pytest.raises(UserError, match=r"scorers of 3 layers .* don't fit a model of 2 layers"):
        sharing.export_released(scorers("none", layers=3), base[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the job


def test_the_job_shares_a_run(base, tmp_path):
    config = tiny.get_config()
    config.model, config.budget = "owner/name", 48
    policy = scorers()
    info = {"config": json.loads(json.dumps(config.to_dict()))}
    checkpoint.save(tmp_path / "run", 3, {"params": policy.params}, info)
    (tmp_path / "run" / "loss_ratio.md").write_text("| policy |")
    config.export.scorer = str(tmp_path / "run")
    export.run(config, str(tmp_path / "out"))
    again, about = sharing.load(tmp_path / "out")
    assert_same(policy, again)
    assert (about["model"], about["budget"], about["interval"]) == ("owner/name", 48, 16)
    assert "| policy |" in (tmp_path / "out" / "README.md").read_text()
    config.export.layout, config.model = "released", str(base[0])
    with pytest.raises(UserError, match="16 hidden units"):  # the tiny recipe normalises
        export.run(config, str(tmp_path / "released"))
    config.export.layout = "torch"
    with pytest.raises(UserError, match="layout = 'torch' must be one of fkv, released"):
        export.run(config, str(tmp_path / "released"))
    assert jnp.isfinite(again.params["w1"]).all()


def test_processes_meet_where_the_first_refuses_to_export(tmp_path, monkeypatch):
    config, met = tiny.get_config(), []
    config.export.scorer = str(tmp_path / "none")
    monkeypatch.setattr(parallel, "barrier", lambda name, **_: met.append(name))
    with pytest.raises(UserError, match=r"export.scorer = .*/none': no checkpoint in"):
        export.run(config, str(tmp_path / "out"))
    monkeypatch.setattr(parallel, "first", lambda: False)
    monkeypatch.setattr(parallel, "anywhere", lambda flag: True)
    with pytest.raises(UserError, match=r"process 0 can't export to .*/out: see its log"):
        export.run(config, str(tmp_path / "out"))
    assert len(met) == 2


def test_a_point_of_a_sweep_exports_beside_its_log(tmp_path):
    (tmp_path / "log.txt").write_text("what it printed")
    sharing.export(scorers(), tmp_path, ABOUT)
    assert sharing.load(tmp_path)
    assert (tmp_path / "log.txt").exists()
