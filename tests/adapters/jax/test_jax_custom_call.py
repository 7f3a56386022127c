"""Kernels in JAX's programs: when a program calls them, and that no bit depends on it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fused_arrays import DTYPES, RATES, fused, get_output, random_patterns, subsets
from fused_arrays import assert_bits as assert_patterns
from jax_by_the_core import KEY, RATE, assert_bits, step_function, values, wanted

import unidrop
from unidrop import Key
from unidrop.adapters.jax import custom_call, dropout, primitive
from unidrop.fused import xla

CALL = "stablehlo.custom_call @unidrop_"


def compile_and_check(f, *args):
    """Return a compiled function, whose program must call kernels."""
    lowered = jax.jit(f).lower(*args)
    assert CALL in lowered.as_text()
    return lowered.compile()


def count_calls(f, *args):
    """Return how many calls of kernels a new program has: JAX caches programs by function."""
    return jax.jit(lambda *args: f(*args)).lower(*args).as_text().count(CALL)


def normal_patterns(shape, name):
    """Return an array of random bits without the subnormal numbers that XLA flushes to 0."""
    x = random_patterns(shape, name).reshape(-1)
    components = x.view(f"f{x.itemsize // 2}") if x.dtype.kind == "c" else x
    if name != "float16":
        with np.errstate(invalid="ignore"):
            is_tiny = np.abs(components) < ml_dtypes.finfo(components.dtype).tiny
            components[is_tiny & (components != 0)] = 3
    return x.reshape(shape)


@pytest.mark.parametrize("name", DTYPES)
def test_gives_bits_of_kernels_for_each_dtype(name):
    shapes = [(), (1,), (129,), (3, 41), (2, 3, 5, 7)]
    with jax.enable_x64(True):
        for shape, p in zip(shapes, RATES, strict=False):
            x = normal_patterns(shape, name)
            y = compile_and_check(lambda v, key, p=p: dropout(v, p, key), x, KEY)(x, KEY)
            assert_patterns(np.asarray(y), fused(x, p, KEY))


def test_gives_bits_of_kernels_for_broadcast_axes():
    x = values((4, 5, 6))
    for axes in subsets(3):
        f = compile_and_check(lambda v, axes=axes: dropout(v, RATE, KEY, broadcast_dims=axes), x)
        assert_bits(f(x), wanted(x, broadcast_axes=axes))


WINDOWS = [
    ((7, 9), (40, 50), (3, 4)),
    ((7, 9), (2**32, 2**32), (2**32 - 7, 2**32 - 9)),
    ((2, 3, 5), (4, 6, 7), (1, 2, 2)),
    ((9,), (2**63,), (2**63 - 9,)),
]


@pytest.mark.parametrize(("shape", "whole", "start"), WINDOWS, ids=str)
def test_gives_window_with_known_start(shape, whole, start):
    x = values(shape)
    f = compile_and_check(lambda v: dropout(v, RATE, KEY, global_shape=whole, start=start), x)
    assert_bits(f(x), wanted(x, global_shape=whole, start=start))


@pytest.mark.parametrize(("shape", "whole", "start"), WINDOWS, ids=str)
def test_gives_window_with_traced_starts(shape, whole, start):
    x = values(shape)

    def drop(v, key, *start):
        return dropout(v, RATE, key, global_shape=whole, start=start)

    with jax.enable_x64(True):
        starts = [np.uint64(s) for s in start]
        f = compile_and_check(drop, x, KEY, *starts)
        assert_bits(f(x, KEY, *starts), wanted(x, global_shape=whole, start=start))
        first = compile_and_check(lambda v, key, s: drop(v, key, s, *start[1:]), x, KEY, starts[0])
        assert_bits(first(x, KEY, starts[0]), wanted(x, global_shape=whole, start=start))


def test_gives_batch_of_windows_and_keys():
    xs = values((3, 2, 4, 9))
    keys = [[Key(n).fold_in(m) for m in range(2)] for n in range(3)]
    words = [jnp.asarray([[key.words[i] for key in row] for row in keys], "uint32") for i in (0, 1)]
    rows = jnp.asarray([5, 0, 60])

    def drop(x, lo, hi, row):
        key = Key.from_words(lo, hi)
        return dropout(x, RATE, key, global_shape=(64, 11), start=(row, 2))

    f = jax.vmap(jax.vmap(drop, (0, 0, 0, None)))
    ys = compile_and_check(f, xs, *words, rows)(xs, *words, rows)
    for n, m in np.ndindex(3, 2):
        options = {"global_shape": (64, 11), "start": (int(rows[n]), 2)}
        assert_bits(ys[n, m], wanted(xs[n, m], keys[n][m], **options))


def test_gives_one_mask_to_batch_under_one_key():
    xs = values((3, 2, 33))
    ys = compile_and_check(jax.vmap(jax.vmap(lambda v: dropout(v, RATE, KEY))), xs)(xs)
    for n, m in np.ndindex(3, 2):
        assert_bits(ys[n, m], wanted(xs[n, m]))


def test_gives_large_array():
    x = np.arange(1, 1 << 23 | 9, dtype="float32")  # large enough for advice on huge pages
    y = compile_and_check(step_function, x, 0)(x, 5)
    assert_bits(y, fused(x, RATE, KEY.fold_in(5)))


def test_calls_kernels_in_gradient():
    x, upstream = values((3, 70)), values((3, 70)) + 9

    def pull(v, u, step):
        return jax.vjp(lambda v: step_function(v, step), v)[1](u)[0]

    assert count_calls(pull, x, upstream, 0) == 1  # the forward pass is not used
    assert_bits(jax.jit(pull)(x, upstream, 3), wanted(upstream, KEY.fold_in(3)))
    assert count_calls(lambda v: jax.grad(lambda v: (step_function(v, 0) ** 2).sum())(v), x) == 2


def test_calls_kernels_in_loop():
    def loop(x, steps):
        return jax.lax.scan(lambda y, step: (step_function(y, step), y.sum()), x, steps)[0]

    x, steps = values((40, 7)), jnp.arange(3)
    expected = x
    for step in range(3):
        expected = wanted(expected, KEY.fold_in(step))
    assert_bits(compile_and_check(loop, x, steps)(x, steps), expected)


def test_gives_bits_in_donated_array():
    x = values((64, 65))
    f = jax.jit(step_function, donate_argnums=0)
    assert_bits(f(jnp.array(x), 3), wanted(x, KEY.fold_in(3)))


def test_compiles_one_eager_program_for_keys_and_rates():
    x = jnp.asarray(values((3, 17)))
    dropout(x, RATE, KEY)
    before = primitive.count_programs()
    for step in range(5):
        key, rate = KEY.fold_in(step), 0.1 + step / 10
        assert_bits(dropout(x, rate, key), wanted(x, key, rate))
        pull = jax.vjp(lambda v, rate=rate, key=key: dropout(v, rate, key), x)[1]
        assert_bits(pull(x)[0], wanted(x, key, rate))
    assert primitive.count_programs() == before


@pytest.mark.parametrize("size", [primitive._LARGE - 1, primitive._LARGE])
def test_gives_bits_of_eager_array_below_and_above_program(size):
    x = jnp.asarray(values((size,)))
    before = primitive._get_program.cache_info().misses
    assert_bits(dropout(x, RATE, KEY), wanted(x))
    assert primitive._get_program.cache_info().misses - before == int(size < primitive._LARGE)


def test_gives_bits_of_eager_array_on_forced_path():
    x = jnp.asarray(values((33, 3)))
    for path in ("fused", "portable"):
        before = primitive._run._cache_size()
        with unidrop.force_path(path):
            assert_bits(dropout(x, RATE, KEY), wanted(x))
        assert primitive._run._cache_size() - before == int(path == "portable")


@pytest.mark.parametrize("path", ["fused", "portable"])
def test_transfers_numbers_of_a_call_under_guard(path):
    x, upstream = jnp.asarray(values((33, 3))), jnp.asarray(values((33, 3)))
    with jax.transfer_guard("disallow"):
        with unidrop.force_path(path):
            y = dropout(x, RATE, KEY)
        gradient = jax.vjp(lambda v: dropout(v, RATE, KEY), x)[1](upstream)[0]
    assert_bits(y, wanted(x))
    assert_bits(gradient, wanted(upstream))


def test_calls_kernels_in_eager_batch():
    xs, rows = jnp.asarray(values((3, 2, 9))), jnp.asarray([5, 0, 60])

    def drop(x, row):
        key = KEY.fold_in(row)
        return dropout(x, RATE, key, global_shape=(64, 11), start=(row, 2))

    before = primitive._run._cache_size()
    ys = jax.vmap(drop)(xs, rows)
    assert primitive._run._cache_size() == before
    for x, y, row in zip(xs, ys, rows.tolist(), strict=True):
        options = {"global_shape": (64, 11), "start": (row, 2)}
        assert_bits(y, wanted(x, KEY.fold_in(row), **options))


def test_calls_no_kernels_in_program_that_closes_over_array():
    x = jnp.asarray(values((33,)))
    exported = jax.export.export(jax.jit(lambda: dropout(x, RATE, KEY)))()
    assert CALL not in exported.mlir_module()
    assert_bits(exported.call(), wanted(x))


def test_calls_no_kernels_on_portable_path():
    def drop(x):
        with unidrop.force_path("portable"):
            return dropout(x, RATE, KEY)

    x = values((33,))
    assert count_calls(jax.grad(lambda x: (drop(x) ** 2).sum()), x) == 0
    assert_bits(jax.jit(drop)(x), wanted(x))


@pytest.mark.parametrize("platforms", [None, ["cpu"], ["cpu", "cuda", "tpu"]], ids=str)
def test_exports_no_call_of_kernels(platforms):
    exported = jax.export.export(jax.jit(step_function), platforms=platforms)(values((33,)), 0)
    assert CALL not in exported.mlir_module()
    assert CALL not in exported.vjp().mlir_module()


def test_calls_no_kernels_in_program_for_another_platform():
    lowered = jax.jit(step_function).trace(values((33,)), 0).lower(lowering_platforms=("cuda",))
    assert CALL not in lowered.as_text()


def test_calls_no_kernels_for_empty_batch():
    assert jax.jit(jax.vmap(lambda v: dropout(v, RATE, KEY)))(jnp.ones((0, 3))).shape == (0, 3)


def make_call(shape, strides):
    return custom_call.make_call(np.dtype("float32"), shape, strides, 0, (), 1)


def test_holds_no_address_in_program():
    assert max(map(abs, make_call((3, 70), (70, 1)).numbers)) < 1 << 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_API_VERSION", (0, 99)),
        ("_API_VERSION", (1, 3)),
        *(("_SIZES", xla._SIZES | {field: 56}) for field in xla._SIZES),
        ("_METADATA_SIZE", 99),
    ],
    ids=str,
)
def test_falls_back_if_interface_of_xla_differs(monkeypatch, request, name, value):
    # XLA keeps the handlers of a process, so this one needs its own name.
    monkeypatch.setattr(custom_call, "_targets", {})
    monkeypatch.setattr(custom_call, "_VERSION", request.node.name)
    monkeypatch.setattr(xla, name, value)
    x = values((33,))
    assert count_calls(step_function, x, 3) == 0
    assert_bits(jax.jit(lambda x: step_function(x, 3))(x), wanted(x, KEY.fold_in(3)))


WITHOUT_KERNELS = """
import sys
sys.modules[{missing!r}] = None
import jax
from unidrop import Key
from unidrop.adapters.jax import dropout
f = jax.jit(lambda x, key: dropout(x, 0.5, key))
assert "custom_call" not in f.lower(jax.numpy.ones(6), Key(42)).as_text()
print(f(jax.numpy.ones(6), Key(42)).tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["llvmlite", "unidrop.fused"])
def test_falls_back_without_kernels(missing):
    assert get_output(WITHOUT_KERNELS.format(missing=missing)) == ["[2.0, 0.0, 0.0, 0.0, 0.0, 2.0]"]


def test_raises_for_operands_of_another_version():
    x = jnp.ones(3)
    compile_and_check(step_function, x, 0)
    target = make_call((3,), (1,)).target
    for operands, numbers in [((x,), np.arange(99)), ((x, x, x, x), np.arange(9))]:
        call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(x.shape, x.dtype))
        with pytest.raises(jax.errors.JaxRuntimeError, match="a call that it does not know"):
            jax.jit(lambda *v, call=call, n=numbers: call(*v, numbers=n))(*operands)
