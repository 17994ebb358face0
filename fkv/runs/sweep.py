"""Many runs of one recipe: what to run, in which order, and what came out.

A config file says what in a pure `sweep()` that returns points; each is a job with values set, in
a directory of its own under the sweep's. A value that mentions `{sweep}/NAME` is about the
directory of the point NAME, which is then run before.
"""

import collections
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

from fkv import files
from fkv.errors import UserError
from fkv.runs import preemption, rundir

DONE = "sweep_point.json"
_MENTION = re.compile(r"\{sweep\}/([\w.+-]+)")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      job: what to launch: `sft`, `grpo`, `evaluate`...
      name: of its directory, unique in the sweep.
      values: dotted names of the config's fields, and what they are set to.
      group: points that differ in their seed alone share one; the summary is over them.
    """

    job: str
    name: str
    values: Mapping[str, Any]
    group: str = ""

    def needs(self) -> list[str]:
        """Names of the points that have to be done before."""
        return _MENTION.findall(" ".join(map(repr, self.values.values())))

    def arguments(self, root: str, common: Sequence[str]) -> list[str]:
        """The command line after `python -m`, with `{sweep}` filled in.

        Args:
          root: directory of the sweep.
          common: options of all points, `--config=...` among them.
        """
        values = [
            f"--config.{name}={value}".replace("{sweep}", root)
            for name, value in self.values.items()
        ]
        return [f"launch.{self.job}", *common, f"--workdir={root}/{self.name}", *values]

    def command(self, root: str, common: Sequence[str]) -> str:
        """The same for a shell."""
        return f"python -m {shlex.join(self.arguments(root, common))}"


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination, the last name changing fastest; `a__b` stands for `a.b`."""
    names = [name.replace("__", ".") for name in values]
    return [dict(zip(names, row, strict=True)) for row in itertools.product(*values.values())]


def check(points: Iterable[Point], jobs: Sequence[str]) -> list[Point]:
    """The points in their order, but for each coming after what it needs.

    Raises:
      UserError: a name is used twice or is no directory name, a job is unknown, or a point needs
        one that is not there, or itself.
    """
    points = list(points)
    if not points:
        raise UserError("the sweep has no points")
    by_name = {point.name: point for point in points}
    if twice := [
        n for n, times in collections.Counter(p.name for p in points).items() if times > 1
    ]:
        raise UserError(f"the sweep has two points named {twice[0]!r}")
    for point in points:
        if not re.fullmatch(r"[\w.+-]+", point.name) or not point.name.strip("."):
            raise UserError(f"sweep point {point.name!r}: use letters, digits and _ . + - alone")
        if point.job not in jobs:
            raise UserError(
                f"sweep point {point.name!r}: no job {point.job!r}: there are {', '.join(jobs)}"
            )
        if missing := [name for name in point.needs() if name not in by_name]:
            raise UserError(f"sweep point {point.name!r} needs {missing[0]!r}, which is no point")
    ordered: dict[str, Point] = {}

    def put(point, needed_by=()):
        if point.name in needed_by:
            circle = " -> ".join([*needed_by[needed_by.index(point.name) :], point.name])
            raise UserError(f"sweep points need each other in a circle: {circle}")
        for name in point.needs():
            put(by_name[name], (*needed_by, point.name))
        ordered.setdefault(point.name, point)

    for point in points:
        put(point)
    return list(ordered.values())


def choose(points: Sequence[Point], names: Sequence[str], root: str | os.PathLike) -> list[Point]:
    """Some of the points, in their order.

    Raises:
      UserError: a name is unknown, or a point needs one that is neither among them nor done, or
        was done with other values.
    """
    if unknown := [name for name in names if name not in {p.name for p in points}]:
        known = ", ".join(p.name for p in points)
        raise UserError(f"--points: there is no {unknown[0]!r} in the sweep; it has {known}")
    by_name = {point.name: point for point in points}
    chosen = [point for point in points if point.name in names]
    for point in chosen:
        for need in point.needs():
            if need not in names and not is_done(files.expand(root) / need, by_name[need]):
                raise UserError(
                    f"sweep point {point.name!r} needs {need!r}, which is not done in {root}: "
                    "add it to --points"
                )
    return chosen


def run_local(
    points: Sequence[Point],
    root: str | os.PathLike,
    common: Sequence[str],
    show: bool = False,
    alone: bool = True,
) -> list[Point]:
    """Runs the points one after the other, each in a process of its own; returns those that failed.

    A point that was done before is not run again; one that was interrupted goes on where it
    stopped. The rest goes on without points that need one that failed. What a point prints goes to
    `log.txt` in its directory.

    Args:
      show: let it through instead, as the many machines of a pod can't write one file.
      alone: no other sweep may be at work in `root`; otherwise others that said so may, too, on
        other points: a run directory has one process at a time.

    Raises:
      UserError: another sweep is at work in `root`, or a point was done with other values.
    """
    try:
        root = rundir.check_path(root)
        root.mkdir(parents=True, exist_ok=True)
        held = rundir.lock(root, shared=not alone)
    except OSError as error:
        raise UserError(
            f"cannot write sweep directory {root}: {error.strerror}; choose another --workdir"
        ) from error
    try:
        return _run(points, str(root), common, show)
    finally:
        with contextlib.suppress(OSError):  # a mounted bucket minds that others made the file, too
            held.close()


def _run(points, root, common, show):
    failed = []
    done = {p.name for p in points if is_done(Path(root, p.name), p)}
    for point in points:  # what one that is run again gives may be other than what was used
        if set(point.needs()) & {p.name for p in points} - done:
            done.discard(point.name)
    for i, point in enumerate(points, 1):
        path = Path(root, point.name)
        label = f"[{i}/{len(points)}] {point.name}"
        if point.name in done:
            print(f"{label}: done before", flush=True)
            continue
        if set(point.needs()) & {p.name for p in failed}:
            print(f"{label}: left out, what it needs failed", flush=True)
            failed.append(point)
            continue
        with files.writing(path):
            path.mkdir(parents=True, exist_ok=True)
            for left in path.glob(f"{DONE}.*"):  # by one that was killed; no other is done here yet
                left.unlink(missing_ok=True)
        start = time.monotonic()
        command = point.arguments(root, common)
        print(f"{label}: {point.command(root, common)}", flush=True)
        with contextlib.nullcontext() if show else _open_log(path / "log.txt") as log:
            code = _run_job(command, log)
        seconds = time.monotonic() - start
        if code:
            last = "" if show else f": {_last_line(path / 'log.txt')}"
            print(f"{label}: failed with code {code}{last}", flush=True)
            failed.append(point)
            continue
        print(f"{label}: {seconds:.0f} s", flush=True)
        record = {"values": _plain(point.values), "job": point.job, "seconds": round(seconds, 1)}
        # All machines of a pod write this: each a file of its own, and then whole.
        with files.whole(path / DONE, uuid.uuid4().hex) as mine:
            mine.write_text(json.dumps(record, indent=1) + "\n")
    return failed


def _open_log(path):
    with files.writing(path):
        return path.open("a")


def _last_line(path):
    return " ".join(path.read_text(errors="replace").strip().splitlines()[-1:])


def _run_job(arguments: Sequence[str], log: IO | None) -> int:
    """Exit code of a job; a signal that asks to end is passed on, and ends the sweep after the job.

    Whatever came, the job gets SIGTERM, on which it saves; a second Ctrl-C kills it. The job gets
    it, too, if this process is killed (on Linux).
    """
    came, jobs = [], []

    def pass_on(number, _):
        came.append(number)
        for job in jobs:
            job.kill() if came.count(signal.SIGINT) > 1 else job.terminate()

    with (
        preemption.handled(pass_on),
        subprocess.Popen(
            preemption.following([sys.executable, "-m", *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log and subprocess.STDOUT,
        ) as job,
    ):
        jobs.append(job)
        if came:  # before there was a job
            job.terminate()
        code = job.wait()
    if came:
        preemption.say(came[0])
        sys.exit(128 + came[0])
    return code


def _plain(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(values)))


def is_done(path: Path, point: Point) -> bool:
    mark = path / DONE
    if not mark.exists():
        return False
    try:
        before = json.loads(files.read_bytes(mark))
        was = before["job"], before["values"]
        if not isinstance(was[0], str) or not isinstance(was[1], dict):
            raise TypeError("no job, or no values")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{mark} is not the mark of a point that is done ({error!r}): delete it, and run the "
            "sweep again"
        ) from error
    if was != (point.job, _plain(point.values)):
        raise UserError(
            f"{path} holds a point with other values ({was[0]} {was[1]}): use another --workdir"
        )
    return True
