import contextlib
import dataclasses
import json
import os
import weakref
from unittest import mock

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import load_file, save_file

from fkv import models
from fkv.errors import UserError
from fkv.models import LM, ModelConfig, loading
from fkv.models.config import from_hf, read
from fkv.models.decoder import OUTPUTS_FIRST
from fkv.runs import parallel
from tests.models import (
    SMALL,
    full_logits,
    random_lm,
    random_params,
    tokens,
    torch_logits,
    torch_model,
)
from tests.runs.test_checkpoint import small_files_only

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
QWEN3 = ModelConfig(
    family="qwen3",
    vocab_size=29,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp_width=48,
    qk_norm=True,
    tied_embeddings=True,
    rope_theta=5e4,
    rms_eps=1e-5,
    max_positions=99,
)
CONFIGS = {
    "qwen3": QWEN3,
    "qwen3, biases": dataclasses.replace(
        QWEN3,
        qkv_bias=True,
        out_bias=True,
        tied_embeddings=False,
        rope_scaling=tuple(sorted(YARN.items())),
    ),
    "qwen2": dataclasses.replace(
        QWEN3, family="qwen2", qk_norm=False, qkv_bias=True, tied_embeddings=False, head_dim=8
    ),
    "llama, biases": dataclasses.replace(
        QWEN3,
        family="llama",
        qk_norm=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        rope_scaling=tuple(sorted(LLAMA3.items())),
    ),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture
def checkpoint(tmp_path):
    """A small tied Qwen3 checkpoint to spoil."""
    models.save(tmp_path, random_lm(QWEN3))
    return tmp_path


def edit(directory, change, metadata=None):
    """Rewrites the tensors of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata)


def shard(directory):
    """Splits a checkpoint into two files and an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        part = {n: x for n, x in tensors.items() if where[n] == file}
        save_file(part, directory / file, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def refusal(call, *args, **kwargs):
    """The message of the refusal, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, leaf in jax.tree_util.tree_leaves_with_path(got):
        expected = want
        for key in path:
            expected = expected[getattr(key, "key", getattr(key, "idx", None))]
        assert leaf.dtype == expected.dtype, path
        np.testing.assert_array_equal(leaf, expected, err_msg=str(path))


# Round trips.


@configs
def test_save_then_load_is_the_identity(config, tmp_path):
    lm = random_lm(config)
    models.save(tmp_path / "stacked", lm)
    loaded = models.load(tmp_path / "stacked")
    assert loaded.config == config
    assert_equal(loaded.params, lm.params)
    separate = models.load(tmp_path / "stacked", separate=True)
    assert separate.config == config
    assert_equal(separate.params, one_by_one(lm.params))
    models.save(tmp_path / "separate", separate)
    for name in ("model.safetensors", "config.json"):
        some, others = ((tmp_path / form / name).read_bytes() for form in ("stacked", "separate"))
        assert some == others


@configs
@pytest.mark.parametrize("separate", [True, False])
def test_a_mesh_of_one_device_changes_nothing(config, separate, tmp_path):
    """Jobs load over a mesh, biases too."""
    models.save(tmp_path, random_lm(config))
    mesh = parallel.make_mesh(1)
    found = models.load(tmp_path, mesh=mesh, separate=separate)
    assert_equal(found.params, models.load(tmp_path, separate=separate).params)


def one_by_one(params):
    """The parameters with a dictionary for each layer, as a CPU decodes with them."""
    stacks = {
        OUTPUTS_FIRST.get(n, n): np.moveaxis(x, -1, 1) if n in OUTPUTS_FIRST else x
        for n, x in params["layers"].items()
    }
    count = len(stacks["q_hdm"])
    return {**params, "layers": tuple({n: x[i] for n, x in stacks.items()} for i in range(count))}


@configs
def test_saved_checkpoint_has_the_same_logits_in_pytorch(config, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm = random_lm(config)
    models.save(tmp_path, lm)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    token_bt = tokens(40, config.vocab_size)
    want = torch_logits(model, token_bt)
    np.testing.assert_allclose(full_logits(lm, token_bt), want, atol=1e-4)


@pytest.mark.parametrize(
    ("stored", "asked"), [("bfloat16", None), ("float16", "float32"), ("float32", jnp.bfloat16)]
)
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(stored, asked, tmp_path):
    lm = random_lm(QWEN3, stored)
    models.save(tmp_path, lm)
    want = jax.tree.map(lambda x: x.astype(asked or stored), lm.params)
    assert_equal(models.load(tmp_path, dtype=asked).params, want)
    separate = models.load(tmp_path, dtype=asked, separate=True)
    assert_equal(separate.params, one_by_one(want))


def test_mixed_dtypes_load_as_the_widest(checkpoint):
    def halve(tensors):
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].astype(jnp.bfloat16)

    edit(checkpoint, halve)
    params = models.load(checkpoint).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    want = random_params(QWEN3)
    np.testing.assert_array_equal(params["final_norm_m"], want["final_norm_m"])
    assert 0 < np.abs(params["embed_vm"] - want["embed_vm"]).max() < 0.01


def test_shards_of_pytorch_in_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch_model("qwen2")
    for parameter in model.parameters():  # model.to() would round the rotary frequencies too
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    lm = models.load(tmp_path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm)} == {"bfloat16"}
    lm = jax.tree.map(lambda x: np.asarray(x, np.float32), lm)
    token_bt = tokens(40)
    want = torch_logits(model, token_bt)
    np.testing.assert_allclose(full_logits(lm, token_bt), want, atol=1e-4)


def test_what_stands_beside_the_decoder_is_ignored(checkpoint):
    def add(tensors):
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
        tensors["model.layers.0.self_attn.judge_model.fc1.weight"] = np.zeros(3, np.int8)

    edit(checkpoint, add)
    assert_equal(models.load(checkpoint).params, random_params(QWEN3))


# Tied embeddings.


@pytest.mark.parametrize(
    ("family", "stored", "sharded"),
    [
        ("qwen3", "equal", False),
        ("qwen3", "another", True),
        ("llama", "another", False),
        ("llama", "alone", True),
    ],
)
def test_a_head_stored_with_tied_embeddings_counts_as_in_pytorch(family, stored, sharded, tmp_path):
    model = torch_model(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)

    def add(tensors):
        head = tensors["model.embed_tokens.weight"].copy()
        if stored == "another":
            head[-1, -1] += 1  # the last of all numbers
        if stored == "alone":
            del tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = head

    edit(tmp_path, add, {"format": "pt"})
    if sharded:
        shard(tmp_path)
    lm = models.load(tmp_path)
    assert lm.config.tied_embeddings == (stored != "another") == ("head_vm" not in lm.params)
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    token_bt = tokens(20)
    want = torch_logits(theirs, token_bt)
    np.testing.assert_allclose(full_logits(lm, token_bt), want, atol=1e-4)


def test_a_head_is_compared_piece_by_piece(checkpoint, monkeypatch):
    """Never are the whole embedding and the whole head in memory to be compared."""
    edit(checkpoint, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"]}))
    stored = loading._stored(checkpoint)
    asked = []

    class Watched:
        def __init__(self, view):
            self.view = view

        def __getitem__(self, rows):
            asked.append(rows)
            return self.view[rows]

    class File:
        def __init__(self, file):
            self.file = file

        def get_slice(self, name):
            return Watched(self.file.get_slice(name))

    inner = loading._open

    @contextlib.contextmanager
    def watched(path):
        with inner(path) as file:
            yield File(file)

    monkeypatch.setattr(loading, "_open", watched)
    monkeypatch.setattr(loading, "_AT_ONCE", 10 * QWEN3.width)
    assert loading._same(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert asked[::2] == asked[1::2] == [slice(0, 10), slice(10, 20), slice(20, 29)]


def test_a_head_of_another_shape_is_named(checkpoint):
    edit(checkpoint, lambda x: x.update({"lm_head.weight": np.zeros((28, 32), np.float32)}))
    assert "lm_head.weight [28, 32] instead of [29, 32]" in refusal(models.load, checkpoint)


def test_save_refuses_what_no_config_describes(tmp_path):
    config = dataclasses.replace(QWEN3, mlp_bias=True)
    assert "no qwen3 config.json" in refusal(models.save, tmp_path / "new", random_lm(config))
    with pytest.raises(AssertionError, match="shapes"):
        models.save(
            tmp_path / "new", LM(random_params(dataclasses.replace(QWEN3, layers=1)), QWEN3)
        )
    assert not (tmp_path / "new").exists()


def test_save_without_room_leaves_what_is_there(checkpoint):
    with small_files_only(10_000):
        message = refusal(models.save, checkpoint, random_lm(QWEN3))
    assert f"cannot write {checkpoint}/model.safetensors (" in message
    assert "File too large" in message and "free disk space" in message
    assert_equal(models.load(checkpoint).params, random_params(QWEN3))


# Refusals of a checkpoint.


def test_missing_tensors_are_named(checkpoint):
    def drop(tensors):
        for name in [n for n in tensors if "q_norm" in n or ".1.mlp" in n]:
            del tensors[name]

    edit(checkpoint, drop)
    message = refusal(models.load, checkpoint)
    assert "missing tensors (5): " in message and "and 2 more" in message
    assert "model.layers.1.mlp." in message and str(checkpoint) in message


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "judge"]
)
def test_extra_tensors_are_named(checkpoint, name):
    edit(checkpoint, lambda tensors: tensors.update({name: np.zeros(3)}))
    message = refusal(models.load, checkpoint)
    assert f"tensors that do not belong to this decoder (1): {name};" in message


def test_head_of_an_untied_checkpoint_is_needed(checkpoint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    assert "missing tensors (1): lm_head.weight;" in refusal(models.load, checkpoint)


def test_misshapen_tensors_are_named(checkpoint):
    name = "model.layers.0.self_attn.o_proj.weight"
    edit(checkpoint, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    assert f"{name} [64, 32] instead of [32, 64];" in refusal(models.load, checkpoint)


def test_quantised_tensors_are_named(checkpoint):
    name = "model.layers.0.self_attn.o_proj.weight"
    edit(checkpoint, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    assert f"{name} I8;" in refusal(models.load, checkpoint)


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16"])
def test_other_dtypes_are_refused(checkpoint, dtype):
    message = refusal(models.load, checkpoint, dtype=dtype)
    assert dtype in message and "bfloat16" in message


def test_shards(checkpoint):
    shard(checkpoint)
    assert_equal(models.load(checkpoint).params, random_params(QWEN3))
    (checkpoint / "part-1.safetensors").unlink()
    message = refusal(models.load, checkpoint)
    assert "part-1.safetensors: no such file, though model.safetensors.index.json" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_malformed_index(checkpoint, text):
    shard(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(text)
    assert f"{index}: not " in refusal(models.load, checkpoint)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_file(checkpoint, length):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    message = refusal(models.load, checkpoint)
    assert str(path) in message and "download" in message


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    message = refusal(models.load, checkpoint)
    assert f"{checkpoint}: neither model.safetensors nor" in message


# The hub.


def test_a_hub_id_is_downloaded(checkpoint, monkeypatch):
    download = mock.Mock(return_value=str(checkpoint))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    params = models.load("some-one/a_model.v2", revision="main").params
    assert_equal(params, random_params(QWEN3))
    download.assert_called_once_with(
        "some-one/a_model.v2", revision="main", allow_patterns=loading._FILES
    )


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errors.GatedRepoError("403\nno", response=mock.Mock()), "https://huggingface.co/a/b"),
        (errors.RepositoryNotFoundError("401\nno", response=mock.Mock()), "check the spelling"),
        (errors.RevisionNotFoundError("404\nno", response=mock.Mock()), "no revision 'v9'"),
        (
            errors.LocalEntryNotFoundError("\nGot: ConnectError\nno"),
            "(LocalEntryNotFoundError: Got",
        ),
        (errors.HFValidationError("Repo id\nno"), "(HFValidationError: Repo id)"),
        (ConnectionError(), "check the network"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_refusals_of_the_hub(error, says, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=error))
    message = refusal(models.load, "a/b", revision="v9")
    assert message.startswith("a/b: ") and says in message


@pytest.mark.parametrize("name", ["nowhere", "/no/such", "../no", "a/b/c", "~/none"])
def test_what_is_no_directory_and_no_hub_id(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=ValueError))
    assert "no such directory, and not a hub id" in refusal(models.load, name)


def test_a_directory_has_no_revision(checkpoint):
    assert "revision 'main' is for a hub id" in refusal(models.load, checkpoint, revision="main")


# The released scorers.


def judged(directory):
    """Adds scorers to the small checkpoint: K = 2 heads, F = 2 * 16 + 8 * 2 = 48 features."""
    rng = np.random.default_rng(2)
    shapes = {
        "fc1.weight": (2, 48, 16),
        "fc1.bias": (2, 16),
        "fc2.weight": (2, 16, 1),
        "fc2.bias": (2, 1),
        "feature_norm.weight": (48,),
    }
    added = {
        f"model.layers.{i}.self_attn.judge_model.{name}": rng.normal(size=shape).astype("bfloat16")
        for i in range(2)
        for name, shape in shapes.items()
    }
    edit(directory, lambda tensors: tensors.update(added))
    return added


@pytest.mark.parametrize("sharded", [False, True])
def test_judges(checkpoint, sharded):
    stored = judged(checkpoint)
    if sharded:
        shard(checkpoint)
    judges = models.load_judges(checkpoint)
    assert {name: x.shape for name, x in judges.items()} == {
        "w1": (2, 2, 48, 16),
        "b1": (2, 2, 16),
        "w2": (2, 2, 16),
        "b2": (2, 2),
    }
    assert all(type(x) is np.ndarray and x.dtype == np.float32 for x in judges.values())
    for i in range(2):
        prefix = f"model.layers.{i}.self_attn.judge_model."
        np.testing.assert_array_equal(judges["w1"][i], stored[prefix + "fc1.weight"])
        np.testing.assert_array_equal(judges["b1"][i], stored[prefix + "fc1.bias"])
        np.testing.assert_array_equal(judges["w2"][i][..., None], stored[prefix + "fc2.weight"])
        np.testing.assert_array_equal(judges["b2"][i][..., None], stored[prefix + "fc2.bias"])


def test_judges_that_are_missing_or_misshapen(checkpoint):
    assert "missing tensors (8)" in refusal(models.load_judges, checkpoint)
    judged(checkpoint)
    name = "model.layers.1.self_attn.judge_model.fc1.weight"
    edit(checkpoint, lambda tensors: tensors.update({name: tensors[name][:, :47].copy()}))
    assert f"{name} [2, 47, 16] instead of [2, 48, 16]" in refusal(models.load_judges, checkpoint)


# config.json.

HF = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL}
ODD = ("64", "", -1, [], [64], {}, {"a": 1}, float("nan"), float("inf"), "a\nb" * 500, True)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": LLAMA3},
        {"rope_scaling": LLAMA3 | {"rope_theta": 5e5}},
        {
            "rope_scaling": {k if k != "rope_type" else "type": v for k, v in LLAMA3.items()},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ],
)
def test_every_spelling_of_the_rotary_settings(spelling):
    config = from_hf(HF | spelling)
    assert config.rope_theta == 5e5
    assert dict(config.rope_scaling) == LLAMA3


@configs
def test_both_spellings_are_written(config, tmp_path):
    models.save(tmp_path, random_lm(config))
    written = json.loads((tmp_path / "config.json").read_text())
    for spelling in (("rope_theta", "rope_scaling"), ("rope_parameters",)):
        assert from_hf({k: v for k, v in written.items() if k not in spelling}) == config


def test_a_config_without_scaling_or_optional_fields():
    config = from_hf(HF | {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}})
    assert (config.rope_theta, config.rope_scaling) == (3e4, ())
    bare = {k: v for k, v in HF.items() if k not in ("architectures", "num_key_value_heads")}
    config = from_hf(bare | {"rope_scaling": None})
    assert (config.family, config.kv_heads, config.head_dim) == ("llama", 4, 8)
    assert (config.rope_theta, config.rope_scaling) == (1e4, ())


def test_biases_that_a_family_has_not_are_none():
    """As in transformers: Qwen2 has those of queries, keys and values, whatever is said."""
    qwen2, qwen3 = (
        from_hf(HF | {"architectures": None, "model_type": family, "attention_bias": True}
                | {"mlp_bias": True})
        for family in ("qwen2", "qwen3")
    )  # fmt: skip
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.mlp_bias) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.mlp_bias) == (True, True, False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not supported"),
        (
            {"hidden_size": None},
            "hidden_size = None must be a whole number from 1 to 16777216",
        ),
        (
            {"num_hidden_layers": "two"},
            "num_hidden_layers = 'two' must be a whole number from 1 to 4096",
        ),
        ({"num_key_value_heads": 3}, "4 heads are not a multiple of num_key_value_heads 3"),
        ({"head_dim": 9}, "head_dim 9 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' must be one of silu, swish"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type = 'dynamic' must be one of default,",
        ),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "rope_scaling.factor = None must be a number above 0",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "differ by layer"),
    ],
)
def test_configs_that_are_refused(change, says):
    assert says in refusal(from_hf, HF | change)


# Fields of each kind, and values that none of that kind may have.
KINDS = {
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads": (
        *ODD, None, 0, 1.5, 10**9, 10**400,
    ),
    "num_key_value_heads head_dim": (*ODD, 0, 1.5, 10**9),
    "max_position_embeddings": (*ODD, 0, 1.5, 10**10),
    "rope_theta rms_norm_eps": (*ODD, None, 10**400),
    "tie_word_embeddings attention_bias mlp_bias use_sliding_window": (*ODD[:-1], None, 0, 1),
    "architectures": ("LlamaForCausalLM", {}, 3, [None], [["LlamaForCausalLM"]], True),
    "model_type": ([], {}, 3, True, "qwen3"),
    "rope_scaling rope_parameters": ([], "linear", 3, True, *(
        {"rope_type": "yarn", "factor": 2, **wrong} for wrong in (
            {"rope_type": 3}, {"rope_type": ["yarn"]}, {"factor": "2"}, {"factor": True},
            {"factor": 0}, {"factor": float("nan")}, {"factor": [2]}, {"truncate": 1},
            {"original_max_position_embeddings": None, "factor": -1}, {"beta_fast": "x"},
            {"original_max_position_embeddings": 0}, {"attention_factor": []},
            {"partial_rotary_factor": 0.5}, {"mrope_section": [1, 2, 3]}, {"rope_type": "default"},
        )
    ), LLAMA3 | {"low_freq_factor": 4.0}),
    "layer_types": ("full_attention", 3, {}, ["full_attention"], [None] * 2, ["full", "full"]),
    "sliding_window max_window_layers": ("64", 1.5, [], True),
    "hidden_act": (None, 3, [], "gelu"),
    "attn_logit_softcapping clip_qkv partial_rotary_factor embedding_multiplier": (30.0, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_field_of_the_wrong_kind_is_named(family):
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    sound = HF | {"architectures": [f"{name}ForCausalLM"], "model_type": family}
    from_hf(sound)
    for fields, values in KINDS.items():
        for field in fields.split():
            for value in values:
                if value == family:
                    continue
                message = refusal(from_hf, sound | {field: value}, "here/config.json")
                assert message.startswith("here/config.json: ") and len(message) < 400, message
                assert field.removesuffix("s") in message, (field, value, message)


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("settings", "slides"),
    [
        ({"use_sliding_window": True, "max_window_layers": 2}, False),
        ({"use_sliding_window": True}, False),  # max_window_layers is 28
        ({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16}, True),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, False),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 64}, False),
        ({"use_sliding_window": False, "max_window_layers": 0, "sliding_window": 16}, False),
        ({"max_window_layers": 0, "sliding_window": 16}, False),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0,
          "layer_types": ["full_attention"] * 2}, False),
        ({"use_sliding_window": True, "sliding_window": 16,
          "layer_types": ["full_attention", "sliding_attention"]}, True),
        # Scaled to 256 tokens.
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 64,
          "rope_scaling": SCALED}, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_is_refused_where_it_hides_something(family, settings, slides):
    """The masks of transformers say where; 64 tokens are all that the model was made for."""
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{name}Config")(**SMALL | settings)
    window = theirs.sliding_window or 64
    reach = 256 if "rope_scaling" in settings else 64
    assert ("sliding_attention" in theirs.layer_types and window < reach) == slides
    settings = HF | settings | {"architectures": [f"{name}ForCausalLM"], "model_type": family}
    if slides:
        assert "sliding-window attention is not supported" in refusal(from_hf, settings)
    else:
        assert from_hf(settings) == from_hf(
            HF | {k: settings[k] for k in ("architectures", "model_type")}
        )


def test_what_llama_says_of_windows():
    """Llama has none; a config that asks for one is another model's."""
    for settings in ({"sliding_window": None}, {"sliding_window": 64}, {"sliding_window": 4096},
                     {"sliding_window": 16, "use_sliding_window": False}):  # fmt: skip
        assert from_hf(HF | settings) == from_hf(HF)
    assert "sliding-window" in refusal(from_hf, HF | {"sliding_window": 16})


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {}),  # heads of 128
        ("llama", {"max_position_embeddings": None}),  # 2048
        ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": None,
                                    "original_max_position_embeddings": 16}}),
        ("qwen3", {"rope_scaling": YARN | {"attn_factor": 0.9}}),
        ("qwen3", {"rope_scaling": YARN | {"truncate": False}}),
    ],
)  # fmt: skip
def test_what_is_absent_is_as_in_transformers(family, settings):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    settings = {k: v for k, v in (SMALL | settings).items() if v is not None}
    theirs = getattr(transformers, f"{name}Config")(**settings)
    ours = from_hf(settings | {"architectures": [f"{name}ForCausalLM"]})
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.head_dim == getattr(theirs, "head_dim", 32 // 4)
    rotary = getattr(transformers.models, family)
    rotary = getattr(getattr(rotary, f"modeling_{family}"), f"{name}RotaryEmbedding")(theirs)
    inv, scale = ours.inv_frequencies()
    np.testing.assert_allclose(inv, rotary.inv_freq.numpy(), rtol=2e-6)
    assert scale == pytest.approx(rotary.attention_scaling)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "not JSON (maximum recursion"),
        (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "not JSON (Exceeds the limit"),
        (b'{"hidden_size": 64, "hidden_size": 32}', "not JSON (two values of 'hidden_size')"),
        (b"3", "not a JSON object, but 3"),
        (b"", "not JSON"),
    ],
)
def test_json_that_no_config_is(tmp_path, content, says):
    (tmp_path / "config.json").write_bytes(content)
    assert f"{tmp_path / 'config.json'}: {says}" in refusal(read, tmp_path)


def test_what_is_no_regular_file_is_not_read(checkpoint):
    """A pipe that nobody writes to would never end."""
    path = checkpoint / "config.json"
    for i, make in enumerate((os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path))):
        path.rename(checkpoint / str(i))
        make(path)
        assert f"{path}: not a regular file" in refusal(read, checkpoint)
    path.unlink()
    (checkpoint / "0").rename(path)
    weights = checkpoint / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert "neither model.safetensors nor" in refusal(models.load, checkpoint)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "a/../x.safetensors", "x\0y", "..", "", 3, None, ["x"]],
)
def test_shards_have_plain_names(checkpoint, name):
    shard(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    # The file is there and would do.
    (checkpoint.parent / "x.safetensors").write_bytes(
        (checkpoint / "part-0.safetensors").read_bytes()
    )
    places = {n: name if p == "part-0.safetensors" else p for n, p in places.items()}
    index.write_text(json.dumps({"weight_map": places}))
    assert f"{index}: not an index of shards, whose" in refusal(models.load, checkpoint)


def test_shards_that_the_index_is_wrong_about(checkpoint):
    shard(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    swapped = {n: f"part-{'10'[int(p[5])]}.safetensors" for n, p in places.items()}
    index.write_text(json.dumps({"weight_map": swapped}))
    message = refusal(models.load, checkpoint)
    assert f"{index}: tensors that are not in the files it names (24)" in message
    index.write_text(json.dumps({"weight_map": places}))
    (checkpoint / "part-1.safetensors").write_bytes(
        (checkpoint / "part-0.safetensors").read_bytes()
    )
    assert "is in part-0.safetensors, too" in refusal(models.load, checkpoint)


def test_shards_of_a_snapshot_are_links(checkpoint):
    shard(checkpoint)
    blobs = checkpoint.parent / "blobs"
    blobs.mkdir()
    for i, path in enumerate(list(checkpoint.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    assert_equal(models.load(checkpoint).params, random_params(QWEN3))
    part = checkpoint / "part-1.safetensors"
    part.unlink()
    os.mkfifo(part)
    assert f"{part}: no such file" in refusal(models.load, checkpoint)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"{", "not JSON"), (b"\xff\xfe{}", "not JSON"), (b"[]", "not a JSON object")],
)
def test_config_files_that_are_refused(tmp_path, content, says):
    assert f"{tmp_path / 'config.json'}: no such file" in refusal(read, tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    assert f"{tmp_path / 'config.json'}: {says}" in refusal(read, tmp_path)


@pytest.mark.parametrize("separate", [False, True])
def test_one_tensor_at_a_time_lies_in_memory_twice(separate, checkpoint, monkeypatch):
    """What has been read is gone when the next tensor is read, and nothing is held twice."""
    read_so_far, held, live = [], [], []
    before = {id(x) for x in jax.live_arrays()}

    class Watched:
        def __init__(self, file):
            self.file = file

        def get_tensor(self, name):
            held.append(sum(reference() is not None for reference in read_so_far))
            live.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))
            tensor = self.file.get_tensor(name)
            read_so_far.append(weakref.ref(tensor))
            return tensor

    inner = loading._open

    @contextlib.contextmanager
    def watched(path):
        with inner(path) as file:
            yield Watched(file)

    stored = loading._stored(checkpoint)
    monkeypatch.setattr(loading, "_stored", lambda directory: stored)
    monkeypatch.setattr(loading, "_open", watched)
    lm = loading.load(checkpoint, "bfloat16", separate=separate)
    assert len(held) == len(list(loading._tensors(QWEN3))) and max(held) <= 1
    sizes = [x.nbytes for x in jax.tree.leaves(models.separate(lm, consume=False))]
    # Beside it the last tensor as it was stored, in float32, and of each whether it is finite.
    assert max(live) <= sum(sizes) + 2 * max(sizes) + len(held)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path, wrong):
    params = jax.device_get(random_params(QWEN3))
    models.save(tmp_path, LM(params, QWEN3))
    sound = load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        tensors = {key: x.copy() for key, x in sound.items()}
        tensors[name].reshape(-1)[3] = wrong
        save_file(tensors, tmp_path / "model.safetensors")
        message = rf"model\.safetensors: {name} holds NaN or infinity in float32: the checkpoint"
        for separate in (False, True):
            with pytest.raises(UserError, match=message):
                models.load(tmp_path, separate=separate)


def test_weights_beyond_a_dtype_are_named(tmp_path):
    params = jax.device_get(random_params(QWEN3))
    params["layers"]["q_hdm"][0, 0] = 1e6
    models.save(tmp_path, LM(params, QWEN3))
    models.load(tmp_path, "bfloat16")
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj.weight holds .* in float16"):
        models.load(tmp_path, "float16")
