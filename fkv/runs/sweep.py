"""Sweeps: many runs of one recipe.

A config file lists the points of its sweep in a pure `sweep()`; each is a job with some fields set,
in its own directory. A value that mentions `{sweep}/NAME` refers to the directory of point NAME,
which then runs first.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fkv import commands, files
from fkv.errors import UserError
from fkv.runs import preemption, rundir

DONE = "sweep_point.json"
_MENTION = re.compile(r"\{sweep\}/([\w.+-]+)")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    job: str  # to launch: `sft`, `grpo`, `evaluate`...
    name: str  # of its directory; unique in the sweep
    values: Mapping[str, Any]  # of the config's fields, by dotted names
    group: str = ""  # points that differ only in their seed; the summary averages over them

    def needs(self) -> list[str]:
        """Names of the points that have to run first."""
        return _MENTION.findall(" ".join(map(repr, self.values.values())))

    def arguments(self, root: str, common: Sequence[str]) -> list[str]:
        """The command line after `python -m`, with the sweep's directory `root` for `{sweep}`."""
        values = [f"--config.{k}={v}".replace("{sweep}", root) for k, v in self.values.items()]
        return [commands.module(self.job), *common, f"--workdir={root}/{self.name}", *values]


def arguments(points: Sequence[Point], root: str, common: Sequence[str]) -> list[str]:
    """The command line, after `python -m`, of a point, or of several as one job."""
    if len(points) == 1:
        return points[0].arguments(root, common)
    names = ",".join(point.name for point in points)
    options = f"--workdir={root}", f"--points={names}", "--together"
    return [commands.module("sweep"), *common, *options]


def command(points: Sequence[Point], root: str, common: Sequence[str]) -> str:
    """The command line of a point, or of several as one job, for a shell."""
    return f"python -m {shlex.join(arguments(points, root, common))}"


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations, the last name varying fastest; `a__b` stands for `a.b`."""
    names = [name.replace("__", ".") for name in values]
    return [dict(zip(names, row, strict=True)) for row in itertools.product(*values.values())]


def check(points: Iterable[Point], jobs: Sequence[str]) -> list[Point]:
    """The points in their order, but each after those it needs."""
    points = list(points)
    if not points:
        raise UserError("the sweep has no points")
    ordered: dict[str, Point] = {}
    by_name: dict[str, Point] = {}
    for point in points:
        if point.name in by_name:
            raise UserError(f"the sweep has two points named {point.name!r}")
        by_name[point.name] = point
        if not re.fullmatch(r"[\w.+-]+", point.name) or not point.name.strip("."):
            raise UserError(f"sweep point {point.name!r}: use only letters, digits and _ . + -")
        if point.job not in jobs:
            raise UserError(
                f"sweep point {point.name!r}: no job {point.job!r}: choose from {', '.join(jobs)}"
            )

    def put(point, needed_by=()):
        if point.name in needed_by:
            circle = " -> ".join([*needed_by[needed_by.index(point.name) :], point.name])
            raise UserError(f"sweep points depend on each other in a circle: {circle}")
        for name in point.needs():
            if name not in by_name:
                raise UserError(f"sweep point {point.name!r} needs {name!r}, which is not a point")
            put(by_name[name], (*needed_by, point.name))
        ordered.setdefault(point.name, point)

    for point in points:
        put(point)
    return list(ordered.values())


def choose(points: Sequence[Point], names: Sequence[str], root: str | os.PathLike) -> list[Point]:
    """The points of these names, in their order; those they need must be included, or done."""
    by_name = {point.name: point for point in points}
    if unknown := [name for name in names if name not in by_name]:
        known = ", ".join(by_name)
        raise UserError(f"--points: there is no {unknown[0]!r} in the sweep; it has {known}")
    chosen = [point for point in points if point.name in names]
    for point in chosen:
        for need in point.needs():
            if need not in names and not is_done(files.expand(root) / need, by_name[need]):
                raise UserError(
                    f"sweep point {point.name!r} needs {need!r}, which is not done in {root}: "
                    "add it to --points"
                )
    return chosen


def jobs(points: Sequence[Point], passes: Mapping[str, Any]) -> list[list[Point]]:
    """The points in their order, but those that share a pass together, where the first of them is.

    Points join only if they need no more than that first one does.

    Args:
      passes: by name, what points have in common that can run as one job; absent for others.
    """
    found: list[list[Point]] = []
    for point in points:
        for job in found:
            same = point.name in passes and passes.get(job[0].name) == passes[point.name]
            if same and set(point.needs()) <= set(job[0].needs()):
                job.append(point)
                break
        else:
            found.append([point])
    return found


def run_local(
    points: Sequence[Point],
    root: str | os.PathLike,
    common: Sequence[str],
    show: bool = False,
    alone: bool = True,
    passes: Mapping[str, Any] | None = None,
) -> list[Point]:
    """Runs the points in sequence, each job in its own process; returns those that failed.

    Finished points are skipped, interrupted ones resume, and points that need a failed one are not
    run. The output of a point goes to `log.txt` in its directory.

    Args:
      show: print the output instead, for pods, whose machines can't share a file.
      alone: no other sweep may run in `root`; otherwise others with `alone=False` may, on other
        points.
      passes: see `jobs`; each point is a job of its own by default.
    """
    root = rundir.check_path(root)
    with files.writing(root):
        root.mkdir(parents=True, exist_ok=True)
        held = rundir.lock(root, shared=not alone)
    try:
        return _run(points, str(root), common, show, passes or {})
    finally:
        with contextlib.suppress(OSError):  # on a mounted bucket, if others created the file, too
            held.close()


def _run(points, root, common, show, passes):
    failed, paths = [], {point.name: Path(root, point.name) for point in points}
    done = {p.name for p in points if is_done(paths[p.name], p)}
    for point in points:  # a rerun point may change the result of those that need it
        if set(point.needs()) & paths.keys() - done:
            done.discard(point.name)
    labels = {p.name: f"[{i}/{len(points)}] {p.name}" for i, p in enumerate(points, 1)}
    for point in points:
        if point.name in done:
            print(f"{labels[point.name]}: already done", flush=True)
    for job in jobs([point for point in points if point.name not in done], passes):
        label = ", ".join(labels[point.name] for point in job)
        if set(job[0].needs()) & {p.name for p in failed}:
            print(f"{label}: skipped, as a point it needs failed", flush=True)
            failed += job
            continue
        for path in (paths[point.name] for point in job):
            with files.writing(path):
                path.mkdir(parents=True, exist_ok=True)
                for left in path.glob(f"{DONE}.*"):  # left by a killed process
                    left.unlink(missing_ok=True)
        start, logs = time.monotonic(), [paths[point.name] / "log.txt" for point in job]
        as_one = f"{len(job)} points as one job: " if job[1:] else ""
        print(f"{label}: {as_one}{command(job, root, common)}", flush=True)
        code = _run_logged(arguments(job, root, common), [] if show else logs)
        seconds = time.monotonic() - start
        if code:
            said = "" if show else logs[0].read_text(errors="replace").strip()
            last = "".join(f": {line}" for line in said.splitlines()[-1:])
            print(f"{label}: failed with code {code}{last}", flush=True)
            failed += job
            continue
        print(f"{label}: {seconds:.0f} s", flush=True)
        for point in job:
            record = {"values": _plain(point.values), "job": point.job}
            record["seconds"] = round(seconds, 1)
            if job[1:]:  # these took as long in all
                record["together"] = [point.name for point in job]
            # All machines of a pod write this, each through its own file.
            with files.whole(paths[point.name] / DONE, uuid.uuid4().hex) as mine:
                mine.write_text(json.dumps(record, indent=1) + "\n")
    return failed


def _run_logged(arguments: Sequence[str], logs: Sequence[Path]) -> int:
    """Runs a job whose output is appended to all of these files; without any it is printed."""
    if not logs:
        return _run_job(arguments, None)
    first, *others = logs
    with contextlib.ExitStack() as stack:
        with files.writing(first):
            out = stack.enter_context(first.open("a"))
        before = first.stat().st_size
        try:
            return _run_job(arguments, out)
        finally:  # when a signal ends the sweep, too
            out.flush()
            with first.open("rb") as file:
                file.seek(before)
                text = file.read()
            for log in others:
                with files.writing(log), log.open("ab") as file:
                    file.write(text)


def _run_job(arguments: Sequence[str], log: IO | None) -> int:
    """Runs a job, returns its exit code; a signal to this process ends the job, then the sweep.

    On any signal the job gets SIGTERM, so that it saves; a second Ctrl-C kills it. On Linux the job
    also gets SIGTERM when this process is killed.
    """
    came, jobs = [], []

    def pass_on(number, _):
        came.append(number)
        for job in jobs:
            job.kill() if came.count(signal.SIGINT) > 1 else job.terminate()

    command = preemption.following([sys.executable, "-m", *arguments])
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log and subprocess.STDOUT}
    with preemption.handled(pass_on), subprocess.Popen(command, **streams) as job:
        jobs.append(job)
        if came:  # before the job started
            job.terminate()
        code = job.wait()
    if came:
        preemption.say(came[0])
        sys.exit(128 + came[0])
    return code


def _plain(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(values)))


def is_done(path: Path, point: Point) -> bool:
    """Whether the point is done in this directory; refuses another point or a damaged record."""
    record = path / DONE
    if not record.exists():
        return False
    try:
        before = files.read_json(record)
        job, values = before["job"], before["values"]
        if not isinstance(job, str) or not isinstance(values, dict):
            raise TypeError("no job, or no values")
    except (UserError, TypeError, KeyError) as error:
        raise UserError(
            f"{record} is not the record of a finished point ({error}): delete it, and rerun the "
            "sweep"
        ) from error
    if (job, values) != (point.job, _plain(point.values)):
        raise UserError(
            f"{path} holds a point with other values ({job} {values}): use another --workdir"
        )
    return True
