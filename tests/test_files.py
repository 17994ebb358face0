"""Files are written atomically, whatever interrupts the writing."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import fkv
from fkv import files, models
from fkv.data import traces as data
from fkv.errors import UserError
from fkv.evaluation import plots
from fkv.jobs.benchmark import peers
from fkv.models import loading
from fkv.runs import costs
from tests import oracles
from tests.runs.test_checkpoint import small_files_only

REFUSALS = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO]


def draw(path):
    plots.cache_memory(16, 32, 1024, path, "a cache")


def table(path):
    data.write(path, [], {})


def tensors(path):
    with files.whole(path) as temporary:
        loading.write_tensors(temporary, {"x": np.ones(3)}, "fkv")


def text(path):
    files.write_text(path, "new")


WRITERS = [draw, table, tensors, text]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("code", REFUSALS)
def test_what_is_refused_leaves_nothing(tmp_path, monkeypatch, write, code):
    path = tmp_path / "file.png"
    for before in (None, b"old"):
        if before:
            path.write_bytes(before)

        def refuse(source, target):
            assert os.path.getsize(source)
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            with pytest.raises(UserError, match=rf"cannot write {path} \({os.strerror(code)}\)"):
                write(path)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_a_picture_is_not_seen_before_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def killed(figure, target, **kwargs):
        with open(target, "wb") as file:
            file.write(b"half a picture")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", killed)
        with pytest.raises(KeyboardInterrupt):
            draw(path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]
    draw(path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.read_bytes().endswith(
        b"IEND\xaeB`\x82"
    )
    draw(tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_directories_take_the_place_of_others_whole(tmp_path):
    path = tmp_path / "model"
    for name in ("a", "b"):
        with files.whole(path, directory=True) as directory:
            (directory / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["b"]
    with pytest.raises(KeyboardInterrupt), files.whole(path, directory=True) as directory:
        (directory / "c").write_text("c")
        raise KeyboardInterrupt
    with (
        pytest.raises(UserError, match=rf"cannot write {path} \(No space left on device\)"),
        files.whole(path, directory=True),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.name for p in path.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    for suffix in (".tmp", ".old.tmp"):  # of one that was killed
        (tmp_path / f"model{suffix}" / "part").mkdir(parents=True)
    with files.whole(path, directory=True) as directory:
        (directory / "d").write_text("d")
    assert [p.name for p in path.iterdir()] == ["d"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_line_that_fits_in_part_is_not_written(tmp_path):
    path = tmp_path / "lines"
    files.append_text(path, "one\n")
    with (
        pytest.raises(UserError, match=rf"cannot write {path} \(File too large\)"),
        small_files_only(7),
    ):
        files.append_text(path, "another\n")
    assert path.read_text() == "one\n"


def test_a_models_config_is_written_whole(tmp_path):
    lm = oracles.make_lm()
    (tmp_path / "config.json.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*/config.json \(No space left"):
        models.save(tmp_path, lm)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(UserError, match=r"cannot write .*/model.safetensors/x"):
        models.save(tmp_path / "model.safetensors" / "x", lm)


def test_text_that_is_none_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"ok \xff")
    with pytest.raises(UserError, match=r"a is not UTF-8 text \(invalid start byte at byte 3\)"):
        files.read_text(tmp_path / "a")
    with pytest.raises(UserError, match=r"b can't be read \(No such file"):
        files.read_text(tmp_path / "b")


def test_home_is_where_a_shell_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    lm = oracles.make_lm()
    models.save("~/model", lm)
    assert models.read("~/model") == fkv.load("~/model").config == lm.config
    assert costs.shape_of("~/model") == lm.config
    python = tmp_path / "me" / "python"
    python.write_text("#!/bin/sh\nread question\necho '{\"version\": 1}'\nread end\n")
    python.chmod(0o755)
    peer = peers.Peer("transformers", "~/python", "model", "float32")
    assert peer.about == {"version": 1}
    peer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["me"]


def test_nobodys_home_is_an_error(monkeypatch):
    for path in ("~nosuchuser", "~nosuchuser/x"):
        with pytest.raises(UserError, match=f"{path}: no home directory is known for ~nosuchuser"):
            files.expand(path)
    for path in ("a/~/b", "./~a", "/~a", "a~", ""):
        assert "~" not in files.expand(path).parts[:1]
    assert files.expand("./~a") == Path.cwd() / "~a"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as in some containers
    with pytest.raises(UserError, match="no home directory is known for ~; write the path out"):
        files.expand("~/x")
