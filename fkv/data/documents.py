"""Documents: plain text of files, read whole, each once."""

import dataclasses
import functools
import glob
import gzip
import hashlib
import html.parser
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from fkv import files
from fkv.data import benchmarks, sources
from fkv.errors import UserError

_ROWS = (".jsonl", ".parquet")
_HTML = (".html", ".htm", ".xhtml")
_MAGIC = re.compile(r"[*?[]")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and where it was read.

    Attributes:
      kind: what sort of text it is, a word that the user chose.
      source: its file, and after a colon its row.
    """

    kind: str
    source: str
    text: str

    @functools.cached_property
    def id(self) -> str:
        """A hash of its words: copies share it, whatever their paths and line ends."""
        return hashlib.sha256(" ".join(self.text.split()).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Read:
    """What was read of one place.

    Attributes:
      documents: different ones, in order of their files.
      files: that they come from.
      copies: documents left out, as the same text was read before.
      unusable: (source, reason) of files and rows that are no text.
    """

    documents: list[Document]
    files: int
    copies: int
    unusable: list[tuple[str, str]]


def find(where: str) -> list[Path]:
    """Regular files by their name, that of a folder above them, or a pattern of either.

    Hidden files and Python's caches are left out, unless they are named.

    Raises:
      UserError: there are none.
    """
    place = files.expand(where)
    if place.is_dir():
        found = _below(place)
    elif place.exists():
        if not place.is_file():
            raise UserError(f"{where}: not a regular file or a directory")
        found = [place]
    elif _MAGIC.search(where):
        matches = map(Path, glob.iglob(str(place), recursive=True))
        found = [x for path in matches for x in (_below(path) if path.is_dir() else [path])]
        found = [path for path in found if path.is_file()]
    else:
        raise UserError(f"{where}: no such file or directory")
    if not found:
        raise UserError(
            f"{where}: no files match" if _MAGIC.search(where) else f"{where}: no files"
        )
    # Links may lead to a file in many ways: the shortest stays.
    found.sort(key=lambda path: (len(path.parts), path), reverse=True)
    return sorted({os.path.realpath(path): path for path in found}.values())


def _below(place: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(place):
        folders[:] = [x for x in folders if not x.startswith(".") and x != "__pycache__"]
        paths = (Path(folder) / name for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return found


def read(kind: str, paths: Iterable[Path], column: str, seen: set[str]) -> Read:
    """Reads documents: of a JSONL or Parquet file one per row, of another the whole text.

    HTML is stripped to its text, and `.gz` unpacked.

    Args:
      column: of the text, in JSONL and Parquet files.
      seen: ids of documents that were read before; grows.

    Raises:
      UserError: a JSONL or Parquet file can't be read, or lacks the column.
    """
    documents, unusable, copies, count = [], [], 0, 0
    for path in paths:
        before = len(documents) + copies
        for source, text in _texts(path, column):
            if text is None or isinstance(text, ValueError):
                unusable.append((source, str(text or f"{column!r} is no text")))
                continue
            document = Document(kind, source, text)
            if document.id in seen:
                copies += 1
                continue
            seen.add(document.id)
            documents.append(document)
        count += len(documents) + copies > before
    return Read(documents, count, copies, unusable)


def _texts(path: Path, column: str) -> Iterable[tuple[str, str | ValueError | None]]:
    """(source, text) of a file, or of its rows; in place of a text the reason why it is none."""
    name = os.fsencode(path).decode(errors="backslashreplace")
    if path.suffix.lower() in _ROWS:
        values = sources.column(sources.open_file(str(path)), column, str(path))
        for row, value in enumerate(values):
            yield f"{name}:{row}", benchmarks.words(value)
        return
    try:
        yield name, text_of(path.name, files.read_bytes(path))
    except ValueError as error:
        yield name, error


def text_of(name: str, data: bytes) -> str:
    """The text of a file's content; ValueError says why it has none."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
        if suffixes[-1:] and suffixes[-1] in _ROWS:
            raise ValueError(f"unpack it: rows are read from {' and '.join(_ROWS)}")
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"can't be unpacked ({error})") from None
    if b"\0" in data:
        raise ValueError("not text, as it has zero bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if suffixes[-1:] and suffixes[-1] in _HTML:
        text = strip_html(text)
    if not text.strip():
        raise ValueError("empty")
    return text


def strip_html(text: str) -> str:
    """The text that a browser would show, with lines and paragraphs, without images and scripts."""
    parser = _Stripper()
    parser.feed(text)
    parser.close()
    lines = [line.rstrip() for line in "".join(parser.parts).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


_HIDDEN = ("script", "style", "head", "title", "template", "noscript", "svg", "math")
_PARAGRAPHS = (
    "p", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "blockquote",
    "section", "article", "figure",
)  # fmt: skip
_LINES = ("br", "li", "dt", "dd", "tr", "div", "hr", "header", "footer", "nav", "main", "caption")


class _Stripper(html.parser.HTMLParser):
    """Collects the text of HTML in `parts`."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden, self._verbatim = [], 0

    def handle_starttag(self, tag, attrs):
        if tag in _HIDDEN:
            self._hidden.append(tag)
        elif tag == "body":
            self._hidden.clear()  # a head need not be closed
        self._verbatim += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag):
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        if tag == "pre" and self._verbatim:
            self._verbatim -= 1
        self._break(tag)

    def _break(self, tag):
        if self._hidden:
            return
        if tag in ("td", "th"):
            self.handle_data(" ")
        elif tag in _PARAGRAPHS or tag in _LINES:
            self.parts.append("\n\n" if tag in _PARAGRAPHS else "\n")

    def handle_data(self, data):
        if self._hidden:
            return
        if not self._verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip(" ")
        if data:
            self.parts.append(data)


SPLITS = ("train", "dev", "heldout")


def split(document: Document, held_out: float, dev: float) -> str:
    """Which of `SPLITS` a document is in: by its hash, so whatever else is read, and its copies.

    Args:
      held_out, dev: shares of documents.
    """
    digest = hashlib.sha256(f"held out {document.id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "heldout" if place < held_out else "dev" if place < held_out + dev else "train"


def shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """The documents in an order that depends on the seed and on each of them alone."""
    return sorted(documents, key=lambda x: hashlib.sha256(f"{seed} {x.id}".encode()).digest())
