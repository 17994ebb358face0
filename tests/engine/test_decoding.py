"""Generation against PyTorch and replay; rows do not meet; no cache is copied."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import models, policies, tasks
from fkv.cache.cadence import Cadence
from fkv.engine import decoding, replay
from fkv.engine.batch import Batch, left_pad
from fkv.engine.decoding import NO_TOKEN, Plan, Sampling
from fkv.errors import UserError
from fkv.evaluation import loss_ratio
from fkv.keys import Purpose, key_of
from fkv.models import LM
from fkv.policies import scorer
from fkv.tasks import ledger
from tests import oracles
from tests.models import SMALL, torch_model

BUDGET, INTERVAL, NEW = 24, 12, 30  # 30 is no multiple of 12
# Longer than B + L, shorter than an interval, exactly one, more than one, a single token.
LENGTHS = [50, 5, 12, 31, 1]
CADENCE = Cadence(BUDGET, INTERVAL)
GREEDY, WARM = Sampling(0.0), Sampling(0.8, 12, 0.9)


@functools.cache
def model():
    return oracles.make_lm()


def random_prompts(lengths, vocab=37, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(vocab, size=n).astype(np.int32) for n in lengths]


PROMPTS = random_prompts(LENGTHS)
KEYS = jax.random.split(jax.random.key(0), len(LENGTHS))


TOGETHER = ("snapkv", "h2o", "random", "tova", "lagkv", "foresight")


@functools.cache
def in_one_program(name):
    """A policy, of several that are compiled together: compiling takes the time."""
    if name not in TOGETHER:
        return policy_of(name)
    index = jnp.full(model().config.layers, TOGETHER.index(name))
    return loss_ratio.OneOf(tuple(map(policy_of, TOGETHER)), index)


def policy_of(name):
    if "foresight" not in name:
        return policies.get(name)
    rules = scorer.ScorerConfig()
    params = scorer.init(jax.random.key(3), model().config, rules)
    policy = policies.Foresight(params, rules, "sample")
    return policies.Ada(policy) if name == "ada(foresight)" else policy


def with_config(lm, **fields):
    return lm.replace(config=dataclasses.replace(lm.config, **fields))


def generate(
    name,
    prompts=PROMPTS,
    keys=KEYS,
    sampling=WARM,
    cache_dtype="",
    budget=BUDGET,
    interval=INTERVAL,
    stop=(),
    limit=None,
    width=0,
):
    lm, policy = with_config(model(), cache_dtype=cache_dtype), name
    if isinstance(name, str):
        policy = policy_of(name)
    plan = Plan(Cadence(budget, interval), sampling, stop)
    limit = [NEW] * len(prompts) if limit is None else limit
    return decoding.generate(lm, policy, plan, prompts, keys, limit, width)


def assert_same(some, others):
    assert [x.tolist() for x in some] == [x.tolist() for x in others]


# ---- the full cache is what everyone else computes


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_full_cache_generates_what_pytorch_generates(family, tmp_path):
    torch = pytest.importorskip("torch")
    reference = torch_model(family, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    reference.save_pretrained(tmp_path)
    lm, plan = models.load(tmp_path, "float32"), Plan(Cadence(16, 8), GREEDY)
    prompts = random_prompts([30, 3, 12, 1, 17], SMALL["vocab_size"])
    out = decoding.generate(lm, policies.get("full"), plan, prompts, KEYS, [20] * 5)
    for prompt, tokens in zip(prompts, out, strict=True):
        ids = torch.tensor(prompt[None].astype(np.int64))
        want = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        assert tokens.tolist() == want[0, len(prompt) :].tolist()
    assert len({tuple(x.tolist()) for x in out}) == len(out)


def test_a_budget_that_holds_everything_is_the_full_cache():
    full = generate("full")
    assert_same(generate("h2o", budget=96), full)
    # And eviction is noticed by the rows that are long enough for it.
    evicted = generate("h2o")
    assert any(a.tolist() != b.tolist() for a, b in zip(evicted, full, strict=True))


# ---- rows do not meet


# Not `knorm`: keys of equal tokens have equal norms in the first layer, and such exact ties are
# decided by rounding that may differ with the shape of the batch.
@pytest.mark.parametrize(
    ("name", "cache_dtype"),
    [*((x, "") for x in ("full", "snapkv", "h2o", "random", "pyramid", "ada")), ("random", "int8")],
)
def test_rows_are_independent_of_the_batch(name, cache_dtype):
    policy = policy_of(name) if cache_dtype else in_one_program(name)
    together = generate(policy, cache_dtype=cache_dtype)
    # Another order, other neighbours, other keys for these.
    order = [3, 1, 4, 2, 0]
    prompts, keys = [PROMPTS[i] for i in order], KEYS[np.array(order)]
    prompts[1], keys = random_prompts([55], seed=5)[0], keys.at[1].set(jax.random.key(9))
    mixed = generate(policy, prompts, keys, cache_dtype=cache_dtype)
    for row, i in enumerate(order):
        assert (mixed[row].tolist() == together[i].tolist()) == (row != 1)
    # Alone, with padding to 36 where it was 60.
    for row in (1, 2, 3, 4):
        alone = generate(
            policy, [PROMPTS[row]], KEYS[row : row + 1], width=36, cache_dtype=cache_dtype
        )
        assert_same(alone, [together[row]])


# ---- decoding is replay


EVERY = ["full", "snapkv", "rkv", "h2o", "tova", "random", "lagkv", "pyramid", "ada", "foresight"]
EVERY += ["ada(foresight)", "ada(pyramid(h2o))", "prompt(random):tokens=7"]
EVERY += ["prompt(snapkv):tokens=30,on_top=True"]


@pytest.mark.parametrize(
    ("name", "sampling", "cache_dtype"),
    [
        ("rkv", GREEDY, ""),
        ("ada", GREEDY, ""),
        *((name, WARM, "") for name in EVERY),
        *((name, WARM, "int8") for name in ("full", "ada")),
    ],
)
def test_tokens_come_from_the_logits_of_replay(name, sampling, cache_dtype):
    lm, policy = with_config(model(), cache_dtype=cache_dtype), in_one_program(name)
    out = generate(policy, sampling=sampling, cache_dtype=cache_dtype)
    prompts = left_pad(PROMPTS, INTERVAL)
    width = prompts.token_bt.shape[1]
    assert width == 60 and all(len(x) == NEW for x in out)
    token = np.concatenate([prompts.token_bt, np.stack(out)], axis=1)
    whole = prompts.replace(token_bt=token, length_b=prompts.length_b + NEW)
    hidden, _, _ = replayed(lm, whole, policy, CADENCE, KEYS)
    logits = logits_of(lm, hidden[:, width - 1 : -1])
    if sampling == GREEDY:
        best = np.take_along_axis(np.asarray(logits), np.stack(out)[..., None], axis=-1)[..., 0]
        assert (np.asarray(logits).max(-1) - best < 1e-4).all()
    else:
        position = prompts.length_b[:, None] + np.arange(NEW)[None]
        assert_same(drawn(logits, KEYS, position), out)


replayed = jax.jit(replay.replay, static_argnums=3)
logits_of = jax.jit(models.unembed)


@jax.jit
def drawn(logits_btv, key_b, position_bt):
    token_key = lambda key, at: key_of(key, Purpose.TOKEN, at)  # noqa: E731
    keys = jax.vmap(jax.vmap(token_key, (None, 0)))(key_b, position_bt)
    return jax.vmap(lambda x, key: decoding.sample(x, key, WARM), 1, 1)(logits_btv, keys)


# ---- sampling


def draw(logits_v, sampling, draws=2000):
    logits = jnp.broadcast_to(jnp.asarray(logits_v, jnp.float32)[None], (draws, len(logits_v)))
    keys = jax.random.split(jax.random.key(1), draws)
    token = jax.jit(decoding.sample, static_argnums=2)(logits, keys, sampling)
    assert token.dtype == jnp.int32 and token.shape == (draws,)
    return np.bincount(np.asarray(token), minlength=len(logits_v))


def allowed(logits_v, sampling):
    """Probabilities [v] by the definition, one token after another."""
    p = oracles.softmax(np.asarray(logits_v, np.float64) / sampling.temperature)
    order = sorted(range(len(p)), key=lambda i: -p[i])
    order = order[: sampling.top_k or None]
    total, kept, so_far = sum(p[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        so_far += p[i] / total
        if so_far >= sampling.top_p:
            break
    return np.array([p[i] if i in kept else 0 for i in range(len(p))]) / sum(p[i] for i in kept)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.5),
        Sampling(1.0, 5),
        Sampling(1.0, 0, 0.7),
        Sampling(1.3, 6, 0.8),
        Sampling(1.0, 100, 0.5),  # more than there are
        Sampling(1.0, 0, 1e-9),  # the likeliest always stays
    ],
    ids=str,
)
def test_draws_follow_the_definition(sampling):
    logits = 1.5 * np.random.default_rng(2).normal(size=16)
    p, count = allowed(logits, sampling), draw(logits, sampling)
    assert (count[p == 0] == 0).all()
    p, count = p[p > 0], count[p > 0]
    assert (abs(count - 2000 * p) < 5 * (2000 * p * (1 - p)) ** 0.5 + 1).all()
    # Chi-square has as mean its degrees of freedom and as variance twice that.
    chi2 = ((count - 2000 * p) ** 2 / (2000 * p)).sum()
    assert chi2 <= len(p) - 1 + 5 * (2 * (len(p) - 1)) ** 0.5


def test_top_p_reaches_its_share_exactly():
    # 0.5 + 0.25 is enough for 0.75, and no third token comes in.
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    assert (draw(logits, Sampling(1.0, 0, 0.74)) > 0).tolist() == [True, True, False, False]
    assert (draw(logits, Sampling(1.0, 0, 0.76)) > 0).sum() == 3
    # Without rounding: of four alike, two are enough for a half.
    assert (draw(np.zeros(4), Sampling(1.0, 0, 0.5)) > 0).sum() == 2


def test_temperature_zero_takes_the_likeliest():
    logits = np.random.default_rng(3).normal(size=(4, 50)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    for sampling in (GREEDY, Sampling(0.0, 3, 0.5)):
        token = decoding.sample(jnp.asarray(logits), keys, sampling)
        assert token.tolist() == logits.argmax(-1).tolist() and token.dtype == jnp.int32


def test_the_vocabulary_is_not_sorted_under_top_k():
    vocab = 5003

    def sorts(sampling):
        text = jax.jit(decoding.sample, static_argnums=2).lower(
            jnp.zeros((2, vocab)), jax.random.split(jax.random.key(0), 2), sampling
        )
        lines = text.compile().as_text().splitlines()
        return [x for x in lines if " sort(" in x and f",{vocab}]" in x]

    assert sorts(Sampling(0.6, 20, 0.95)) == sorts(Sampling(0.6, 20)) == []
    assert sorts(Sampling(0.6, 0, 0.95))  # so the pattern does find one


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1 must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": 2.5}, "top_k = 2.5 must be a whole number"),
        ({"top_k": -1}, "top_k = -1 must be a whole number from 0"),
        ({"top_p": 0.0}, "top_p = 0.0 must be a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p = 1.1 must be a number above 0 and at most 1"),
    ],
)
def test_impossible_sampling_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Sampling(**fields)


# ---- where rows end


def until(tokens, stop, limit=NEW):
    """A row's tokens up to its first stop token, at most `limit`."""
    ends = [i + 1 for i, x in enumerate(tokens.tolist()) if x in stop]
    return tokens[: min([limit, *ends])]


@pytest.mark.parametrize("name", ["full", "h2o"])
def test_rows_end_at_their_stop_token_or_limit(name):
    free = generate(name)
    assert all(len(x) == NEW and (x != NO_TOKEN).all() for x in free)
    # One that is drawn first, one in the middle of a row, one that is never drawn.
    at = next(i for i in range(14, 0, -1) if free[0][i] not in free[0][:i])
    row = next(i for i in range(1, len(free)) if free[i][0] not in free[0][:at])
    stop = (int(free[row][0]), int(free[0][at]), 99)
    want = [until(x, stop) for x in free]
    assert len(want[row]) == 1 < len(want[0]) == at + 1
    assert_same(generate(name, stop=stop), want)

    limit = [30, 0, 1, 13, 12]
    assert_same(generate(name, limit=limit), [x[:n] for x, n in zip(free, limit, strict=True)])
    both = [until(x, stop, n) for x, n in zip(free, limit, strict=True)]
    assert_same(generate(name, stop=stop, limit=limit), both)


@pytest.mark.parametrize("name", ["full", "h2o"])
def test_stream_pieces_are_what_generate_gives(name):
    free = generate(name)
    for stops in ((int(free[0][14]),), *([tuple(range(37))] if name == "h2o" else [])):
        plan = Plan(CADENCE, WARM, stops)
        pieces = list(
            decoding.stream(model(), policy_of(name), plan, PROMPTS, KEYS, [NEW] * len(PROMPTS))
        )
        assert all(len(x) <= INTERVAL for piece in pieces for x in piece)
        rows = [np.concatenate(row) for row in zip(*pieces, strict=True)]
        want = [until(x, stops) for x in free]
        assert_same(rows, want)
        # No chunk runs after every row is done.
        assert len(pieces) == -(-max(len(x) for x in want) // INTERVAL)


@pytest.mark.parametrize("name", ["full", "ada(foresight)"])
def test_deep_models_decode_the_same_by_several_programs(name, monkeypatch):
    policy = in_one_program(name)
    free = generate(policy)
    stop = (int(free[0][14]),)
    want = [until(x, stop) for x in free]
    assert_same(generate(policy, stop=stop), want)
    monkeypatch.setattr(decoding, "SHALLOW", 1)
    monkeypatch.setattr(decoding, "decode_at_once", None)
    monkeypatch.setattr(decoding, "one_chunk", None)
    compiled = decoding.evict_layer._cache_size()
    assert_same(generate(policy), free)
    # One program for all layers.
    assert decoding.evict_layer._cache_size() - compiled == (name != "full")
    assert_same(generate(policy, stop=stop), want)
    plan, limit = Plan(CADENCE, WARM, stop), [NEW] * len(PROMPTS)
    pieces = list(decoding.stream(model(), policy, plan, PROMPTS, KEYS, limit))
    assert_same([np.concatenate(row) for row in zip(*pieces, strict=True)], want)
    assert len(pieces) == -(-max(map(len, want)) // INTERVAL)


@pytest.mark.parametrize("shallow", [8, 1])
def test_decode_stops_when_every_row_is_done(shallow, monkeypatch):
    monkeypatch.setattr(decoding, "SHALLOW", shallow)
    policy, plan, limit = policy_of("h2o"), Plan(CADENCE, WARM), [3, 0, 7, 12, 1]
    lm = models.separate(model(), consume=False)
    state, width = decoding._start(lm, policy, plan, PROMPTS, KEYS, limit)
    assert state.chunk == 5 and width == 60
    out, state = decoding.decode(lm, policy, plan, state, width, NEW)
    assert out.shape == (5, 36) and state.chunk == 6  # one chunk of the three
    assert (state.token_b == NO_TOKEN).all() and (state.left_b == 0).all()
    out = np.asarray(out)
    # A row that is left out draws its first token all the same, and `generate` drops it.
    assert (out != NO_TOKEN).sum(1).tolist() == [3, 1, 7, 12, 1]
    assert (out[:, 12:] == NO_TOKEN).all()
    # What is put in after a row's end leaves no entry: only tokens do.
    for cache in state.caches:
        newest = np.asarray(cache.position_bks).max((1, 2)) + 1
        assert newest.tolist() == [50 + 3, 5 + 1, 12 + 7, 31 + 12, 1 + 1]


# ---- no copy of the weights


@pytest.mark.parametrize("separate", [True, False])
def test_steps_make_no_copy_of_separate_weights(separate):
    config = dataclasses.replace(model().config, width=256, mlp_width=1024)
    lm = LM(models.decoder.param_shapes(config, separate), config)
    plan, policy, row = Plan(CADENCE, GREEDY), policies.get("knorm"), jnp.zeros(2, jnp.int32)
    cache = jax.eval_shape(lambda: replay.init_cache(policy, 2, config, CADENCE, jnp.float32))
    state = decoding.State((cache,) * config.layers, row, row, row, KEYS[:2], row, jnp.int32(1))
    memory = decoding.steps.lower(lm, policy, plan, state, INTERVAL).compile().memory_analysis()
    size = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(lm.params["layers"]))
    # Those that are stacked are copied, all of them.
    assert (memory.temp_size_in_bytes < 0.1 * size) == separate
    assert separate or memory.temp_size_in_bytes > 0.9 * size


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_steps_on_a_cpu_transpose_no_weight(rows):
    config = dataclasses.replace(model().config, width=104, mlp_width=256)
    lm = LM(models.decoder.param_shapes(config, True, True), config)
    policy, row = policies.get("knorm"), jnp.zeros(rows, jnp.int32)
    cache = jax.eval_shape(lambda: replay.init_cache(policy, rows, config, CADENCE, jnp.float32))
    keys = jax.eval_shape(lambda: replay.row_keys(jax.random.key(0), rows))
    state = decoding.State((cache,) * config.layers, row, row, row, keys, row, jnp.int32(1))
    plan = Plan(CADENCE, GREEDY)
    text = decoding.steps.lower(lm, policy, plan, state, INTERVAL).compile().as_text()
    shapes = {x.shape for x in jax.tree.leaves(lm.params["layers"]) if len(x.shape) > 1}
    weights = {math.prod(shape) for shape in shapes}
    copied = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    assert not weights & {math.prod(map(int, found.split(","))) for found in copied}


def test_either_form_of_a_model_gives_the_same_tokens():
    lm, plan = models.separate(model(), consume=False), Plan(CADENCE, WARM)
    for name in ("full", "random"):
        policy = in_one_program(name)
        some = decoding.generate(lm, policy, plan, PROMPTS, KEYS, [NEW] * len(PROMPTS))
        assert_same(some, generate(policy))


# ---- no copy of the cache


@pytest.mark.parametrize(
    ("name", "program", "cache_dtype", "rows", "kv_heads"),
    [
        ("snapkv", "decode", "", 4, 2),
        ("h2o", "decode", "", 4, 2),
        ("full", "decode", "", 4, 2),
        ("snapkv", "decode_chunk", "", 4, 2),
        ("snapkv", "decode_chunk", "int8", 4, 2),
        # XLA drops axes of one, and may copy a cache to do so.
        ("h2o", "decode", "", 1, 2),
        ("full", "decode", "", 1, 2),
        ("snapkv", "decode", "", 4, 1),
        ("full", "decode", "", 1, 1),
    ],
)
def test_decoding_makes_no_copy_of_the_cache(name, program, cache_dtype, rows, kv_heads):
    # A cache that outweighs all else: an eviction gathers the `L` rows that move, never `B`.
    lm, policy = wide_model(cache_dtype=cache_dtype, kv_heads=kv_heads), policies.get(name)
    state, fixed = wide_state(lm, policy, rows), {"prompt_width": 2048}
    if program == "decode":
        fixed["new_tokens"] = 16
        function = decoding.decode_at_once
    else:
        function = decoding.decode_chunk
    call = jax.jit(function, static_argnames=("plan", *fixed), donate_argnames="state")
    compiled = call.lower(lm, policy, WIDE, state, **fixed).compile()
    memory, keys = compiled.memory_analysis(), state.caches[0].key_bksd
    caches = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.caches))
    size, shape = math.prod(keys.shape), ",".join(map(str, keys.shape))
    if cache_dtype:
        assert caches < 4.2 * size  # bytes
        # One of the two heads as floats, but not both, and no copy.
        assert 2 * size < memory.temp_size_in_bytes < 3.4 * size
        assert f"f32[{shape}]" not in compiled.as_text()
    else:
        # A copy of one layer's keys alone would be more than this.
        assert memory.temp_size_in_bytes < 0.6 * 4 * size
    assert memory.alias_size_in_bytes >= caches > 4 * size * (1 if cache_dtype else 4)
    shape = f"{'s8' if cache_dtype else 'f32'}[{shape}]"
    lines = [x for x in compiled.as_text().splitlines() if shape in x]
    assert lines and not [x for x in lines if " copy(" in x]


@pytest.mark.parametrize("name", ["snapkv", "knorm", "h2o"])
def test_eviction_makes_no_copy_of_the_cache(name):
    # Scores, choice and move alone: `L` entries are gathered, into the caches that were given, and
    # on a CPU the keys of one of the four rows at a time.
    lm, policy = wide_model(), policies.get(name)
    state, config = wide_state(lm, policy), lm.config
    keys = state.caches[0].key_bksd
    asked = decoding.Asked(
        jax.ShapeDtypeStruct((16, 4, config.heads, config.head_dim), jnp.float32),
        jax.ShapeDtypeStruct((16, 4, config.kv_heads, config.group_size), jnp.float32),
        jax.ShapeDtypeStruct((16, 4), jnp.int32), state.chunk,
    )  # fmt: skip
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    site = replay.Site(config, WIDE.cadence, layer, state.key_b, state.prompt_b)
    compiled = decoding.evict_layer.lower(policy, state.caches[0], asked, site).compile()
    memory = compiled.memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.caches[0]))
    assert memory.alias_size_in_bytes >= size > 2 * keys.size * keys.dtype.itemsize
    assert memory.temp_size_in_bytes < 0.5 * keys.size * keys.dtype.itemsize


WIDE = Plan(Cadence(2048, 16), GREEDY)


def wide_model(**fields):
    """Shapes; nothing runs."""
    config = dataclasses.replace(model().config, heads=2, head_dim=128, **fields)
    return LM(models.decoder.param_shapes(config), config)


def wide_state(lm, policy, rows=4):
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    prompts = Batch(jax.ShapeDtypeStruct((rows, 2048), jnp.int32), row, row, row)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))

    def prefill(lm, policy, prompts, keys, limit):
        return decoding.prefill(lm, policy, WIDE, prompts, keys, limit, new_tokens=16)

    return jax.eval_shape(prefill, lm, policy, prompts, keys, row)


# ---- sizes and errors


def simulated_evictions(prompt, generated, budget, interval):
    """Token by token: how many evictions dropped something and were followed by a token."""
    held, padding, seen, due = 0, -prompt % interval, 0, False
    for i in range(prompt + generated - 1):  # the last token is never put in
        seen += due
        due, held = False, held + 1
        if (padding + i + 1) % interval == 0:
            due, held = held > budget, min(held, budget)
    return seen


def test_evictions_are_those_of_a_simulation():
    sizes = [(6, 2), (6, 3), (4, 1), (8, 4)]
    for prompt, generated in itertools.product(range(1, 20), range(1, 20)):
        for budget, interval in sizes:
            case = prompt, generated, budget, interval
            found = Cadence(budget, interval).evictions_generating(prompt, generated)
            assert found == simulated_evictions(*case), case
    assert CADENCE.evictions_generating(36, 2) == 1 > CADENCE.evictions_generating(36, 1)


def test_left_pad_aligns_the_ends():
    batch = left_pad([np.array([1, 2, 3]), np.array([4])], 4)
    assert batch.token_bt.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert batch.padding_b.tolist() == [1, 3]
    assert batch.length_b.tolist() == batch.prompt_b.tolist() == [3, 1]
    assert {x.dtype.name for x in jax.tree.leaves(batch)} == {"int32"}
    assert batch.position_bt.tolist() == [[-1, 0, 1, 2], [-1, -1, -1, 0]]
    batch = left_pad([np.array([5, 6]), np.array([7])])
    assert batch.token_bt.tolist() == [[5, 6], [0, 7]] and batch.padding_b.tolist() == [0, 1]
    assert left_pad([np.arange(8)], 4).token_bt.shape == (1, 8)
    # At least a width, which is rounded up, too.
    for width, want in ((3, 4), (4, 4), (5, 8), (8, 8)):
        batch = left_pad([np.array([1, 2, 3])], 4, width)
        assert batch.token_bt.tolist() == [[0] * (want - 3) + [1, 2, 3]]
        assert batch.padding_b.tolist() == [want - 3] and batch.length_b.tolist() == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [PROMPTS[0], np.array([], np.int32)]}, "prompt 1 is empty"),
        ({"prompts": []}, "no prompts given"),
        ({"prompts": [np.array([3, 37])]}, "prompt 0 has token 37, beyond the model's 37"),
        ({"prompts": [np.array([3, -2])]}, "prompt 0 has token"),
        ({"budget": 12}, "budget = 12 must be larger than interval = 12"),
        ({"budget": 25}, "budget = 25 must be a multiple of interval = 12"),
        ({"interval": 0}, "interval = 0 must be a whole number from 1"),
        ({"limit": [0] * 5}, r"limit = \[0, 0, 0, 0, 0\] must be a number of tokens for every"),
        ({"limit": [3, 3, -1, 3, 3]}, r"limit = \[3, 3, -1, 3, 3\] must be a number of tokens"),
        ({"limit": [3]}, r"limit = \[3\] must be a number of tokens for every prompt"),
    ],
)
def test_impossible_requests_are_refused(change, message):
    for name in ("full", "h2o"):
        with pytest.raises(UserError, match=message):
            generate(name, **change)


@pytest.mark.parametrize("name", ["full", "snapkv", "h2o", "rkv", "lagkv", "expected_attention"])
def test_bfloat16_weights_and_caches(name):
    # The embedded reasoner: a random model's choices are too close for half precision.
    lm = models.load(tasks.REASONER, dtype=jnp.bfloat16)
    problem = ledger.problem(0, "bfloat16", 0, ledger.Spec())
    prompt = ledger.encode(problem.prompt)
    plan, keys = Plan(Cadence(64, 16), GREEDY, (ledger.EOS,)), replay.row_keys(jax.random.key(0), 1)
    policy, even = policies.get(name), ("snapkv", "h2o", "rkv", "lagkv", "expected_attention")
    if name in even:  # in one program
        index = jnp.full(lm.config.layers, even.index(name))
        policy = loss_ratio.OneOf(tuple(map(policies.get, even)), index)
    state, _ = decoding._start(lm, policy, plan, [prompt], keys, [24])
    assert all(cache.key_bksd.dtype == jnp.bfloat16 for cache in state.caches)
    out = decoding.generate(lm, policy, plan, [prompt], keys, [24])
    words = [w for w in ledger.decode(out[0]) if w not in ledger.FILLERS]
    thought = [w for w in problem.thought if w not in ledger.FILLERS]
    # With the full cache the reasoning is right; under eviction it is still made of known words.
    assert len(words) > 8
    if name == "full":
        assert words == thought[: len(words)]


@pytest.mark.parametrize("sampling", [GREEDY, WARM, Sampling(0.8)])
def test_logits_that_are_no_numbers_are_no_answer(sampling):
    """Weights may be finite, and what is made of them not."""
    lm = with_config(model(), tied_embeddings=False)
    head = jnp.array(lm.params.get("head_vm", lm.params["embed_vm"]))
    many, one, minus = (
        lm.replace(params=lm.params | {"head_vm": x})
        for x in (head * 1e38, head.at[5].set(jnp.nan), head.at[5].set(0))
    )
    plan, rest = Plan(CADENCE, sampling), (PROMPTS, KEYS, [NEW] * 5)
    for wrong in (many, one):
        for name in ("full", "snapkv"):
            message = r"logits are NaN or infinite in float32 \(row 0, and 4 more of 5\): check its"
            with pytest.raises(UserError, match=message):
                decoding.generate(wrong, policies.get(name), plan, *rest)
            with pytest.raises(UserError, match="logits are NaN or infinite in float32"):
                next(decoding.stream(wrong, policies.get(name), plan, *rest))
    decoding.generate(minus, policies.get("full"), plan, *rest)
    # Rows that are left out answer nothing, and so nothing wrong.
    short = [0, 0, NEW, 0, 0]
    with pytest.raises(UserError, match=r"in float32 \(row 2, and 0 more of 5\)"):
        decoding.generate(many, policies.get("full"), plan, PROMPTS, KEYS, short)
