"""Finished jobs: what makes them run again, and what they print if nothing does."""

import os
import sys
from pathlib import Path

import pytest

from fkv.runs import finished
from launch import app


@pytest.fixture
def run(tmp_path):
    """A directory with a table, and a config that names files it was made from."""
    traces, scorers = tmp_path / "traces.jsonl", tmp_path / "other"
    traces.write_text("one\n")
    scorers.mkdir()
    (scorers / "weights").write_text("w")
    path = tmp_path / "run"
    (path / "tb").mkdir(parents=True)
    (path / "loss_ratio.txt").write_text("the table\n")
    (path / "commit.txt").write_text("abc\n")
    (path / "tb" / "events").write_text("e")
    config = {"budget": 4, "data": {"path": str(traces)}, "x": ("a=" + str(scorers), "", "no/file")}
    return path, config, traces, scorers


def test_a_finished_run_prints_its_tables(run):
    path, config, _, _ = run
    assert finished.tables(path, config) is None
    finished.record(path, config)
    assert finished.tables(path, config) == "the table"
    (path / ".lock").write_text("")  # of whoever looks
    assert finished.tables(path, config) == "the table"


CHANGES = {
    "another config": lambda path, config, traces, scorers: config.update(budget=8),
    "another field": lambda path, config, traces, scorers: config.update(seed=8),
    "other traces": lambda path, config, traces, scorers: traces.write_text("two\n2"),
    "no traces": lambda path, config, traces, scorers: traces.unlink(),
    "traces that are touched": lambda path, config, traces, scorers: os.utime(traces, (1, 1)),
    "scorers trained on": lambda path, config, traces, scorers: (scorers / "new").write_text("x"),
    "a table that is gone": lambda path, config, traces, scorers: (path / "tb" / "events").unlink(),
    "a table that is edited": lambda path, *_: (path / "loss_ratio.txt").write_text("!"),
    "a new file": lambda path, *_: (path / "tb" / "more").write_text("!"),
    "a damaged record": lambda path, *_: (path / finished.RECORD).write_text("{"),
    "a record of nothing": lambda path, *_: (path / finished.RECORD).write_text("{}"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_has_changed_runs_again(run, name):
    finished.record(*run[:2])
    CHANGES[name](*run)
    assert finished.tables(*run[:2]) is None


def test_another_version_runs_again(run, monkeypatch):
    finished.record(*run[:2])
    monkeypatch.setattr(finished, "source_version", lambda: "another")
    assert finished.tables(*run[:2]) is None


def test_directories_without_end_are_not_recorded(run, monkeypatch):
    monkeypatch.setattr(finished, "_MOST", 3)
    finished.record(*run[:2])
    assert not (run[0] / finished.RECORD).exists()


def test_a_pipeline_s_tables_are_in_its_stages(tmp_path):
    for i, stage in enumerate(("sft", "evaluate")):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "table.txt").write_text(f"{stage}\n")
        os.utime(tmp_path / stage / "table.txt", (i, i))
    finished.record(tmp_path, {})
    assert finished.tables(tmp_path, {}) == "sft\n\nevaluate"


def test_a_job_says_how_long_it_took_and_then_that_it_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(app, "use_compilation_cache", lambda: None)
    calls = []

    def main(config, workdir):
        calls.append(workdir)
        Path(workdir).mkdir()
        (Path(workdir) / "loss_ratio.txt").write_text("the table\n")

    command = ["sft.py", "--config=tiny", f"--workdir={tmp_path}/run"]
    for _ in range(2):
        app.run(main, command)
    first, second = capsys.readouterr().out.split("the table")
    assert first.startswith("sft: done in 0.") and len(calls) == 1
    assert f"sft: nothing left to do in {tmp_path}/run" in second
    # Another job's field changes nothing, one of its own does; a dry run is none.
    app.run(main, [*command, "--config.grpo.steps=3"])
    assert len(calls) == 1
    with pytest.raises(FileExistsError):
        app.run(main, [*command, "--config.sft.steps=3"])
    # A job that answers anew each time.
    monkeypatch.setattr(sys.modules[__name__], "__doc__", "")
    command = ["generate.py", "--config=tiny", f"--workdir={tmp_path}/other"]
    app.run(main, command)
    with pytest.raises(FileExistsError):
        app.run(main, command)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (200, "3 min 20 s"),
     (3599.6, "1 h 00 min"), (7500, "2 h 05 min"), (3 * 86400, "72 h 00 min")],
)  # fmt: skip
def test_durations(seconds, said):
    assert finished.duration(seconds) == said
