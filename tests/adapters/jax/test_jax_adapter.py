"""Dropout for JAX: what it returns, and what it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax_by_the_core import KEY, RATE, assert_bits, step_function, values, wanted

import unidrop
from unidrop.adapters.jax import dropout
from unidrop.adapters.jax.generator import _generate_by_loop, _generate_unrolled


# Around the sizes at which the program changes: a block, a word of blocks, few blocks and many.
@pytest.mark.parametrize("size", [1, 7, 8, 33, 16383, 16384, 16385, 16416, 20001])
def test_gives_specified_mask_at_any_size(size):
    y = jax.jit(step_function)(jnp.ones(size), 5)
    mask = reference.keep_mask((size,), RATE, int(KEY.fold_in(5)))
    assert (np.asarray(y) != 0).astype(int).tolist() == mask


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("shape", [(5, 13), (3, 20000)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"broadcast_axes": (0,)},
        {"global_shape": (100, 30000), "start": (7, 13)},
        {"global_shape": (100, 2**35), "start": (7, 2**34 + 5)},
    ],
    ids=str,
)
def test_gives_windows_and_broadcast_axes_of_core(x64, shape, options):
    x = values(shape)
    with jax.enable_x64(x64):
        own = {("broadcast_dims" if n == "broadcast_axes" else n): v for n, v in options.items()}
        y = jax.jit(lambda x: dropout(x, RATE, KEY, **own))(jnp.asarray(x))
    assert_bits(y, wanted(x, **options))


@pytest.mark.parametrize("whole", [(64, 24), (64, 13)], ids=["whole blocks", "odd rows"])
def test_accepts_traced_start(whole):
    x = values((4, whole[1]))
    f = jax.jit(lambda x, row: dropout(x, RATE, KEY, global_shape=whole, start=(row, 0)))
    for row in (0, 3, 60):
        assert_bits(f(x, row), wanted(x, global_shape=whole, start=(row, 0)))


@pytest.mark.parametrize("row", [0, 2**33 + 5, 2**39 + 1])
def test_accepts_traced_start_of_64_bits(row):
    x, whole = values((4, 11)), (2**40, 11)
    with jax.enable_x64(True):
        f = jax.jit(lambda x, row: dropout(x, RATE, KEY, global_shape=whole, start=(row, 0)))
        y = f(x, np.int64(row))
    assert_bits(y, wanted(x, global_shape=whole, start=(row, 0)))


@pytest.mark.parametrize("size", [34, 20000])
def test_gives_same_bits_with_64_bit_numbers_and_without(size):
    x = values((size,))
    with jax.enable_x64(True):
        wide = np.asarray(jax.jit(step_function)(x, 3))
        mask = unidrop.keep_mask((size,), RATE, KEY.fold_in(3), xp=jnp)
    narrow = unidrop.keep_mask((size,), RATE, KEY.fold_in(3), xp=jnp)
    assert_bits(wide, wanted(x, KEY.fold_in(3)))
    assert_bits(narrow, np.asarray(mask))
    assert_bits(narrow, wide != 0)


def test_keeps_float64_lowered_where_it_is_disabled():
    x = values((100,), "float64")
    with jax.enable_x64(True):
        traced = jax.jit(lambda x: dropout(x, RATE, KEY)).trace(jnp.asarray(x))
        y = traced.lower().compile()(jnp.asarray(x))
    assert_bits(y, wanted(x))


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_accepts_numpy_arrays(dtype):
    x = values((33,)).astype(dtype)
    y = dropout(x, RATE, KEY)
    assert isinstance(y, jax.Array)
    assert_bits(y, wanted(x))


def test_accepts_python_number():
    assert dropout(1.0, 0.999999, KEY).shape == ()


@pytest.mark.parametrize("x", [[1.0, 2.0], "x", None], ids=str)
def test_rejects_non_array(x):
    with pytest.raises(TypeError, match=r"x must be a jax\.Array"):
        dropout(x, RATE, KEY)


def test_returns_x_without_key_if_nothing_is_dropped():
    x = jnp.ones(3)
    assert dropout(x, RATE, deterministic=True) is x
    assert dropout(x, 0.0) is x
    y, mask = dropout(x, RATE, deterministic=True, return_mask=True)
    assert y is x
    assert mask.all()


class Variable:
    """A variable of a module, which holds an array of NumPy, as `nnx.Param(np.ones(3))` does."""

    def __jax_array__(self):
        return np.ones(3)


def test_returns_array_of_jax_for_variable_of_numpy():
    x = np.ones(3, "float32")
    for options, expected in (({}, wanted(x)), ({"deterministic": True}, x)):
        y = dropout(Variable(), RATE, KEY, **options)
        assert isinstance(y, jax.Array)
        assert_bits(y, expected)


def test_returns_mask_of_its_output():
    x = jnp.ones((5, 7))
    y, mask = jax.jit(lambda x: dropout(x, RATE, KEY, return_mask=True))(x)
    assert_bits(np.asarray(y) != 0, np.asarray(mask))
    assert_bits(y, wanted(x))


@pytest.mark.parametrize("rate", [float("nan"), -0.1, 1.1])
def test_rejects_bad_rate(rate):
    with pytest.raises(ValueError, match=r"rate has to be between 0 and 1"):
        dropout(jnp.ones(3), rate, KEY)


@pytest.mark.parametrize("rate", [1, True, [0.5], jnp.float16(0.5)], ids=repr)
def test_rejects_traced_rate_of_other_dtype_or_shape(rate):
    with pytest.raises(TypeError, match="rate must be a Python int or float"):
        jax.jit(lambda rate: dropout(jnp.ones(3), rate, KEY))(jnp.asarray(rate))


def test_generates_same_words_on_devices_that_unroll():
    numbers = [jnp.uint32(n) for n in (1, 2, 3, 4, 5, 6)]
    expected = reference.philox((1, 2, 3, 4), (5, 6))
    for generate in (_generate_unrolled, _generate_by_loop):
        assert [int(word) for word in generate(*numbers)] == list(expected)
