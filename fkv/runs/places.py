"""Where a run is, and which version of the source made it; quick to import."""

import os
import re
import subprocess
from pathlib import Path

import fkv
from fkv import files
from fkv.errors import UserError


def check_path(workdir: str | os.PathLike) -> Path:
    """The path with `~` expanded; refuses `gs://...` and the empty string (an unset variable)."""
    if not os.fspath(workdir).strip():
        raise UserError("--workdir is empty: name a directory")
    if match := re.match(r"(\w+)://", os.fspath(workdir)):
        raise UserError(
            f"{workdir}: {match[1]}:// is not a file system: mount the bucket (by gcsfuse, or "
            "--bucket of launch.sweep) and give its local directory"
        )
    return files.expand(workdir)


def source_version() -> str:
    """The git commit of fkv's source, with "-dirty" if modified, or else fkv's version."""
    here = Path(__file__)
    try:
        for command in (
            # An fkv installed inside another project's checkout is not tracked by it.
            ["git", "ls-files", "--error-unmatch", here.name],
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            options = {"check": True, "capture_output": True, "text": True}
            done = subprocess.run(command, cwd=here.parent, **options)
    except (OSError, subprocess.CalledProcessError):
        return f"fkv {fkv.__version__}"
    return done.stdout.strip()
