"""Run directories: what is recorded, what is refused, and what resuming drops."""

import errno
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import fkv
from fkv.errors import UserError
from fkv.runs import checkpoint, places, rundir


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_config(**fields) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({"lr": 0.01, "model": {"widths": (8, 16)}, **fields})


def metrics_of(run: rundir.Run) -> list[dict]:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def events_of(run: rundir.Run) -> list[Event]:
    """The TensorBoard events: records of length (8 bytes), checksum (4), event, checksum (4)."""
    events = []
    for path in sorted((run.path / "tb").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_records_config_commit_and_metrics(tmp_path):
    run = rundir.open_run(tmp_path / "a" / "run", make_config())
    run.log(0, {"loss": jnp.float32(0.5), "per_layer": np.arange(2), "note": "warm-up"})
    run.log(1, {"loss": 1, "eval": {"nll": np.inf, "all": [1.0, float("nan")]}, "bad": jnp.nan})
    run.close()
    assert json.loads((run.path / "config.json").read_text()) == run.config
    assert run.config == {"lr": 0.01, "model": {"widths": [8, 16]}}
    assert (run.path / "commit.txt").read_text() == f"{rundir.source_version()}\n"
    assert metrics_of(run) == [
        {"step": 0, "loss": 0.5, "per_layer": [0, 1], "note": "warm-up"},
        {"step": 1, "loss": 1, "eval": {"nll": None, "all": [1.0, None]}, "bad": None},
    ]
    scalars = [(e.step, v.tag, v.simple_value) for e in events_of(run) for v in e.summary.value]
    assert scalars == [(0, "loss", 0.5), (1, "loss", 1.0)]


def test_refuses_another_config(tmp_path):
    rundir.open_run(tmp_path, make_config(progress=True))
    changed = make_config(progress=False, seed=1)
    changed.model.widths = (8, 32)
    with pytest.raises(UserError) as error:
        rundir.open_run(tmp_path, changed, may_differ=["progress"])
    assert str(error.value) == (
        f"{tmp_path} holds a run with another config (model.widths: [8, 16] -> [8, 32]; "
        "seed: absent -> 1): use another --workdir"
    )


def test_a_field_that_an_old_run_did_not_have_may_be_off(tmp_path):
    rundir.open_run(tmp_path, make_config()).close()
    new = {"seed": 0, "variants": (), "group": {"name": "", "switch": False}}
    rundir.open_run(tmp_path, make_config(**new)).close()
    with pytest.raises(UserError, match=r"\(group.name:  -> a\)"):
        rundir.open_run(tmp_path, make_config(**new | {"group": {"name": "a", "switch": False}}))


def test_a_field_that_only_an_old_run_had_may_have_been_off(tmp_path):
    rundir.open_run(tmp_path, make_config(kernels=(), kernel="plain")).close()
    rundir.open_run(tmp_path, make_config(), may_differ=["kernel"]).close()
    with pytest.raises(UserError, match=r"\(kernel: on -> absent\)"):
        rundir.open_run(tmp_path / "other", make_config(kernels=(), kernel="on")).close()
        rundir.open_run(tmp_path / "other", make_config())


def test_checkpoints_of_another_config_are_refused(tmp_path):
    run = rundir.open_run(tmp_path, make_config())
    run.save(1, {"w": np.ones(2)})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"not JSON .* delete it, as the checkpoints have"):
        rundir.open_run(tmp_path, make_config())
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"another config \(lr: 0.01 -> 0.02\): use another"):
        rundir.open_run(tmp_path, make_config(lr=0.02))
    assert rundir.open_run(tmp_path, make_config()).resume({"w": np.ones(2)}).step == 1


def test_harmless_fields_may_change(tmp_path):
    rundir.open_run(tmp_path, make_config())
    config = make_config()
    config.model.widths = (1,)
    run = rundir.open_run(tmp_path, config, may_differ=["model"])
    assert json.loads((run.path / "config.json").read_text())["model"]["widths"] == [1]
    with pytest.raises(UserError, match=r"model\.widths"):
        rundir.open_run(tmp_path, make_config(), may_differ=["mod"])


def test_resuming_drops_later_metrics(tmp_path):
    state = {"w": np.arange(3.0)}
    run = rundir.open_run(tmp_path, make_config())
    assert run.resume(state) is None
    for step in range(5):
        run.log(step, {"loss": step})
        if step == 2:
            run.save(step, {"w": state["w"] + step}, batches_read=6)
    run.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing

    run = rundir.open_run(tmp_path, make_config())
    assert [record["step"] for record in metrics_of(run)] == [0, 1, 2, 3, 4]
    step, restored, info = run.resume(state)
    assert (step, info) == (2, {"config": run.config, "batches_read": 6})
    np.testing.assert_array_equal(restored["w"], [2, 3, 4])
    run.log(3, {"loss": 33})
    run.close()
    assert metrics_of(run) == [{"step": s, "loss": loss} for s, loss in enumerate([0, 1, 2, 33])]
    starts = [e.step for e in events_of(run) if e.HasField("session_log")]
    assert starts == [0, 3]  # TensorBoard hides older events from these steps on

    shutil.rmtree(tmp_path / "checkpoints")
    assert rundir.open_run(tmp_path, make_config()).resume(state) is None
    assert metrics_of(run) == []


def test_names_a_bad_line_and_a_bad_directory(tmp_path):
    rundir.open_run(tmp_path, make_config())
    for line in ("oops", "[]", "3", "{}", '{"step": "two"}', '{"step": null}'):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 1}}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not a record"):
            rundir.open_run(tmp_path, make_config())
    with pytest.raises(UserError, match=r"cannot write .*config.json/run \(Not a directory\)"):
        rundir.open_run(tmp_path / "config.json" / "run", make_config())
    for text in ("", "{", "[1]", "3", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json: not "):
            rundir.open_run(tmp_path, make_config())


def test_a_full_disk_is_one_line(tmp_path):
    """/dev/full takes nothing."""
    run = rundir.open_run(tmp_path, make_config())
    run.log(1, {"loss": 1.0})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    advice = r"\(No space left on device\): free disk space .* rerun the same command"
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/metrics.jsonl {advice}"):
        run.log(2, {"loss": 1.0})
    (tmp_path / "kept").replace(tmp_path / "metrics.jsonl")

    before = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/config.json {advice}"):
        rundir.open_run(tmp_path, make_config())
    assert (tmp_path / "config.json").read_text() == before
    assert not (tmp_path / "config.json.tmp").is_symlink()
    assert len(metrics_of(rundir.open_run(tmp_path, make_config()))) == 1


def test_lines_are_logged_atomically(tmp_path, monkeypatch):
    run = rundir.open_run(tmp_path, make_config())
    run.log(1, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(os, "fsync", disk_full)  # by then it is written
    with pytest.raises(UserError, match=r"cannot write .*/metrics.jsonl \(No space left"):
        run.log(2, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_small_files_that_are_not_text(tmp_path):
    (tmp_path / "commit.txt").write_bytes(b"caf\xe9\n")
    rundir.open_run(tmp_path, make_config())
    commits = (tmp_path / "commit.txt").read_text().splitlines()
    assert commits == ["caf\\xe9", rundir.source_version()]
    for bad in (b"\xff\xfe{}", b"[" * 100_000, b"\x00"):
        (tmp_path / "config.json").write_bytes(bad)
        with pytest.raises(UserError, match=r"config\.json: not "):
            rundir.open_run(tmp_path, make_config())


def test_files_that_are_no_files(tmp_path):
    """Directories, and pipes, which never end."""
    names = ("config.json", "provenance.json", "metrics.jsonl", "commit.txt")
    for name, make in itertools.product(names, (os.mkdir, os.mkfifo)):
        path = tmp_path / f"{name}-{make.__name__}"
        path.mkdir()
        make(path / name)
        with pytest.raises(UserError, match=rf"{name}(:| can't be read).*not a regular file"):
            rundir.open_run(path, make_config())
        if name.endswith(".json"):
            with pytest.raises(UserError, match=rf"{name}: not a regular file.*: use"):
                rundir.check_run(path, make_config())


def test_metrics_nested_too_deeply_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("[" * 100_000 + '\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1 is not a record"):
        rundir.open_run(tmp_path, make_config())


def test_names_that_no_file_system_has(tmp_path):
    for name in ("x" * 256, "a\0b"):
        with pytest.raises(UserError, match="can't be a path here"):
            rundir.check_run(f"{tmp_path}/{name}", make_config())
    with pytest.raises(UserError, match="--workdir is empty"):
        rundir.open_run("", make_config())


def test_home_is_where_a_shell_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    run = rundir.open_run("~/run", make_config())
    assert run.path == tmp_path / "me" / "run"
    run.save(1, {"w": np.ones(2)})
    assert checkpoint.latest_step("~/run") == 1
    assert rundir.open_run("~/run", make_config()).resume({"w": np.ones(2)}).step == 1
    assert rundir.open_run("./~here", make_config()).path.is_dir()
    with pytest.raises(UserError, match=r"~nosuchuser/x: no home directory is known for ~nosuchu"):
        rundir.open_run("~nosuchuser/x", make_config())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["me", "~here"]


def test_commit_of_the_source(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    source = tmp_path / "places.py"
    source.write_text("1")
    monkeypatch.setattr(places, "__file__", str(source))
    git("init")
    git("commit", "--allow-empty", "-m", "another project, with fkv installed inside")
    assert rundir.source_version() == f"fkv {fkv.__version__}"
    git("add", "places.py")
    git("commit", "-m", "fkv's own")
    commit = git("rev-parse", "HEAD")
    assert rundir.source_version() == commit
    rundir.open_run(tmp_path / "run", make_config())
    source.write_text("2")
    assert rundir.source_version() == f"{commit}-dirty"
    run = rundir.open_run(tmp_path / "run", make_config())
    assert (run.path / "commit.txt").read_text() == f"{commit}\n{commit}-dirty\n"


def test_two_processes_are_kept_apart(tmp_path):
    """The lock is a process's own, so another process has to hold it."""
    script = """
import sys, ml_collections
from fkv.runs import checkpoint, rundir
run = rundir.open_run(sys.argv[1], ml_collections.ConfigDict({"a": 1}))
print("open", flush=True)
sys.stdin.read()
"""
    config = ml_collections.ConfigDict({"a": 1})
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process is using"):
            rundir.open_run(tmp_path, config)
        other.communicate("")
    rundir.open_run(tmp_path, config)  # it has gone
    rundir.open_run(tmp_path, config)  # and one process may open a run again


def test_other_inputs_are_refused_by_name(tmp_path):
    used = {"data.path: traces": "a", "questions": ["q0", "q1"], "model: its weights": "m"}
    rundir.open_run(tmp_path, make_config(), (), used)
    before = (tmp_path / "provenance.json").read_bytes()
    rundir.open_run(tmp_path, make_config(), (), used)
    rundir.open_run(tmp_path, make_config(), (), {"questions": ["q0"]})  # fewer, and some not used
    assert (tmp_path / "provenance.json").read_bytes() == before
    rundir.open_run(tmp_path, make_config(), (), {"questions": ["q0", "q1", "q2"], "new": "n"})
    assert rundir.read_inputs(tmp_path) == {
        **used, "questions": ["q0", "q1", "q2"], "new": "n",
    }  # fmt: skip

    before = (tmp_path / "provenance.json").read_bytes()
    other = {
        "data.path: traces": "b",
        "questions": ["q0", "x", "y", "q3"],
        "model: its weights": "m",
    }
    for attempt in (rundir.open_run, rundir.check_run):
        with pytest.raises(UserError) as error:
            attempt(tmp_path, make_config(seed=1), (), other)
        assert str(error.value) == (
            f"{tmp_path} holds a run with another config (seed: absent -> 1) and with other "
            "inputs, which have changed since (data.path: traces; questions, number 2 and 1 more): "
            "use another --workdir"
        )
    assert (tmp_path / "provenance.json").read_bytes() == before
    assert "seed" not in json.loads((tmp_path / "config.json").read_text())
    rundir.check_run(tmp_path / "new", make_config(), (), other)
    assert not (tmp_path / "new").exists()


def test_a_run_from_before_inputs_were_recorded_takes_those_of_now(tmp_path):
    rundir.open_run(tmp_path, make_config())
    assert not (tmp_path / "provenance.json").exists()
    rundir.open_run(tmp_path, make_config(), (), {"model": "m"})
    with pytest.raises(UserError, match=r"changed since \(model\)"):
        rundir.open_run(tmp_path, make_config(), (), {"model": "n"})

    (tmp_path / "provenance.json").unlink()
    (tmp_path / "scorers.json").write_text('{"mine": {"source": "a", "sha256": "s"}}')
    assert rundir.read_inputs(tmp_path) == {rundir.answers_of("mine"): "s"}
