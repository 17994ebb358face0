"""Weights of other methods, in checkpoints as their authors' code writes them."""

import json
import os
import pickle
import re
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import fkv
from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import calibration, replay
from fkv.errors import UserError
from fkv.policies.foresight import Foresight
from fkv.runs import sharing, torch_files
from tests import oracles
from tests.policies import WEIGHTED, weighted

CONFIG, _ = oracles.make_model()
CARD = "---\nlicense: apache-2.0\ntags:\n- x\n---\nlicense: not this\n"


def assert_params(policy, want):
    assert policy.params.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(policy.params[name], x, err_msg=name)
        assert policy.params[name].dtype == np.float32
    replay.check(policy, CONFIG, Cadence(16, 8))


def write_kvzap(path, policy, **config):
    """As `KVzapModel.save_pretrained` of kvpress: `nn.Linear`s, [output, input]."""
    path.mkdir(exist_ok=True)
    tensors, mlp = {}, "w2" in policy.params
    for layer in range(2):
        for name, x in policy.params.items():
            place = f"layers.{layer}." + ("0." if name[1] == "1" else "2.") * mlp
            x = x[layer]
            kind = "weight" if name[0] == "w" else "bias"
            tensors[place + kind] = np.ascontiguousarray(x.T if name[0] == "w" else x)
    save_file(tensors, path / "model.safetensors")
    sizes = {"input_dim": 32, "output_dim": 2, "hidden_dim": 5 if mlp else None, "n_modules": 2}
    about = {"model_type": "kvzap", "architectures": ["KVzapModel"], **sizes, **config}
    (path / "config.json").write_text(json.dumps(about))
    (path / "README.md").write_text(CARD)
    return tensors


@pytest.mark.parametrize("name", ["kvzap", "kvzap, linear"])
def test_surrogates_of_kvzap(name, tmp_path):
    policy = weighted(name, CONFIG)
    tensors = write_kvzap(tmp_path / "zap", policy)
    found = fkv.load_scorer(tmp_path / "zap")
    assert isinstance(found, policies.KVzap)
    assert_params(found, policy.params)
    assert sharing.load(tmp_path / "zap")[1]["license"] == "apache-2.0"
    for change, message in (
        (lambda t: t.pop("layers.1" + (".0" if "," not in name else "") + ".bias"), "is missing"),
        (lambda t: t.update(more=np.zeros(2)), "more is not a known tensor"),
        (lambda t: t.update({min(t): np.zeros((3, 3, 3))}), "must have . axes"),
        (lambda t: t.update({max(t): np.zeros((7, 7))}), "differ in shape|must have 1 axes"),
    ):
        other = dict(tensors)
        change(other)
        save_file(other, tmp_path / "zap" / "model.safetensors")
        with pytest.raises(UserError, match=f"model.safetensors: .*({message})") as error:
            fkv.load_scorer(tmp_path / "zap")
        assert "\n" not in str(error.value)
    (tmp_path / "zap" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="these surrogates can't be read"):
        fkv.load_scorer(tmp_path / "zap")
    for modules in (None, 0, True, "2"):
        write_kvzap(tmp_path / "zap", policy, n_modules=modules)
        with pytest.raises(UserError, match=r"n_modules = .* must be a whole number"):
            fkv.load_scorer(tmp_path / "zap")


def write_trimkv(path, policy, dtype="float32", **config):
    """As the released code: gate weights by their names in the model, and its config."""
    torch = pytest.importorskip("torch")
    path.mkdir(exist_ok=True)
    names = {
        "w1": "linear1.weight", "b1": "linear1.bias", "w2": "linear2.weight", "b2": "bias",
        "gate": "gate_proj.weight", "up": "up_proj.weight", "down": "down_proj.weight",
    }  # fmt: skip
    weights = {}
    for layer in range(2):
        for name, x in policy.params.items():
            place = f"model.layers.{layer}.self_attn.retention_gate.{names[name]}"
            x = torch.tensor(x[layer]).to(getattr(torch, dtype))
            weights[place] = x if name[0] == "b" else x.T  # a view, with strides
    torch.save(weights, path / "trimkv_weights.pth")
    about = {"model_type": "qwen3", "retention_gate": policy.gate, "base_model": "Qwen/Qwen3-4B"}
    (path / "config.json").write_text(json.dumps({"hidden_act": "silu", **about, **config}))


@pytest.mark.parametrize("name", ["trimkv", "trimkv, rg2", "trimkv, rg3"])
def test_gates_of_trimkv(name, tmp_path):
    policy, path = weighted(name, CONFIG), tmp_path / "gates"
    write_trimkv(path, policy)
    found = fkv.load_scorer(path)
    assert isinstance(found, policies.TrimKV) and not found.knorm
    assert (found.gate, found.trained.model) == (policy.gate, "Qwen/Qwen3-4B")
    assert_params(found, policy.params)
    write_trimkv(path, policy, compress_strategy="knorm_alpha")
    assert fkv.load_scorer(path).knorm
    write_trimkv(path, policy, "bfloat16")
    for key, x in fkv.load_scorer(path).params.items():
        np.testing.assert_allclose(x, policy.params[key], rtol=1e-2)
    for config, message in (
        ({"retention_gate": None}, "retention_gate = None must be one of rg, rg2, rg3"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' must be silu"),
        ({"retention_gate": "rg3" if policy.gate != "rg3" else "rg"}, "is missing"),
    ):
        write_trimkv(path, policy, **config)
        with pytest.raises(UserError, match=message) as error:
            fkv.load_scorer(path)
        assert "\n" not in str(error.value)


def write_triattention(path, policy, **metadata):
    """As `save_head_frequency_stats` of the released code."""
    torch = pytest.importorskip("torch")
    real, imaginary = np.split(policy.params["mean"], 2, axis=-1)
    stats = {
        f"layer{layer:02d}_head{head:02d}": {
            "q_mean_real": torch.tensor(real[layer, head]),
            "q_mean_imag": torch.tensor(imaginary[layer, head]),
            "q_abs_mean": torch.tensor(policy.params["norm"][layer, head]),
        }
        for layer, head in np.ndindex(2, 4)
    }
    heads = [list(place) for place in np.ndindex(2, 4)]
    metadata = {"rope_style": "half", "head_dim": 8, "sampled_heads": heads, **metadata}
    torch.save({"metadata": metadata, "stats": stats}, path)
    return metadata, stats


def test_statistics_of_triattention(tmp_path):
    torch = pytest.importorskip("torch")
    policy, path = weighted("triattention", CONFIG), tmp_path / "stats.pt"
    metadata, stats = write_triattention(path, policy, model_name="Qwen/Qwen3-8B")
    found = fkv.load_scorer(path)
    assert isinstance(found, policies.TriAttention) and found.trained.model == "Qwen/Qwen3-8B"
    assert_params(found, policy.params)
    for content, message in (
        ({"metadata": metadata}, "no statistics of TriAttention"),
        ({"metadata": {**metadata, "rope_style": "interleaved"}, "stats": stats}, "must be half"),
        ({"metadata": metadata, "stats": dict(list(stats.items())[1:])}, "of 7 of 2 x 4 query"),
        ({"metadata": metadata, "stats": {"layer00_head00": 3}}, "q_abs_mean|q_mean_real is miss"),
        ([1, 2], "no statistics of TriAttention"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=message) as error:
            fkv.load_scorer(path)
        assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/fkv_was_here",)


@pytest.mark.parametrize("evil", [Evil(), np.float32(3), object()])
def test_a_file_that_names_anything_but_tensors_is_not_run(evil, tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"metadata": evil}))
    with pytest.raises(UserError, match=r"it names \S+, which is no tensor"):
        fkv.load_scorer(path)
    assert not os.path.exists("/tmp/fkv_was_here")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"x" * 999])
def test_a_file_that_torch_did_not_write_is_refused(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"not a file that torch\.save wrote") as error:
        fkv.load_scorer(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_tensors_of_all_kinds_are_read_as_torch_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.arange(24).reshape(2, 3, 4)
    given = {
        "strided": x.float()[:, ::2, 1:].transpose(0, 2), "half": x.half(), "empty": x[:, :0],
        "brain": x.bfloat16(), "long": x, "bool": x > 3, "scalar": torch.tensor(2.5), "n": [1, "a"],
    }  # fmt: skip
    torch.save(given, tmp_path / "x.pt")
    found = torch_files.read(tmp_path / "x.pt")
    assert found.keys() == given.keys() and found["n"] == [1, "a"]
    for name, want in given.items():
        if name != "n":
            np.testing.assert_array_equal(found[name].astype(np.float64), want.double().numpy())


@pytest.mark.parametrize("name", WEIGHTED)
def test_what_is_saved_comes_back_with_a_card(name, tmp_path):
    policy = weighted(name, CONFIG)
    if "trimkv" in name:
        policy = policy.replace(window=3, knorm=True)
    fkv.save_scorer(policy, tmp_path / "a", license="mit", source="a/b", model="Qwen/Qwen3-8B")
    again = fkv.load_scorer(tmp_path / "a")
    assert_params(again, policy.params)
    assert sharing.settings(again) == sharing.settings(policy)
    assert type(again) is type(policy) and again.trained.model == "Qwen/Qwen3-8B"
    card = (tmp_path / "a" / "README.md").read_text()
    assert "\nlicense: mit\n" in card and "| source | a/b |" in card
    assert "base_model: Qwen/Qwen3-8B" in card and "arXiv 2602.03203" not in card
    record = json.loads((tmp_path / "a" / "scorer.json").read_text())
    record["policy"]["name"] = "h2o"
    (tmp_path / "a" / "scorer.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"policy\.name = 'h2o' must be one of kvzap, trimkv, tria"):
        fkv.load_scorer(tmp_path / "a")
    with pytest.raises(UserError, match="h2o has no weights of its own to write"):
        fkv.save_scorer(policies.get("h2o"), tmp_path / "b")


def test_queries_are_calibrated_before_their_rotation():
    lm = oracles.make_lm()
    batch = oracles.make_batch(CONFIG, [30, 17])
    found = jax.device_get(calibration.query_statistics(lm, batch))
    queries = [[], []]
    for row, length in enumerate((30, 17)):

        def attend(layer, q, k, v):
            z = np.split(q, 2, axis=-1)
            z = z[0] + 1j * z[1]  # a unit turns each pair back
            at = np.arange(len(q))[:, None, None] * CONFIG.inv_frequencies()[0]
            queries[layer].append(z * np.exp(-1j * at))
            return oracles.full_attention(q, k, v)[0]

        oracles.run_model(CONFIG, lm.params, batch.token_bt[row, :length], attend)
    for layer in range(2):
        z = np.concatenate(queries[layer])
        mean = z.mean(0)
        want = np.concatenate([mean.real, mean.imag], axis=-1)
        np.testing.assert_allclose(found["mean"][layer], want, atol=2e-5)
        np.testing.assert_allclose(found["norm"][layer], abs(z).mean(0), rtol=1e-4)


def test_a_calibrated_model_generates(tmp_path):
    model = fkv.load("embedded")
    policy = fkv.calibrate(model, ["a0 = 3 ;" if model.tokenizer is None else "a = 3"])
    assert isinstance(policy, policies.TriAttention) and not isinstance(policy, Foresight)
    replay.check(policy, model.config, Cadence(16, 8))
    assert re.match("embedded", policy.trained.model)
    with pytest.raises(UserError, match="no text given to calibrate on"):
        fkv.calibrate(model, [])
