"""Parses a command line into a config and a run directory.

`ml_collections.config_flags` sets fields. This adds recipes by name, a job's fields in `--help`,
and one-line errors with suggestions.
"""

import argparse
import difflib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from fkv import commands, files
from fkv.errors import UserError, suggest
from fkv.runs import places

from . import fields

DISTRIBUTED = "--distributed"
OPTIONS = ("--config", "--workdir", DISTRIBUTED, "--help")  # of every job
CONFIGS = Path("configs")  # the user's, in the current directory
PACKAGED = Path(__file__).parents[1] / "configs"
SHARED = ("__init__", "base", "paper")  # modules that are not recipes


def parse(
    argv: Sequence[str], description: str | None = None, options: Sequence[str] = OPTIONS
) -> tuple[ConfigDict, str]:
    """The config, with its overrides, and the run directory of a command line.

    Args:
      options: known options, for suggestions.

    Raises:
      UserError: an option, the config file, or a field of the config is unknown or ill-typed, or
        the run directory can't be a directory.
    """
    job = Path(argv[0]).stem
    parser = argparse.ArgumentParser(
        prog=commands.command(job),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    add = parser.add_argument
    add("--config", metavar="NAME|FILE.py[:ARG]", help="recipe of the run, for example tiny")
    add("--workdir", metavar="DIR", help="run directory (default: runs/<job>_<config>)")
    add(DISTRIBUTED, action="store_true", help="this process is one of several")
    add("--help", "-h", action="store_true", help="show this, with the values of --config")
    try:
        given, rest = parser.parse_known_args(argv[1:])
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (see --help)") from error
    if given.config is None and not given.help:
        raise no_config(rest)
    path, argument = find_config(given.config or "tiny")
    config = _load(path, argument)
    _override(config, rest, options)
    name = "_".join([path.stem, *argument.replace("/", "_").split()])
    if given.help:
        parser.epilog = fields.describe(job, config, name)
        parser.print_help()
        sys.exit()
    workdir = f"runs/{job}_{name}" if given.workdir is None else given.workdir
    return config, str(places.check_path(workdir))


def no_config(rest: Sequence[str]) -> UserError:
    """The error for a command line without `--config`.

    Args:
      rest: arguments that were not understood.
    """
    for word in rest:
        name = word.partition("=")[0]
        if difflib.get_close_matches(name, ["--config"]):
            return UserError(f"unknown option {name}: did you mean --config?")
        if word.endswith(".py"):
            return UserError(f"no config given: did you mean --config={word}?")
    return UserError("no config given: add --config=<name>, for example --config=tiny")


# ---- config files


def find_config(given: str) -> tuple[Path, str]:
    """The file and the argument of `--config=NAME[:ARGUMENT]`.

    `tiny` is `tiny.py` or `configs/tiny.py` in the current directory, else the packaged recipe;
    the same holds for `configs/tiny.py`.

    Raises:
      UserError: no such file.
    """
    name, _, argument = given.partition(":")
    path = files.expand(name)
    folders = [Path(), CONFIGS]
    if path.parent in folders:
        folders.append(PACKAGED)
    for folder in folders:
        start = folder / (path.name if folder == PACKAGED else path)
        for found in (start, start.with_name(f"{start.name}.py") if start.name else start):
            if os.path.isfile(found):  # Path.is_file raises on overlong names
                return found, argument
    if "=" in name:
        raise UserError(f"--config={given}: a field of the config is set by --config.{given}")
    if PACKAGED in folders:
        stems = {p.stem for folder in (CONFIGS, PACKAGED) for p in folder.glob("*.py")}
        wanted, known = path.stem, sorted(stems - {*SHARED})
    else:
        wanted = str(path.parent / path.stem)
        known = [str(p.with_suffix("")) for p in sorted(path.parent.glob("*.py"))]
    raise UserError(f"config file {name} not found{suggest(wanted, known)}")


def load_module(path: Path) -> ModuleType:
    """The module of a config file found by `find_config`."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise UserError(f"config file {path} is not a Python file: give configs/<name>.py")
    module = importlib.util.module_from_spec(spec)
    _provide_recipes([PACKAGED] if path.parent == PACKAGED else [CONFIGS.absolute(), PACKAGED])
    spec.loader.exec_module(module)
    return module


def _provide_recipes(folders: Sequence[Path]) -> None:
    """Has recipes import `configs` from these folders, the first that has a module.

    A packaged recipe imports its own base, even if the user has a package named configs; the user's
    recipes import either. Installed, the packaged ones are no top-level package.
    """
    places = [str(folder) for folder in folders if folder.is_dir()]
    before = sys.modules.get("configs")
    if before is not None and list(dict.fromkeys(before.__path__)) == places:
        return
    for name in [x for x in sys.modules if x.partition(".")[0] == "configs"]:
        del sys.modules[name]
    start = next(x for x in (Path(place, "__init__.py") for place in places) if x.exists())
    spec = importlib.util.spec_from_file_location(
        "configs", start, submodule_search_locations=places
    )
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["configs"])


def _load(path: Path, argument: str) -> ConfigDict:
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
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config file {path}: get_config() returns a {type(config).__name__}, not a ConfigDict"
        )
    return config.lock()


# ---- fields


def _override(config: ConfigDict, rest: Sequence[str], options: Sequence[str]) -> None:
    """Sets the fields that `rest` names."""
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
        raise UserError(f"cannot parse {unknown[0]!r}{meant}")
    for name, old in before.items():
        kinds = {type(entry) for entry in old} if isinstance(old, tuple) else ()
        for entry in _field(config, name) if kinds else ():
            if type(entry) not in kinds and not (type(entry) is int and float in kinds):
                wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
                raise UserError(f"config.{name} holds {entry!r}: its entries must be {wanted}")


def _meant(config: ConfigDict, rest: Sequence[str], given: str, options: Sequence[str]) -> str:
    """Suggestions for an unknown option, or for a word without dashes."""
    # absl reports the name of an option without its value.
    pattern = rf"--?{re.escape(given.lstrip('-'))}(=|$)"
    word = next((word for word in rest if re.match(pattern, word)), given)
    name, equals, value = word.lstrip("-").removeprefix("config.").partition("=")
    names = [name for name, _ in fields.leaves(config)] if name else []
    ends = [name] if name in names else [f for f in names if f.endswith(f".{name}")]
    ends.sort(key=lambda field: field.count("."))
    near = difflib.get_close_matches(name, names, cutoff=0.75)
    found = difflib.get_close_matches(f"--{name}", options, cutoff=0.7)
    if ends or (near and not found):
        found = [f"--config.{field}{equals}{value}" for field in (ends or near)[:3]]
    return f": did you mean {' or '.join(found)}?" if found else " (see --help)"


def _field(config: ConfigDict, name: str) -> Any:
    """The value of a field that the command line may set."""
    parent, value = "config", config
    for key in name.split("."):
        known = sorted(value) if isinstance(value, ConfigDict) else []
        if key not in known:
            raise UserError(f"{parent} has no field {key!r}{suggest(key, known)}")
        if value.get_type(key) in (list, type(None)):
            raise UserError(f"{parent}.{key} cannot be set from here: edit the config file")
        parent, value = f"{parent}.{key}", value[key]
    if isinstance(value, ConfigDict):
        raise UserError(f"{parent} is a group of fields: set one of {', '.join(sorted(value))}")
    return value
