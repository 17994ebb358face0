"""Sweeps: the order of points, that nothing runs twice, and the summary."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fkv import sweep
from fkv.errors import UserError
from fkv.jobs import common
from fkv.sweep import Point
from launch import flags

CONFIGS = sorted(p for p in Path("configs").glob("*.py") if "def sweep" in p.read_text())


def test_grid_is_every_combination():
    assert sweep.grid(seed=(0, 1), sft__steps=(5, 6)) == [
        {"seed": 0, "sft.steps": 5}, {"seed": 0, "sft.steps": 6},
        {"seed": 1, "sft.steps": 5}, {"seed": 1, "sft.steps": 6},
    ]  # fmt: skip


def test_points_come_after_what_they_need():
    last = Point("evaluate", "c", {"evaluate.scorers": ("x={sweep}/b", "y={sweep}/a")})
    points = [last, Point("grpo", "b", {"grpo.scorer": "{sweep}/a"}), Point("sft", "a", {})]
    assert [p.name for p in sweep.check(points, common.JOBS)] == ["a", "b", "c"]
    # What needs nothing keeps its place.
    assert [p.name for p in sweep.check([points[2], Point("sft", "z", {}), last, points[1]],
                                        common.JOBS)] == ["a", "z", "b", "c"]  # fmt: skip
    command = last.arguments("runs/s", ["--config=configs/x.py", "--config.seed=1"])
    assert command == [
        "launch.evaluate",
        "--config=configs/x.py",
        "--config.seed=1",
        "--workdir=runs/s/c",
        "--config.evaluate.scorers=('x=runs/s/b', 'y=runs/s/a')",
    ]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "has no points"),
        ([Point("sft", "a", {}), Point("grpo", "a", {})], "two points named 'a'"),
        ([Point("sft", "../a", {})], "point '../a': use letters"),
        ([Point("stf", "a", {})], "point 'a': no job 'stf': there are pretrain, traces, sft"),
        ([Point("sft", "a", {"x": "{sweep}/b"})], "point 'a' needs 'b', which is no point"),
        (
            [Point("sft", "a", {"x": "{sweep}/b"}), Point("sft", "b", {"x": "{sweep}/a"})],
            "in a circle: a -> b -> a",
        ),
    ],
)
def test_impossible_sweeps_are_refused(points, message):
    with pytest.raises(UserError, match=message):
        sweep.check(points, common.JOBS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_sweeps_of_the_project_are_sound(path):
    points = sweep.check(flags.load_module(path).sweep(), common.JOBS)
    for point in points:
        config, workdir = flags.parse(point.arguments("runs/s", [f"--config={path}"]))
        assert workdir == f"runs/s/{point.name}" and config.is_locked


# ---- running


@pytest.fixture
def fake_jobs(monkeypatch):
    """Jobs that write a table at once; those named in the list fail."""
    calls, failing = [], []

    def call(command, **_):
        name = next(Path(word[10:]) for word in command if word.startswith("--workdir="))
        calls.append(name.name)
        if name.name in failing:
            return 1
        ratio = 1 + 0.1 * int(name.name[-1])
        (name / "loss_ratio.csv").write_text(
            "policy,budget,ratio,ratio_low,added_low,overlap\n"
            f"full,16,1,1,0,nan\nforesight,16,{ratio},{ratio},0.5,0.7\n"
        )
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    return calls, failing


def points():
    yield from (Point("sft", f"a{i}", {"seed": i}, "a") for i in (1, 2, 3))
    yield Point("grpo", "b1", {"grpo.scorer": "{sweep}/a1"}, "b")


def test_what_is_done_is_not_run_again_and_failures_stop_what_needs_them(
    fake_jobs, tmp_path, capsys
):
    calls, failing = fake_jobs
    failing.append("a1")
    failed = sweep.run_local(list(points()), tmp_path, ["--config=x"])
    assert calls == ["a1", "a2", "a3"] and [p.name for p in failed] == ["a1", "b1"]
    assert "b1: left out, what it needs failed" in capsys.readouterr().out
    failing.clear()
    assert sweep.run_local(list(points()), tmp_path, ["--config=x"]) == []
    assert calls[3:] == ["a1", "b1"]
    with pytest.raises(UserError, match="holds a point with other values"):
        sweep.run_local([Point("sft", "a2", {"seed": 5})], tmp_path, ["--config=x"])


def test_the_summary_is_the_mean_over_seeds(fake_jobs, tmp_path):
    assert sweep.write_summary(list(points()), tmp_path) == "no point has figures yet"
    sweep.run_local(list(points()), tmp_path, ["--config=x"])
    text = sweep.write_summary(list(points()), tmp_path)
    ratios = np.array([1.1, 1.2, 1.3])
    error = ratios.std(ddof=1) / 3**0.5
    (line,) = [line for line in text.splitlines() if line.startswith("a ") and "foresight" in line]
    assert line.split()[:6] == ["a", "foresight", "16", "3", "1.200", "±"]
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    (row,) = [
        r for r in rows if (r["group"], r["policy"], r["figure"]) == ("a", "foresight", "ratio")
    ]
    assert float(row["mean"]) == pytest.approx(1.2) and float(row["se"]) == pytest.approx(error)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert "| b | foresight | 16 | 1 | 1.100 |" in (tmp_path / "summary.md").read_text()
    assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == 4 * 2 * 4


CONFIG = """
from fkv.sweep import Point
from configs import tiny

get_config = tiny.get_config

def sweep():
    yield Point("sft", "ok", {"seed": 1})
    yield Point("sft", "bad", {"sft.stepz": 1})
"""


def test_command_line_finds_what_is_wrong_before_anything_runs(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(CONFIG)
    command = [sys.executable, "-m", "launch.sweep", f"--config={path}", f"--workdir={tmp_path}/s"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: sweep point 'bad': config.sft has no field 'stepz': did you mean steps?"
    )
    assert not (tmp_path / "s").exists()
    path.write_text(CONFIG.replace("stepz", "steps"))
    done = subprocess.run([*command, "--dry_run", "--config.budget=96"], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == (
        f"python -m launch.sft --config={path} --config.budget=96 --workdir={tmp_path}/s/bad "
        "--config.sft.steps=1"
    )


def test_marks_of_done_points_are_data(fake_jobs, tmp_path):
    sweep.run_local([Point("sft", "a1", {"eval.budgets": (16, 32)})], tmp_path, ["--config=x"])
    record = json.loads((tmp_path / "a1" / sweep.DONE).read_text())
    assert record["values"] == {"eval.budgets": [16, 32]} and record["job"] == "sft"
    # The same again is done, though JSON knows no tuples.
    sweep.run_local([Point("sft", "a1", {"eval.budgets": (16, 32)})], tmp_path, ["--config=x"])
    assert fake_jobs[0] == ["a1"]
