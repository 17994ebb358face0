"""Start and end of every job: `app.run(main)` calls `main(config, workdir)`.

Mains import their jobs when called, and JAX is imported then, so that `--help`, errors and the
tables of finished jobs are fast.
"""

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from fkv import files
from fkv.errors import UserError
from fkv.jobs import READS
from fkv.runs import finished

from . import flags

# Jobs that have nothing to do if they are run again; others answer, serve, write or measure anew.
_END = (
    "pretrain",
    "traces",
    "sft",
    "grpo",
    "evaluate",
    "recall",
    "harness",
    "leaderboard",
    "advise",
    "pipeline",
)


def run(main: Callable[[ConfigDict, str], None], argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run `main(config, workdir)`, or its dry run.

    A job that has finished is not run again: its tables are printed.

    A `UserError`, here or in `main`, becomes one line on stderr and exit code 2; any other
    exception keeps its traceback.

    Args:
      argv: the command line, program first; by default `sys.argv`.
    """
    description = sys.modules[main.__module__].__doc__

    def start(argv):
        since, job = time.monotonic(), Path(argv[0]).stem
        config, workdir = flags.parse(argv, description)
        alone = job in _END and not config.get("dry_run") and not _are_several(argv)
        read = _read_by(job, config) if alone else {}
        seen = finished.look(workdir, read) if alone else None
        if (tables := finished.tables(workdir, read, seen)) is not None:
            _say_finished(job, workdir, tables)
            return
        begin(argv)
        if config.get("dry_run"):
            from fkv.jobs import dry_run

            dry_run.run(job, config)
        elif name := next((x for x in ("target", "dry_run_json") if config.get(x)), None):
            raise UserError(f"{name} = {config[name]!r} is for dry runs: add --config.dry_run=True")
        else:
            main(config, workdir)
            finished.record(workdir, read, seen)
            _say_done(job, time.monotonic() - since, argv)

    guard(start, sys.argv if argv is None else argv)


def _say_done(job: str, seconds: float, argv: Sequence[str]) -> None:
    if _are_several(argv):
        from fkv.runs import parallel

        if not parallel.first():
            return
    print(f"{job}: done in {finished.duration(seconds)}", flush=True)


def _say_finished(job: str, workdir: str, tables: str) -> None:
    if tables:
        print(f"{tables}\n")
    again = f"use another --workdir to run anew, or delete {finished.RECORD} to have it checked"
    print(f"{job}: nothing left to do in {workdir}: {again}")


def _read_by(job: str, config: ConfigDict) -> dict:
    """The fields, and groups of fields, that a job reads; a pipeline's stages may read all."""
    everything = config.to_dict()
    if job == "pipeline":
        return everything
    found = {}
    for name in READS[job]:
        value = everything
        for part in name.split("."):
            value = value.get(part, {})
        found[name] = value
    return found


def _are_several(argv: Sequence[str]) -> bool:
    """Whether this process is one of several."""
    return flags.DISTRIBUTED in argv or bool(os.environ.get("JAX_COORDINATOR_ADDRESS"))


def begin(argv: Sequence[str]) -> None:
    """What every job does before JAX finds its devices: a cache of programs, other processes."""
    use_compilation_cache()
    if _are_several(argv):
        join()


def join() -> None:
    """Make this process one of several, before JAX initialises its devices.

    TPU pods, Slurm, Open MPI and Kubernetes tell JAX the process topology; elsewhere
    $JAX_COORDINATOR_ADDRESS (host:port of process 0), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID do.

    Raises:
      UserError: the topology is unknown, or the other processes can't be reached.
    """
    import jax

    numbers = {}
    for field in ("num_processes", "process_id"):
        value = os.environ.get(f"JAX_{field.upper()}")
        if value is not None and not value.isdigit():
            raise UserError(f"JAX_{field.upper()} = {value!r} must be a number")
        numbers[field] = value and int(value)
    jax.config.update("jax_enable_preemption_service", False)  # the jobs handle SIGTERM themselves
    try:
        jax.distributed.initialize(**numbers, shutdown_timeout_seconds=60)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes can't join ({str(error).strip().splitlines()[0]}): where JAX can't "
            "detect the process topology, set JAX_COORDINATOR_ADDRESS=host:port of process 0, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def guard(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Call `main(argv)`; a `UserError` becomes one line on stderr and exit code 2.

    So do a disk that can't be written and a closed pipe; Ctrl-C exits with 130, the shell's code.
    Characters that the terminal can't encode are escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # in a notebook
            stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        message = "the output pipe is closed: rerun the same command with its output in a file"
        # Python flushes again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        message = f"{error}: free disk space and rerun the same command; it resumes"
    except KeyboardInterrupt:
        print("interrupted by SIGINT: rerun the same command to resume", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    else:
        return
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def use_compilation_cache() -> None:
    """Keep compiled programs in ~/.cache/fkv/jax, or in $JAX_COMPILATION_CACHE_DIR if it is set."""
    import jax

    path = jax.config.jax_compilation_cache_dir
    if path is None:
        path = os.path.expanduser("~/.cache/fkv/jax")
        path = None if path.startswith("~") else path  # without a home directory
    elif path.startswith("~"):  # JAX would take ~ for a directory name
        path = str(files.expand(path))
    jax.config.update("jax_compilation_cache_dir", path)
