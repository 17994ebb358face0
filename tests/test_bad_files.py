"""Damaged and hostile files: one line that names the file; and nothing is unpickled."""

import ast
import json
import os
import pickle
import re
import struct
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fkv
from configs import tiny
from fkv import models
from fkv.data import traces as data
from fkv.errors import UserError
from fkv.jobs import traces
from fkv.models import ModelConfig
from fkv.policies import Foresight, scorer
from fkv.runs import checkpoint, rundir, sharing

MODEL = ModelConfig("qwen3", 29, 16, 1, 2, 1, 8, 16, qk_norm=True, tied_embeddings=True)


def refusal(call, *args):
    """The message of the refusal, which must be one short line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


# ---- safetensors


def repacked(data: bytes, change) -> bytes:
    """A safetensors file with another header."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def with_offsets(start: int, end: int):
    def change(header):
        name = sorted(name for name in header if name != "__metadata__")[0]
        header[name]["data_offsets"] = [start, end]

    return change


def with_shape(*shape):
    def change(header):
        name = sorted(name for name in header if name != "__metadata__")[0]
        header[name]["shape"] = list(shape)

    return change


def with_dtype(dtype):
    def change(header):
        for name in set(header) - {"__metadata__"}:
            header[name]["dtype"] = dtype

    return change


def head_of(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


SPOILED = {
    "empty": lambda data: b"",
    "cut in the length": lambda data: data[:5],
    "cut in the header": lambda data: data[:40],
    "cut in the data": lambda data: data[:-1],
    "header longer than the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "header of 2^63 bytes": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "header of no bytes": lambda data: struct.pack("<Q", 0) + data[8:],
    "header is no JSON": lambda data: data[:8] + b"{" * (head_of(data) - 8) + data[head_of(data) :],
    "header is no text": lambda data: data[:8] + b"\xff" * (head_of(data) - 8) + data[8:],
    "header is a list": lambda data: struct.pack("<Q", 2) + b"[]" + data[head_of(data) :],
    "pickle": lambda data: pickle.dumps(print),
    "offsets overlap": lambda data: repacked(data, with_offsets(4, 8)),
    "offsets beyond the file": lambda data: repacked(data, with_offsets(0, 2**40)),
    "offsets backwards": lambda data: repacked(data, with_offsets(8, 0)),
    "offsets negative": lambda data: repacked(data, with_offsets(-8, 0)),
    "shape of another size": lambda data: repacked(data, with_shape(3, 5, 7)),
    "shape that overflows": lambda data: repacked(data, with_shape(2**40, 2**40)),
    "shape negative": lambda data: repacked(data, with_shape(-1)),
    "dtype of no kind": lambda data: repacked(data, with_dtype("F31")),
    "dtype of another size": lambda data: repacked(data, with_dtype("F64")),
    "bytes too many": lambda data: data + b"more",
    "tensors that are null": lambda data: repacked(
        data, lambda header: header.update(dict.fromkeys(header))
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A model and scorers, each in a directory."""
    root = tmp_path_factory.mktemp("sound")
    params = jax.device_get(models.init(jax.random.key(0), MODEL))
    models.save(root / "model", models.LM(params, MODEL))
    params = jax.device_get(scorer.init(jax.random.key(0), MODEL, scorer.ScorerConfig()))
    sharing.export(Foresight(params, scorer.ScorerConfig()), root / "scorers", {"model": "x"})
    return root


def test_what_is_not_spoiled_loads(sound):
    assert models.load(sound / "model").config == MODEL
    assert fkv.load_scorer(sound / "scorers").config == scorer.ScorerConfig()


@pytest.mark.parametrize("how", SPOILED)
def test_safetensors(sound, tmp_path, how):
    for name, file, load in (
        ("model", "model.safetensors", models.load),
        ("model", "model.safetensors", models.load_judges),
        ("scorers", "scorer.safetensors", fkv.load_scorer),
    ):
        path = tmp_path / load.__name__
        path.mkdir()
        for one in (sound / name).iterdir():
            (path / one.name).write_bytes(one.read_bytes())
        (path / file).write_bytes(SPOILED[how]((sound / name / file).read_bytes()))
        assert str(path) in refusal(load, path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", '{"scorer": 3}', '{"scorer": {"colour": 3}}', "[" * 100_000, "\x00"],
)
def test_what_is_said_of_scorers(sound, tmp_path, text):
    for one in (sound / "scorers").iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    (tmp_path / "scorer.json").write_text(text)
    assert str(tmp_path) in refusal(fkv.load_scorer, tmp_path)


@pytest.mark.parametrize("name", ["scorer.json", "scorer.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_scorers_that_are_no_regular_files(sound, tmp_path, name, make):
    """A pipe that nobody writes to would never end."""
    for one in (sound / "scorers").iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    (tmp_path / name).unlink()
    make(tmp_path / name)
    assert str(tmp_path / name) in refusal(fkv.load_scorer, tmp_path)


@pytest.mark.parametrize("info", [{}, {"config": 3}, {"config": {"scorer": {"colour": 3}}}])
def test_checkpoints_without_scorers(tmp_path, info):
    """As those of pretraining: whole, but nothing to evict by."""
    checkpoint.save(tmp_path, 1, {"params": {"x": np.ones(3)}}, info)
    assert f"{tmp_path}: " in refusal(fkv.load_scorer, tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"foresight": 3}', '{"foresight": {}}', "[" * 100_000, "\xff"]
)
@pytest.mark.parametrize("name", ["provenance.json", "scorers.json"])
def test_what_a_run_has_used(tmp_path, text, name):
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    assert f"{path}: " in refusal(rundir.open_run, tmp_path, tiny.get_config(), (), {"x": "0"})


# ---- Parquet


@pytest.mark.parametrize(
    "columns",
    [
        {"id": [1, 2], "sample": ["a", "b"]},
        {"id": ["a"]},
        {"id": [None], "sample": [None]},
        {"id": [["a"]], "sample": [[0]]},
        {"other": [1]},
    ],
)
def test_traces_written_by_somebody_else(tmp_path, columns):
    """Rows that are taken for done must be rows of `launch.traces`."""
    file = tmp_path / "traces-000-00000.parquet"
    pq.write_table(pa.table(columns), file)
    assert f"{file} " in refusal(traces._done, tmp_path)


def test_ids_of_traces_that_are_not_utf8(tmp_path):
    offsets = pa.array([0, 2], pa.int32()).buffers()[1]
    bad = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    file = tmp_path / "traces-000-00000.parquet"
    pq.write_table(pa.table({"id": bad, "sample": pa.array([0], pa.int32())}), file)
    assert f"{file} can't be read (" in refusal(traces._done, tmp_path)


def test_what_is_written_holds_no_pickles(tmp_path):
    """Arrays, JSON, Parquet of plain types: bytes that begin like a pickle are nowhere."""
    checkpoint.save(tmp_path, 1, {"x": np.ones(3), "n": 3}, {"config": {}})
    config = tiny.get_config()
    row = {"id": "0", "sample": 0, "input_ids": np.arange(3), "prompt_tokens": 1, "tokens": 3,
           "truncated": False, "source": "here", "kind": "answers"}  # fmt: skip
    data.write(tmp_path / "traces-000-00000.parquet", [row], config.to_dict())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert not re.match(rb"\x80[\x02-\x05]|\(dp0|cos\n|PK", path.read_bytes()), path
    schema = pq.read_schema(tmp_path / "traces-000-00000.parquet")
    assert not any(isinstance(field.type, pa.BaseExtensionType) for field in schema)
    assert set(schema.metadata) == {b"fkv"}


FORBIDDEN = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch",
}  # fmt: skip


def test_nothing_is_unpickled():
    """No module of fkv imports what can run code from data, or asks NumPy to.

    But for the script that the benchmark runs in an environment with PyTorch, on its own files; and
    one reader of PyTorch's files, whose unpickler finds nothing but what rebuilds dense tensors
    (tests/runs/test_imported.py tries hostile ones).
    """
    for path in Path(fkv.__file__).parent.rglob("*.py"):
        if path.name == "peer.py":
            continue
        tree = ast.parse(path.read_text())
        if path.name == "torch_files.py":
            used = {ast.unparse(x) for x in ast.walk(tree) if isinstance(x, ast.Attribute)}
            assert {x for x in used if x.startswith("pickle.")} == {"pickle.Unpickler"}
            [reader] = [x for x in ast.walk(tree) if isinstance(x, ast.ClassDef)]
            assert [ast.unparse(x) for x in reader.bases] == ["pickle.Unpickler"]
            own = {x.name for x in reader.body if isinstance(x, ast.FunctionDef)}
            assert {"find_class", "persistent_load"} <= own
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                names = []
            assert not FORBIDDEN & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "np.load", "numpy.load"), f"{path}: {name}"
                assert not re.search(r"(^|\.)(recv|read_pickle)$", name), f"{path}: {name}"
                for word in node.keywords:
                    trusting = word.arg in ("allow_pickle", "trust_remote_code")
                    assert not trusting or ast.unparse(word.value) == "False", f"{path}: {name}"


def test_math_verify_is_imported_in_its_own_process_alone():
    """Untrusted text reaches its parser where it can be killed, and nowhere else."""
    found = []
    for path in Path(fkv.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found += [
                    (path.name, node.name)
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.Import)
                    and "math_verify" in [alias.name for alias in inner.names]
                ]
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not any("math_verify" in ast.unparse(n) or "sympy" in ast.unparse(n) for n in top)
    assert found == [("math_answers.py", "_serve")]
