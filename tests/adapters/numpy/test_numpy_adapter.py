"""Tests of the NumPy adapter: the textbook's form, SPEC 7's rng, out=, and the backward pass."""

import re

import ml_dtypes
import numpy as np
import pytest
import reference

import unidrop
from unidrop import Key
from unidrop.adapters.numpy import dropout, dropout_backward

KEY = Key(42).fold_in("encoder/0").fold_in(7)
X = np.random.default_rng(0).standard_normal((3, 37))
MASK = np.reshape(reference.keep_mask(X.shape, 0.5, int(KEY)), X.shape).astype(bool)

FUNCTIONS = {
    "dropout": lambda x, *args, **kwargs: dropout(x, *args, **{"key": KEY} | kwargs),
    "dropout_backward": lambda x, *args, **kwargs: dropout_backward(
        x, *args, **{"key": KEY} | kwargs
    ),
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    """Return forward and backward in turn: the same function of its first argument, under a key."""
    return FUNCTIONS[request.param]


def assert_same_bits(actual, expected):
    """Compare two arrays: type, shape, dtype and bits."""
    assert type(actual) is np.ndarray
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def state(generator):
    """Return what a generator's next draws depend on."""
    return generator.bit_generator.state


# --- The textbook's function -------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "complex64", ml_dtypes.bfloat16]
)
@pytest.mark.parametrize("p", [0.1, 0.5, 1])
def test_the_output_is_the_cores(function, dtype, p):
    x = X.astype(dtype)
    assert_same_bits(function(x, p), unidrop.dropout(x, p, KEY))


def test_the_rate_is_a_half_by_default(function):
    assert_same_bits(function(X), np.where(MASK, X * 2, 0))


@pytest.mark.parametrize("keep_prob", [0.0, 0.1, 0.7, 0.8, 1.0, 1, np.float64(0.7)])
def test_keep_prob_gives_the_output_and_mask_of_the_rest_to_1(keep_prob):
    output, mask = dropout(X, keep_prob=keep_prob, key=KEY, return_mask=True)
    p = 1.0 - float(keep_prob)
    keep = reference.keep_mask(X.shape, p, int(KEY))
    bits = reference.dropout_bits(X.ravel().view("u8").tolist(), "float64", keep, p)
    np.testing.assert_array_equal(mask, np.reshape(keep, X.shape).astype(bool), strict=True)
    assert output.ravel().view("u8").tolist() == bits


def test_keep_prob_is_the_backward_calls_too():
    expected = dropout_backward(X, 1.0 - 0.7, key=KEY)
    assert_same_bits(dropout_backward(X, keep_prob=0.7, key=KEY), expected)


def test_lists_of_floats_are_arrays(function):
    assert_same_bits(function([1.0, 2.0, 3.0]), function(np.asarray([1.0, 2.0, 3.0])))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)], ids=str)
def test_0_d_and_empty_arrays_keep_their_shape(function, shape):
    x = np.ones(shape, "float32")
    assert_same_bits(function(x), unidrop.dropout(x, 0.5, KEY))


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), -1], ids=str)
def test_broadcast_axes_share_a_decision(axes):
    output, mask = dropout(X, key=KEY, broadcast_axes=axes, return_mask=True)
    expected = unidrop.keep_mask(X.shape, 0.5, KEY, broadcast_axes=axes)
    np.testing.assert_array_equal(mask, expected, strict=True)
    assert_same_bits(output, np.where(expected, X * 2, 0))


@pytest.mark.parametrize("options", [{"p": 0}, {"training": False}, {"keep_prob": 1.0}], ids=str)
def test_where_nothing_is_dropped_the_input_itself_is_returned(function, options):
    assert function(X, **options) is X


@pytest.mark.parametrize("options", [{"p": 0}, {"training": False}], ids=str)
def test_where_nothing_is_dropped_the_mask_keeps_everything(options):
    output, mask = dropout(X, key=KEY, broadcast_axes=(0,), return_mask=True, **options)
    assert output is X
    np.testing.assert_array_equal(mask, np.ones((1, 37), bool), strict=True)


# --- Memory layouts ----------------------------------------------------------------------------


def readonly(x):
    """Return a copy that cannot be written to."""
    copy = x.copy()
    copy.flags.writeable = False
    return copy


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "transposed": lambda x: x.T,
    "every second": lambda x: x[:, ::2],
    "negative strides": lambda x: x[::-1, ::-1],
    "broadcast": lambda x: np.broadcast_to(x[0], (3, 37)),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "read-only": readonly,
    "unaligned": lambda x: np.frombuffer(b"0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_the_mask_follows_logical_indices_in_every_layout(function, layout, dtype):
    x = LAYOUTS[layout](X.astype(dtype))
    before = x.copy()
    output = function(x, 0.1)
    assert output.dtype == x.dtype
    np.testing.assert_array_equal(output, function(np.array(x, dtype, order="C"), 0.1))
    np.testing.assert_array_equal(x, before)


# --- rng ---------------------------------------------------------------------------------------


def test_a_generator_is_advanced_by_one_64_bit_draw_which_is_the_key():
    generator, twin = np.random.default_rng(5), np.random.default_rng(5)
    output = dropout(X, rng=generator)
    key = Key(int(twin.integers(0, 2**64, dtype=np.uint64)))
    assert_same_bits(output, dropout(X, key=key))
    assert state(generator) == state(twin)


def test_a_generator_gives_another_mask_at_each_call():
    generator = np.random.default_rng(5)
    assert not np.array_equal(dropout(X, rng=generator), dropout(X, rng=generator))


@pytest.mark.parametrize(
    "rng",
    [5, np.int64(5), np.random.SeedSequence(5), np.random.PCG64(5)],
    ids=lambda rng: type(rng).__name__,
)
def test_what_default_rng_takes_seeds_the_same_mask(rng):
    assert_same_bits(dropout(X, rng=rng), dropout(X, rng=np.random.default_rng(5)))


def test_without_key_and_rng_each_call_has_a_mask_of_its_own():
    assert not np.array_equal(dropout(X), dropout(X))


def test_without_key_and_rng_numpys_global_state_is_left_alone():
    before = np.random.get_state()[1].tolist()
    dropout(X)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize(
    "options", [{"p": 0}, {"p": 0.0}, {"training": False}, {"keep_prob": 1}], ids=str
)
def test_where_nothing_is_dropped_nothing_is_drawn(options):
    generator = np.random.default_rng(5)
    before = state(generator)
    dropout(X, rng=generator, **options)
    assert state(generator) == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"x": [1, 2]}, TypeError),
        ({"p": 1.5}, ValueError),
        ({"p": True}, TypeError),
        ({"keep_prob": -0.5}, ValueError),
        ({"p": 0.1, "keep_prob": 0.9}, ValueError),
        ({"key": KEY}, ValueError),
        ({"key": 42}, TypeError),
        ({"broadcast_axes": (2,)}, ValueError),
        ({"out": [0.0]}, TypeError),
        ({"out": np.zeros(3)}, ValueError),
        ({"out": readonly(X)}, ValueError),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else value.__name__,
)
def test_a_call_that_raises_draws_nothing(options, error):
    generator = np.random.default_rng(5)
    before = state(generator)
    with pytest.raises(error):
        dropout(**{"x": X, "rng": generator} | options)
    assert state(generator) == before


@pytest.mark.parametrize(
    ("rng", "error"), [(-1, ValueError), (1.5, TypeError), ("5", TypeError)], ids=repr
)
def test_what_default_rng_does_not_take_raises_and_is_named(rng, error):
    with pytest.raises(error, match=rf"rng.*{re.escape(str(rng))}"):
        dropout(X, rng=rng)


def test_both_key_and_rng_raise_and_are_named():
    with pytest.raises(ValueError, match=re.escape(f"got key={KEY!r} and rng=5")):
        dropout(X, key=KEY, rng=5)


# --- out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"p": 0.1}, {"p": 1}, {"p": 0}, {"training": False}])
def test_out_receives_the_output_and_is_returned(function, options):
    out = np.full_like(X, 7)
    assert function(X, out=out, **options) is out
    assert_same_bits(out, function(X, **options))


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"p": 0}, {"training": False}])
def test_out_may_be_the_input(function, options):
    x = X.copy()
    assert function(x, out=x, **options) is x
    assert_same_bits(x, function(X, **options))


def test_out_may_overlap_the_input(function):
    x = X.copy()
    function(x, out=x[::-1])
    assert_same_bits(np.ascontiguousarray(x[::-1]), function(X))


def test_out_may_have_any_strides(function):
    out = np.zeros((37, 3)).T
    function(X, out=out)
    np.testing.assert_array_equal(out, function(X))


def test_out_may_be_0_d(function):
    out = np.zeros(())
    assert function(np.ones(()), out=out) is out
    assert out == function(np.ones(()))


def test_out_is_the_first_of_output_and_mask():
    out = np.zeros_like(X)
    output, mask = dropout(X, key=KEY, out=out, return_mask=True)
    assert output is out
    np.testing.assert_array_equal(mask, MASK, strict=True)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.zeros((37, 3)), ValueError, "shape (3, 37) and dtype float64, got shape (37, 3)"),
        (np.zeros(37), ValueError, "got shape (37,)"),
        (np.zeros((1, 3, 37)), ValueError, "got shape (1, 3, 37)"),
        (np.zeros((3, 37), "float32"), ValueError, "and dtype float32"),
        (np.zeros((3, 37), ">f8"), ValueError, "and dtype >f8"),
        (np.zeros((3, 37), "int64"), ValueError, "and dtype int64"),
        (X.tolist(), TypeError, "numpy.ndarray, got list"),
    ],
    ids=["transposed", "shorter", "longer", "float32", "big-endian", "int64", "list"],
)
def test_an_out_that_does_not_fit_raises_is_named_and_stays_untouched(
    function, out, error, message
):
    before = np.copy(out)
    with pytest.raises(error, match=r"^out must .*" + re.escape(message)):
        function(X, out=out)
    np.testing.assert_array_equal(out, before)


def test_a_read_only_out_raises_and_is_named(function):
    with pytest.raises(ValueError, match=r"^out must be writeable"):
        function(X, out=readonly(X))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"p": 1.5}, ValueError),
        ({"keep_prob": 1.5}, ValueError),
        ({"key": 42}, TypeError),
        ({"broadcast_axes": (2,)}, ValueError),
    ],
    ids=str,
)
def test_a_call_that_raises_leaves_out_untouched(function, options, error):
    out = np.full_like(X, 7)
    with pytest.raises(error):
        function(X, out=out, **options)
    np.testing.assert_array_equal(out, 7)


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), 2], ids=repr)
@pytest.mark.parametrize("name", ["p", "keep_prob"])
def test_a_rate_outside_0_and_1_raises_and_is_named(function, name, value, training):
    with pytest.raises(ValueError, match=rf"{name} has to be between 0 and 1, but got {value}"):
        function(X, training=training, **{name: value})


@pytest.mark.parametrize("value", [True, np.float32(0.5), "0.5", np.asarray(0.5)], ids=repr)
@pytest.mark.parametrize("name", ["p", "keep_prob"])
def test_a_rate_that_is_no_python_number_raises_and_is_named(function, name, value):
    with pytest.raises(TypeError, match=rf"{name} must be .*got {re.escape(repr(value))}"):
        function(X, **{name: value})


def test_both_rates_raise_and_are_named(function):
    with pytest.raises(ValueError, match=re.escape("got p=0.1 and keep_prob=0.9")):
        function(X, 0.1, keep_prob=0.9)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int64", "uint32"])
@pytest.mark.parametrize("training", [True, False])
def test_integers_raise_and_the_argument_and_its_dtype_are_named(function, dtype, training):
    with pytest.raises(TypeError, match=rf"^(x|grad) must be of a floating.*{dtype}"):
        function(np.ones(3, dtype), training=training)


@pytest.mark.parametrize("x", [[1, 2], 3, "text", None, [True]], ids=repr)
def test_what_is_no_array_of_floats_raises_and_is_named(x):
    with pytest.raises(TypeError, match=r"^x must be of a floating-point dtype"):
        dropout(x, key=KEY)


def test_the_backward_call_names_its_own_argument():
    with pytest.raises(TypeError, match=r"^grad must be of a floating-point dtype"):
        dropout_backward([1, 2], key=KEY)


@pytest.mark.parametrize("key", [42, "encoder", 0.5], ids=repr)
def test_a_key_that_is_none_raises_and_is_named(function, key):
    with pytest.raises(TypeError, match=rf"key must be a unidrop.Key.*{re.escape(repr(key))}"):
        function(X, key=key)


# --- The backward pass -------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 1])
@pytest.mark.parametrize("axes", [(), (0,), (1,)], ids=str)
@pytest.mark.parametrize("by", ["key", "mask"])
def test_the_backward_pass_is_the_numerical_gradient(p, axes, by):
    options = {"broadcast_axes": axes}
    upstream = np.random.default_rng(1).standard_normal(X.shape)
    _, mask = dropout(X, p, key=KEY, return_mask=True, **options)
    kept = {"key": KEY} if by == "key" else {"mask": mask}
    numerical = np.empty_like(X)
    for index in np.ndindex(X.shape):
        step = np.zeros_like(X)
        step[index] = 0.5  # dropout is linear: any step gives the slope
        difference = dropout(X + step, p, key=KEY, **options) - dropout(
            X - step, p, key=KEY, **options
        )
        numerical[index] = (difference * upstream).sum()
    np.testing.assert_allclose(
        dropout_backward(upstream, p, **kept, **options), numerical, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "complex64", ml_dtypes.bfloat16]
)
@pytest.mark.parametrize("axes", [(), (0,), (0, 1)], ids=str)
def test_the_backward_pass_by_mask_has_the_bits_of_that_by_key(dtype, axes):
    grad = X.astype(dtype)
    _, mask = dropout(grad, 0.1, key=KEY, broadcast_axes=axes, return_mask=True)
    by_mask = dropout_backward(grad, 0.1, mask=mask, broadcast_axes=axes)
    assert_same_bits(by_mask, dropout_backward(grad, 0.1, key=KEY, broadcast_axes=axes))


def test_a_mask_may_be_a_list():
    grad = np.ones(3)
    actual = dropout_backward(grad, 0.5, mask=[True, False, True])
    assert_same_bits(actual, np.asarray([2.0, 0.0, 2.0]))


def test_a_masked_nan_of_the_upstream_gradient_is_dropped():
    grad = np.asarray([np.nan, np.inf, 1.0])
    actual = dropout_backward(grad, 0.5, mask=np.asarray([False, False, True]))
    assert_same_bits(actual, np.asarray([0.0, 0.0, 2.0]))


@pytest.mark.parametrize("options", [{"p": 0}, {"training": False}], ids=str)
def test_where_nothing_was_dropped_the_backward_pass_needs_neither_key_nor_mask(options):
    assert dropout_backward(X, **options) is X


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got key=None and mask=None"),
        ({"key": KEY, "mask": MASK}, f"got key={KEY!r} and mask="),
    ],
    ids=["neither", "both"],
)
def test_the_backward_pass_takes_either_key_or_mask(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dropout_backward(X, **options)


@pytest.mark.parametrize("dtype", ["int64", "float64", "uint8"])
def test_a_mask_of_another_dtype_raises_and_is_named(dtype):
    with pytest.raises(TypeError, match=rf"^mask must be of bool, got dtype {dtype}"):
        dropout_backward(X, mask=MASK.astype(dtype))


@pytest.mark.parametrize(
    ("mask", "axes"),
    [(MASK.T, ()), (MASK[:1], ()), (MASK, (0,)), (MASK[None], ())],
    ids=["transposed", "too short", "without the broadcast axis", "with another axis"],
)
def test_a_mask_of_another_shape_raises_and_is_named(mask, axes):
    with pytest.raises(ValueError, match=rf"^mask must have shape .*{re.escape(str(mask.shape))}"):
        dropout_backward(X, mask=mask, broadcast_axes=axes)


@pytest.mark.parametrize("rng", [True, False])
def test_a_bool_is_no_rng(rng):
    with pytest.raises(TypeError, match=f"rng.*{rng}"):
        dropout(X, rng=rng)


def test_an_array_of_rates_raises_and_is_named():
    with pytest.raises(TypeError, match=r"probability p must be a Python int or float"):
        dropout(X, np.array([0.1, 0.2]), keep_prob=0.5, key=Key(1))
