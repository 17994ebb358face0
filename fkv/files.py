"""Files as people name them, and files that are there whole or not at all."""

import contextlib
import os
import reprlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from fkv.errors import UserError

_MEND = "make room or mend that, and run the same command again; it goes on where it stopped"


def expand(path: str | os.PathLike) -> Path:
    """The path with a leading `~` or `~user` filled in, as a shell does it.

    Raises:
      UserError: there is no such user, nobody knows where home is, or the file system can't have
        such a path, say because it is too long.
    """
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
        raise UserError(f"{reprlib.repr(given)} can't be a path here ({reason})") from None
    # Of ./~x a Path forgets the dot, and the next would take it for a user.
    return Path(found).absolute() if str(Path(found)).startswith("~") else Path(found)


def read_bytes(path: Path) -> bytes:
    """What a file holds.

    Raises:
      UserError: it can't be read, or is a directory, or a pipe, which would never end.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} can't be read (not a regular file): move it away")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error})") from None


def read_text(path: Path) -> str:
    """A file's text, UTF-8.

    Raises:
      UserError: it can't be read, or is something else.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
      UserError: the file system refuses, say because the disk is full.
    """
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Appends lines, all or none of them, and waits for the disk.

    Raises:
      UserError: the file system refuses.
    """
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
def whole(path: str | os.PathLike, suffix: str = "tmp") -> Iterator[Path]:
    """Yields where to write a file, which takes the place of `path` in the end.

    Nothing stays of one that fails, and what was there before stays as it was.

    Args:
      suffix: of the name until then; several who write the same file need one each.

    Raises:
      UserError: the file system refuses.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{suffix}")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            if temporary.is_file():
                temporary.unlink()
            raise


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike) -> Iterator[Path]:
    """The same for a directory, whose old files all go.

    Raises:
      UserError: the file system refuses.
    """
    path = Path(os.path.abspath(path))
    temporary, old = (path.with_name(path.name + suffix) for suffix in (".tmp", ".old.tmp"))
    with writing(path):
        try:
            for left in (temporary, old):  # by one that was killed
                if left.exists():
                    shutil.rmtree(left)
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Names the file that is written within, should the file system refuse."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): {_MEND}") from error
