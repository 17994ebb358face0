"""What is held and who is attended, against one trace in numpy; the pictures of it."""

import csv
import dataclasses
import io
import time

import numpy as np
import pytest
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine.batch import Batch
from fkv.evaluation import diagnosis, drawing, loss_ratio, plots
from fkv.evaluation.accuracy import Accuracy
from tests import oracles
from tests.policies.test_policies import h2o

BUDGET, INTERVAL, LENGTH, PADDED = 16, 8, 61, 64
CADENCE = Cadence(BUDGET, INTERVAL)
CHUNKS = PADDED // INTERVAL


@pytest.fixture(scope="module")
def model():
    return oracles.make_lm(heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def trace(model):
    """One trace that ends inside a chunk, with padding."""
    token, length = oracles.make_tokens(model.config, [LENGTH])
    token = np.pad(np.asarray(token), ((0, 0), (0, PADDED - LENGTH)))
    return Batch.of(token, np.asarray(length))


@pytest.fixture(scope="module")
def held(model, trace):
    chosen = {name: policies.get(name) for name in ("full", "h2o", "random")}
    return diagnosis.retention(model, chosen, trace, CADENCE)


def seen_before(chunk):
    return min(chunk * INTERVAL, LENGTH)


def held_by(drops):
    """[chunks, t], from the positions dropped at each eviction."""
    found, gone = np.zeros((CHUNKS, PADDED), bool), set()
    for chunk in range(CHUNKS):
        found[chunk, : seen_before(chunk + 1)] = True
        found[chunk, list(gone)] = False
        event = chunk - BUDGET // INTERVAL
        if 0 <= event < len(drops):
            gone |= set(np.asarray(drops[event]).tolist())
    return found


def test_as_much_is_held_as_fits(held):
    assert list(held) == ["golden", "full", "h2o", "random"]
    for name, one in held.items():
        assert one.shape == (2, 2, CHUNKS, PADDED) and one.dtype == bool
        for chunk in range(CHUNKS):
            before, after = seen_before(chunk), seen_before(chunk + 1)
            count = min(before, LENGTH if name == "full" else BUDGET) + after - before
            assert (one[:, :, chunk].sum(-1) == count).all(), (name, chunk)
            # The chunk attends to itself, and to nothing that is still to come.
            assert one[:, :, chunk, before:after].all() and not one[:, :, chunk, after:].any()
            if chunk:  # what is gone stays gone
                assert not (one[:, :, chunk, :before] & ~one[:, :, chunk - 1, :before]).any()


def test_golden_holds_all_but_what_was_evicted(model, trace, held):
    token = trace.token_bt[0, :LENGTH]
    events = oracles.golden_of_model(model.config, model.params, token, BUDGET, INTERVAL)
    for layer, head in np.ndindex(2, 2):
        want = held_by([drop for _, _, drop in events[layer][head]])
        np.testing.assert_array_equal(held["golden"][layer, head], want)


def test_a_rule_holds_what_its_definition_keeps(model, trace, held):
    drops = {}

    def evict(layer, head, state):
        positions, score = h2o(state, INTERVAL)
        drop = [positions[i] for i in np.argsort(score, kind="stable")[:INTERVAL]]
        drops.setdefault((layer, head), []).append(drop)
        return drop

    token = trace.token_bt[0, :LENGTH]
    oracles.replay(model.config, model.params, token, BUDGET, INTERVAL, evict)
    for layer, head in np.ndindex(2, 2):
        assert len(drops[layer, head]) == 5
        want = held_by(drops[layer, head])
        np.testing.assert_array_equal(held["h2o"][layer, head], want)
    assert (held["h2o"] != held["golden"]).any()


def test_uneven_budgets_are_held_unevenly(model, trace):
    one = diagnosis.retention(model, {"pyramid": policies.get("pyramid")}, trace, CADENCE)
    count = one["pyramid"].sum(-1)
    assert (count[0, :, -2] > count[1, :, -2]).all()  # lower layers keep more


def test_retention_is_of_one_trace(model):
    two = oracles.make_batch(model.config, [40, 40])
    with pytest.raises(ValueError, match="one trace, not 2"):
        diagnosis.retention(model, {}, two, CADENCE)


# ---- attention over time


def test_block_scores_are_those_of_the_whole_matrix(model, trace):
    config = model.config
    _, attention = oracles.full(config, model.params, trace.token_bt[0, :LENGTH])
    want = [oracles.block_scores(p, config.kv_heads, INTERVAL) for p in attention]
    for padded in (False, True):
        token = trace.token_bt if padded else trace.token_bt[:, :LENGTH]
        got = diagnosis.block_scores(model, Batch.of(token, trace.length_b), INTERVAL)
        assert got.shape == (2, 2, token.shape[1], CHUNKS)
        np.testing.assert_allclose(got[:, :, :LENGTH], want, atol=2e-6)
        assert not got[:, :, LENGTH:].any()


def synthetic():
    """Scores [1, 2, t, blocks] of silent tokens, and of one of each kind, in other heads."""
    score = np.zeros((1, 2, 48, 12))
    steady, local, recalled = score[0, 0, 2], score[0, 1, 5], score[0, 1, 9]  # blocks 0, 1, 2
    steady[:] = 0.3
    local[1:3] = 0.9, 0.5
    recalled[2], recalled[8] = 0.2, 0.7
    score[0, 0, 40, 10:] = 0.9  # too late to say anything of it
    score[0, 1, 1, 4] = 0.6  # silent for three blocks after its own, which is not long
    return score, {"steady": steady, "local": local, "recalled": recalled}


def test_patterns_are_recognised():
    score, kinds = synthetic()
    found = diagnosis.patterns(score)
    assert list(found) == ["steady", "local", "recalled"]
    for (name, row), own in zip(kinds.items(), (0, 1, 2), strict=True):
        np.testing.assert_array_equal(found[name][0, own:], row[own:], err_msg=name)
        assert np.isnan(found[name][0, :own]).all()  # it was not there yet
    assert len(found["local"]) == len(found["recalled"]) == 1


def test_the_clearest_come_first_and_at_most_six():
    score = np.zeros((2, 1, 48, 12))
    for i in range(8):
        score[i % 2, 0, i, i // 4] = 0.1 * (i + 1)
    found = diagnosis.patterns(score)
    own = np.nanmax(found["local"], axis=1)
    np.testing.assert_allclose(own, [0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert found["recalled"].shape == (0, 12)


def test_recalled_is_what_was_silent_for_four_blocks():
    score = np.zeros((1, 1, 48, 12))
    for token, block in ((0, 5), (1, 4)):  # silent in blocks 1 to 4, and 1 to 3
        score[0, 0, token, [0, block]] = 0.1, 0.5
    found = diagnosis.patterns(score)["recalled"]
    np.testing.assert_array_equal(found, score[0, 0, :1])


# ---- tables and pictures


def losses(policy, budget, n=5, t=40):
    rng = np.random.default_rng([budget, len(policy)])
    counts = rng.integers(5, 20, (n, 3))
    full = counts * rng.gamma(9, 0.1, (n, 3))
    heads = [None, None] if policy == "full" else [rng.random((n, 2, 3)) for _ in range(2)]
    excess = rng.normal(size=(n, t))
    excess[:, :10] = np.nan
    return loss_ratio.Losses(policy, budget, 8, full * 1.1, full, counts, *heads, excess)


@pytest.fixture
def several():
    return [losses(name, b) for b in (16, 32) for name in ("full", "golden", "h2o", "foresight")]


def test_csv_has_a_line_for_every_head(several):
    several[1] = dataclasses.replace(several[1], protect_prompt=4)
    lines = list(csv.DictReader(io.StringIO(diagnosis.csv(several))))
    assert len(lines) == 2 * 3 * 2 * 3
    kept = {line["protect_prompt"] for line in lines if line["policy"] == "golden"}
    assert kept == {"0", "4"} and {line["protect_prompt"] for line in lines[6:]} == {"0"}
    by_name = {(r.policy, r.budget): r for r in several}
    for line in lines:
        r, at = by_name[line["policy"], int(line["budget"])], (line["layer"], line["kv_head"])
        layer, head = map(int, at)
        assert float(line["recall"]) == pytest.approx(r.recall_nyk[:, layer, head].mean(), rel=1e-5)
        assert float(line["regret"]) == pytest.approx(r.regret_nyk[:, layer, head].mean(), rel=1e-5)
    assert len({tuple(line.values())[:4] for line in lines}) == len(lines)


def check_png(path):
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = image.imread(path)
    assert min(picture.shape[:2]) > 100 and len(np.unique(picture)) > 10


@pytest.fixture
def drawn(monkeypatch):
    """What reaches matplotlib: (kind, panel title so far, args, kwargs)."""
    calls = []
    for kind in ("plot", "imshow", "errorbar", "axhspan"):
        real = getattr(Axes, kind)

        def spy(axis, *args, real=real, kind=kind, **kwargs):
            calls.append((kind, args, kwargs))
            return real(axis, *args, **kwargs)

        monkeypatch.setattr(Axes, kind, spy)
    return calls


def test_accuracy_is_drawn(tmp_path, drawn):
    rng = np.random.default_rng(0)
    results = [
        Accuracy(name, budget, rng.random((30, 2)) < p, 10.0, 0.0, 0.0)
        for name, budget, p in (("h2o", 32, 0.4), ("full", 0, 0.9), ("h2o", 16, 0.2),
                                ("foresight", 16, 0.8))
    ]  # fmt: skip
    plots.accuracy(results, tmp_path / "a.png")
    check_png(tmp_path / "a.png")
    (band,) = [args for kind, args, _ in drawn if kind == "axhspan"]
    assert list(band) == [100 * x for x in results[1].interval()]
    lines = {kw["label"]: (args, kw["yerr"]) for kind, args, kw in drawn if kind == "errorbar"}
    (x, y), error = lines["h2o"]
    assert (x, y) == ([16, 32], [100 * r.pass_at_1 for r in (results[2], results[0])])
    for i, r in enumerate((results[2], results[0])):
        low, high = r.interval()
        assert [y[i] - error[0][i], y[i] + error[1][i]] == pytest.approx([100 * low, 100 * high])
    assert lines["foresight"][0] == ([16], [100 * results[3].pass_at_1])


def test_accuracy_of_the_full_cache_alone_is_drawn(tmp_path):
    plots.accuracy([Accuracy("full", 0, np.ones((3, 1), bool), 1.0, 0.0, 0.0)], tmp_path / "a.png")
    check_png(tmp_path / "a.png")


def test_loss_by_position_is_drawn(several, tmp_path, drawn):
    plots.loss_by_position(several, tmp_path / "a.png", bins=3)
    check_png(tmp_path / "a.png")
    lines = [args for kind, args, kw in drawn if kind == "plot" and kw.get("label")]
    shown = [r for r in several if r.policy != "full"]
    assert len(lines) == len(shown)
    for (x, y), r in zip(lines, shown, strict=True):
        # Entry i is the loss of the token at position i + 1: 11 ... 40 in three bins of ten.
        np.testing.assert_allclose(x, [16, 26, 36])
        means = [r.excess_nt[:, i : i + 10].mean() for i in (10, 20, 30)]
        np.testing.assert_allclose(y, means)


def test_regret_is_drawn(several, tmp_path, drawn):
    plots.regret(several, tmp_path / "a.png")
    check_png(tmp_path / "a.png")
    images = [args[0] for kind, args, _ in drawn if kind == "imshow"]
    shown = [r for r in several if r.policy in ("h2o", "foresight")]
    for array, r in zip(images, shown, strict=True):
        np.testing.assert_array_equal(array, r.regret_nyk.mean(0))


def test_retention_is_drawn(held, tmp_path, drawn):
    plots.retention(held, tmp_path / "a.png", "a title")
    check_png(tmp_path / "a.png")
    images = [args[0] for kind, args, _ in drawn if kind == "imshow"]
    assert len(images) == 4 * 2  # policies and layers
    extents = {kw["extent"] for kind, _, kw in drawn if kind == "imshow"}
    assert extents == {(0, PADDED, CHUNKS * INTERVAL, 0)}  # tokens on both axes
    np.testing.assert_array_equal(images[4], held["h2o"][0].mean(0))


def test_of_many_layers_some_are_drawn_and_numbered(held, several, tmp_path, drawn, monkeypatch):
    numbered, real = [], Axes.set

    def spy(axis, **kwargs):
        numbered.append(len(kwargs["yticks"]))
        return real(axis, **kwargs)

    monkeypatch.setattr(Axes, "set", spy)
    deep = {"h2o": np.repeat(held["h2o"], 10, axis=0)}  # of two layers
    plots.retention(deep, tmp_path / "a.png", "a title")
    images = [args[0] for kind, args, _ in drawn if kind == "imshow"]
    assert len(images) == 4
    np.testing.assert_array_equal(images[1], held["h2o"][0].mean(0))  # 0, 6 and 13, 19
    np.testing.assert_array_equal(images[2], held["h2o"][1].mean(0))
    one = dataclasses.replace(several[2], regret_nyk=np.tile(several[2].regret_nyk, (1, 15, 1)))
    plots.regret([several[2], one], tmp_path / "b.png")
    assert numbered == [2, 8]  # of 2 and 30 layers


def test_lookups_are_far_and_strong():
    score = np.zeros((60, 60))  # keys, queries
    score[3, 40], score[20, 37], score[21, 37], score[5, 50] = 0.6, 0.3, 0.9, 0.29
    # 37 - 21 is not more than two intervals of eight.
    assert diagnosis.lookups(score, 8).tolist() == [[37, 20], [40, 3]]
    assert diagnosis.lookups(score, 8, share=0.2).tolist() == [[37, 20], [40, 3], [50, 5]]


def test_lookups_are_drawn(held, tmp_path, drawn):
    one = {name: maps[0, 0] for name, maps in held.items()}
    lookup = np.array([[40, 1], [40, 9], [60, 2]])
    plots.lookups(one, lookup, tmp_path / "a.png", "a title", prompt=20)
    check_png(tmp_path / "a.png")
    lines = [(kw["label"], args) for kind, args, kw in drawn if kind == "plot"]
    for i, name in enumerate(one):
        there = [one[name][query // INTERVAL, key] for query, key in lookup]
        for (label, (x, y, _)), want in zip(lines[2 * i : 2 * i + 2], (True, False), strict=True):
            assert label == ("look-up found" if want else "look-up lost")
            shown = [row for row, found in zip(lookup, there, strict=True) if found == want]
            assert np.stack([y, x], axis=-1).tolist() == [row.tolist() for row in shown]


def test_memory_is_drawn(tmp_path, drawn):
    plots.cache_memory(2**20, 48, 512, tmp_path / "a.png", "a title")
    check_png(tmp_path / "a.png")
    (x, full), (_, bounded) = (args for kind, args, _ in drawn if kind == "plot")
    np.testing.assert_allclose(full, x)  # one MiB a token
    assert set(bounded) == {48}


def test_a_policy_has_one_colour_in_all_pictures():
    few = drawing.styles_of(["snapkv", "grpo"])
    many = drawing.styles_of(
        ["golden", "rkv", "rkv:mix=0.05", "mine", "supervised", "grpo", "snapkv"]
    )
    assert all(few[name]["color"] == many[name]["color"] for name in few)
    assert len({(s["color"], s["linestyle"]) for s in many.values()}) == len(many)
    assert many["rkv"]["color"] == many["rkv:mix=0.05"]["color"]
    (nested,) = drawing.styles_of(["ada(rkv:mix=0.05):room=2"]).values()
    assert nested["color"] == drawing.COLOURS["ada"]
    assert set(policies.names()) <= {*drawing.COLOURS, *drawing.LEARNED, "forced"}


def test_training_is_drawn_with_its_running_mean(tmp_path, drawn):
    rng = np.random.default_rng(0)
    records = [{"step": i, "loss": float(x)} for i, x in enumerate(rng.random(60), 1)]
    records.insert(7, {"step": 7, "answers": 1.0})  # of another kind
    plots.training(records, ("loss", "answers", "none"), tmp_path / "a.png")
    check_png(tmp_path / "a.png")
    (step, loss), (_, mean), *_ = (args for kind, args, _ in drawn if kind == "plot")
    assert step.tolist() == list(range(1, 61))
    assert loss.tolist() == [r["loss"] for r in records if "loss" in r]
    plain = [loss[max(0, i - 2) : i + 1].mean() for i in range(60)]  # a twentieth of the steps
    np.testing.assert_allclose(mean, plain)


def test_a_picture_has_a_pdf_beside_it_and_the_same_one_is_the_same_file(tmp_path):
    figure = plots.cache_memory(2**20, 48, 512, tmp_path / "a.png", "a title")
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(files) == {"a.png", "a.pdf"} and files["a.pdf"].startswith(b"%PDF")
    time.sleep(1.1)  # PDF files hold the second of their making
    plots.cache_memory(2**20, 48, 512, tmp_path / "a.png", "a title")
    assert files == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert isinstance(figure, Figure) and figure._repr_png_().startswith(b"\x89PNG")


def test_names_of_lines_are_apart_in_the_order_of_their_ends():
    rng = np.random.default_rng(0)
    for wanted in (np.zeros(8), np.ones(3), rng.random(12), np.array([0.5, 0.52, 0.9])):
        found = drawing.apart(wanted, 0.05)
        order = np.argsort(wanted, kind="stable")
        assert np.diff(found[order]).min() >= 0.05 - 1e-9
        assert found.min() >= 0 and found.max() <= 1 + 1e-9
    assert found[2] == 0.9 and found[:2].mean() == pytest.approx(0.51)  # no further than needed


def test_plain_random_leaves_the_others_room():
    small = [losses(name, b) for b in (16, 32) for name in ("golden", "h2o", "foresight")]
    far = [
        dataclasses.replace(losses("random", b), evicted=losses("random", b).full * 50)
        for b in (16, 32)
    ]
    axis = plots.loss_ratios([*small, *far]).axes[0]
    top = axis.get_ylim()[1]
    assert max(r.ratio()[0] for r in small) < top < min(r.ratio()[0] for r in far)
    shown = {text.get_text() for text in axis.texts}
    assert {"golden", "h2o", "foresight"} < shown and len(shown) == 4
    assert any(text.startswith("random: ") and text.endswith(", above") for text in shown)


def test_attention_patterns_are_drawn(tmp_path, drawn):
    found = diagnosis.patterns(synthetic()[0])
    plots.attention_patterns({**found, "local": found["local"][:0]}, 4, tmp_path / "a.png")
    check_png(tmp_path / "a.png")
    lines = [args for kind, args, _ in drawn if kind == "plot"]
    assert len(lines) == len(found["steady"]) + len(found["recalled"])
    np.testing.assert_array_equal(lines[0][0], 4 * np.arange(12))


def test_names_stand_at_the_ends_of_their_lines():
    # Limits are made anew when a figure is drawn, after the names have been placed.
    with drawing.figure(None, (4, 3)) as axes:
        axis = axes[0, 0]
        for top in (1, 50, 100):
            axis.plot([0, 1], [0, top], label=str(top))
        drawing.name_lines(axis)
    drawing.figure_of(axes).draw_without_rendering()
    low, high = axis.get_ylim()
    for name in axis.texts:
        assert name.xyann[1] == pytest.approx((float(name.get_text()) - low) / (high - low))
