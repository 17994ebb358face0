"""The command line that every job shares: `flags.run(main)` calls `main(config, workdir)`."""

import argparse
import contextlib
import difflib
import errno
import importlib.util
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags

from fkv import files
from fkv.errors import UserError, suggest
from fkv.jobs import dry_run
from fkv.runs import rundir

DISTRIBUTED = "--distributed"
OPTIONS = ("--config", "--workdir", DISTRIBUTED, "--help")  # of every job
CONFIGS = Path("configs")


def run(
    main: Callable[[ml_collections.ConfigDict, str], None], argv: Sequence[str] | None = None
) -> None:
    """Parse the command line and run `main(config, workdir)`, or say what it would take.

    A `UserError`, here or in `main`, becomes one line on stderr and exit code 2; any other
    exception keeps its traceback.

    Args:
      argv: the command line, program first; by default `sys.argv`.
    """
    description = sys.modules[main.__module__].__doc__

    def start(argv):
        use_compilation_cache()
        config, workdir = parse(argv, description)
        if DISTRIBUTED in argv or os.environ.get("JAX_COORDINATOR_ADDRESS"):
            join()
        if config.get("dry_run"):
            dry_run.run(Path(argv[0]).stem, config)
        else:
            main(config, workdir)

    guard(start, sys.argv if argv is None else argv)


def join() -> None:
    """Make this process one of several, before JAX looks for devices.

    TPU pods, Slurm, Open MPI and Kubernetes say who is who; elsewhere $JAX_COORDINATOR_ADDRESS
    (host:port of process 0), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID do.

    Raises:
      UserError: nobody says so, or the others can't be reached.
    """
    numbers = {}
    for field in ("num_processes", "process_id"):
        value = os.environ.get(f"JAX_{field.upper()}")
        if value is not None and not value.isdigit():
            raise UserError(f"JAX_{field.upper()} = {value!r} must be a number")
        numbers[field] = value and int(value)
    # The jobs see to SIGTERM themselves.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**numbers, shutdown_timeout_seconds=60)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes can't join ({str(error).strip().splitlines()[0]}): where JAX does not "
            "find out by itself, set JAX_COORDINATOR_ADDRESS=host:port of process 0, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def guard(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Call `main(argv)`; a `UserError` becomes one line on stderr and exit code 2.

    So does a disk that takes nothing, wherever it is met, and a pipe whose reader has gone; and
    Ctrl-C, with 130, the shell's code. What a terminal has no letters for is shown as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        message = "nobody reads what is printed any more: run the same command again, to a file"
        # Python writes what is left when it ends, and would say so once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        message = f"{error}: make room, and run the same command again; it goes on where it stopped"
    except KeyboardInterrupt:
        print("ended by SIGINT: run the same command again to go on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    else:
        return
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def parse(
    argv: Sequence[str], description: str | None = None, options: Sequence[str] = OPTIONS
) -> tuple[ml_collections.ConfigDict, str]:
    """The config, with its overrides, and the run directory that a command line asks for.

    Args:
      options: that there are, to suggest one that may have been meant.

    Raises:
      UserError: an option, the config file, or a field of the config is unknown or ill-typed, or
        the run directory is none of the file system.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m launch.{Path(argv[0]).stem}",
        description=description,
        epilog="--config.key=value overrides a field of the config",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="configs/x.py[:arg]", help="the recipe of the run")
    parser.add_argument("--workdir", help="run directory (default: runs/<job>_<config>)")
    parser.add_argument(
        DISTRIBUTED, action="store_true", help="this process is one of several, each on its host"
    )
    try:
        given, rest = parser.parse_known_args(argv[1:])
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (see --help)") from error
    if given.config is None:
        raise no_config(rest)
    path, argument = find_config(given.config)
    config = _load(path, argument)
    _override(config, rest, options)
    name = "_".join([path.stem, *argument.replace("/", "_").split()])
    workdir = given.workdir
    if workdir is None:
        workdir = str(Path("runs", f"{Path(argv[0]).stem}_{name}"))
    return config, str(rundir.check_path(workdir))


def no_config(rest: Sequence[str]) -> UserError:
    """For a command line without `--config`, of which this was not understood."""
    for word in rest:
        name = word.partition("=")[0]
        if difflib.get_close_matches(name, ["--config"]):
            return UserError(f"unknown option {name}: did you mean --config?")
        if word.endswith(".py"):
            return UserError(f"no config given: did you mean --config={word}?")
    return UserError("no config given: add --config=configs/<name>.py")


def use_compilation_cache() -> None:
    """Keep compiled programs in ~/.cache/fkv/jax, unless $JAX_COMPILATION_CACHE_DIR says where."""
    path = jax.config.jax_compilation_cache_dir
    if path is None:
        path = os.path.expanduser("~/.cache/fkv/jax")
        path = None if path.startswith("~") else path  # nobody knows where home is
    elif path.startswith("~"):  # JAX would make a directory of that name
        path = str(files.expand(path))
    jax.config.update("jax_compilation_cache_dir", path)


def find_config(given: str) -> tuple[Path, str]:
    """The file and the argument of `--config=FILE[:ARGUMENT]`; `tiny` is `configs/tiny.py`.

    Raises:
      UserError: there is no such file.
    """
    name, _, argument = given.partition(":")
    path = files.expand(name)
    script = path.with_name(f"{path.name}.py") if path.name else path
    for found in (path, script, CONFIGS / path, CONFIGS / script):
        if os.path.isfile(found):  # a Path would mind names that are too long
            return found, argument
    if "=" in name:
        raise UserError(f"--config={given}: a field of the config is set by --config.{given}")
    folder = path.parent if path.parent.parts else CONFIGS
    others = [p for p in sorted(folder.glob("*.py")) if p.stem != "__init__"]
    known = [p.stem if folder == CONFIGS else str(p.with_suffix("")) for p in others]
    wanted = path.stem if folder == CONFIGS else str(path.parent / path.stem)
    raise UserError(f"config file {name} not found{suggest(wanted, known)}")


def load_module(path: Path) -> ModuleType:
    """The module of a config file, as `find_config` has found it."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise UserError(f"config file {path} is not a Python file: give configs/<name>.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load(path: Path, argument: str) -> ml_collections.ConfigDict:
    module = load_module(path)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {path} has no get_config(): is it a config?")
    arguments = [argument] if argument else []
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        wants = "takes no argument" if argument else "needs an argument"
        raise UserError(
            f"config file {path} {wants}: give --config={path}{'' if argument else ':<argument>'}"
        ) from error
    config = module.get_config(*arguments)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"config file {path}: get_config() gives a {type(config).__name__}, not a ConfigDict"
        )
    return config.lock()


def _override(
    config: ml_collections.ConfigDict, rest: Sequence[str], options: Sequence[str]
) -> None:
    named = [re.match(r"--?(?:no)?config\.([^=]*)", word) for word in rest]
    before = {match[1]: _field(config, match[1]) for match in named if match}
    values = absl_flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[*rest])
        _, *unknown = values(["", *rest])
    except absl_flags.UnrecognizedFlagError as error:
        given = f"--{error.flagname}"
        raise UserError(f"unknown option {given}{_meant(config, rest, given, options)}") from error
    except (absl_flags.Error, TypeError) as error:
        raise UserError(str(error)) from error
    if unknown:
        meant = _meant(config, rest, unknown[0], options)
        raise UserError(f"cannot make sense of {unknown[0]!r}{meant}")
    for name, old in before.items():
        if isinstance(old, tuple) and old:
            _check_entries(name, {type(entry) for entry in old}, _field(config, name))


def _meant(
    config: ml_collections.ConfigDict, rest: Sequence[str], given: str, options: Sequence[str]
) -> str:
    """What may have been meant by an option that there isn't, or by a word without dashes."""
    # absl says the name alone of an option.
    pattern = rf"--?{re.escape(given.lstrip('-'))}(=|$)"
    word = next((word for word in rest if re.match(pattern, word)), given)
    name, equals, value = word.lstrip("-").removeprefix("config.").partition("=")
    names = [*_names(config)] if name else []
    ends = [name] if name in names else [f for f in names if f.endswith(f".{name}")]
    ends.sort(key=lambda field: field.count("."))
    near = difflib.get_close_matches(name, names, cutoff=0.75)
    found = difflib.get_close_matches(f"--{name}", options, cutoff=0.7)
    if ends or (near and not found):
        found = [f"--config.{field}{equals}{value}" for field in (ends or near)[:3]]
    return f": did you mean {' or '.join(found)}?" if found else " (see --help)"


def _names(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _check_entries(name: str, kinds: set[type], entries: tuple) -> None:
    # config_flags sees to the types of fields, but not of what is in a tuple.
    for entry in entries:
        if type(entry) not in kinds and not (type(entry) is int and float in kinds):
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise UserError(f"config.{name} holds {entry!r}: its entries must be {wanted}")


def _field(config: ml_collections.ConfigDict, name: str) -> Any:
    parent, value = "config", config
    for key in name.split("."):
        known = sorted(value) if isinstance(value, ml_collections.ConfigDict) else []
        if key not in known:
            raise UserError(f"{parent} has no field {key!r}{suggest(key, known)}")
        if value.get_type(key) in (list, type(None)):
            raise UserError(f"{parent}.{key} cannot be set from here: edit the config file")
        parent, value = f"{parent}.{key}", value[key]
    if isinstance(value, ml_collections.ConfigDict):
        raise UserError(f"{parent} is a group of fields: set one of {', '.join(sorted(value))}")
    return value
