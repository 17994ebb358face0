"""Loss ratios and golden overlap against one trace at a time, in numpy."""

import csv
import dataclasses
import io
import zlib

import jax
import numpy as np
import pytest
from matplotlib import image
from matplotlib.axes import Axes

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import loss_ratio, loss_table, plots, tables
from fkv.learning.tokens import token_losses
from tests import oracles
from tests.policies.test_policies import h2o, snapkv

BUDGET, INTERVAL = 16, 8
CADENCE = Cadence(BUDGET, INTERVAL)
LENGTHS = [45, 25, 61, 32, 40]  # T = B + L + 1 and T = B + 2L are among them
# Without pooling no two entries tie; the window is shorter than the interval, so that some of the
# newest entries are candidates too.
RULES = {
    "snapkv": lambda state: snapkv(state, INTERVAL, window=3, kernel=1),
    "h2o": lambda state: h2o(state, INTERVAL),
}
POLICIES = {
    "snapkv": policies.get("snapkv", window=3, kernel=1),
    "h2o": policies.get("h2o"),
    "random": policies.get("random"),
}


@pytest.fixture(scope="module")
def model():
    return oracles.make_lm(heads=4, kv_heads=2)


def traces_of(model, lengths=LENGTHS, at_once=5, width=None, prompts=None):
    token, length = map(np.asarray, oracles.make_tokens(model.config, lengths))
    batch = Batch.of(token, length, prompts)
    width = np.full(len(length), token.shape[1]) if width is None else width
    keys = replay.row_keys(jax.random.key(1), len(length))
    return loss_ratio.Traces(batch, keys, width, at_once=at_once)


def in_turns(measure):
    """What two processes find, of which each does every second batch."""
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_ratio.jax, "process_count", lambda: 2)
        patch.setattr(loss_ratio.parallel, "total", lambda tree: parts.append(tree) or tree)
        for index in (0, 1):
            patch.setattr(loss_ratio.jax, "process_index", lambda index=index: index)
            measure()
        patch.setattr(loss_ratio.parallel, "total", lambda _: jax.tree.map(np.add, *parts))
        patch.setattr(loss_ratio.jax, "process_index", lambda: 9)  # whose turn never comes
        return measure()


@pytest.fixture(scope="module")
def measured(model):
    """Results by batch size: one that does not divide the traces, one larger than them.

    The first are those of two processes, and the short traces run at a width of their own there.
    """

    def measure(at_once, width=None):
        traces = traces_of(model, at_once=at_once, width=width)
        return loss_ratio.measure(model, POLICIES, traces, CADENCE)

    width = np.where(np.array(LENGTHS) > 32, max(LENGTHS), 32)
    return {2: in_turns(lambda: measure(2, width)), 7: measure(7)}


def lowest(positions, score):
    return [positions[i] for i in np.argsort(score, kind="stable")[:INTERVAL]]


def losses(config, params, token, hidden):
    """Loss of every next token, and the entropy of its prediction."""
    log_p = oracles.log_probabilities(config, params, hidden)[:-1]
    nll = -np.array([row[target] for row, target in zip(log_p, token[1:], strict=True)])
    return nll, -(np.exp(log_p) * log_p).sum(1)


def split(nll, entropy, prompt=0):
    """Sums over all counted tokens, the 4 in 5 of lowest entropy, and the others; and counts."""
    # Entry i predicts token i + 1: the first counted token comes after B + L others.
    counted = list(range(max(BUDGET + INTERVAL, prompt) - 1, len(nll)))
    by_entropy = sorted(counted, key=lambda i: entropy[i])
    high = len(counted) // 5
    kinds = [counted, by_entropy[: len(counted) - high], by_entropy[len(counted) - high :]]
    return [nll[kind].sum() for kind in kinds], [len(kind) for kind in kinds]


@pytest.fixture(scope="module")
def plain(model):
    """For each trace: entropy, losses by policy, and recall and regret by rule, [layers, heads]."""
    config, params = model.config, model.params
    token, _ = oracles.make_tokens(config, LENGTHS)
    found = []
    for row, n in zip(np.asarray(token), LENGTHS, strict=True):
        row = row[:n]
        hidden, attention = oracles.full(config, params, row)
        nll, entropy = losses(config, params, row, hidden)
        score = [oracles.block_scores(p, config.kv_heads, INTERVAL) for p in attention]
        events = oracles.golden_of_model(config, params, row, BUDGET, INTERVAL)
        # By rule, layer and head: share of the golden choice, and what is lost beyond it.
        shares, lost = ({name: {} for name in RULES} for _ in range(2))

        def golden(layer, head, state, events=events, score=score, shares=shares, lost=lost):
            if state.event == len(events[layer][head]):
                return state.positions[:INTERVAL]  # no token follows
            drop = events[layer][head][state.event][2]
            later = 1 + BUDGET // INTERVAL + state.event

            def future(positions, table=score[layer][head], later=later):
                return sum(table[position, later:].max() for position in positions)

            for name, rule in RULES.items():
                chosen = lowest(*rule(state))
                share = len(set(chosen) & set(drop)) / INTERVAL
                shares[name].setdefault((layer, head), []).append(share)
                lost[name].setdefault((layer, head), []).append(future(chosen) - future(drop))
            return drop

        rules = {
            name: lambda layer, head, state, rule=rule: lowest(*rule(state))
            for name, rule in RULES.items()
        }
        by_policy = {"full": nll}
        for name, evict in {"golden": golden, **rules}.items():
            hidden = oracles.replay(config, params, row, BUDGET, INTERVAL, evict)
            by_policy[name] = losses(config, params, row, hidden)[0]
        per_head = [
            {
                name: [[np.mean(x[layer, head]) for head in range(2)] for layer in range(2)]
                for name, x in by_rule.items()
            }
            for by_rule in (shares, lost)
        ]
        found.append((entropy, by_policy, *per_head))
    return found


@pytest.fixture(scope="module")
def expected(plain):
    """By policy: sums [n, 3], and golden overlap [n]; and how many tokens were summed [n, 3]."""
    sums = {
        name: np.array([split(nll[name], entropy)[0] for entropy, nll, _, _ in plain])
        for name in ("full", "golden", *RULES)
    }
    overlap = {
        name: np.array([np.mean(recall[name]) for _, _, recall, _ in plain]) for name in RULES
    }
    return sums, overlap, np.array([split(nll["full"], entropy)[1] for entropy, nll, _, _ in plain])


@pytest.mark.parametrize("batch", [2, 7])
def test_measure_is_the_plain_computation(measured, expected, batch):
    results = measured[batch]
    assert [r.policy for r in results] == ["full", "golden", *POLICIES]
    sums, overlap, tokens = expected
    for r in results:
        assert (r.budget, r.interval, r.rule) == (BUDGET, INTERVAL, r.policy in POLICIES)
        np.testing.assert_array_equal(r.tokens, tokens, err_msg=r.policy)
        np.testing.assert_allclose(r.full, sums["full"], rtol=1e-5, atol=1e-4)
        if r.policy in sums:
            np.testing.assert_allclose(
                r.evicted, sums[r.policy], rtol=1e-5, atol=1e-4, err_msg=r.policy
            )
        if r.policy in overlap:
            np.testing.assert_allclose(r.overlap, overlap[r.policy], atol=1e-6, err_msg=r.policy)
    assert results[0].overlap is None
    np.testing.assert_allclose(results[1].overlap, 1, atol=1e-6)
    # Evictions matter here, or the comparison would say nothing.
    longest = LENGTHS.index(max(LENGTHS))
    assert all(abs(r.evicted[longest, 0] - r.full[longest, 0]) > 0.1 for r in results[1:])
    assert all(0.05 < overlap[name].mean() < 0.95 for name in RULES)


@pytest.mark.parametrize("batch", [2, 7])
def test_recall_and_regret_of_every_head(measured, plain, batch):
    for r in measured[batch]:
        if r.policy in RULES:
            recall, regret = ([row[i][r.policy] for row in plain] for i in (2, 3))
            np.testing.assert_allclose(r.recall_nyk, recall, atol=1e-6, err_msg=r.policy)
            np.testing.assert_allclose(r.regret_nyk, regret, atol=1e-5, err_msg=r.policy)
            assert np.std(r.regret_nyk) > 0.01  # heads and traces differ, or order would not show
    full, golden, *_, random = measured[batch]
    assert full.recall_nyk is None and full.regret_nyk is None
    assert not golden.regret_nyk.any()
    # It chooses among the candidates, of which golden eviction takes the best.
    assert random.policy == "random" and (random.regret_nyk > -1e-6).all()
    assert random.regret_nyk.mean() > 0.01


def test_tokens_of_the_prompt_do_not_count(model, plain):
    # Shorter than B + L, as long, longer, and all but one token.
    prompts = [30, 3, 50, 24, 39]
    traces = traces_of(model, prompts=np.array(prompts))
    results = loss_ratio.measure(model, {}, traces, CADENCE)
    for r in results:
        rows = [
            split(nll[r.policy], entropy, prompt)
            for (entropy, nll, _, _), prompt in zip(plain, prompts, strict=True)
        ]
        np.testing.assert_array_equal(r.tokens, [count for _, count in rows])
        np.testing.assert_allclose(r.evicted, [total for total, _ in rows], rtol=1e-5, atol=1e-4)
        counted = ~np.isnan(r.excess_nt)
        first = [max(BUDGET + INTERVAL, prompt) - 1 for prompt in prompts]
        np.testing.assert_array_equal(counted.argmax(1), first)
    assert results[0].tokens[:, 0].tolist() == [15, 1, 11, 8, 1]


def test_excess_is_the_loss_added_token_by_token(measured, plain):
    for r in measured[2]:
        assert r.excess_nt.shape == (len(LENGTHS), max(LENGTHS) - 1)
        np.testing.assert_array_equal((~np.isnan(r.excess_nt)).sum(1), r.tokens[:, 0])
        np.testing.assert_allclose(
            np.nansum(r.excess_nt, axis=1), (r.evicted - r.full)[:, 0], rtol=1e-4, atol=1e-4
        )
        if r.policy in RULES:
            for row, (_, nll, _, _) in zip(r.excess_nt, plain, strict=True):
                counted = ~np.isnan(row)
                at = np.flatnonzero(counted)
                want = (nll[r.policy] - nll["full"])[at]
                np.testing.assert_allclose(row[at], want, atol=1e-4)


def test_budgets_shared_unevenly_have_losses_and_no_recall(model):
    uneven = {name: policies.get(name, window=3) for name in ("pyramid", "ada")}
    traces = traces_of(model, LENGTHS[:3], at_once=3)
    batch, results = traces.batch, loss_ratio.measure(model, uneven, traces, CADENCE)
    assert [r.policy for r in results] == ["full", "golden", *uneven]
    np.testing.assert_allclose(results[1].recall_nyk, 1)  # with no one beside it, too

    @jax.jit
    def nll(policy):
        hidden, _, _ = replay.replay(model, batch, policy, CADENCE)
        return token_losses(model, hidden, batch.token_bt).nll_bt

    for r in results[2:]:
        assert r.recall_nyk is None and r.regret_nyk is None and r.overlap is None
        for row, n, evicted in zip(nll(uneven[r.policy]), batch.length_b, r.evicted, strict=True):
            want = row[BUDGET + INTERVAL - 1 : n - 1].sum()
            assert evicted[0] == pytest.approx(float(want), rel=1e-5)
        assert (abs(r.evicted - r.full)[[0, 2], 0] > 0.1).all()
    assert "pyramid" in [loss_table.cells(r)[0] for r in results]


def test_rows_do_not_depend_on_the_batch(measured):
    # Those that draw, too, and those in a last batch that wraps round.
    for one, two in zip(measured[2], measured[7], strict=True):
        assert len(one.full) == len(two.full) == len(LENGTHS)
        np.testing.assert_allclose(one.evicted, two.evicted, rtol=1e-5, atol=1e-4)


def test_overlap_of_a_policy_that_draws_does_not_depend_on_the_batch(measured):
    one, two = (measured[batch][-1] for batch in (2, 7))
    assert one.policy == "random"
    np.testing.assert_allclose(one.overlap, two.overlap, atol=1e-6)


@pytest.mark.parametrize(("cache_dtype", "passes"), [("", 0), ("int8", 1)])
def test_policies_share_one_beginning(model, monkeypatch, cache_dtype, passes):
    """That of the full pass, unless caches are quantised; uneven budgets have their own."""
    lm = model.replace(config=dataclasses.replace(model.config, cache_dtype=cache_dtype))
    begin, begun = replay.begin_layer, []
    monkeypatch.setattr(
        replay, "begin_layer", lambda policy, *args: begun.append(policy) or begin(policy, *args)
    )
    uneven = {"ada": policies.get("ada"), "pyramid": policies.get("pyramid")}
    loss_ratio.measure(lm, POLICIES | uneven, traces_of(lm, [45, 40]), CADENCE)
    names = [type(policy).__name__ for policy in begun]
    assert names == ["OneOf"] * passes + ["Ada", "Pyramid"]


def test_refuses_traces_without_an_eviction(model):
    with pytest.raises(UserError, match="longest trace has 24 tokens"):
        loss_ratio.measure(model, POLICIES, traces_of(model, [24, 20]), CADENCE)


# ---- standard errors, tables, pictures


def random_losses(policy, budget, n=300):
    """Results with traces of very different lengths, and evicted losses that follow the full."""
    rng = np.random.default_rng([budget, zlib.crc32(policy.encode())])
    counts = rng.integers(20, 200, size=(n, 3))
    full = counts * rng.gamma(9, 0.1, size=(n, 3))
    evicted = full * rng.gamma(20, 0.07, size=(n, 3))
    overlap = None if policy == "full" else rng.random((n, 2, 2))
    return loss_ratio.Losses(policy, budget, 8, evicted, full, counts, overlap)


def jackknife(statistic, *arrays):
    """Standard error of a statistic of n rows."""
    n = len(arrays[0])
    left_out = [statistic(*(np.delete(x, i, axis=0) for x in arrays)) for i in range(n)]
    return np.sqrt((n - 1) * np.var(left_out))


@pytest.mark.parametrize("kind", range(3))
def test_standard_errors_are_those_of_the_jackknife(kind):
    r = random_losses("h2o", 16)
    evicted, full, tokens = (x[:, kind] for x in (r.evicted, r.full, r.tokens))

    def ratio(evicted, full):
        return evicted.sum() / full.sum()

    def added(evicted, full, tokens):
        return (evicted - full).sum() / tokens.sum()

    value, error = r.ratio(kind)
    assert value == pytest.approx(ratio(evicted, full))
    assert error == pytest.approx(jackknife(ratio, evicted, full), rel=0.05)
    value, error = r.added(kind)
    assert value == pytest.approx(added(evicted, full, tokens))
    assert error == pytest.approx(jackknife(added, evicted, full, tokens), rel=0.05)
    value, error = r.mean_overlap()
    assert value == pytest.approx(r.overlap.mean())
    assert error == pytest.approx(jackknife(np.mean, r.overlap))


def test_standard_error_is_the_spread_over_samples():
    # The truth behind the estimate: draw many sets of traces, look how far the ratios scatter.
    r, rng = random_losses("h2o", 16), np.random.default_rng(0)
    index = rng.integers(len(r.full), size=(2000, len(r.full)))
    ratios = r.evicted[index, 0].sum(1) / r.full[index, 0].sum(1)
    assert r.ratio()[1] == pytest.approx(ratios.std(), rel=0.1)


def test_standard_errors_of_two_traces_by_hand():
    # Residuals are 1/2 and -1/2 in both: their spread, of one degree of freedom, is 1 / sqrt(2).
    column = lambda *x: np.repeat(np.array(x)[:, None], 3, axis=1)  # noqa: E731
    recall = np.array([0.2, 0.6]).reshape(2, 1, 1)
    r = loss_ratio.Losses("h2o", 16, 8, column(2.0, 4.0), column(1.0, 3.0), column(2, 6), recall)
    for kind in range(3):
        assert r.ratio(kind) == pytest.approx((1.5, 0.5 / 2))  # of a mean loss of 2
        assert r.added(kind) == pytest.approx((0.25, 0.5 / 4))  # of 4 tokens on average
    assert r.mean_overlap() == pytest.approx((0.4, 0.2))


def test_the_full_cache_has_ratio_one_and_no_overlap():
    r = random_losses("full", 16)
    r = loss_ratio.Losses("full", 16, 8, r.full, r.full, r.tokens, None)
    assert r.ratio() == (1, 0) and r.added() == (0, 0)
    assert np.isnan(r.mean_overlap()).all()


@pytest.fixture
def several():
    return [random_losses(name, b) for b in (16, 32) for name in ("full", "golden", "foresight")]


def test_table_has_a_line_for_every_policy_and_budget(several):
    rows = [loss_table.cells(r) for r in several]
    head, rule, *lines = tables.text(loss_table.HEAD, rows).splitlines()
    assert head.startswith("policy") and set(rule) == {"-"}
    assert len(lines) == len(several)
    for line, r in zip(lines, several, strict=True):
        assert line.split()[:2] == [r.policy, str(r.budget)]
        found = line.replace("±", " ").split()[2:]
        assert found[:2] == [f"{x:.3f}" for x in r.ratio()]
        assert found[2:4] == [f"{x:.4f}" for x in r.added(1)]  # no baseline between them
        overlap = [] if r.overlap is None else [f"{x:.3f}" for x in r.mean_overlap()]
        assert found[4:] == overlap


def test_csv_has_a_line_for_every_policy_and_budget(several):
    lines = list(csv.DictReader(io.StringIO(loss_table.csv(several))))
    assert len(lines) == len(several)
    for line, r in zip(lines, several, strict=True):
        assert (line["policy"], line["budget"], line["interval"]) == (r.policy, str(r.budget), "8")
        assert line["traces"] == "300"
        for name, want in (
            ("ratio", r.ratio(0)),
            ("ratio_low", r.ratio(1)),
            ("ratio_high", r.ratio(2)),
            ("added_low", r.added(1)),
            ("overlap", r.mean_overlap()),
        ):
            got = [float(line[name]), float(line[f"{name}_se"])]
            assert got == pytest.approx(want, rel=1e-5, nan_ok=True), name


def test_loss_ratios_are_drawn(several, tmp_path, monkeypatch):
    drawn, errorbar = [], Axes.errorbar

    def spy(axis, x, y, yerr, label, **style):
        drawn.append((axis.get_subplotspec().num1, label, x, y, yerr))
        return errorbar(axis, x, y, yerr=yerr, label=label, **style)

    monkeypatch.setattr(Axes, "errorbar", spy)
    path = tmp_path / "ratios.png"
    figure = plots.loss_ratios(several[::-1], path, "a title")  # budgets come in any order
    assert [axis.get_visible() for axis in figure.axes] == [True] * 3 + [False]  # two by two
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = image.imread(path)
    assert min(picture.shape[:2]) > 300 and len(np.unique(picture)) > 10

    # A line for every policy but the full cache in each panel; added nats in the second one.
    assert len(drawn) == 6
    by_name = {(r.policy, r.budget): r for r in several}
    for panel, name, x, y, yerr in drawn:
        assert name in ("golden", "foresight") and x == [16, 32]
        results = [by_name[name, budget] for budget in x]
        points = [r.added(1) if panel == 1 else r.ratio(panel) for r in results]
        assert list(zip(y, yerr, strict=True)) == [(value, error) for value, error in points]
