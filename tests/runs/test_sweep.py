"""Sweeps: the order of points, no repeated runs, the summary, and pods."""

import csv
import dataclasses
import errno
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import yaml

from fkv import recipes
from fkv.errors import UserError
from fkv.evaluation import sweeps
from fkv.jobs import common
from fkv.runs import pods, rundir, sweep
from fkv.runs.sweep import Point
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
        ([Point("sft", "../a", {})], "point '../a': use only letters"),
        ([Point("sft", "..", {})], "point '..': use only letters"),
        ([Point("sft", "a\n", {})], r"point 'a\\n': use only letters"),
        ([Point("stf", "a", {})], "point 'a': no job 'stf': choose from pretrain, traces, sft"),
        ([Point("sft", "a", {"x": "{sweep}/b"})], "point 'a' needs 'b', which is not a point"),
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
    points = sweep.check(recipes.load_module(path).sweep(), common.JOBS)
    for point in points:
        config, workdir = flags.parse(point.arguments("runs/s", [f"--config={path}"]))
        assert workdir == f"runs/s/{point.name}" and config.is_locked


# ---- running


@pytest.fixture
def fake_jobs(monkeypatch):
    """Jobs that write a table at once; those named in the list fail."""
    calls, failing = [], []

    def run_job(command, log):
        name = next(Path(word[10:]) for word in command if word.startswith("--workdir="))
        calls.append(name.name)
        if log is not None:
            log.write("some output\n")
        if name.name in failing:
            return 1
        ratio = 1 + 0.1 * int(name.name[-1])
        (name / "loss_ratio.csv").write_text(
            "policy,budget,ratio,ratio_low,added_low,overlap\n"
            f"full,16,1,1,0,nan\nforesight,16,{ratio},{ratio},0.5,0.7\n"
        )
        return 0

    monkeypatch.setattr(sweep, "_run_job", run_job)
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
    assert "b1: skipped, as a point it needs failed" in capsys.readouterr().out
    failing.clear()
    assert sweep.run_local(list(points()), tmp_path, ["--config=x"]) == []
    assert calls[3:] == ["a1", "b1"]
    with pytest.raises(UserError, match="holds a point with other values"):
        sweep.run_local([Point("sft", "a2", {"seed": 5})], tmp_path, ["--config=x"])


def test_the_summary_is_the_mean_over_seeds(fake_jobs, tmp_path):
    assert "has results yet" in sweeps.write_summary(list(points()), tmp_path)
    sweep.run_local(list(points()), tmp_path, ["--config=x"])
    text = sweeps.write_summary(list(points()), tmp_path)
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


def test_shares_of_the_gap_and_protected_prompts_are_in_the_summary(fake_jobs, tmp_path):
    some = list(points())[:2]
    sweep.run_local(some, tmp_path, ["--config=x"])
    for point, share in zip(some, (0.5, 0.7), strict=True):
        (tmp_path / point.name / "loss_ratio.csv").write_text(
            "policy,budget,ratio,ratio_low,added_low,overlap,gap_closed,protect_prompt\n"
            f"full,16,1,1,0,nan,,0\nforesight,16,1.1,1.1,0.5,0.7,{share},8\n"
        )
    text = sweeps.write_summary(some, tmp_path)
    head, _, full, foresight = text.splitlines()[:4]
    assert head.split()[-1] == "gap_closed"
    assert "foresight, prompt 8" in foresight and foresight.endswith("0.600 ± 0.100")
    assert full.rstrip().endswith("0.000 ± 0.000")


# ---- several points as one job

SHARED = {"a1": "x", "a2": "y", "a3": "x", "b1": "x"}


@pytest.fixture
def joint_jobs(fake_jobs, monkeypatch):
    """Jobs of one point or of several, which write the tables of all; their points, by job."""
    run_job, calls = sweep._run_job, []

    def run(command, log):
        found = [word.partition("=")[2] for word in command if word.startswith("--points=")]
        names = found[0].split(",") if found else []
        assert (names != []) == ("--together" in command)
        (root,) = (word[10:] for word in command if word.startswith("--workdir="))
        calls.append(names or [Path(root).name])
        return max(run_job([f"--workdir={root}/{x}"] if names else command, log)
                   for x in names or [""])  # fmt: skip

    monkeypatch.setattr(sweep, "_run_job", run)
    return calls, fake_jobs[1]


def test_points_that_share_a_pass_are_one_job_where_the_first_of_them_is():
    found = sweep.jobs(list(points()), SHARED)
    assert [[p.name for p in job] for job in found] == [["a1", "a3"], ["a2"], ["b1"]]
    assert [len(job) for job in sweep.jobs(list(points()), {})] == [1, 1, 1, 1]
    pair = sweep.command(found[0], "runs/s", ["--config=x"])
    assert pair == ("python -m launch.sweep --config=x --workdir=runs/s --points=a1,a3 --together")
    assert sweep.command(found[1], "runs/s", []) == (
        "python -m launch.sft --workdir=runs/s/a2 --config.seed=2"
    )


def test_each_point_of_a_job_is_as_if_alone(joint_jobs, tmp_path, capsys):
    calls, _ = joint_jobs
    (tmp_path / "a3").mkdir()
    (tmp_path / "a3" / "log.txt").write_text("before\n")
    assert sweep.run_local(list(points()), tmp_path, ["--config=x"], passes=SHARED) == []
    assert calls == [["a1", "a3"], ["a2"], ["b1"]]
    said = capsys.readouterr().out
    assert "[1/4] a1, [3/4] a3: 2 points as one job: python -m launch.sweep --config=x" in said
    assert (tmp_path / "a1" / "log.txt").read_text() == "some output\n" * 2
    assert (tmp_path / "a3" / "log.txt").read_text() == "before\n" + "some output\n" * 2
    record = json.loads((tmp_path / "a3" / sweep.DONE).read_text())
    assert record["values"] == {"seed": 3} and record["together"] == ["a1", "a3"]
    assert "together" not in json.loads((tmp_path / "a2" / sweep.DONE).read_text())
    assert "foresight" in sweeps.write_summary(list(points()), tmp_path)
    # All is done, whether together or not.
    sweep.run_local(list(points()), tmp_path, ["--config=x"])
    assert len(calls) == 3


def test_what_is_done_is_left_out_of_a_job_and_a_failure_is_that_of_all(joint_jobs, tmp_path):
    calls, failing = joint_jobs
    together = dict.fromkeys(("a1", "a2", "a3"), "x")
    sweep.run_local([Point("sft", "a2", {"seed": 2}, "a")], tmp_path, ["--config=x"])
    failing.append("a3")
    failed = sweep.run_local(list(points()), tmp_path, ["--config=x"], passes=together)
    assert calls == [["a2"], ["a1", "a3"]] and [p.name for p in failed] == ["a1", "a3", "b1"]
    assert not (tmp_path / "a1" / sweep.DONE).exists()
    failing.clear()
    assert sweep.run_local(list(points()), tmp_path, ["--config=x"], passes=together) == []
    assert calls[2:] == [["a1", "a3"], ["b1"]]


def test_a_point_joins_no_job_that_comes_before_what_it_needs():
    start = Point("sft", "a", {})
    model = Point("pretrain", "m", {})
    late = Point("sft", "b", {"model": "{sweep}/m/model"})
    found = sweep.jobs([start, model, late], {"a": "x", "b": "x"})
    assert [[p.name for p in job] for job in found] == [["a"], ["m"], ["b"]]


TOGETHER = """
from fkv.runs.sweep import Point
from configs import tiny

get_config = tiny.get_config

def sweep():
    yield Point("sft", "a", {"scorer.hidden": 4})
    yield Point("sft", "b", {"sft.scorer_seed": 1, "scorer.inputs": "kv"})
    yield Point("sft", "c", {"budget": 96})
    yield Point("sft", "d", {"seed": 1})
    yield Point("sft", "e", {"scorer.form": "reference"})
    yield Point("sft", "f", {"sft.variants": ("x", "y:scorer.hidden=4")})
    yield Point("grpo", "g", {"grpo.scorer": "{sweep}/a"})
    yield Point("sft", "h", {"budget": 96, "sft.margin": 0.5})
"""


def test_a_sweep_finds_which_points_can_share_a_pass(tmp_path, command):
    path = tmp_path / "some.py"
    path.write_text(TOGETHER)
    options = (f"--config={path}", f"--workdir={tmp_path}/s")
    code, out, _ = command(*options, "--dry_run", "--config.sft.steps=5")
    assert code == 0
    jobs = [re.search(r"--points=(\S+) --together$|/s/(\w) ", x) for x in out.splitlines()]
    assert [job[1] or job[2] for job in jobs] == ["a,b", "c,h", "d", "e", "f", "g"]
    assert "--config.sft.steps=5" in out.splitlines()[0]
    _, out, _ = command(*options, "--dry_run", "--points=b,c")
    assert "--together" not in out
    for names in ("a,c", "a,f", "f", "a,g"):
        code, _, error = command(*options, f"--points={names}", "--together")
        assert (code, error) == (2, "error: --together: these --points can't run as one job")


def test_the_supervised_ablations_of_the_paper_are_one_job(command):
    _, out, _ = command("--config=configs/tiny_ablations.py", "--dry_run")
    (line,) = [line for line in out.splitlines() if "--together" in line]
    (names,) = re.findall(r"--points=(\S+)", line)
    assert len(names.split(",")) == 15 and "launch.sft" not in out
    assert out.splitlines()[0] == line


CONFIG = """
from fkv.runs.sweep import Point
from configs import tiny

get_config = tiny.get_config

def sweep():
    yield Point("sft", "ok", {"seed": 1})
    yield Point("sft", "bad", {"sft.stepz": 1})
"""


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m launch.sweep`: its code, what it prints, and its error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["launch/sweep.py", *arguments])
        code = 0
        try:
            runpy.run_module("launch.sweep", run_name="__main__")
        except SystemExit as end:
            code = end.code
        return (code, *map(str.strip, capsys.readouterr()))

    return run


def test_command_line_finds_what_is_wrong_before_anything_runs(tmp_path, command):
    path = tmp_path / "some.py"
    path.write_text(CONFIG)
    options = (f"--config={path}", f"--workdir={tmp_path}/s")
    wrong = "error: sweep point 'bad': config.sft has no field 'stepz': did you mean steps?"
    assert command(*options) == (2, "", wrong)
    assert not (tmp_path / "s").exists()
    path.write_text(CONFIG.replace("stepz", "steps"))
    code, out, _ = command(*options, "--dry_run", "--config.budget=96")
    assert code == 0
    assert out.splitlines()[1] == (
        f"python -m launch.sft --config={path} --config.budget=96 --workdir={tmp_path}/s/bad "
        "--config.sft.steps=1"
    )


def test_a_recipe_without_a_sweep_is_a_sweep_of_one_job(command):
    _, out, _ = command("--config=configs/tiny.py", "--dry_run")
    assert out == "python -m launch.sft --config=configs/tiny.py --workdir=runs/sweep_tiny/sft"
    _, out, _ = command("--config=configs/tiny.py", "--dry_run", "--job=pipeline")
    assert out.startswith("python -m launch.pipeline ")
    code, _, error = command("--config=configs/tiny_ablations.py", "--dry_run", "--job=sft")
    assert code == 2 and "has a sweep(), which says what to run" in error


def test_some_points_run_where_the_rest_is_done_elsewhere(fake_jobs, tmp_path, command):
    path, root = tmp_path / "some.py", tmp_path / "s"
    path.write_text(
        "from configs.tiny import get_config\nfrom tests.runs.test_sweep import points as sweep"
    )
    options = (f"--config={path}", f"--workdir={root}")
    code, _, error = command(*options, "--points=b1")
    assert code == 2 and "point 'b1' needs 'a1', which is not done in" in error
    code, _, error = command(*options, "--points=a1,c")
    assert code == 2 and "there is no 'c' in the sweep; it has a1, a2, a3, b1" in error
    assert fake_jobs[0] == []
    command(*options, "--points=a1,a2", "--show")
    command(*options, "--points=b1")
    assert fake_jobs[0] == ["a1", "a2", "b1"]
    assert not (root / "a1/log.txt").exists()  # it was shown
    assert (root / "b1/log.txt").read_text() == "some output\n"
    assert {p.name for p in (root / "a1").iterdir()} == {"loss_ratio.csv", sweep.DONE}
    # Others may be at work, so what came out is gathered when asked for.
    assert not (root / "summary.txt").exists()
    code, out, _ = command(*options, "--summary")
    assert code == 0 and "a      foresight" in out and len(fake_jobs[0]) == 3
    assert (root / "summary.txt").read_text().strip() in out
    assert len(list(csv.DictReader((root / "results.csv").open()))) == 3 * 2 * 4


def test_one_sweep_at_a_time_unless_they_share(fake_jobs, tmp_path):
    """The lock is a process's own, so another process has to hold it."""
    script = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, getattr(fcntl, sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""
    for kind, shares in (("LOCK_EX", False), ("LOCK_SH", True)):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / ".lock"), kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as other:  # fmt: skip
            assert other.stdout.readline() == "held\n"
            with pytest.raises(UserError, match="another process is using"):
                sweep.run_local([Point("sft", "a1", {})], tmp_path, [])
            if shares:
                sweep.run_local([Point("sft", "a2", {})], tmp_path, [], alone=False)
            other.communicate("")
    sweep.run_local([Point("sft", "a1", {})], tmp_path, [])
    assert fake_jobs[0] == ["a2", "a1"]


SAVES = "echo saved; exit 143"


def stand_in(tmp_path, on_sigterm=SAVES):
    """A program in Python's place that works until it is asked to end."""
    job = tmp_path / "job"
    job.write_text(
        # What follows its parent begins in a real Python.
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n'
        f"trap '{on_sigterm}' TERM\necho $$ > {tmp_path}/pid.tmp\n"
        f"mv {tmp_path}/pid.tmp {tmp_path}/pid\nwhile :; do sleep 0.02; done\n"
    )
    job.chmod(0o755)
    return str(job)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_go_to_the_job_and_end_the_sweep(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path))
    before = signal.getsignal(number)

    def end_it():
        wait_for((tmp_path / "pid").exists)
        os.kill(os.getpid(), number)

    threading.Thread(target=end_it).start()
    with pytest.raises(SystemExit) as end:
        sweep.run_local(list(points()), tmp_path / "s", [])
    assert end.value.code == 128 + number and signal.getsignal(number) is before
    assert f"ended by {number.name}: rerun the same command" in capsys.readouterr().out
    assert (tmp_path / "s/a1/log.txt").read_text() == "saved\n"
    assert not (tmp_path / "s/a1" / sweep.DONE).exists() and not (tmp_path / "s/a2").exists()


def test_a_second_ctrl_c_waits_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path, f"touch {tmp_path}/asked"))

    def end_it():
        for file in ("pid", "asked"):
            wait_for((tmp_path / file).exists)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=end_it).start()
    with pytest.raises(SystemExit) as end:
        sweep.run_local(list(points()), tmp_path / "s", [])
    assert end.value.code == 130


def test_what_nohup_ignores_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(sys, "executable", stand_in(tmp_path))

        def end_it():
            wait_for((tmp_path / "pid").exists)
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=end_it).start()
        with pytest.raises(SystemExit) as end:
            sweep.run_local(list(points()), tmp_path / "s", [])
        assert end.value.code == 143
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child is not told")
def test_a_killed_sweep_takes_its_job_along(tmp_path):
    script = """
import sys
from fkv.runs import sweep
sys.executable = sys.argv[1]
sweep.run_local([sweep.Point("sft", "a", {})], sys.argv[2], [])
"""
    command = [sys.executable, "-c", script, stand_in(tmp_path), str(tmp_path / "s")]
    with subprocess.Popen(command) as process:
        wait_for((tmp_path / "pid").exists)
        process.kill()
    log = tmp_path / "s" / "a" / "log.txt"
    wait_for(lambda: log.read_text() == "saved\n")  # it was asked, and not killed
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in state_of(pid))


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


BAD_JSON = [
    b"", b"{", b"[]", b"null", b"3", b"{}", b"\xff\xfe\x00", b"\x00" * 9, b"[" * 100_000,
    b'{"job": "sft"}', b'{"job": 3, "values": {}}', b'{"job": "sft", "values": [["seed", 1]]}',
]  # fmt: skip


@pytest.mark.parametrize("data", BAD_JSON, ids=range(len(BAD_JSON)))
def test_a_damaged_mark_is_named(fake_jobs, tmp_path, data):
    sweep.run_local(list(points()), tmp_path, [])
    mark = tmp_path / "a1" / sweep.DONE
    mark.write_bytes(data)
    told = f"{mark} is not the record of a finished point .*: delete it, and rerun the sweep"
    for use in (
        lambda: sweep.run_local(list(points()), tmp_path, []),
        lambda: sweeps.write_summary(list(points()), tmp_path),
        lambda: sweep.choose(list(points()), ["b1"], tmp_path),
    ):
        with pytest.raises(UserError, match=told):
            use()
    mark.unlink()  # as told
    assert sweep.run_local(list(points()), tmp_path, []) == []
    assert "foresight" in sweeps.write_summary(list(points()), tmp_path)


TABLE = "policy,budget,ratio,ratio_low,added_low,overlap\nfull,16,1,1,0,nan\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (TABLE[:-4].encode(), "cut off"),
        (TABLE.partition("full")[0].encode(), "no rows"),
        (TABLE.replace("overlap", "ratio").encode(), "no column 'overlap'"),
        (TABLE.replace("policy", "who").encode(), "no column 'policy'"),
        (TABLE.replace("full,16", "full").encode(), "row 1 does not have one field per column"),
        (TABLE.replace("nan", "nan,3").encode(), "row 1 does not have one field per column"),
        (TABLE.replace("nan", "x").encode(), "row 1: could not convert"),
        (TABLE.replace("16", "1.5").encode(), "row 1: invalid literal"),
        (b"\xff" + TABLE.encode(), "can't decode byte 0xff"),
        (TABLE.encode("utf-16"), "can't decode"),
        (bytes(range(128)) + b"\n", "no column"),
        (b"\x00" * 64 + b"\n", "no column"),
    ],
)
@pytest.mark.parametrize("file", list(sweeps.FIGURES))
def test_a_damaged_table_is_named(fake_jobs, tmp_path, data, reason, file):
    sweep.run_local(list(points()), tmp_path, [])
    if file == "accuracy.csv":
        data = data.replace(b"overlap", b"pass_at_1")
        reason = reason.replace("overlap", "pass_at_1")
    (tmp_path / "a2" / file).write_bytes(data)
    with pytest.raises(UserError) as error:
        sweeps.write_summary(list(points()), tmp_path)
    told = str(error.value)
    assert told.startswith(f"{tmp_path}/a2/{file} is damaged (") and reason in told
    assert "delete it and sweep_point.json next to it, and rerun the sweep" in told
    assert not (tmp_path / "summary.txt").exists()


def test_figures_of_other_values_are_not_gathered(fake_jobs, tmp_path):
    sweep.run_local([Point("sft", "a1", {"seed": 1})], tmp_path, [])
    with pytest.raises(UserError, match="holds a point with other values"):
        sweeps.write_summary([Point("sft", "a1", {"seed": 2})], tmp_path)


def test_a_directory_that_takes_no_log_is_named(fake_jobs, tmp_path):
    (tmp_path / "a1").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/a1 .File exists"):
        sweep.run_local([Point("sft", "a1", {})], tmp_path, [])
    (tmp_path / "a2" / "log.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/a2/log.txt .Is a directory"):
        sweep.run_local([Point("sft", "a2", {})], tmp_path, [])


def test_marks_leave_nothing_beside_them(fake_jobs, tmp_path, monkeypatch):
    (tmp_path / "a1").mkdir()
    (tmp_path / "a1" / f"{sweep.DONE}.abc").write_text("of one that was killed")

    def disk_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", disk_full)
        with pytest.raises(UserError, match=f"cannot write .*/a1/{sweep.DONE} .No space left"):
            sweep.run_local([Point("sft", "a1", {})], tmp_path, [])
    assert not list((tmp_path / "a1").glob(f"{sweep.DONE}*"))
    sweep.run_local([Point("sft", "a1", {})], tmp_path, [])
    assert [p.name for p in (tmp_path / "a1").glob(f"{sweep.DONE}*")] == [sweep.DONE]


def test_marks_of_done_points_are_data(fake_jobs, tmp_path):
    sweep.run_local([Point("sft", "a1", {"eval.budgets": (16, 32)})], tmp_path, ["--config=x"])
    record = json.loads((tmp_path / "a1" / sweep.DONE).read_text())
    assert record["values"] == {"eval.budgets": [16, 32]} and record["job"] == "sft"
    # The same again is done, though JSON knows no tuples.
    sweep.run_local([Point("sft", "a1", {"eval.budgets": (16, 32)})], tmp_path, ["--config=x"])
    assert fake_jobs[0] == ["a1"]


# ---- on pods

CLUSTER = pods.Cluster(
    tpu_type="v5litepod-16", image="eu-docker.pkg.dev/p/r/fkv:1", bucket="my_bucket", name="pod"
)
SPECIAL = """--config.evaluate.policies=("a b", '{x}', "it's $HOME $(date)")"""


def some_points():
    yield Point("sft", "a", {})
    yield Point("sft", "Long_name.of-a+point_that_goes_on_and_on_1", {"seed": 1})
    yield Point("sft", "Long_name.of-a-point_that_goes_on_and_on_1", {"seed": 2})
    yield Point("grpo", "g", {"grpo.scorer": "{sweep}/a"})
    yield Point("sft", "z", {"seed": 3})
    yield Point("evaluate", "e", {"evaluate.scorers": ("x={sweep}/g", "y={sweep}/z")})


def some_workloads(root="runs/s", bucket="my_bucket"):
    points = sweep.check(some_points(), common.JOBS)
    return pods.workloads(points, root, ["--config=configs/x.py", SPECIAL], "2k_config", bucket)


def test_points_that_need_each_other_share_a_workload_in_order():
    first, second, third = some_workloads()
    assert [p.name for p in first.points] == ["a", "g", "z", "e"]
    assert "--points=a,g,z,e" in first.arguments
    assert len(second.points) == len(third.points) == 1


def test_names_of_workloads_are_valid_and_tell_sweeps_apart():
    names = [w.name for w in some_workloads()]
    for name in names:
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 40
        assert name.startswith("fkv-2k-config-")
    assert names == [w.name for w in some_workloads()]  # submitted again
    others = [w.name for w in some_workloads("runs/t") + some_workloads(bucket="another")]
    assert len({*names, *others}) == 9


def scripts(document):
    """Every script of a manifest, as bash sees it."""
    for job in document["spec"]["replicatedJobs"]:
        for container in job["template"]["spec"]["template"]["spec"]["containers"]:
            yield container["command"][2]


def test_manifests_say_what_the_commands_say():
    found = some_workloads()
    text = pods.render(found, "runs/s", ["--config=configs/x.py"], CLUSTER)
    documents = list(yaml.safe_load_all(text))
    assert [d["metadata"]["name"] for d in documents] == [w.name for w in found]
    lines = [line[2:] for line in text.splitlines() if line.startswith("# xpk workload")]
    for workload, document, line in zip(found, documents, lines, strict=True):
        options = dict(word[2:].split("=", 1) for word in shlex.split(line) if word[:2] == "--")
        assert options["workload"] == workload.name and options["cluster"] == "pod"
        assert options["tpu-type"] == "v5litepod-16" and options["storage"] == "my-bucket"
        # What arrives after two shells is what was asked for.
        (script,) = scripts(document)
        (inner,) = re.findall(r"^\((.*)\) & PID=", script, re.MULTILINE)
        assert inner == options["command"]
        assert tuple(shlex.split(inner)) == ("cd", "/fkv", "&&", "exec", *workload.arguments)
        assert SPECIAL in workload.arguments
    job = documents[0]["spec"]["replicatedJobs"][0]
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    claims = {v["name"]: v.get("persistentVolumeClaim") for v in pod["volumes"]}
    assert claims["my-bucket-pv"] == {"claimName": "my-bucket-pvc", "readOnly": False}
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts["my-bucket-pv"] == "/fkv/runs" and {*mounts} == {*claims}
    # The jobs of a point are there to be read.
    assert "#   python -m launch.grpo --config=configs/x.py --workdir=runs/s/g" in text


def test_tpu_vms_are_made_used_and_deleted():
    found = some_workloads()
    text = pods.render_gcloud(found, "runs/s", [], CLUSTER)
    commands = [
        shlex.split(line.removesuffix(" &&"))[4:]
        for line in text.splitlines()
        if line.startswith("gcloud compute tpus tpu-vm ")
    ]
    assert len(commands) == 5 * len(found)
    create, mount, start, follow, delete = commands[:5]
    assert [c[1] for c in commands[:5]] == [found[0].name] * 5
    assert create[0] == "create" and "--accelerator-type=v5litepod-16" in create
    assert "--version=v2-alpha-tpuv5-lite" in create
    assert mount[2] == "--worker=all" and "gcsfuse --implicit-dirs my_bucket" in mount[3]
    assert start[2] == "--worker=all" and follow[2] == "--worker=0"
    words = shlex.split(start[3].removeprefix("--command="))
    assert words[words.index(CLUSTER.image) + 1 :] == [*found[0].arguments]
    assert "--volume=/mnt/runs:/fkv/runs" in words and "--workdir=/fkv" in words
    assert delete == ["delete", found[0].name, "--quiet"]


def test_a_dry_run_needs_no_cluster(command):
    code, out, _ = command("--config=configs/tiny.py", "--backend=xpk", "--dry_run")
    (document,) = yaml.safe_load_all(out)
    (script,) = scripts(document)
    assert code == 0 and document["kind"] == "JobSet"
    assert "launch.sweep --config=configs/tiny.py --workdir=runs/sweep_tiny --points=sft" in script
    assert "--distributed" not in script  # one machine
    _, out, _ = command(
        "--config=configs/tiny.py", "--backend=xpk", "--dry_run", "--tpu_type=v6e-8"
    )
    (document,) = yaml.safe_load_all(out)
    (script,) = scripts(document)
    assert "launch.sweep --config=configs/tiny.py --distributed --workdir" in script
    _, out, _ = command(
        "--config=configs/tiny_ablations.py", "--backend=tpu-vm", "--dry_run", "--tpu_type=v6e-1"
    )
    assert out.count("tpu-vm create") == 3  # a chain for each seed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tpu_type=v5litepod-4", "xpk has v5litepod-8, v5litepod-16"),
        ("--cluster=", "--backend=xpk needs --cluster"),
        ("--backend=tpu-vm --image=", "--backend=tpu-vm needs --image"),
        ("--bucket=", "xpk needs --bucket, or a --workdir=/on/a/disk"),
        ("--bucket=gs://b", "--bucket=gs://b: give its name only, without gs://"),
        ("--workdir=elsewhere", "--workdir=elsewhere: --bucket is mounted"),
        ("--workdir=runs/../x", "--workdir=runs/../x: --bucket is mounted"),
        ("--workdir=gs://b/x", "gs://b/x/sft: gs:// is not a file system: mount the bucket"),
        ("--num_slices=0", "--num_slices=0 must be 1, or"),
        ("--num_slices=a", "argument --num_slices: invalid int value"),
        ("--backend=slurm", "argument --backend: invalid choice"),
        ("--claster=x", "unknown option --claster: did you mean --cluster?"),
        ("--pionts=a", "unknown option --pionts: did you mean --points?"),
        ("--budget=64", "unknown option --budget: did you mean --config.budget=64?"),
        ("--config=configs/tinny.py", "configs/tinny.py not found: did you mean tiny"),
        ("--job=stf", "point 'stf': no job 'stf'"),
    ],
)
def test_impossible_pods_are_refused_in_one_line(options, message, command, monkeypatch):
    monkeypatch.setattr(subprocess, "call", None)  # nothing gets that far
    usual = "--config=configs/tiny.py --backend=xpk --cluster=c --image=i --bucket=runs-of-us"
    code, out, error = command(*usual.split(), *options.split())
    assert code == 2 and out == "" and error.count("\n") == 0
    assert error.startswith("error: ") and message in error


CONTROL = "\n\r\x85\u2028\u2029\v\f\x1b\x00\x1c\udc80\uffff"


@pytest.mark.parametrize("char", CONTROL, ids=ascii)
def test_control_characters_end_no_comment(char):
    pods.check(CLUSTER, "xpk", "runs/s")
    for name in ("image", "project", "zone", "name", "bucket", "tpu_type"):
        value = f"{getattr(CLUSTER, name)}{char}rm -rf x"
        for backend in ("xpk", "tpu-vm"):
            with pytest.raises(UserError, match="has a control character") as error:
                pods.check(dataclasses.replace(CLUSTER, **{name: value}), backend, "runs/s")
            assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"--workdir=.* has a control character"):
        pods.check(CLUSTER, "xpk", f"runs/s{char}x")
    for option in (f"--config=configs/{char}.py", f"--config.generate.prompt=a{char}b"):
        with pytest.raises(UserError, match=r"--config.* has a control character"):
            pods.workloads([Point("sft", "a", {})], "runs/s", [option], "x")


@pytest.mark.parametrize(
    "option", ["--image", "--cluster", "--workdir", "--config.generate.prompt"]
)
def test_line_breaks_are_refused_in_one_line(command, option):
    usual = "--config=configs/tiny.py --backend=xpk --dry_run"
    code, out, error = command(*usual.split(), f"{option}=/a\u2028rm -rf x")
    assert (code, out) == (2, "") and len(error.splitlines()) == 1
    assert rf"{option}='/a\u2028rm -rf x' has a control character ('\u2028')" in error


@pytest.mark.parametrize("char", CONTROL, ids=ascii)
def test_values_of_points_are_shown_on_one_line(char):
    points = [Point("generate", "a", {"generate.prompt": f"one{char}two \N{BLACK HEART SUIT}"})]
    found = pods.workloads(points, "runs/s", ["--config=configs/x.py"], "x", "my_bucket")
    for render in (pods.render, pods.render_gcloud):
        text = render(found, f"runs/s{char}", ["--config=configs/x.py"], CLUSTER)
        lines = text.splitlines()
        (shown,) = [line for line in lines if "launch.generate" in line]
        assert shown.startswith("#   ")
        assert f"one{ascii(char)[1:-1]}two \N{BLACK HEART SUIT}" in shown
    list(yaml.safe_load_all(pods.render(found, "runs/s", [], CLUSTER)))


def test_submitting_runs_xpk_and_says_how_far_it_came(command, monkeypatch, capsys):
    calls, codes = [], [0, 3]

    def call(command):
        calls.append(command)
        return codes[len(calls) - 1]

    monkeypatch.setattr(subprocess, "call", call)
    usual = (
        "--config=configs/tiny_ablations.py --backend=xpk --cluster=c --image=i --bucket=runs-of-us"
    )
    code, _, error = command(*usual.split(), "--project=p", "--zone=z")
    assert code == 2 and "xpk exited with code 3 at workload fkv-tiny-" in error
    assert "1 of 3 are submitted" in error and len(calls) == 2
    assert calls[0][:3] == ["xpk", "workload", "create"] and "--project=p" in calls[0]

    def missing(command):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "call", missing)
    code, _, error = command(*usual.split())
    assert code == 2 and "xpk is not installed: pip install xpk" in error


def test_buckets_are_no_run_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs:// is not a file system: mount the bucket"):
        rundir.open_run("gs://b/x", ml_collections.ConfigDict())
    with pytest.raises(UserError, match="gs:// is not a file system: mount the bucket"):
        sweep.run_local([Point("sft", "a", {})], "gs://b/x", [])
    assert list(tmp_path.iterdir()) == []


# ---- what a point was made from


def test_what_needs_a_point_that_is_run_again_is_run_again(fake_jobs, tmp_path):
    sweep.run_local(list(points()), tmp_path, [])
    fake_jobs[0].clear()
    (tmp_path / "a1" / sweep.DONE).unlink()
    sweep.run_local(list(points()), tmp_path, [])
    assert fake_jobs[0] == ["a1", "b1"]  # its job sees whether it has changed
    sweep.run_local(list(points()), tmp_path, [])
    assert fake_jobs[0] == ["a1", "b1"]


def test_points_that_are_done_with_another_config_are_not_counted(fake_jobs, tmp_path, command):
    path, root = tmp_path / "some.py", tmp_path / "s"
    path.write_text(
        "from configs.tiny import get_config\nfrom tests.runs.test_sweep import points as sweep"
    )
    options = (f"--config={path}", f"--workdir={root}")
    config, _ = flags.parse(["launch/sft.py", f"--config={path}", "--config.seed=1"])
    rundir.open_run(root / "a1", config)  # as the job does
    assert command(*options)[0] == 0
    code, _, error = command(*options, "--config.budget=96")
    assert code == 2 and error == (
        f"error: sweep point 'a1': {root}/a1 holds a run with another config (budget: 64 -> 96): "
        "use another --workdir"
    )
    assert command(*options, "--config.grpo.steps=7")[0] == 0  # no matter to `sft`
    assert len(fake_jobs[0]) == 4
