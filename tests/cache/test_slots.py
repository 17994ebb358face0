import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv.cache import slots as kv
from fkv.cache.cadence import FULL, Cadence
from fkv.errors import UserError

BATCH, HEADS, DIM = 3, 2, 4


def entries(cache, row, head):
    """What one head of a cache in host memory holds: position -> (key, value, payloads)."""
    held = {}
    for slot, position in enumerate(cache.position_bks[row, head].tolist()):
        if position >= 0:
            assert position not in held, "an entry is held twice"
            leaves = (cache.key_bksd, cache.value_bksd, *jax.tree.leaves(cache.entry))
            held[position] = [x[row, head, slot].tolist() for x in leaves]
    return held


@pytest.mark.parametrize(("budget", "interval"), [(12, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize(
    "scores", ["random", "only the staged go", "only the kept go", "equal", "minus infinity"]
)
def test_holds_what_a_list_of_entries_holds(budget, interval, scores):
    rng = np.random.default_rng(budget)
    slots, padding = budget + interval, [0, 1, interval]  # of the first chunk of each row
    entry = {
        "sum": jax.ShapeDtypeStruct((3,), jnp.float32),
        "born": jax.ShapeDtypeStruct((), jnp.int32),
    }
    cache = kv.init(BATCH, HEADS, slots, DIM, jnp.float32, entry)
    oracle = {(b, k): {} for b in range(BATCH) for k in range(HEADS)}
    admit, append = jax.jit(kv.admit), jax.jit(kv.append)
    choose = jax.jit(kv.choose, static_argnums=2)
    for chunk in range(14):
        key, value = rng.normal(size=(2, BATCH, interval, HEADS, DIM)).astype(np.float32)
        position = np.arange(interval)[None] + chunk * interval - np.array(padding)[:, None]
        position = np.maximum(position, -1)
        cache = append(cache, budget, key, value, position)
        # Every entry's payload changes all the time, as sums of attention do.
        payload = {
            "sum": rng.normal(size=(BATCH, HEADS, slots, 3)).astype(np.float32),
            "born": rng.integers(1000, size=(BATCH, HEADS, slots)).astype(np.int32),
        }
        cache = cache.replace(entry=payload)
        before = jax.device_get(cache)
        for (row, head), held in oracle.items():
            for i, at in enumerate(position[row].tolist()):
                if at >= 0:
                    held[at] = [key[row, i, head].tolist(), value[row, i, head].tolist()]
            now = entries(before, row, head)
            assert {p: x[:2] for p, x in now.items()} == {p: x[:2] for p, x in held.items()}
            oracle[row, head] = now

        importance = rng.normal(size=(BATCH, HEADS, slots)).astype(np.float32)
        staged = np.arange(slots) >= budget
        if scores == "only the staged go":
            importance = np.where(staged, importance - 100, importance)
        elif scores == "only the kept go":
            importance = np.where(staged, importance + 100, importance)
        elif scores == "equal":
            importance = np.zeros_like(importance)
        elif scores == "minus infinity":
            importance = np.full_like(importance, -np.inf)
        evict = np.asarray(choose(importance, cache.position_bks, interval))
        cache = admit(cache, rng.permuted(evict, axis=-1))
        after = jax.device_get(cache)
        for (row, head), held in oracle.items():
            at, score = before.position_bks[row, head], importance[row, head]
            empty = [s for s in range(slots) if at[s] < 0]
            taken = [s for s in np.argsort(score, kind="stable").tolist() if at[s] >= 0]
            assert evict[row, head].tolist() == (empty + taken)[:interval]
            for slot in evict[row, head]:
                held.pop(int(at[slot]), None)
            assert entries(after, row, head) == held
            real = (chunk + 1) * interval - padding[row]
            assert len(held) == min(real, budget)  # nothing is lost while the cache fills
        assert (after.position_bks[..., budget:] == -1).all()


def test_the_order_of_evicted_slots_does_not_matter():
    rng = np.random.default_rng(0)
    cache = kv.init(1, 1, 12, DIM, jnp.float32)
    cache = kv.append(cache, 0, *rng.normal(size=(2, 1, 12, 1, DIM)), jnp.arange(12)[None])
    admit = jax.jit(kv.admit)
    one = admit(cache, jnp.array([[[9, 0, 11, 5]]]))
    two = admit(cache, jnp.array([[[0, 5, 9, 11]]]))
    np.testing.assert_array_equal(one.position_bks, two.position_bks)
    np.testing.assert_array_equal(one.key_bksd, two.key_bksd)
    # A kept entry never moves; the staged survivors, in their order, fill the freed slots.
    assert one.position_bks[0, 0].tolist() == [8, 1, 2, 3, 4, 10, 6, 7, -1, -1, -1, -1]


def test_moves_are_unique_and_sorted():
    # The scatter promises both to the compiler, also for the indices out of bounds.
    slots, interval = 10, 4
    rng = np.random.default_rng(0)
    evict = np.stack([rng.permutation(slots)[:interval] for _ in range(600)])[None]
    target, source = (np.asarray(x)[0] for x in jax.jit(kv.moves, static_argnums=1)(evict, slots))
    assert (np.diff(target, axis=-1) > 0).all()
    for dropped, to, of in zip(evict[0], target, source, strict=True):
        budget = slots - interval
        moved = to < slots
        assert set(to[moved]) == {s for s in dropped if s < budget}
        assert sorted(of[moved]) == [s for s in range(budget, slots) if s not in dropped]


def test_casts_to_the_dtype_of_the_cache():
    cache = kv.init(1, 1, 3, DIM, jnp.bfloat16)
    cache = kv.append(cache, 1, *jnp.ones((2, 1, 2, 1, DIM)), jnp.array([[5, 6]]))
    assert cache.key_bksd.dtype == cache.value_bksd.dtype == jnp.bfloat16
    assert cache.position_bks.tolist() == [[[-1, 5, 6]]]
    assert cache.key_bksd[0, 0, :, 0].tolist() == [0, 1, 1]


# ---- eight bits


quantise = jax.jit(kv.quantise)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_is_off_by_half_a_step_at_most(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 40, DIM)) * 10.0 ** rng.integers(-6, 7, size=(5, 3, 40, 1))
    x = jnp.asarray(x, dtype).at[1, :, 7].set(0.0)
    got = quantise(x)
    assert got.value.dtype == jnp.int8 and got.scale.dtype == jnp.float32 and got.shape == x.shape
    value, scale, x = (np.asarray(y, np.float64) for y in (got.value, got.scale, x))
    np.testing.assert_allclose(scale, abs(x).max(-1) / 127, rtol=1e-6)
    assert (abs(value).max(-1) == np.where(scale > 0, 127, 0)).all()
    assert (abs(value * scale[..., None] - x) <= scale[..., None] / 2 * (1 + 1e-5)).all()
    assert (scale[1, :, 7] == 0).all() and (value[1, :, 7] == 0).all()
    np.testing.assert_allclose(kv.dense(got), value * scale[..., None], rtol=1e-6)


def test_an_int8_cache_is_the_float_cache_quantised_bit_for_bit():
    budget, interval = 8, 4
    rng = np.random.default_rng(0)
    entry = jax.ShapeDtypeStruct((), jnp.float32)
    exact, small = (
        kv.init(BATCH, HEADS, budget + interval, DIM, dtype, entry)
        for dtype in (jnp.float32, "int8")
    )
    assert isinstance(small.key_bksd, kv.Int8)
    append, admit = jax.jit(kv.append), jax.jit(kv.admit)
    for chunk in range(6):
        key, value = rng.normal(size=(2, BATCH, interval, HEADS, DIM)).astype(np.float32)
        position = np.broadcast_to(np.arange(interval) + chunk * interval, (BATCH, interval))
        evict = [
            [rng.permutation(budget + interval)[:interval] for _ in range(HEADS)]
            for _ in range(BATCH)
        ]
        exact = admit(append(exact, budget, key, value, position), jnp.array(evict))
        # It makes no difference whether the tokens are quantised before or as they are taken in.
        new = (quantise(key), quantise(value)) if chunk % 2 else (key, value)
        small = admit(append(small, budget, *new, position), jnp.array(evict))
        want = exact.replace(
            key_bksd=quantise(exact.key_bksd), value_bksd=quantise(exact.value_bksd)
        )
        jax.tree.map(np.testing.assert_array_equal, small, want)
    assert (np.asarray(small.position_bks)[..., :budget] < 4 * interval).any()  # some have moved on


@pytest.mark.parametrize(
    ("budget", "interval", "message"),
    [
        (16, 0, "interval = 0 must be a whole number from 1"),
        (16, -4, "interval = -4 must be"),
        (16, 4.0, "interval = 4.0 must be"),
        (0, 4, "budget = 0 must be a whole number from 1"),
        (True, 4, "budget = True must be"),
        (16, 16, "budget = 16 must be larger than interval = 16"),
        (8, 16, "budget = 8 must be larger"),
        (24, 16, "budget = 24 must be a multiple of interval = 16"),
    ],
)
def test_refuses_sizes_that_no_cadence_has(budget, interval, message):
    with pytest.raises(UserError, match=message):
        Cadence(budget, interval)


def test_accepts_sizes():
    assert Cadence(32, 16) == Cadence.of(32, 16)
    assert Cadence(2, 1).slots == Cadence(2, 1).first_evicting_token == 3
    # That of the full cache is of its interval alone.
    assert Cadence.of(FULL, 16).interval == 16


@pytest.mark.parametrize(("budget", "interval"), [(2, 1), (3, 1), (8, 4), (12, 4), (24, 12)])
def test_a_cadence_is_that_of_a_simulation(budget, interval):
    cadence = Cadence(budget, interval)
    held, evictions = 0, 0
    for token in range(10 * budget):
        # The eviction comes with the next token: none that no token sees is counted.
        if held == budget + interval:
            held, evictions = budget, evictions + 1
        assert (token >= cadence.first_evicting_token) == (evictions > 0)
        held += 1
        assert cadence.evictions(token + 1) == evictions
    assert cadence.fill_chunks * interval == budget and cadence.slots == budget + interval
