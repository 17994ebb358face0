"""Checkpoints: exact round trips, mismatches named, damage found."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from fkv.errors import UserError
from fkv.runs import checkpoint


@flax.struct.dataclass
class State:
    params: dict
    opt_state: optax.OptState
    key: jax.Array
    epoch: int


def make_state(width: int = 16, seed: int = 0) -> State:
    key = jax.random.key(seed)
    params = {
        "layers": [{"w1": jax.random.normal(key, (3, width))}, {"w1": jnp.ones((width,))}],
        "scale": jnp.full((5,), 1 / 3, jnp.bfloat16),
    }
    return State(params, optax.adam(1e-2).init(params), jax.random.key_data(key), seed + 7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    checkpoint.save(run_dir, 10, make_state(), {"config": {"lr": 0.01}})
    return run_dir


def test_restores_every_leaf_exactly(saved):
    state = make_state()
    step, restored, info = checkpoint.restore(saved, make_state(seed=1))
    assert (step, info) == (10, {"config": {"lr": 0.01}})
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for was, now in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert jnp.result_type(was) == jnp.result_type(now)
        np.testing.assert_array_equal(was, now)
    assert restored.epoch == 7 and type(restored.epoch) is int


def test_restores_into_abstract_shapes(saved):
    restored = checkpoint.restore(saved, jax.eval_shape(make_state)).state
    np.testing.assert_array_equal(restored.key, make_state().key)


def test_load_needs_no_target(saved):
    step, state, info = checkpoint.load(saved)
    assert (step, info["config"]["lr"]) == (10, 0.01)
    np.testing.assert_array_equal(
        state["params"]["layers"]["0"]["w1"], make_state().params["layers"][0]["w1"]
    )
    assert state["opt_state"]["0"]["count"] == 0


def test_names_the_first_leaf_that_differs(saved):
    state = make_state()
    misfits = {
        r"params/layers/0/w1 is float32\[3, 16\] there, float32\[3, 17\] here": make_state(
            width=17
        ),
        r"key is uint32\[2\] there, int32\[2\] here": state.replace(key=jnp.zeros(2, jnp.int32)),
        r"params/bias is absent there, float32\[2\] here": state.replace(
            params={**state.params, "bias": jnp.zeros(2)}
        ),
        r"opt_state/0/count is int32\[\] there, absent here": state.replace(opt_state=()),
    }
    for message, target in misfits.items():
        with pytest.raises(UserError, match=f"does not fit this config: {message}"):
            checkpoint.restore(saved, target)


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, {"x": np.arange(step)}, {}, keep=2)
    assert checkpoint.latest_step(tmp_path) == 10
    assert checkpoint.load(tmp_path, 2).state["x"].size == 2
    with pytest.raises(UserError, match=r"no checkpoint of step 1 .*, only of \[2, 10\]"):
        checkpoint.load(tmp_path, 1)
    with pytest.raises(UserError, match="keep at least 1"):
        checkpoint.save(tmp_path, 11, {"x": np.ones(1)}, {}, keep=0)


def test_saving_a_step_again_replaces_it(tmp_path):
    for value in (1, 2):
        checkpoint.save(tmp_path, 5, {"x": np.array([value])}, {}, keep=1)
    assert checkpoint.load(tmp_path).state["x"] == [2]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["5"]


def test_a_killed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"x": np.ones(3)}, {})

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sha256", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, {"x": np.zeros(3)}, {})
    assert checkpoint.load(tmp_path).step == 1
    checkpoint.save(tmp_path, 3, {"x": np.zeros(3)}, {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]


@contextlib.contextmanager
def small_files_only(limit: int):
    """No file may grow beyond `limit` bytes; Python ignores the signal that would end it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["arrays", "limit", "asked before", "info.json"])
def test_a_full_disk(tmp_path, monkeypatch, where, caplog):
    checkpoint.save(tmp_path, 1, {"x": np.ones(3)}, {})
    state = {"x": np.random.default_rng(0).random(40_000)}
    reason = "File too large" if where in ("arrays", "limit") else "No space left on device"
    refused = (
        f"cannot write {tmp_path}/checkpoints/2 ({reason}): free disk space or fix the cause, and "
        "rerun the same command"
    )
    with monkeypatch.context() as patch, contextlib.ExitStack() as limits:
        if where == "arrays":  # the file system can't be asked before
            patch.setattr(os, "posix_fallocate", lambda *_: None)
            limits.enter_context(small_files_only(100_000))
        elif where == "limit":
            limits.enter_context(small_files_only(100_000))
            patch.setattr(ocp, "StandardCheckpointer", None)
        elif where == "asked before":
            patch.setattr(os, "posix_fallocate", disk_full)
            patch.setattr(ocp, "StandardCheckpointer", None)  # Orbax is never called
        else:
            patch.setattr(Path, "write_text", disk_full)
        with pytest.raises(UserError) as error:
            checkpoint.save(tmp_path, 2, state, {})
    assert str(error.value) == refused
    assert caplog.text == ""  # Orbax would say it in hundreds of lines
    # What was there still is, and nothing else: half a checkpoint takes space, too.
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert checkpoint.restore(tmp_path, {"x": np.ones(3)}).step == 1
    checkpoint.save(tmp_path, 2, state, {})
    np.testing.assert_array_equal(checkpoint.load(tmp_path).state["x"], state["x"])


@pytest.mark.parametrize("name", ["²", "٣", "01", "+1", "-1", "1_0", "7", "8", "9.tmp", "x"])
def test_only_what_was_saved_is_a_checkpoint(tmp_path, name):
    checkpoint.save(tmp_path, 1, {"x": np.ones(3)}, {})
    other = tmp_path / "checkpoints" / name
    other.write_text("") if name in ("8", "9.tmp") else other.mkdir()
    assert checkpoint.latest_step(tmp_path) == checkpoint.load(tmp_path).step == 1
    assert checkpoint.newest_info(tmp_path) == {}
    checkpoint.save(tmp_path, 12, {"x": np.ones(3)}, {}, keep=1)
    assert checkpoint.restore(tmp_path, {"x": np.ones(3)}).step == 12
    assert other.exists() == (name != "9.tmp")


def test_names_the_path_of_a_missing_checkpoint(tmp_path):
    assert checkpoint.latest_step(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}/nowhere/checkpoints"):
        checkpoint.load(tmp_path / "nowhere")


def damage_cases(path: Path) -> list[bytes]:
    data = path.read_bytes()
    flips = [
        data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        for at in np.linspace(0, len(data) - 1, 5, dtype=int)
    ]
    return [b"", data[:-1], data[: len(data) // 2], *flips]


def test_finds_damage_in_any_file(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    files = [p for p in (tmp_path / "checkpoints/10").rglob("*") if p.is_file()]
    assert {"info.json", "sha256.json", "manifest.ocdbt"} <= {p.name for p in files}
    message = f"checkpoint {tmp_path}/checkpoints/10 is damaged .*: rerun the job that made it"
    for path in files:
        sound = path.read_bytes()
        for damaged in damage_cases(path):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=message) as error:
                checkpoint.load(tmp_path)
            assert "\n" not in str(error.value)
        path.unlink()
        with pytest.raises(UserError, match=message):
            checkpoint.load(tmp_path)
        path.write_bytes(sound)
    assert checkpoint.load(tmp_path).step == 10


def arrays_of(folder: Path) -> Path:
    """The largest file of arrays in a checkpoint."""
    return max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def flip_a_bit(folder: Path) -> None:
    data = bytearray(arrays_of(folder).read_bytes())
    data[len(data) // 2] ^= 1
    arrays_of(folder).write_bytes(data)


def cut_short(folder: Path) -> None:
    os.truncate(arrays_of(folder), arrays_of(folder).stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip_a_bit, "/d/.*: does not match its checksum"),
        (cut_short, "/d/.*: does not match its checksum"),
        (lambda folder: (folder / "sha256.json").unlink(), "sha256.json: no such file"),
    ],
)
def test_a_damaged_checkpoint_is_skipped(tmp_path, capsys, damage, told):
    root = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, step, {"x": np.arange(step)}, {"at": step}, keep=3)
    damage(root / "6")
    step, state, info = checkpoint.restore(tmp_path, {"x": np.arange(4)})
    assert (step, info, state["x"].tolist()) == (4, {"at": 4}, [0, 1, 2, 3])
    (warning,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"warning: checkpoint {root}/6 is damaged \(.*{told}.*\): resuming from step 4", warning
    )
    # What was asked for, by the number of its step or for use, is not silently another one.
    for call in (lambda: checkpoint.restore(tmp_path, {}, 6), lambda: checkpoint.load(tmp_path)):
        with pytest.raises(UserError, match="checkpoints/6 is damaged"):
            call()

    # It does not count among those to keep, nor is it in the way when its step comes again.
    checkpoint.save(tmp_path, 5, {"x": np.arange(5)}, {}, keep=2)
    assert sorted(p.name for p in root.iterdir()) == ["4", "5", "6"]
    checkpoint.save(tmp_path, 6, {"x": np.arange(6)}, {}, keep=2)
    assert sorted(p.name for p in root.iterdir()) == ["5", "6"]
    assert checkpoint.load(tmp_path).step == 6


def rewritten(change):
    """A damage of `sha256.json`."""

    def damage(folder):
        path = folder / "sha256.json"
        checksums = json.loads(path.read_text())
        changed = change(checksums)
        path.write_text(changed if isinstance(changed, str) else json.dumps(changed))

    return damage


def info_of(text):
    """An `info.json` with its checksum."""

    def damage(folder):
        (folder / "info.json").write_text(text)
        sha = checkpoint._sha256(folder / "info.json")
        rewritten(lambda checksums: checksums | {"info.json": sha})(folder)

    return damage


def odd_file(make, name="odd"):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (rewritten(lambda c: c | {"/dev/zero": "a"}), "names '/dev/zero', which is outside"),
        (rewritten(lambda c: c | {"../../x": "a"}), "names '../../x', which is outside"),
        (rewritten(lambda c: c | {"state/../../x": "a"}), "which is outside"),
        (rewritten(lambda c: c | {"state": "a"}), "'state': no such file"),
        (rewritten(lambda c: c | {"a\0b": "a"}), "no such file"),
        (rewritten(lambda c: c | {"x" * 300: "a"}), "File name too long"),
        (rewritten(lambda c: c | {"info.json": None}), "info.json: does not match its checksum"),
        (rewritten(lambda c: {k: v for k, v in c.items() if k != "info.json"}), "does not name"),
        (rewritten(lambda c: {}), "does not name info.json"),
        (rewritten(lambda c: [["info.json", "a"]]), "sha256.json: not a JSON object"),
        (rewritten(lambda c: None), "sha256.json: not a JSON object"),
        (rewritten(lambda c: "[" * 100_000), "sha256.json: not JSON (maximum recursion"),
        (rewritten(lambda c: "{"), "sha256.json: not JSON (Expecting"),
        (odd_file(os.mkfifo), "odd: not a regular file"),
        (odd_file(os.mkfifo, "sha256.json"), "sha256.json: not a regular file"),
        (odd_file(os.mkfifo, "info.json"), "info.json: not a regular file"),
        (odd_file(lambda path: path.symlink_to("/dev/zero")), "odd: not a regular file"),
        (odd_file(lambda path: path.symlink_to("nowhere")), "odd: not a regular file"),
        (odd_file(lambda path: path.write_bytes(b"\xff"), "sha256.json"), "can't decode byte"),
        (info_of("[]"), "info.json: not a JSON object"),
        (info_of("["), "info.json: not JSON (Expecting value"),
    ],
)
def test_only_files_of_the_checkpoint_are_read(tmp_path, damage, told):
    """What is elsewhere, or would never end, is damage and is named."""
    checkpoint.save(tmp_path, 1, {"x": np.arange(1)}, {})
    (tmp_path / "x").write_text("there, but not of the checkpoint")
    folder = tmp_path / "checkpoints" / "1"
    damage(folder)
    with pytest.raises(UserError, match=rf"{folder} is damaged \(") as caught:
        checkpoint.load(tmp_path)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert checkpoint.newest_info(tmp_path) == {}


def test_what_orbax_did_not_write_is_named(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": np.arange(1)}, {})
    folder = tmp_path / "checkpoints" / "1"
    shutil.rmtree(folder / "state")
    rewritten(lambda c: {"info.json": c["info.json"]})(folder)
    with pytest.raises(UserError, match=rf"{folder} can't be read .*: delete it") as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_links_is_read(tmp_path):
    """As a store of large files keeps it: the checksums say that it is the same."""
    checkpoint.save(tmp_path, 1, {"x": np.arange(3)}, {"at": 1})
    store = tmp_path / "store"
    store.mkdir()
    for i, path in enumerate(p for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()):
        path.rename(store / str(i))
        path.symlink_to(store / str(i))
    assert checkpoint.load(tmp_path).state["x"].tolist() == [0, 1, 2]


def test_when_no_checkpoint_is_intact_all_are_named(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"x": np.ones(3)}, {})
    for step in (1, 2):
        flip_a_bit(tmp_path / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"is intact .*/2 is damaged .*/1 is damaged .* delete"):
        checkpoint.restore(tmp_path, {"x": np.ones(3)})
