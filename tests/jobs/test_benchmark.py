"""The benchmark's bookkeeping and formulas; what it measures is not for tests."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from fkv import models, policies
from fkv.errors import UserError
from fkv.jobs import benchmark, groups, programs
from fkv.jobs.benchmark import base, decode, device, peer, peers, queue
from fkv.models import ModelConfig
from tests import decoding
from tests.jobs.test_sft import model_dir, small

__all__ = ["model_dir"]  # a fixture

SHAPE = ModelConfig("qwen3", 50, 8, 3, 4, 2, 4, 16, qk_norm=True, tied_embeddings=True)


def make_bench(config, shape):
    settings = groups.Benchmark.of(config.benchmark, peers={})
    return base.Bench(config, settings, models.LM({}, shape), None, 0, None)


def shrink(model_dir, **changes):
    config = small(model_dir)
    s = config.benchmark
    s.sections += ("largest_batch",)
    s.policies, s.budgets, s.batches, s.lengths = ("full", "h2o"), (16,), (2,), (40, 64)
    s.new_tokens, s.repeats, s.growth_tokens = 8, 2, 40
    s.label_lengths, s.step_length, s.step_rollouts, s.step_replayed = (40, 48), 40, 2, True
    s.largest_limit, s.prefill_lengths = 2, (40,)
    s.update(changes)
    return config


@pytest.fixture(scope="module")
def measured(model_dir, tmp_path_factory):
    """A benchmark of every section that needs no other environment."""
    path = tmp_path_factory.mktemp("benchmark")
    real, device.peaks = device.peaks, lambda *_: device.Peaks(1e9, 1e9, "")
    try:
        return path, benchmark.run(shrink(model_dir), str(path))
    finally:
        device.peaks = real


def test_every_section_is_measured_and_written(measured):
    path, found = measured
    written = json.loads((path / "benchmark.json").read_text())
    assert written.pop("about")["backend"] == "cpu" and written == found
    arms = [(r["policy"], r["budget"], r["batch"], r["length"]) for r in found["decode"]]
    # The full cache at every length, what does not grow with it at the longest alone.
    assert arms == [("full", 0, 2, 40), ("full", 0, 2, 64), ("h2o", 16, 2, 64)]
    # One repeat's first chunk warms up; slots are those of the cache.
    assert [r["slots"] for r in found["decode"]] == [40, 64, 24]
    for r in found["decode"]:
        assert r["tokens_per_s_low"] <= r["tokens_per_s"] <= r["tokens_per_s_high"]
        assert r["ms_p50"] <= r["ms_p99"] and r["roofline"] > 0 and r["compile_s"] > 0
        assert (r["eviction"] > 0) == (r["policy"] == "h2o")
    full, h2o = found["decode"][1:]
    assert full["program_bytes"] > h2o["program_bytes"] > 0
    assert [r["length"] for r in found["labels"]] == [40, 48]
    passes = [("forward", 1), ("losses", 1), ("replay", 1)]
    steps = [("supervised", 1), ("grpo", 2), ("grpo, replayed", 2)]
    assert [(r["step"], r["rows"]) for r in found["steps"]] == passes + steps
    times = {r["step"]: r["seconds"] / r["rows"] for r in found["steps"]}
    for r in found["steps"]:
        assert r["forwards"] == pytest.approx(times[r["step"]] / times["forward"])
    largest = found["largest_batch"]
    arms = [(r["policy"], r["length"], r["batch"], r["limited"]) for r in largest]
    assert arms == [("full", 40, 2, True), ("full", 64, 2, True), ("h2o", 64, 2, True)]
    assert largest[1]["times_full"]["64"] == 1
    assert largest[2]["times_full"]["40"] == pytest.approx(
        largest[2]["tokens_per_s"] / largest[0]["tokens_per_s"]
    )
    assert list(found["growth"][0]["ms_per_token"]) == ["16", "40"]
    for r in (*found["prefill"], *found["labels"], *found["steps"][3:]):
        assert r["mfu"] > 0 and r["seconds_low"] <= r["seconds"] <= r["seconds_high"]
    for suffix in ("txt", "md"):
        text = (path / f"benchmark.{suffix}").read_text()
        assert all(section.title in text for n, section in benchmark.SECTIONS.items() if n in found)
    for name in ("decode.png", "growth.png", "labels.png"):
        assert (path / name).read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_said(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "peaks", lambda *_: device.Peaks(1e9, 1e9, ""))
    config = shrink(model_dir, sections=("decode", "largest_batch"), lengths=(1024,), batches=(64,))
    # Room for the evicted caches of two rows, and for no full cache of 1024 slots.
    config.benchmark.memory_gib = 150_000 / 2**30
    found = benchmark.run(config, str(tmp_path))
    assert [r["fits"] for r in found["decode"]] == [False, False]
    assert [(r["policy"], r["batch"], r["limited"]) for r in found["largest_batch"]] == [
        ("h2o", 2, True)
    ]
    assert "does not fit" in (tmp_path / "benchmark.txt").read_text()


def test_nothing_is_begun_when_time_is_over(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "peaks", lambda *_: device.Peaks(1e9, 1e9, ""))
    real, ran = decode._run_decode, []

    def once(*args):
        ran.append(args)
        return real(*args)

    monkeypatch.setattr(decode, "_run_decode", once)
    monkeypatch.setattr(base.Bench, "late", property(lambda _: bool(ran)))
    config = shrink(model_dir, sections=("decode", "labels"), lengths=(40,))
    found = benchmark.run(config, str(tmp_path))
    assert len(ran) == 1 and found["labels"] == []
    full, h2o = found["decode"]  # the first arm had one of its two repeats
    assert full["tokens_per_s"] > 0 and h2o["error"] == "deadline exceeded"
    text = (tmp_path / "benchmark.txt").read_text()
    assert "deadline exceeded" in text and "Golden labels: not measured" in text
    bench = make_bench(config, SHAPE)
    monkeypatch.undo()
    assert not bench.late and dataclasses.replace(bench, end=0.0).late


def test_beside_a_peer(model_dir, tmp_path, monkeypatch):
    """With PyTorch in its own process: the same tokens, and a failure is a row of the table."""
    pytest.importorskip("torch")
    monkeypatch.setattr(device, "peaks", lambda *_: device.Peaks(1e9, 1e9, ""))
    monkeypatch.setitem(peers.ARMS, "transformers", ("dynamic", "static", "no_such_cache"))
    config = shrink(model_dir, sections=("peers",), repeats=1)
    config.benchmark.peers.transformers = sys.executable
    config.benchmark.peer_policies = ("h2o", "full")
    config.benchmark.peer_batches, config.benchmark.peer_prompt = (2,), 21
    config.benchmark.peer_tokens = 16
    records = benchmark.run(config, str(tmp_path))["peers"]
    h2o, full, dynamic, static, wrong = records
    assert [r["arm"] for r in records] == ["h2o", "full", "dynamic", "static", "no_such_cache"]
    assert full["same_tokens"] == dynamic["same_tokens"] == static["same_tokens"] == 1
    assert "same_tokens" not in h2o and h2o["ours_is_faster"] == 1
    ratio = dynamic["ms_per_step"] / h2o["ms_per_step"]  # one repeat: its own ratio
    assert dynamic["ours_is_faster"] == pytest.approx(ratio)
    # Of 21 + 16 tokens the last is never put in.
    assert full["held"] == dynamic["held"] == 36
    assert "no_such_cache" in wrong["error"] and "tokens_per_s" not in wrong
    assert "no_such_cache" in (tmp_path / "benchmark.txt").read_text()


def test_requests_of_mixed_lengths(model_dir, tmp_path, monkeypatch):
    """Rows that come and go, and batches, say the same, here and by continuous batching."""
    pytest.importorskip("torch")
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(model_dir)

    class InThisProcess:
        name = "transformers"

        def ask(self, arm, **request):
            request |= {"peer": self.name, "arm": arm}
            return peer.answer(model, request) if "limits" in request else peer.decode(
                model, model, request
            )  # fmt: skip

    monkeypatch.setattr(peers, "start", lambda *_: [InThisProcess()])
    monkeypatch.setattr(device, "peaks", lambda *_: device.Peaks(1e9, 1e9, ""))
    config = shrink(model_dir, sections=("queue",), repeats=1, peer_policies=("h2o", "full"))
    config.benchmark.update(queue_rows=2, queue_requests=6, queue_prompt=13, queue_tokens=6)
    records = benchmark.run(config, str(tmp_path))["queue"]
    names = [(r["cache"], r["how"]) for r in records]
    both = [queue.ROWS, queue.BATCHES]
    assert names == [(x, how) for x in ("h2o", "full") for how in both] + [
        ("paged", queue.ROWS), ("dynamic", queue.BATCHES),
    ]  # fmt: skip
    assert all(r["fits"] for r in records), records
    h2o, h2o_batches, full, full_batches, paged, dynamic = records
    for r in (h2o_batches, full_batches, paged, dynamic):
        assert r["same_answers"] == 1, r
    assert "same_answers" not in h2o and "over_rows" not in h2o and "over_ours" not in h2o
    for r, rows in ((h2o_batches, h2o), (full_batches, full), (dynamic, paged)):
        assert r["over_rows"] == pytest.approx(r["seconds"] / rows["seconds"])
        assert r["over_ours"] == pytest.approx(r["seconds"] / h2o["seconds"])
    limits = queue.lengths(config.seed, 6, 6)
    # In twos, each waits for its longer one; all steps are counted, as an interval's are run.
    steps = 8 * sum(-(-(max(limits[i : i + 2]) - 1) // 8) for i in (0, 2, 4))
    assert h2o_batches["rows_in_use"] == pytest.approx((limits - 1).sum() / steps)
    assert h2o["rows_in_use"] >= h2o_batches["rows_in_use"]
    assert "same answers" in (tmp_path / "benchmark.txt").read_text()


def test_lengths_spread_tenfold():
    n = queue.lengths(0, 4096, 1000)
    low, middle, high = np.percentile(n, (10, 50, 90))
    assert high / low == pytest.approx(10, rel=0.05) and middle == pytest.approx(1000, rel=0.05)
    assert n.max() == 8000 and n.min() > 0 and n.dtype == np.int32


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("/no/such/python", "benchmark.peers.transformers = '/no/such/python': No such file"),
        ("/bin/false", "benchmark.peers.transformers = '/bin/false': the peer ended: no message"),
    ],
)
def test_a_peer_that_does_not_start_is_named(python, message):
    with pytest.raises(UserError, match=message):
        peers.Peer("transformers", python, "model", "float32")


@pytest.mark.parametrize("best", [0, 1, 5, 7, 8, 9, 31, 64, 100])
@pytest.mark.parametrize("start", [1, 8, 64])
def test_search_for_the_largest(best, start):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= best

    assert decode.largest(fits, start, 64, 0.0) == min(best, 64)
    assert len(tried) == len(set(tried)) <= 14 and max(tried) <= 64
    near = decode.largest(lambda batch: batch <= best, start, 64, 0.25)
    assert min(best, 64) / 1.25 <= near <= min(best, 64)


def test_a_guess_that_is_a_little_too_large_costs_one_more_try():
    """Each try compiles a program and, where memory is full, waits."""
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= 54

    assert decode.largest(fits, 58, 4096, 0.125) == 52 and tried == [58, 52]


@pytest.mark.parametrize(("name", "cache_dtype"), [("full", "int8"), ("ada", "")])
def test_a_synthetic_state_is_one_of_decoding(name, cache_dtype):
    """As prefill leaves it: the same structure, as many entries, the newest position."""
    shape = dataclasses.replace(SHAPE, cache_dtype=cache_dtype)
    policy, config = policies.get(name), tiny.get_config()
    config.interval, config.benchmark.new_tokens, config.dtype = 8, 24, "float32"
    bench = make_bench(config, shape)
    bench.lm = programs.model_shapes(shape, jnp.float32)
    arm = base.Arm(name, 16 if policy.evicts else 0, 2, 96)
    state = decode.synthetic_state(bench, arm)
    lm, plan = models.LM(models.init(jax.random.key(0), SHAPE), shape), bench.plan(arm.budget)
    # A full cache has room for prompt and answer: 64 + 32 entries.
    prompt, new = (50, 46) if policy.evicts else (64, 32)
    keys = jax.random.split(jax.random.key(0), 2)
    real = decoding.batcher(lm, policy, plan, [np.arange(prompt) % 50] * 2, keys, [new] * 2)
    real.read()
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(state) == shapes(decode._lowered(bench, arm).state)
    assert shapes((real._caches, real._asked)) == shapes((state.caches, state.asked))
    assert state.position_b.tolist() == [64, 64]
    newest = state.caches[0].position_bks.max((1, 2))
    assert newest.tolist() == [63, 63]
    held = (state.caches[0].position_bks >= 0).sum(-1)
    assert (held == (64 if name == "full" else state.caches[0].position_bks.shape[-1] - 8)).all()
    again = (real._caches[0].position_bks >= 0).sum(-1)
    assert (again == (64 if name == "full" else again)).all()


def test_roofline_is_set_by_what_takes_longer():
    peaks = device.Peaks(100.0, 10.0, "")
    assert peaks.roofline(200, 5) == (2.0, "compute")
    assert peaks.roofline(200, 50) == (5.0, "memory")
    assert device.peaks("H100", "bfloat16").bandwidth == 3.35e12
    with pytest.raises(UserError, match="must be one of measured, TPU v4, TPU v5e"):
        device.peaks("abacus", "bfloat16")


def test_growth_is_of_the_chunks_it_names():
    # 64 chunks after the first, the second repeat twice as slow and both slower as they go.
    seconds = np.array([[1.0], [2.0]]) * np.linspace(1, 3, 63)[None]
    record = decode.growth_record(seconds, 512)
    assert list(record["ms_per_token"]) == ["1024", "2048", "4096", "8192", "16384", "32768"]
    assert record["growth"] == pytest.approx(3, rel=0.05)
    assert record["ms_per_token"]["1024"] == pytest.approx(1.5e3 / 512, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sections": ("decoding",)}, "benchmark.sections has 'decoding'; known sections are"),
        ({"growth_tokens": 15}, "benchmark.growth_tokens = 15 must be at least 2 L"),
        ({"lengths": (23,)}, "benchmark.lengths: 23 must be at least 24"),
        ({"budgets": (20,)}, "benchmark.budgets: budget = 20 must be a multiple"),
        ({"policies": ("no",)}, "policy 'no' is not known"),
        ({"label_lengths": (24,)}, "the longest trace has 24 tokens"),
        ({"step_length": 24, "sections": ("steps",)}, "the longest trace has 24 tokens"),
        # Lengths of other sections do not count.
        ({"label_lengths": (24,), "sections": ("steps",), "layers": 1}, "benchmark.layers is for"),
        ({"step_length": 24, "sections": ("labels",), "layers": 1}, "benchmark.layers is for"),
        ({"peer_policies": ("no",), "sections": ("peers",)}, "policy 'no' is not known"),
        ({"layers": 1}, "benchmark.layers is for benchmark.random_weights = True"),
    ],
)
def test_what_can_not_be_measured_is_refused(model_dir, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        benchmark.run(shrink(model_dir, **change), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
