"""The benchmark's bookkeeping; what it measures is not for tests."""

import json

import numpy as np
import pytest

from fkv.errors import UserError
from fkv.jobs import benchmark
from tests.jobs.test_sft import model_dir, small

__all__ = ["model_dir"]  # a fixture


def shrink(model_dir, **changes):
    config = small(model_dir)
    config.benchmark.policies = ("full", "h2o")
    config.benchmark.batch, config.benchmark.prompt = 2, 11
    config.benchmark.new_tokens, config.benchmark.repeats = 40, 2
    config.benchmark.update(changes)
    return config


def test_every_policy_is_timed(model_dir, tmp_path, capsys):
    records = benchmark.run(shrink(model_dir), str(tmp_path))
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert [r["policy"] for r in records] == ["full", "h2o"]
    assert [r["policy"] for r in written["records"]] == ["full", "h2o"]
    assert written["about"]["batch"] == 2 and written["about"]["backend"] == "cpu"
    for r in records:
        assert list(r["ms_per_token"]) == [16, 40]  # no 1024 is reached: the first and the last
        assert r["tokens_per_s"] > 0 and r["compile_s"] > 0
        assert r["growth_low"] <= r["growth"] <= r["growth_high"]
    assert "h2o" in (tmp_path / "benchmark.txt").read_text()
    assert "medians of 2" in capsys.readouterr().out


def test_a_record_is_of_the_chunks_it_names():
    class Config:
        interval = 512

        class benchmark:
            batch = 4

    # 64 chunks after the first, the second repeat twice as slow and both slower as they go.
    seconds = np.array([[1.0], [2.0]]) * np.linspace(1, 3, 63)[None]
    record = benchmark._record(Config, "x", seconds, 0.5)
    assert list(record["ms_per_token"]) == [1024, 2048, 4096, 8192, 16384, 32768]
    assert record["growth"] == pytest.approx(3, rel=0.05)
    assert record["ms_per_token"][1024] == pytest.approx(1.5e3 / 512, rel=0.05)
    assert record["tokens_per_s"] == pytest.approx(4 * 512 / np.median(seconds))


def test_too_few_tokens_are_refused(model_dir, tmp_path):
    with pytest.raises(UserError, match=r"benchmark.new_tokens = 15 must be at least 2 L"):
        benchmark.run(shrink(model_dir, new_tokens=15), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
