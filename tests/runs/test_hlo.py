"""Counting an optimised program: bytes, FLOPs, copies, with loops times their trips."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from fkv.runs import hlo

# What a TPU's compiler writes, cut down: a loop of 3 trips whose body reads a weight that lies in
# HBM, writes on-chip memory (S(1)), and updates a row of a cache in place.
TPU = textwrap.dedent("""
    HloModule step, is_scheduled=true

    %fused_update (p0: bf16[8,128], p1: bf16[1,128], p2: s32[]) -> bf16[8,128] {
      %p0 = bf16[8,128]{1,0:T(8,128)} parameter(0)
      %p1 = bf16[1,128]{1,0:T(8,128)S(1)} parameter(1)
      %p2 = s32[]{:T(128)} parameter(2)
      %zero = s32[] constant(0)
      ROOT %update = bf16[8,128]{1,0:T(8,128)} dynamic-update-slice(%p0, %p1, %p2, %zero)
    }

    %fused_product (a: bf16[1,512], w: bf16[512,128]) -> bf16[1,128] {
      %a = bf16[1,512]{1,0} parameter(0)
      %w = bf16[512,128]{1,0} parameter(1)
      ROOT %c = bf16[1,128]{1,0:S(1)} convolution(%a, %w), dim_labels=bf_io->bf
    }

    %body (state: (s32[], bf16[8,128], bf16[512,128])) -> (s32[], bf16[8,128], bf16[512,128]) {
      %state = (s32[], bf16[8,128]{1,0}, bf16[512,128]{1,0}) parameter(0)
      %i = s32[] get-tuple-element(%state), index=0
      %cache = bf16[8,128]{1,0} get-tuple-element(%state), index=1
      %weight = bf16[512,128]{1,0} get-tuple-element(%state), index=2
      %x = bf16[1,512]{1,0:S(1)} broadcast(%i), dimensions={}
      %y = bf16[1,128]{1,0:S(1)} fusion(%x, %weight), kind=kOutput, calls=%fused_product, backend_config={"estimated_cycles":"300"}
      %held = bf16[8,128]{1,0} fusion(%cache, %y, %i), kind=kLoop, calls=%fused_update, backend_config={"estimated_cycles":"50"}
      %again = bf16[512,128]{0,1} copy(%weight), backend_config={"estimated_cycles":"150"}
      %sorted = s32[1024]{0} sort(%i), dimensions={0}
      ROOT %out = (s32[], bf16[8,128]{1,0}, bf16[512,128]{1,0}) tuple(%i, %held, %weight)
    }

    %condition (state: (s32[], bf16[8,128], bf16[512,128])) -> pred[] {
      %state = (s32[], bf16[8,128]{1,0}, bf16[512,128]{1,0}) parameter(0)
      %i = s32[] get-tuple-element(%state), index=0
      %three = s32[] constant(3)
      ROOT %less = pred[] compare(%i, %three), direction=LT
    }

    ENTRY %main (cache: bf16[8,128], weight: bf16[512,128]) -> bf16[8,128] {
      %cache = bf16[8,128]{1,0} parameter(0)
      %weight = bf16[512,128]{1,0} parameter(1)
      %zero = s32[] constant(0)
      %start = (s32[], bf16[8,128]{1,0}, bf16[512,128]{1,0}) tuple(%zero, %cache, %weight)
      %loop = (s32[], bf16[8,128]{1,0}, bf16[512,128]{1,0}) while(%start), condition=%condition, body=%body
      %reduced = bf16[8,128]{1,0} all-reduce(%cache), replica_groups={{0,1}}, to_apply=%sum
      ROOT %result = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
    }
""")  # noqa: E501


def test_a_loop_counts_times_its_trips():
    found = hlo.count(TPU, clock=1e6)
    (loop,) = found.loops
    assert loop.trips == 3  # read off its condition
    weight, row, order = 512 * 128 * 2, 128 * 2, 1024 * 4
    # The product reads the weight, the cache is written one row, the copy reads and writes; the
    # sort has no estimate. What lies on the chip is free, and the counter too small to matter.
    assert loop.cost.bytes == pytest.approx(weight + row + 2 * weight + order, abs=16)
    assert loop.cost.seconds == pytest.approx(500e-6)
    assert loop.cost.unestimated == pytest.approx(order, abs=8)
    assert loop.cost.flops == 2 * 512 * 128
    assert found.cost.flops == 3 * loop.cost.flops
    assert found.cost.bytes == pytest.approx(3 * loop.cost.bytes + 2 * 8 * 128 * 2, abs=64)
    assert found.products == {"bf16 x bf16 default": 3 * 2 * 512 * 128}
    (shared,) = found.collectives
    assert (shared.op, shared.what, shared.bytes, shared.times) == (
        "all-reduce", "bf16[8,128]", 2048, 1,
    )  # fmt: skip


def test_trips_as_the_compiler_states_them():
    text = TPU.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.count(text).loops[0].trips == 7


def test_copies_and_upcasts_of_a_megabyte_are_listed():
    large = TPU.replace("512", "8192")
    (copy,) = hlo.count(large).copies
    assert (copy.op, copy.what, copy.times) == ("copy", "bf16[8192,128]", 3)
    upcast = large.replace("bf16[8192,128]{0,1} copy(", "f32[8192,128]{0,1} convert(")
    (copy,) = hlo.count(upcast).copies
    assert (copy.op, copy.what, copy.bytes) == ("float32", "f32[8192,128]", 8192 * 128 * 4)
    assert not hlo.count(TPU).copies
    # Between HBM and the chip is no copy.
    read = large.replace("{0,1} copy(", "{0,1:S(1)} copy(")
    assert not hlo.count(read).copies


def test_small_intermediates_stay_in_a_gpu_s_cache_but_weights_and_caches_do_not():
    text = TPU.replace("S(1)", "").replace(":T(8,128)", "")
    every, some = (hlo.count(text, cached=n).loops[0].cost.bytes for n in (0, 2**20))
    weight, row = 512 * 128 * 2, 128 * 2
    assert every > some
    # The product and the copy read a weight, and a row of the cache is written; what the copy
    # writes, like the order and the product, is an intermediate.
    assert some == pytest.approx(2 * weight + row, abs=64)


def test_rates_give_every_kernel_of_a_loop_a_time():
    text = TPU.replace("S(1)", "").replace(":T(8,128)", "")
    plain = hlo.count(text).loops[0]
    timed = hlo.count(text, rates=hlo.Rates(bandwidth=1e9, flops=1e30, kernel=0.0)).loops[0]
    assert timed.cost.seconds == pytest.approx(plain.cost.bytes / 1e9)
    more = hlo.count(text, rates=hlo.Rates(bandwidth=1e9, flops=1e30, kernel=1.0)).loops[0]
    kernels = more.cost.seconds - timed.cost.seconds
    assert kernels == pytest.approx(round(kernels)) and kernels >= 3
    # A product that takes longer than its bytes is charged for its operations.
    slow = hlo.count(text, rates=hlo.Rates(bandwidth=1e30, flops=1e3, kernel=0.0)).loops[0]
    assert slow.cost.seconds == pytest.approx(plain.cost.flops / 1e3)


def test_the_flops_of_a_compiled_program():
    def two(x, w):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w @ w.T), ()), x, None, length=5)
        return x, jnp.einsum("bij,bkj->bik", w.reshape(4, 16, 32), w.reshape(4, 16, 32))

    x, w = jnp.ones((512, 64)), jnp.ones((64, 32))
    text = jax.jit(two).lower(x, w).compile().as_text()
    found = hlo.count(text)
    want = 5 * 2 * (2 * 512 * 64 * 32) + 2 * 4 * 16 * 16 * 32
    # Where XLA calls a library, there is no product in the text.
    assert found.cost.flops in (want, want - 2 * 4 * 16 * 16 * 32)
    assert found.loops[0].trips == 5


def test_branches_and_trips_that_the_data_decide():
    def rare(x, w):
        with jax.named_scope("rare"):
            return x @ w @ w @ w

    def program(x, w, flag, count):
        x = jax.lax.cond(flag, rare, lambda x, w: x @ w, x, w)

        def step(carry):
            i, x = carry
            return i + 1, jnp.tanh(x @ w)

        return jax.lax.while_loop(lambda carry: carry[0] * 4 < count, step, (0, x))[1]

    shapes = [jax.ShapeDtypeStruct(x, y) for x, y in (((8, 64), float), ((64, 64), float))]
    shapes += [jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((), jnp.int32)]
    text, one = jax.jit(program).lower(*shapes).compile().as_text(), 2 * 8 * 64 * 64
    for assumed, products in (
        ({}, 3 + 1), ({"trips": 5}, 3 + 5), ({"never": ("rare",), "trips": 5}, 1 + 5),
        ({"never": ("rarely", "cond")}, 3 + 1),
    ):  # fmt: skip
        assert hlo.count(text, assumed=hlo.Assumed(**assumed)).cost.flops == products * one


@pytest.mark.parametrize(
    ("line", "shapes", "want"),
    [
        # As TPU programs write a batched product: the batch is a window of which one place counts.
        ("f32[8,8,4,1280] convolution(%a, %b), window={size=8x8 stride=7x7 lhs_dilate=8x8}, "
         "dim_labels=01bf_01oi->01bf", ("bf16[8,8,4,128]", "bf16[8,8,1280,128]"),
         2 * 64 * 4 * 1280 * 128),
        # And one whose heads are an axis of a weight.
        ("bf16[8,32,128] convolution(%a, %b), window={size=32 pad=31_31 rhs_reversal=1}, "
         "dim_labels=bf0_i0o->b0f", ("bf16[8,2560,1]", "bf16[2560,32,128]"),
         2 * 8 * 32 * 128 * 2560),
    ],
)  # fmt: skip
def test_products_in_the_form_of_convolutions(line, shapes, want):
    text = "\n".join([
        "HloModule x", "", "ENTRY %main (a: f32[], b: f32[]) -> f32[] {",
        f"  %a = {shapes[0]} parameter(0)", f"  %b = {shapes[1]} parameter(1)",
        f"  ROOT %c = {line}", "}",
    ])  # fmt: skip
    assert hlo.count(text).cost.flops == want
