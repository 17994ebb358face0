"""Recipes, found by their names and loaded: what `--config=NAME[:ARGUMENT]` means."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from fkv import files
from fkv.errors import UserError, suggest

CONFIGS = Path("configs")  # the user's, in the current directory
_HERE = Path(__file__).parent
# In a clone `configs` is beside `fkv`, where it is installed from a wheel in it.
PACKAGED = next((x for x in [_HERE / "configs"] if x.is_dir()), _HERE.parent / "configs")
SHARED = ("__init__", "base", "paper")  # modules that are not recipes


def recipe(name: str | Path) -> ConfigDict:
    """The config of a recipe, to change and to hand to a job.

    config = fkv.recipe("tiny")
    config.budget = 96

    Args:
      name: as after `--config=` on the command line: of a recipe (`tiny`), with a variant
        (`smollm2:pip`), or a file of your own (`mine.py`).

    Returns:
      A config that takes new values, but no new fields.

    Raises:
      UserError: there is no such recipe, or its file is no recipe.
    """
    return load(*find(str(name)))


def find(given: str) -> tuple[Path, str]:
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
    """The module of a config file that `find` found."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is not a Python file: give configs/<name>.py")
    module = importlib.util.module_from_spec(spec)
    _provide([PACKAGED] if path.parent == PACKAGED else [CONFIGS.absolute(), PACKAGED])
    spec.loader.exec_module(module)
    return module


def _provide(folders: Sequence[Path]) -> None:
    """Has recipes import `configs` from these folders, the first that has a module.

    A packaged recipe imports its own base, even if the user has a package named configs; the user's
    recipes import either. Installed, the packaged ones are no top-level package.
    """
    places = list(dict.fromkeys(str(folder) for folder in folders if folder.is_dir()))
    before = sys.modules.get("configs")
    if before is not None and list(getattr(before, "__path__", ())) == places:
        return
    for name in [x for x in sys.modules if x.partition(".")[0] == "configs"]:
        del sys.modules[name]
    start = next(x for x in (Path(place, "__init__.py") for place in places) if x.exists())
    spec = importlib.util.spec_from_file_location(
        "configs", start, submodule_search_locations=places
    )
    assert spec is not None and spec.loader is not None
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["configs"])


def load(path: Path, argument: str = "") -> ConfigDict:
    """The config of a file that `find` found, with the argument of its name."""
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
