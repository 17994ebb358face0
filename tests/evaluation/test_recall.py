"""Agreement and look-ups by replay, against greedy decoding and one row at a time."""

import csv
import io

import jax
import numpy as np
import pytest

from fkv import policies
from fkv.cache.cadence import FULL, Cadence
from fkv.data.lookups import Lookup
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.engine.requests import Plan
from fkv.engine.sampling import Sampling
from fkv.evaluation import accuracy, recall, recall_table
from fkv.learning import golden
from tests import decoding, oracles

CADENCE = Cadence(16, 8)
PROMPT, NEW = 40, 24
NAMED = {name: policies.get(name) for name in ("h2o", "random", "ada")}
replayed = jax.jit(replay.replay, static_argnums=3)
golden_policy = jax.jit(golden.policy, static_argnums=2)


@pytest.fixture(scope="module")
def lm():
    return oracles.make_lm(heads=4, kv_heads=2)


def greedy(lm, policy, prompts, count, key_b, cadence=CADENCE):
    plan = Plan(cadence, Sampling(temperature=0.0))
    return decoding.generate(lm, policy, plan, prompts, key_b, [count] * len(prompts))


@pytest.fixture(scope="module")
def continued(lm):
    """Prompts, their full-cache continuations of 24 tokens (one of 10), as rows, and keys."""
    rng = np.random.default_rng(2)
    prompts = list(rng.integers(lm.config.vocab_size, size=(4, PROMPT), dtype=np.int32))
    key_b = replay.row_keys(jax.random.key(1), 4)
    full = greedy(lm, policies.get("full"), prompts, NEW, key_b, Cadence.of(FULL, 8))
    full[2] = full[2][:10]
    token = np.zeros((4, PROMPT + NEW), np.int32)
    for row, prompt, after in zip(token, prompts, full, strict=True):
        row[: PROMPT + len(after)] = [*prompt, *after]
    length = np.array([PROMPT + len(after) for after in full], np.int32)
    rows = Batch.of(token, length, np.full(4, PROMPT, np.int32))
    return prompts, full, rows, key_b


@pytest.fixture(scope="module")
def agreed(lm, continued):
    _, _, rows, key_b = continued
    given = recall.Given(rows, key_b, recall.full_hidden(lm, rows, NEW))
    found = recall.agree(lm, NAMED, given, CADENCE, ["golden", *NAMED])
    return {name: both for name, *both in found}


@pytest.mark.parametrize("name", NAMED)
def test_the_first_difference_is_that_of_greedy_decoding(lm, continued, agreed, name):
    prompts, full, _, key_b = continued
    ours = greedy(lm, NAMED[name], prompts, NEW, key_b)
    early = 0
    for mine, theirs, hit in zip(ours, full, agreed[name][0], strict=True):
        same = mine[: len(theirs)] == theirs
        hit = hit[: len(theirs)]
        first = len(theirs) if same.all() else same.argmin()
        assert first == (len(theirs) if hit.all() else hit.argmin())
        early += first < len(theirs)
    assert early >= 2  # or there is nothing to find


def log_probs(lm, hidden):
    return oracles.log_probabilities(lm.config, jax.device_get(lm.params), np.asarray(hidden))


@pytest.mark.parametrize("name", ["golden", *NAMED])
def test_agreement_is_that_of_whole_distributions(lm, continued, agreed, name):
    _, full, rows, key_b = continued
    policy = golden_policy(lm, rows, CADENCE)[0] if name == "golden" else NAMED[name]
    hidden = replayed(lm, rows, policy, CADENCE, key_b)[0]
    whole = replayed(lm, rows, policies.get("full"), CADENCE)[0]
    hit, kl = agreed[name]
    for i, after in enumerate(full):
        part = slice(PROMPT - 1, PROMPT - 1 + len(after))
        ours, theirs = (log_probs(lm, x[i, part]) for x in (hidden, whole))
        np.testing.assert_array_equal(hit[i, : len(after)], ours.argmax(-1) == after)
        want = (np.exp(theirs) * (theirs - ours)).sum(-1)
        np.testing.assert_allclose(kl[i, : len(after)], want, atol=2e-4)
    assert kl.max() > 0.01


def test_only_what_is_wanted_runs_and_a_policy_does_not_depend_on_the_others(lm, continued, agreed):
    _, _, rows, key_b = continued
    given = recall.Given(rows, key_b, recall.full_hidden(lm, rows, NEW))
    found = list(recall.agree(lm, NAMED, given, CADENCE, ["random"]))
    assert [name for name, *_ in found] == ["random"]
    for ours, theirs in zip(found[0][1:], agreed["random"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


# ---- look-ups

CONTEXT, ROOM, REPEATS = 48, 8, 3


def lookup(rng, question, answer):
    ids = rng.integers(37, size=question + answer, dtype=np.int32)
    return Lookup("name", ids[:question], ids[question:], "")


@pytest.fixture(scope="module")
def asked_of(lm):
    """Look-ups of every length about three contexts, and answers that the full cache gives."""
    rng = np.random.default_rng(5)
    contexts = list(rng.integers(37, size=(3, CONTEXT), dtype=np.int32))
    lookups = [
        [lookup(rng, 8 - n, n) for n in (1, 2, 5)], [lookup(rng, 2, 6)], [lookup(rng, 1, 1)] * 2,
    ]  # fmt: skip
    # Some have the full cache's own answers.
    for i, j in ((0, 0), (0, 1), (2, 0), (1, 0)):
        one = lookups[i][j]
        prompt = np.concatenate([contexts[i], one.question])
        key = replay.row_keys(jax.random.key(0), 1)
        count = len(one.answer)
        (ids,) = greedy(lm, policies.get("full"), [prompt], count, key, Cadence.of(FULL, 8))
        lookups[i][j] = Lookup(one.kind, one.question, ids, "")
    asked = recall.ask(contexts, lookups, (CONTEXT, REPEATS, ROOM))
    return contexts, lookups, asked


def test_questions_are_put_behind_their_contexts(asked_of):
    contexts, lookups, asked = asked_of
    assert asked.counts == (3, 1, 2) and asked.repeats == REPEATS
    at = asked.rows.position_bt
    for i, (context, mine) in enumerate(zip(contexts, lookups, strict=True)):
        joined = np.concatenate([context, *(one.ids for one in mine)])
        np.testing.assert_array_equal(asked.joined.token_bt[i, : len(joined)], joined)
        assert asked.joined.length_b[i] == len(joined)
        for j, one in enumerate(mine):
            row = i * REPEATS + j
            ids = asked.rows.token_bt[row][np.asarray(at)[row] >= 0]
            np.testing.assert_array_equal(ids, [*context, *one.ids])
            after = asked.rows.token_bt[row, CONTEXT:]
            np.testing.assert_array_equal(after[asked.answer_bw[row]], one.answer)
    assert asked.real(np.arange(9)) == [0, 1, 2, 3, 6, 7]


def alone(lm, policy, context, one, key):
    """Whether the answer is the greedy one, and its likelihood, of one sequence by itself."""
    ids = np.concatenate([context, one.ids])
    rows = Batch.of(ids[None], np.array([len(ids)], np.int32))
    return judged(lm, replayed(lm, rows, policy, CADENCE, key[None])[0][0], len(context), one)


def judged(lm, hidden, context, one):
    start = context + len(one.question) - 1
    log_p = log_probs(lm, hidden[start : start + len(one.answer)])
    nll = -np.take_along_axis(log_p, one.answer[:, None], -1).sum()
    return bool((log_p.argmax(-1) == one.answer).all()), nll


def test_a_look_up_is_that_of_its_whole_sequence(lm, asked_of):
    _, lookups, asked = asked_of
    key_c = replay.row_keys(jax.random.key(4), 3)
    key_b = jax.numpy.repeat(key_c, REPEATS)
    found = {n: x for n, *x in recall.recall(lm, NAMED, asked, key_c, CADENCE, [*NAMED])}
    found["full"] = recall.recall_full(lm, asked, 8)
    rows = [(i * REPEATS + j, one) for i, mine in enumerate(lookups) for j, one in enumerate(mine)]
    for name, (right, nll) in found.items():
        policy = NAMED.get(name, policies.get("full"))
        hidden = replayed(lm, asked.rows, policy, CADENCE, key_b)[0]
        want = [judged(lm, hidden[row], CONTEXT, one) for row, one in rows]
        assert asked.real(right) == [ok for ok, _ in want], name
        np.testing.assert_allclose(asked.real(nll), [x for _, x in want], rtol=1e-4)
    assert asked.real(found["full"][0])[:2] == [True, True]


def test_a_right_answer_is_the_one_that_greedy_decoding_gives(lm):
    """With a question that ends where an interval does, as prompts are padded in front."""
    rng = np.random.default_rng(7)
    contexts = list(rng.integers(37, size=(4, CONTEXT), dtype=np.int32))
    key_c = replay.row_keys(jax.random.key(4), 4)
    questions = list(rng.integers(37, size=(4, 8), dtype=np.int32))
    prompts = [np.concatenate(both) for both in zip(contexts, questions, strict=True)]
    given = greedy(lm, NAMED["h2o"], prompts, 3, key_c)
    wrong = [np.array([*x[:2], (x[2] + 1) % 37], np.int32) for x in given]
    asked = [
        [Lookup("name", q, x, ""), Lookup("name", q, y, "")]
        for q, x, y in zip(questions, given, wrong, strict=True)
    ]
    both = recall.ask(contexts, asked, (CONTEXT, 2, 16))
    (_, right, _), = recall.recall(lm, NAMED, both, key_c, CADENCE, ["h2o"])  # fmt: skip
    assert both.real(right) == [True, False] * 4


def test_golden_eviction_knows_all_questions_of_a_context(lm, asked_of):
    contexts, lookups, asked = asked_of
    key_c = replay.row_keys(jax.random.key(4), 3)
    (_, right, nll), = recall.recall(lm, {}, asked, key_c, CADENCE, ["golden"])  # fmt: skip
    forced = golden_policy(lm, asked.joined, CADENCE)[0]
    for i, mine in enumerate(lookups[:1]):
        own = forced.replace(position_yebkl=forced.position_yebkl[:, :, i : i + 1])
        for j, one in enumerate(mine):
            ok, want = alone(lm, own, contexts[i], one, key_c[i])
            assert right[i * REPEATS + j] == ok
            np.testing.assert_allclose(nll[i * REPEATS + j], want, rtol=1e-4)


def test_the_full_cache_reads_shorter_contexts(lm):
    rng = np.random.default_rng(8)
    contexts = [rng.integers(37, size=n, dtype=np.int32) for n in (48, 17)]
    lookups = [[lookup(rng, 3, 2)], [lookup(rng, 2, 2)]]
    asked = recall.ask(contexts, lookups, (CONTEXT, 1, ROOM))
    nll = asked.real(recall.recall_full(lm, asked, 8)[1])
    want = [
        alone(lm, policies.get("full"), context, one, jax.random.key(0))[1]
        for context, (one,) in zip(contexts, lookups, strict=True)
    ]
    np.testing.assert_allclose(nll, want, rtol=1e-4)


# ---- tables


def test_a_share_and_its_error():
    rng = np.random.default_rng(0)
    count = rng.integers(1, 5, 30)
    value, error = recall_table.share(rng.binomial(count, 0.6), count)
    assert 0.4 < value < 0.8
    # With equal counts it is the mean of the clusters and its error.
    x = rng.normal(size=30)
    value, error = recall_table.share(x * 4, np.full(30, 4))
    np.testing.assert_allclose((value, error), (x.mean(), x.std(ddof=1) / 30**0.5))
    assert np.isnan(recall_table.share([3.0], [4.0])[1])


def found_of(right, document, policy="h2o", rule=True, nll=None):
    right = np.array(right, bool)
    nll = np.linspace(0, 1, len(right)) if nll is None else nll
    kind = ["name", "entry"] * (len(right) // 2)
    return recall_table.Found(policy, 64, right, nll, document, kind, rule)


def test_intervals_are_exact_at_the_effective_number():
    apart = found_of([1, 0, 1, 1, 0, 1, 1, 1], list("abcdefgh"))
    low, high = apart.interval()
    # Independent ones: the sample variance is n / (n - 1) of the binomial one.
    assert (low, high) == pytest.approx(accuracy.exact_interval(0.75 * 7, 7))
    together = found_of([1, 1, 0, 0, 1, 1, 1, 1], list("aabbccdd"))
    assert together.interval()[0] < low and together.interval()[1] > high
    none = found_of([0] * 8, list("aabbccdd"))
    assert none.interval() == accuracy.exact_interval(0, 8)


def test_differences_are_paired_by_document():
    document = list("aabbccdd")
    ours, theirs = found_of([1, 1, 0, 1, 1, 0, 1, 1], document), found_of([1, 0] * 4, document)
    one = recall_table.difference(ours, theirs)
    gain = np.array([1, 0, 0, 1])  # by document, of two look-ups each
    by_hand = np.append(gain, [1, -1]) / 2
    assert one.value == pytest.approx(gain.sum() / 8)
    half = 1.959964 * by_hand.std(ddof=1) / 6**0.5
    assert (one.low, one.high) == pytest.approx((by_hand.mean() - half, by_hand.mean() + half))
    same = recall_table.difference(ours, ours)
    assert same.value == 0 and same.low < 0 < same.high  # not certain, though none differs


def test_tables_name_the_best_rule_and_what_each_kind_gets():
    document = list("aabbccdd")
    results = [
        found_of([1] * 8, document, "full", rule=False),
        found_of([1, 1, 1, 1, 0, 1, 1, 1], document, "golden", rule=False),
        found_of([1, 0, 1, 0, 0, 0, 0, 0], document, "h2o"),
        found_of([1, 1, 1, 0, 0, 0, 0, 0], document, "tova"),
        found_of([1, 1, 1, 1, 1, 0, 0, 0], document, "mine", rule=False),
    ]
    head, rows, text = recall_table.lookups(results)
    at = {name: i for i, name in enumerate(head)}
    assert [row[at["points to baseline"]] for row in rows][3] == "baseline"
    assert rows[4][at["right"]] == "62.5" and rows[4][at["points to baseline"]].startswith(
        "+25.0 ("
    )
    assert [rows[2][at[f"{kind} %"]] for kind in ("entry", "name")] == ["0", "50"]
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["baseline"] for line in lines] == ["tova"] * 5
    assert float(lines[4]["difference"]) == 0.25 and float(lines[2]["right_name"]) == 0.5
    _, rows, _ = recall_table.lookups(results, "h2o")
    assert rows[2][at["points to baseline"]] == "baseline"


def test_the_table_of_agreement():
    tokens = np.array([24, 24, 10])
    ours = recall_table.Agreement(
        "mine",
        16,
        tokens,
        np.array([24, 3, 10]),
        np.array([24, 20, 10]),
        np.array([0.24, 2.4, 0.1]),
    )
    theirs = recall_table.Agreement(
        "h2o", 16, tokens, np.array([2, 3, 4]), np.array([20, 18, 9]), np.array([2.4, 2.4, 1]), True
    )
    assert ours.never_n.tolist() == [True, False, True]
    assert ours.same[0] == pytest.approx(54 / 58) and ours.kl[0] == pytest.approx(2.74 / 58)
    rows, text = recall_table.agreement([ours, theirs])
    at = {name: i for i, name in enumerate(recall_table.AGREEMENT_HEAD)}
    assert rows[0][at["median"]] == "10" and rows[0][at["never"]].startswith("67 ")
    assert rows[0][at["tokens to the first difference"]].startswith("12.3 ± 6.2")
    assert rows[0][at["KL to baseline"]].startswith("-0.053 ± ")
    assert rows[1][at["KL to baseline"]] == "baseline"
    line = next(csv.DictReader(io.StringIO(text)))
    value, error = recall_table.share(ours.kl_n - theirs.kl_n, tokens)
    assert (float(line["kl_difference"]), float(line["kl_difference_se"])) == pytest.approx(
        (value, error), rel=1e-4
    )
    assert float(line["first_difference"]) == pytest.approx(28 / 3, rel=1e-4)
