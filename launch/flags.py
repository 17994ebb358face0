"""Parses a command line into a config and a run directory.

`ml_collections.config_flags` sets fields. This adds recipes by name, a job's fields in `--help`,
and one-line errors with suggestions.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from fkv import commands, recipes
from fkv.errors import UserError, suggest
from fkv.runs import places

from . import fields

DISTRIBUTED = "--distributed"
OPTIONS = ("--config", "--workdir", DISTRIBUTED, "--help")  # of every job


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
    path, argument = recipes.find(given.config or "tiny")
    config = recipes.load(path, argument)
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
