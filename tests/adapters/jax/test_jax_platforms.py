"""Programs for platforms other than the CPU: what they contain, and their bits on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_by_the_core import KEY, RATE, assert_bits, step_function, values, wanted
from jax_off_the_cpu import lower_as_off_the_cpu

import unidrop
from unidrop.adapters.jax import dropout, generator
from unidrop.adapters.jax.generator import keep_flags, keep_flags_by_loop


@pytest.fixture
def off_the_cpu():
    with lower_as_off_the_cpu():
        yield


def _batch(x, step):
    return jax.vmap(lambda row, i: step_function(row, i))(x, step + jnp.arange(len(x)))


def _window(x, step):
    return dropout(x, RATE, KEY, global_shape=(99, 11), start=(step, 2))


PROGRAMS = {
    "forward": step_function,
    "gradient": lambda x, step: jax.grad(lambda v: (step_function(v, step) ** 2).sum())(x),
    "batch": _batch,
    "window": _window,
    "broadcast": lambda x, step: dropout(x, RATE, KEY.fold_in(step), broadcast_dims=(0,)),
    "mask": lambda x, step: dropout(x, RATE, KEY.fold_in(step), return_mask=True),
}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_lowers_to_few_operations_without_loop(name, platform):
    x, step = jnp.ones((8, 9)), jnp.uint32(3)
    exported = jax.export.export(jax.jit(PROGRAMS[name]), platforms=[platform])(x, step)
    program = exported.mlir_module()
    assert "xor" in program
    for operation in ("while", "gather", "scatter", "concatenate", "custom_call"):
        assert f"stablehlo.{operation}" not in program
    # The generator has 20 products. It runs for the key, and for the mask of each pass.
    assert 20 <= program.count("stablehlo.multiply") <= 75


@pytest.mark.parametrize(("platform", "barriers"), [("cuda", [0, 1]), ("cpu", [0, 0])])
def test_hides_from_xla_that_passes_share_mask(platform, barriers):
    x, step = jnp.ones((8, 9)), jnp.uint32(3)
    programs = [
        jax.export.export(jax.jit(PROGRAMS[name]), platforms=[platform])(x, step).mlir_module()
        for name in ("forward", "gradient")
    ]
    assert [text.count("stablehlo.optimization_barrier") for text in programs] == barriers


def test_keeps_loop_for_cpu_in_program_of_both():
    x, step = values((8, 9000)), jnp.uint32(3)
    exported = jax.export.export(jax.jit(step_function), platforms=["cuda", "cpu"])(x, step)
    assert exported.mlir_module().count("stablehlo.while") == 2  # of the key and of the mask
    assert_bits(exported.call(x, step), wanted(x, KEY.fold_in(3)))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8, 9), (3, 1, 70), (2, 4099)])
@pytest.mark.parametrize("rate", [0.1, 0.75])
def test_gives_same_bits(off_the_cpu, shape, rate):
    x = values(shape)
    y, mask = jax.jit(lambda x, key: dropout(x, rate, key, return_mask=True))(x, KEY)
    expected = wanted(x, rate=rate)
    assert_bits(y, expected)
    assert_bits(mask, unidrop.keep_mask(shape, rate, KEY))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_gives_same_bits_and_gradient_in_dtype(off_the_cpu, dtype):
    x = jnp.asarray(values((3, 50)), dtype)
    y, pullback = jax.vjp(lambda v: jax.jit(dropout, static_argnums=1)(v, RATE, KEY), x)
    assert_bits(y, wanted(x))
    assert_bits(jax.jit(pullback)(x)[0], wanted(x))


WINDOWS = {
    "aligned": ((64, 16), (5, 8)),
    "unaligned": ((64, 13), (5, 3)),
    "in one row": ((5000,), (1237,)),
    "cube": ((9, 10, 24), (1, 2, 9)),
    "beyond 2^32": ((1 << 40, 16), (1 << 33, 8)),
    "far and unaligned": ((1 << 40, 13), ((1 << 36) + 5, 3)),
    "the end": ((1 << 60, 16), ((1 << 60) - 3, 8)),
    "rows far apart": ((7, 1 << 40), (2, (1 << 35) + 1)),
    "one row of all": ((1, 1 << 64), (0, (1 << 64) - 99)),
}


@pytest.mark.parametrize("axes", [(), (0,)])
@pytest.mark.parametrize("name", WINDOWS)
def test_gives_same_bits_of_window(off_the_cpu, name, axes):
    whole, start = WINDOWS[name]
    x = values(tuple(min(n - s, size) for n, s, size in zip(whole, start, (3, 7, 9), strict=False)))
    options = {"global_shape": whole, "start": start}
    y = jax.jit(lambda x: dropout(x, RATE, KEY, broadcast_dims=axes, **options))(x)
    assert_bits(y, wanted(x, broadcast_axes=axes, **options))


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("mapped", [False, True])
def test_gives_same_bits_of_window_with_traced_start(off_the_cpu, name, mapped):
    whole, start = WINDOWS[name]
    x = values(tuple(min(n - s, size) for n, s, size in zip(whole, start, (3, 7, 9), strict=False)))
    with jax.enable_x64(True):
        traced = [jnp.asarray(s, np.uint64) for s in start]

        def f(x, *start):
            return dropout(x, RATE, KEY, global_shape=whole, start=start)

        if mapped:
            y = jax.jit(jax.vmap(f, in_axes=(None, *[0] * len(start))))(
                x, *(jnp.stack([s & 0, s]) for s in traced)
            )
            first = wanted(x, global_shape=whole, start=(0,) * len(whole))
            assert_bits(y[0], first)
            y = y[1]
        else:
            y = jax.jit(f)(x, *traced)
    assert_bits(y, wanted(x, global_shape=whole, start=start))


@pytest.mark.slow
def test_gives_each_example_the_mask_of_its_key(off_the_cpu):
    x = values((2, 3, 21))

    def f(row, i, j):
        return dropout(row, RATE, KEY.fold_in(i).fold_in(j))

    inner = jax.vmap(f, in_axes=(0, None, 0))
    y = jax.jit(jax.vmap(inner, in_axes=(0, 0, None)))(x, jnp.arange(2), jnp.arange(3))
    for i in range(2):
        for j in range(3):
            assert_bits(y[i, j], wanted(x[i, j], KEY.fold_in(i).fold_in(j)))
    shared = jax.jit(jax.vmap(jax.vmap(lambda row: dropout(row, RATE, KEY))))(x)
    assert_bits(shared[1, 2], wanted(x[1, 2]))


def test_gives_same_bits_with_64_bit_indices(off_the_cpu, monkeypatch):
    monkeypatch.setattr(generator, "_NARROW", 0)
    x = values((2, 3, 21))
    f = jax.vmap(lambda row, i: dropout(row, 0.21, KEY.fold_in(i)))  # a rate of this test alone
    y = jax.jit(f)(x, jnp.arange(2))
    for i in range(2):
        assert_bits(y[i], wanted(x[i], KEY.fold_in(i), 0.21))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 3])
def test_gives_same_keep_flags_in_eager_calls(monkeypatch, rows):
    def off_the_cpu(*args, cpu, default):
        return default(*args)

    hi, lo = np.uint32(7), np.uint32(2**32 - 3)
    if rows is not None:
        hi, lo = np.full((rows, 1), hi), np.arange(rows, dtype=np.uint32)[:, None]
    numbers = [jnp.asarray(n) for n in (hi, lo, *map(np.uint32, (*KEY.words, 1 << 31)))]
    expected = jax.jit(partial(keep_flags_by_loop, count=5))(*numbers)
    monkeypatch.setattr(jax.lax, "platform_dependent", off_the_cpu)
    with jax.disable_jit():
        assert_bits(keep_flags(*numbers, count=5), np.asarray(expected))
