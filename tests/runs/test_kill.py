"""The short form of `python -m tests.kill`, and that it would notice a difference."""

import shutil

import numpy as np

from fkv.runs import checkpoint
from tests import kill


def test_killed_for_real(tmp_path):
    # Of the supervised stage with several scorers, which are saved one after the other.
    (count,) = kill.run(["variants"], 1, 3, tmp_path, ["sft.steps=16"], patience=0.3)
    assert (count.kills, count.early) == (1, 0) and count.runs >= 1
    assert count.compared > 50_000 and count.differ == 0


def test_a_difference_is_counted(tmp_path):
    run = tmp_path / "one" / "run"
    for step in (1, 2):
        checkpoint.save(run, step, {"x": np.ones(3)}, {"config": {}})
    (run / "metrics.jsonl").write_text("as it was")
    (run / "tb").mkdir()
    (run / "tb" / "events").write_text("at another time")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "run" / "tb" / "events").write_text("now")

    def found():
        count = kill.Count("sft")
        kill.compare(tmp_path / "one", tmp_path / "two", count)
        return count.differ

    assert found() == 0
    other = tmp_path / "two" / "run"
    (other / "metrics.jsonl").write_text("as it is!")
    assert found() == 3
    (other / "more.csv").write_text("four")
    assert found() == 3 + 4
    checkpoint.save(other, 2, {"x": np.array([1.0, 1.0, -1.0])}, {"config": {}})
    assert found() == 3 + 4 + 1  # the sign
    checkpoint.save(other, 3, {"x": np.ones(3)}, {"config": {}})
    assert found() > 3 + 4 + 1 + 24
