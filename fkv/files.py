"""User-given paths, reading, and atomic writing; failures raise `UserError`."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fkv.errors import UserError
from fkv.kinds import said

FIX = "free disk space or fix the cause, and rerun the same command"


def expand(path: str | os.PathLike) -> Path:
    """The path with a leading `~` or `~user` expanded; `UserError` if it can't be a path."""
    given = os.fspath(path)
    found = os.path.expanduser(given)
    if found.startswith("~"):
        raise UserError(
            f"{given}: no home directory is known for {Path(given).parts[0]}; write the path out, "
            "or ./~... for a name that begins with ~"
        )
    try:
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{said(given)} can't be a path here ({reason})") from None
    # Path drops the dot of ./~x, which the next expansion would take for a user.
    return Path(found).absolute() if str(Path(found)).startswith("~") else Path(found)


def read_bytes(path: Path) -> bytes:
    """The content of a regular file; others are refused, as reading a pipe may never end."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} can't be read (not a regular file): move it away")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error})") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path} is not UTF-8 text ({where})") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; refuses other JSON, and one key with two values."""

    def once(pairs):
        found = dict(pairs)
        for key, value in pairs:
            if found[key] is not value and found[key] != value:
                raise ValueError(f"two values of {said(key)}")
        return found

    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        found = json.loads(read_bytes(path).decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object, but {said(found)}")
    return found


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Appends text atomically, and syncs it to disk."""
    data = memoryview(text.encode())
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


@contextlib.contextmanager
def whole(path: str | os.PathLike, suffix: str = "tmp", directory: bool = False) -> Iterator[Path]:
    """Yields a temporary path, which is renamed to `path` on success and deleted on failure.

    Concurrent writers of one file need different suffixes. A `directory` is created, and replaces
    an existing one.
    """
    path = Path(os.path.abspath(path)) if directory else Path(path)
    temporary, old = (path.with_name(f"{path.name}.{end}") for end in (suffix, "old.tmp"))
    with writing(path):
        try:
            if directory:
                delete(temporary, old)  # left by a killed process
                temporary.mkdir(parents=True)
            yield temporary
            if directory and path.exists():
                path.rename(old)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                delete(temporary)
            raise
        if directory:
            shutil.rmtree(old, ignore_errors=True)


def delete(*paths: Path) -> None:
    """Deletes files and directories that exist."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an `OSError` into a `UserError` that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): {FIX}") from error
