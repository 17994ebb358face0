"""`fkv <job> --config=<recipe> ...`, installed; in a clone `python -m launch` is the same."""

import ast
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import fkv
from fkv.errors import UserError, suggest

from . import app

_EPILOG = """
Every job takes --config=<recipe>, [--workdir=DIR] and [--config.<field>=<value> ...];
fkv <job> --help lists its fields. To begin: fkv sft --config=tiny (two minutes on a laptop)"""


def jobs() -> dict[str, str]:
    """What each job does, in a line; nothing is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = ast.get_docstring(tree).splitlines()[0]
    del found["__main__"]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the job that the command line names, as `python -m launch.<job>` does."""
    app.guard(_start, sys.argv if argv is None else argv)


def _start(argv: Sequence[str]) -> None:
    known = jobs()
    job = argv[1] if len(argv) > 1 else "--help"
    if job in ("--help", "-h", "help"):
        width = max(map(len, known))
        lines = [f"  {name:<{width}}  {about}" for name, about in known.items()]
        print("\n".join(["usage: fkv <job> --config=<recipe> [options]", "", *lines, _EPILOG]))
    elif job == "--version":
        print(f"fkv {fkv.__version__}")
    elif job not in known:
        raise UserError(f"fkv has no job {job!r}{suggest(job, list(known))}")
    else:
        here = os.getcwd()
        if not sys.flags.safe_path and here not in sys.path:
            sys.path.insert(0, here)  # as `python -m` does: recipes import what is beside them
        sys.argv = [argv[0], *argv[2:]]
        runpy.run_module(f"{__package__}.{job}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
