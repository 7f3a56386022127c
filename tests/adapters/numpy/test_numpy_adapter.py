"""Tests of the NumPy adapter: the textbook's form, SPEC 7's rng, out=, and the backward pass."""

import re
from contextlib import nullcontext
from functools import partial

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
import reference

import unidrop
from unidrop import Key, keep_mask
from unidrop.adapters.numpy import dropout, dropout_backward
from unidrop.adapters.numpy.arrays import get_address

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
def test_gives_output_of_core(function, dtype, p):
    x = X.astype(dtype)
    assert_same_bits(function(x, p), unidrop.dropout(x, p, KEY))


def test_defaults_to_rate_of_one_half(function):
    assert_same_bits(function(X), np.where(MASK, X * 2, 0))


@pytest.mark.parametrize("keep_prob", [0.0, 0.1, 0.7, 0.8, 1.0, 1, np.float64(0.7)])
def test_accepts_keep_prob(keep_prob):
    output, mask = dropout(X, keep_prob=keep_prob, key=KEY, return_mask=True)
    p = 1.0 - float(keep_prob)
    keep = reference.keep_mask(X.shape, p, int(KEY))
    bits = reference.dropout_bits(X.ravel().view("u8").tolist(), "float64", keep, p)
    np.testing.assert_array_equal(mask, np.reshape(keep, X.shape).astype(bool), strict=True)
    assert output.ravel().view("u8").tolist() == bits


def test_accepts_keep_prob_in_backward():
    expected = dropout_backward(X, 1.0 - 0.7, key=KEY)
    assert_same_bits(dropout_backward(X, keep_prob=0.7, key=KEY), expected)


def test_accepts_lists_of_floats(function):
    assert_same_bits(function([1.0, 2.0, 3.0]), function(np.asarray([1.0, 2.0, 3.0])))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)], ids=str)
def test_keeps_shape_of_0_d_and_empty_arrays(function, shape):
    x = np.ones(shape, "float32")
    assert_same_bits(function(x), unidrop.dropout(x, 0.5, KEY))


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), -1], ids=str)
def test_shares_decisions_along_broadcast_axes(axes):
    output, mask = dropout(X, key=KEY, broadcast_axes=axes, return_mask=True)
    expected = unidrop.keep_mask(X.shape, 0.5, KEY, broadcast_axes=axes)
    np.testing.assert_array_equal(mask, expected, strict=True)
    assert_same_bits(output, np.where(expected, X * 2, 0))


@pytest.mark.parametrize("options", [{"p": 0}, {"training": False}, {"keep_prob": 1.0}], ids=str)
def test_returns_input_itself_if_nothing_is_dropped(function, options):
    assert function(X, **options) is X


@pytest.mark.parametrize("options", [{"p": 0}, {"training": False}], ids=str)
def test_returns_full_mask_if_nothing_is_dropped(options):
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
def test_follows_logical_indices_in_every_layout(function, layout, dtype):
    x = LAYOUTS[layout](X.astype(dtype))
    before = x.copy()
    output = function(x, 0.1)
    assert output.dtype == x.dtype
    np.testing.assert_array_equal(output, function(np.array(x, dtype, order="C"), 0.1))
    np.testing.assert_array_equal(x, before)


# --- rng ---------------------------------------------------------------------------------------


def test_draws_64_bits_of_generator_as_key():
    generator, twin = np.random.default_rng(5), np.random.default_rng(5)
    output = dropout(X, rng=generator)
    key = Key(int(twin.integers(0, 2**64, dtype=np.uint64)))
    assert_same_bits(output, dropout(X, key=key))
    assert state(generator) == state(twin)


def test_draws_another_mask_at_each_call():
    generator = np.random.default_rng(5)
    assert not np.array_equal(dropout(X, rng=generator), dropout(X, rng=generator))


@pytest.mark.parametrize(
    "rng",
    [5, np.int64(5), np.random.SeedSequence(5), np.random.PCG64(5)],
    ids=lambda rng: type(rng).__name__,
)
def test_accepts_what_default_rng_accepts(rng):
    assert_same_bits(dropout(X, rng=rng), dropout(X, rng=np.random.default_rng(5)))


def test_draws_fresh_mask_without_key_and_rng():
    assert not np.array_equal(dropout(X), dropout(X))


def test_draws_64_bits_of_entropy_without_key_and_rng(monkeypatch):
    drawn = []

    def urandom(size):
        drawn.append(size)
        return bytes(range(1, size + 1))

    monkeypatch.setattr("os.urandom", urandom)
    assert_same_bits(dropout(X), dropout(X, key=Key(0x0807060504030201)))
    assert drawn == [8]


@pytest.mark.parametrize("options", [{"p": 0.0}, {"training": False}], ids=str)
def test_draws_no_entropy_if_nothing_is_dropped(monkeypatch, options):
    monkeypatch.setattr("os.urandom", None)
    assert dropout(X, **options) is X


def test_leaves_global_numpy_state_alone():
    before = np.random.get_state()[1].tolist()
    dropout(X)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize(
    "options", [{"p": 0}, {"p": 0.0}, {"training": False}, {"keep_prob": 1}], ids=str
)
def test_draws_nothing_if_nothing_is_dropped(options):
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
def test_draws_nothing_in_call_that_raises(options, error):
    generator = np.random.default_rng(5)
    before = state(generator)
    with pytest.raises(error):
        dropout(**{"x": X, "rng": generator} | options)
    assert state(generator) == before


@pytest.mark.parametrize(
    ("rng", "error"), [(-1, ValueError), (1.5, TypeError), ("5", TypeError)], ids=repr
)
def test_rejects_bad_rng(rng, error):
    with pytest.raises(error, match=rf"rng.*{re.escape(str(rng))}"):
        dropout(X, rng=rng)


def test_rejects_key_beside_rng():
    with pytest.raises(ValueError, match=re.escape(f"got key={KEY!r} and rng=5")):
        dropout(X, key=KEY, rng=5)


# --- out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"p": 0.1}, {"p": 1}, {"p": 0}, {"training": False}])
def test_returns_out_with_output(function, options):
    out = np.full_like(X, 7)
    assert function(X, out=out, **options) is out
    assert_same_bits(out, function(X, **options))


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"p": 0}, {"training": False}])
def test_accepts_input_as_out(function, options):
    x = X.copy()
    assert function(x, out=x, **options) is x
    assert_same_bits(x, function(X, **options))


def test_accepts_out_that_overlaps_input(function):
    x = X.copy()
    function(x, out=x[::-1])
    assert_same_bits(np.ascontiguousarray(x[::-1]), function(X))


def test_accepts_out_of_any_strides(function):
    out = np.zeros((37, 3)).T
    function(X, out=out)
    np.testing.assert_array_equal(out, function(X))


def test_accepts_0_d_out(function):
    out = np.zeros(())
    assert function(np.ones(()), out=out) is out
    assert out == function(np.ones(()))


def test_returns_out_before_mask():
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
def test_rejects_bad_out_and_leaves_it(function, out, error, message):
    before = np.copy(out)
    with pytest.raises(error, match=r"^out must .*" + re.escape(message)):
        function(X, out=out)
    np.testing.assert_array_equal(out, before)


def test_rejects_read_only_out(function):
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
def test_leaves_out_in_call_that_raises(function, options, error):
    out = np.full_like(X, 7)
    with pytest.raises(error):
        function(X, out=out, **options)
    np.testing.assert_array_equal(out, 7)


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), 2], ids=repr)
@pytest.mark.parametrize("name", ["p", "keep_prob"])
def test_rejects_rate_outside_0_and_1(function, name, value, training):
    with pytest.raises(ValueError, match=rf"{name} has to be between 0 and 1, but got {value}"):
        function(X, training=training, **{name: value})


@pytest.mark.parametrize("value", [True, np.float32(0.5), "0.5", np.asarray([0.5])], ids=repr)
@pytest.mark.parametrize("name", ["p", "keep_prob"])
def test_rejects_non_python_rate(function, name, value):
    with pytest.raises(TypeError, match=rf"{name} must be .*got {re.escape(repr(value))}"):
        function(X, **{name: value})


def test_rejects_p_beside_keep_prob(function):
    with pytest.raises(ValueError, match=re.escape("got p=0.1 and keep_prob=0.9")):
        function(X, 0.1, keep_prob=0.9)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int64", "uint32"])
@pytest.mark.parametrize("training", [True, False])
def test_rejects_integers(function, dtype, training):
    with pytest.raises(TypeError, match=rf"^(x|grad) must be of a floating.*{dtype}"):
        function(np.ones(3, dtype), training=training)


@pytest.mark.parametrize("x", [[1, 2], 3, "text", None, [True]], ids=repr)
def test_rejects_non_float_input(x):
    with pytest.raises(TypeError, match=r"^x must be of a floating-point dtype"):
        dropout(x, key=KEY)


def test_names_grad_in_backward():
    with pytest.raises(TypeError, match=r"^grad must be of a floating-point dtype"):
        dropout_backward([1, 2], key=KEY)


@pytest.mark.parametrize("key", [42, "encoder", 0.5], ids=repr)
def test_rejects_non_key(function, key):
    with pytest.raises(TypeError, match=rf"key must be a unidrop.Key.*{re.escape(repr(key))}"):
        function(X, key=key)


# --- The backward pass -------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 1])
@pytest.mark.parametrize("axes", [(), (0,), (1,)], ids=str)
@pytest.mark.parametrize("by", ["key", "mask"])
def test_has_numerical_gradient(p, axes, by):
    options = {"broadcast_axes": axes}
    upstream = np.random.default_rng(1).standard_normal(X.shape)
    _, mask = dropout(X, p, key=KEY, return_mask=True, **options)
    kept = {"key": KEY} if by == "key" else {"mask": mask}
    numerical = np.empty_like(X)
    for index in np.ndindex(X.shape):
        step = np.zeros_like(X)
        step[index] = 0.5  # dropout is linear: any step has the same slope
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
def test_gives_same_bits_backward_by_mask_and_by_key(dtype, axes):
    grad = X.astype(dtype)
    _, mask = dropout(grad, 0.1, key=KEY, broadcast_axes=axes, return_mask=True)
    by_mask = dropout_backward(grad, 0.1, mask=mask, broadcast_axes=axes)
    assert_same_bits(by_mask, dropout_backward(grad, 0.1, key=KEY, broadcast_axes=axes))


def test_accepts_list_as_mask():
    grad = np.ones(3)
    actual = dropout_backward(grad, 0.5, mask=[True, False, True])
    assert_same_bits(actual, np.asarray([2.0, 0.0, 2.0]))


def test_drops_masked_nan_of_upstream_gradient():
    grad = np.asarray([np.nan, np.inf, 1.0])
    actual = dropout_backward(grad, 0.5, mask=np.asarray([False, False, True]))
    assert_same_bits(actual, np.asarray([0.0, 0.0, 2.0]))


@pytest.mark.parametrize("options", [{"p": 0}, {"training": False}], ids=str)
def test_needs_no_key_or_mask_if_nothing_was_dropped(options):
    assert dropout_backward(X, **options) is X


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got key=None and mask=None"),
        ({"key": KEY, "mask": MASK}, f"got key={KEY!r} and mask="),
    ],
    ids=["neither", "both"],
)
def test_requires_either_key_or_mask(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dropout_backward(X, **options)


@pytest.mark.parametrize("dtype", ["int64", "float64", "uint8"])
def test_rejects_mask_of_another_dtype(dtype):
    with pytest.raises(TypeError, match=rf"^mask must be of bool, got dtype {dtype}"):
        dropout_backward(X, mask=MASK.astype(dtype))


@pytest.mark.parametrize(
    ("mask", "axes"),
    [(MASK.T, ()), (MASK[:1], ()), (MASK, (0,)), (MASK[None], ())],
    ids=["transposed", "too short", "without the broadcast axis", "with another axis"],
)
def test_rejects_mask_of_another_shape(mask, axes):
    with pytest.raises(ValueError, match=rf"^mask must have shape .*{re.escape(str(mask.shape))}"):
        dropout_backward(X, mask=mask, broadcast_axes=axes)


@pytest.mark.parametrize("rng", [True, False])
def test_rejects_bool_as_rng(rng):
    with pytest.raises(TypeError, match=f"rng.*{rng}"):
        dropout(X, rng=rng)


def test_rejects_array_of_rates():
    with pytest.raises(TypeError, match=r"probability p must be a Python int or float"):
        dropout(X, np.array([0.1, 0.2]), keep_prob=0.5, key=Key(1))


# --- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        X,
        X[1:, 5:],
        X.T,
        readonly(X),
        np.ones(()),
        np.ones((0, 3)),
        np.ones(3, ml_dtypes.bfloat16),
        np.ones(3, ">f4"),
        np.broadcast_arrays(X, X[None])[0],  # of C order, and NumPy warns of a write
    ],
    ids=lambda x: f"{x.dtype}, {x.shape}, {x.flags.num:#x}",
)
def test_finds_the_address_of_any_array_without_a_warning(array):
    assert get_address(array) == array.__array_interface__["data"][0]


# --- plain calls -------------------------------------------------------------------------------

CALLS = {
    "float32": lambda: {"x": X.astype(np.float32)},
    "float16": lambda: {"x": X.astype(np.float16)},
    "bfloat16": lambda: {"x": X.astype(ml_dtypes.bfloat16)},
    "complex": lambda: {"x": X * 1j},
    "longdouble": lambda: {"x": X.astype(np.longdouble)},
    "integers": lambda: {"x": np.arange(3)},
    "another byte order": lambda: {"x": X.astype(">f8")},
    "0-d": lambda: {"x": np.ones(())},
    "empty": lambda: {"x": np.ones((0, 3))},
    "transposed": lambda: {"x": X.T},
    "sliced": lambda: {"x": X[:, 3:]},
    "read-only": lambda: {"x": readonly(X)},
    "a list": lambda: {"x": [1.0, 2.0]},
    "masked": lambda: {"x": np.ma.masked_array(X)},
    "mapped": lambda: {"x": X.view(np.memmap)},
    "rate 0": lambda: {"p": 0.0},
    "rate 1": lambda: {"p": 1.0},
    "rate 1, an integer": lambda: {"p": 1},
    "rate of few": lambda: {"p": 1e-12},
    "rate of almost 1": lambda: {"p": 1 - 1e-12},
    "rate of NumPy": lambda: {"p": np.float64(0.25)},
    "rate of 32 bits": lambda: {"p": np.float32(0.25)},
    "rate NaN": lambda: {"p": float("nan")},
    "rate above 1": lambda: {"p": 1.5},
    "rate above 1, and integers": lambda: {"p": 1.5, "x": np.arange(3)},
    "key of NumPy words": lambda: {"key": Key.from_words(np.uint32(3), np.uint32(4))},
    "key of strict words": lambda: {"key": Key.from_words(*strict_words(3, 4))},
    "no key but an integer": lambda: {"key": 42},
    "evaluation": lambda: {"training": False},
    "training 0": lambda: {"training": 0},
    "axes": lambda: {"broadcast_axes": [0]},
    "axes of an array": lambda: {"broadcast_axes": np.array([], int)},
    "out": lambda: {"out": np.empty_like(X)},
    "out is x": lambda: {"x": (x := X.copy()), "out": x},
    "out overlaps x": lambda: {"x": (memory := np.ones(50))[:40], "out": memory[3:43]},
    "out is transposed": lambda: {"out": np.empty_like(X.T).T},
    "out is read-only": lambda: {"out": readonly(X)},
    "out has another shape": lambda: {"out": np.empty(3)},
    "out has another dtype": lambda: {"out": np.empty(X.shape, np.float32)},
    "out is a list": lambda: {"out": [0.0]},
    "out is masked": lambda: {"out": np.ma.masked_array(X)},
    "out is wrong, and integers": lambda: {"x": np.arange(3), "out": np.empty(4, int)},
}


def strict_words(*words):
    return (array_api_strict.asarray(word, dtype=array_api_strict.uint32) for word in words)


def outcome(function, call):
    """Return what a call returns, down to the memory layout, or what it raises."""
    options = {"x": X, "p": 0.5, "key": KEY} | call
    try:
        y = function(options.pop("x"), options.pop("p"), **options)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return type(error), str(error)
    is_input = [y is value for value in call.values()]
    return type(y), y.dtype, y.shape, y.strides, y.tobytes(), is_input


@pytest.mark.parametrize("path", [None, "fused", "portable"])
@pytest.mark.parametrize("name", CALLS)
def test_plain_calls_do_and_raise_the_same(monkeypatch, name, path):
    context = nullcontext if path is None else partial(unidrop.force_path, path)
    for function in (dropout, dropout_backward):
        with monkeypatch.context() as patch, context():
            actual = outcome(function, CALLS[name]())
            patch.setattr("unidrop.adapters.numpy.functional._run_plain", lambda *arguments: None)
            assert outcome(function, CALLS[name]()) == actual


def test_runs_plain_calls_by_one_kernel(monkeypatch):
    monkeypatch.setattr("unidrop.plan.DropoutPlan.run", None)
    np.testing.assert_array_equal(dropout(X, key=KEY), MASK * X * 2)
    np.testing.assert_array_equal(dropout_backward(X, key=KEY), MASK * X * 2)


def test_runs_no_kernel_if_another_path_is_forced(monkeypatch):
    x = np.ones((3, 5, 7))  # of a shape that no other test has
    monkeypatch.setattr("unidrop.fused.prepare", None)
    with unidrop.force_path("portable"):
        assert_same_bits(dropout(x, key=KEY), keep_mask(x.shape, 0.5, KEY) * 2.0)
