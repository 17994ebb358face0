"""Finished jobs: what makes them run again, and what they print if nothing does."""

import dataclasses
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


def record(path, config, before=None):
    """As after a job that wrote all there is."""
    finished.record(
        path, config, before or dataclasses.replace(finished.look(path, config), own={})
    )


def tables(path, config):
    return finished.tables(path, config, finished.look(path, config))


def test_a_finished_run_prints_its_tables(run):
    path, config, _, _ = run
    assert tables(path, config) is None
    record(path, config)
    assert tables(path, config) == "the table"
    (path / ".lock").write_text("")  # of whoever looks
    assert tables(path, config) == "the table"


def test_only_what_the_last_run_wrote_is_printed(run):
    path, config, _, _ = run
    (path / "compared.txt").write_text("of a run with other options\n")
    (path / "log.txt").write_text("a log\n")
    before = finished.look(path, config)
    (path / "loss_ratio.txt").write_text("another table\n")
    record(path, config, before)
    assert tables(path, config) == "another table"


def test_inputs_that_changed_while_the_job_ran_are_read_again(run):
    path, config, traces, scorers = run
    before = finished.look(path, config)
    traces.write_text("two\n2")
    record(path, config, before)
    assert not (path / finished.RECORD).exists()
    before = finished.look(path, config)
    (scorers / "new").write_text("x")
    record(path, config, before)
    assert tables(path, config) is None


def test_what_can_not_be_looked_at_runs_again_and_does_no_harm(run):
    path, config, _, scorers = run
    record(path, config)
    (scorers / ".#lock").symlink_to("nowhere")
    assert finished.look(path, config) is None and tables(path, config) is None
    finished.record(path, config, None)


def test_files_behind_links_and_patterns_count(run, tmp_path):
    path, config, _, scorers = run
    far = tmp_path / "far"
    far.mkdir()
    (far / "part").write_text("p")
    (scorers / "link").symlink_to(far)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    config["text"] = (f"code={tmp_path}/texts/**/*.txt",)
    for change in (far / "part", tmp_path / "texts" / "a.txt", tmp_path / "texts" / "b.txt"):
        record(path, config)
        assert tables(path, config) == "the table"
        change.write_text("changed")
        assert tables(path, config) is None


def test_changed_source_runs_again_in_the_same_version(run, tmp_path, monkeypatch):
    source = tmp_path / "source" / "policy.py"
    source.parent.mkdir()
    source.write_text("1")
    monkeypatch.setattr(finished, "_SOURCE", source.parent)
    own = tmp_path / "recipe.py"
    own.write_text("1")
    module = type(sys)("a_recipe_of_mine")
    module.__file__ = str(own)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for change in (source, own):
        record(*run[:2])
        assert tables(*run[:2]) == "the table"
        change.write_text("22")
        assert tables(*run[:2]) is None


CHANGES = {
    "another config": lambda path, config, traces, scorers: config.update(budget=8),
    "another field": lambda path, config, traces, scorers: config.update(seed=8),
    "other traces": lambda path, config, traces, scorers: traces.write_text("two\n2"),
    "no traces": lambda path, config, traces, scorers: traces.unlink(),
    "traces that are touched": lambda path, config, traces, scorers: os.utime(traces, (1, 1)),
    "scorers trained on": lambda path, config, traces, scorers: (scorers / "new").write_text("x"),
    "a table that is gone": lambda path, config, traces, scorers: (
        path / "loss_ratio.txt"
    ).unlink(),
    "a table that is edited": lambda path, *_: (path / "loss_ratio.txt").write_text("!"),
    "a new file": lambda path, *_: (path / "tb" / "more").write_text("!"),
    "a damaged record": lambda path, *_: (path / finished.RECORD).write_text("{"),
    "a record of nothing": lambda path, *_: (path / finished.RECORD).write_text("{}"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_has_changed_runs_again(run, name):
    record(*run[:2])
    CHANGES[name](*run)
    assert tables(*run[:2]) is None


def test_another_version_runs_again(run, monkeypatch):
    record(*run[:2])
    monkeypatch.setattr(finished, "source_version", lambda: "another")
    assert tables(*run[:2]) is None


def test_directories_without_end_are_not_recorded(run, monkeypatch):
    monkeypatch.setattr(finished, "_MOST", 3)
    assert finished.look(*run[:2]) is None
    finished.record(*run[:2], None)
    assert not (run[0] / finished.RECORD).exists()


def test_a_pipeline_s_tables_are_in_its_stages(tmp_path):
    for i, stage in enumerate(("sft", "evaluate")):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "table.txt").write_text(f"{stage}\n")
        os.utime(tmp_path / stage / "table.txt", (i, i))
    record(tmp_path, {})
    assert tables(tmp_path, {}) == "sft\n\nevaluate"


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
