"""Bad arguments of the core: each error names the argument and the value."""

import re

import array_api_strict
import numpy as np
import pytest
from standard_arrays import KEY, expected_mask

from unidrop import Key, dropout, keep_mask
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

ONES = np.ones((3, 5), "float32")
ZERO = array_api_strict.asarray(0)
CALLS = {
    "dropout": lambda **arguments: dropout(**{"x": ONES, "p": 0.5, "key": KEY} | arguments),
    "keep_mask": lambda **arguments: keep_mask(
        **{"shape": (3, 5), "p": 0.5, "key": KEY} | arguments
    ),
}


@pytest.fixture(params=CALLS)
def call(request):
    """Return each function of the core in turn, with valid arguments to replace."""
    return CALLS[request.param]


def said(name, expected, value):
    """Return a pattern for a message that names an argument, what it must be, and its value."""
    return rf"\b{name} .*{re.escape(expected)}.*{re.escape(str(value))}"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "p",
    [
        True,
        False,
        np.True_,
        np.float32(0.1),
        np.float16(0.5),
        np.asarray(1),
        np.asarray(True),
        np.asarray([0.5]),
        np.asarray(0.5, np.float16),
        array_api_strict.asarray(0.5),
        "0.5",
        b"0.5",
        None,
        0.5j,
        (0.5,),
    ],
    ids=lambda p: f"{type(p).__name__}-{getattr(p, 'dtype', '')}-{getattr(p, 'shape', '')}",
)
def test_rejects_non_python_rate(call, p, training):
    with pytest.raises(TypeError, match=said("p", "a Python int or float", repr(p))):
        call(p=p, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [-0.1, 1.1, -1, 2, -5e-324, 1 + 2**-52, float("nan"), float("inf")])
def test_rejects_rate_outside_0_and_1(call, p, training):
    with pytest.raises(ValueError, match=said("p", "between 0 and 1", p)):
        call(p=p, training=training)


@pytest.mark.parametrize("p", [np.float64(0.1), 0.1])
def test_accepts_numpy_double_as_rate(p):
    np.testing.assert_array_equal(keep_mask((37,), p, KEY), expected_mask((37,), 0.1))


@pytest.mark.parametrize("key", [42, "encoder", None, 0.5, np.uint64(42)], ids=repr)
def test_rejects_non_key(call, key):
    with pytest.raises(TypeError, match=said("key", "unidrop.Key", repr(key))):
        call(key=key)


@pytest.mark.parametrize(
    ("axes", "error", "expected", "value"),
    [
        ((2,), ValueError, "axes of the 2-d array", "2"),
        ((-3,), ValueError, "axes of the 2-d array", "-3"),
        ((0, 0), ValueError, "each axis once", "(0, 0)"),
        ((0, -2), ValueError, "each axis once", "(0, -2)"),
        ((0.0,), TypeError, "integers", "0.0"),
        ((True,), TypeError, "integers", "True"),
        (True, TypeError, "", "True"),
        ("01", TypeError, "a sequence of integers", "'01'"),
        (None, TypeError, "a sequence of integers", "None"),
        (1.0, TypeError, "a sequence of integers", "1.0"),
        ((ZERO,), TypeError, "integers", repr(ZERO)),
    ],
    ids=repr,
)
def test_rejects_bad_broadcast_axes(call, axes, error, expected, value):
    with pytest.raises(error, match=said("broadcast_axes", expected, value)):
        call(broadcast_axes=axes)


@pytest.mark.parametrize(
    ("whole", "start", "error", "message"),
    [
        (None, (0, 0), ValueError, "got start without global_shape"),
        ((3, 5), None, ValueError, "got global_shape without start"),
        ((15,), (0, 0), ValueError, r"global_shape .*one length per axis.*\(15,\)"),
        ((3, 5), (0,), ValueError, r"start .*one element per axis.*\(0,\)"),
        ((3, 5), (0, 1), ValueError, "start 1 and 5 elements along axis 1 "),
        ((3, 5), (-1, 0), ValueError, "start -1 and 3 elements along axis 0 "),
        ((2, 5), (0, 0), ValueError, "start 0 and 3 elements along axis 0 "),
        ((2, 5), (ZERO, 0), ValueError, "axis 0"),
        ((-3, 5), (0, 0), ValueError, r"global_shape .*lengths of 0 or more.*-3"),
        ((2**33, 2**32), (0, 0), ValueError, r"global_shape .*at most 2\*\*64 elements"),
        ((3.0, 5), (0, 0), TypeError, r"global_shape .*integers, .*3\.0"),
        ((True, 5), (0, 0), TypeError, "global_shape .*integers, .*True"),
        ((ZERO + 3, 5), (0, 0), TypeError, "global_shape .*integers"),
        ("35", (0, 0), TypeError, "global_shape .*a sequence of integers, .*'35'"),
        (15, (0, 0), TypeError, "global_shape .*a sequence of integers, .*15"),
        ((3, 5), (0.0, 0), TypeError, r"start .*integers, .*0\.0"),
        ((3, 5), (False, 0), TypeError, "start .*integers, .*False"),
        ((3, 5), (None, 0), TypeError, "start .*integers, .*None"),
        ((3, 5), 0, TypeError, "start .*a sequence of integers, .*0"),
    ],
    ids=repr,
)
def test_rejects_bad_window(call, whole, start, error, message):
    with pytest.raises(error, match=message):
        call(global_shape=whole, start=start)


@pytest.mark.parametrize(
    ("value", "error"), [(0.5, TypeError), (True, TypeError), ([0], ValueError)], ids=repr
)
def test_rejects_start_that_is_not_an_integer_array(value, error):
    start = (array_api_strict.asarray(value),)
    with pytest.raises(error, match=r"^start "):
        keep_mask((5,), 0.5, KEY, xp=array_api_strict, global_shape=(50,), start=start)


@pytest.mark.parametrize(
    ("shape", "error", "expected", "value"),
    [
        ((-1,), ValueError, "lengths of 0 or more", "(-1,)"),
        ((2**33, 2**32), ValueError, "at most 2**64 elements", ""),
        ((2.0,), TypeError, "integers", "2.0"),
        ((True,), TypeError, "integers", "True"),
        ("35", TypeError, "a sequence of integers", "'35'"),
        (5, TypeError, "a sequence of integers", "5"),
        (None, TypeError, "a sequence of integers", "None"),
    ],
    ids=repr,
)
def test_rejects_bad_shape(shape, error, expected, value):
    with pytest.raises(error, match=said("shape", expected, value)):
        keep_mask(shape, 0.5, KEY)


@pytest.mark.parametrize("xp", ["numpy", np.ones(3), 42], ids=repr)
def test_rejects_non_namespace(xp):
    with pytest.raises(TypeError, match=said("xp", "", repr(xp))):
        keep_mask((3,), 0.5, KEY, xp=xp)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "uint8"])
def test_rejects_integer_array(space, dtype, training):
    x = space.array(np.ones(5, dtype))
    with pytest.raises(TypeError, match=said("x", "a floating-point dtype", dtype)):
        dropout(x, 0.5, KEY, training=training)


@pytest.mark.parametrize(
    "x", [[1.0, 2.0], 1.0, "x", None, {"x": 1.0}, np.asarray(["a"]), np.asarray([None])], ids=repr
)
def test_rejects_non_array(x):
    with pytest.raises(TypeError, match=r"^x "):
        dropout(x, 0.5, KEY)


def test_accepts_dtypes_that_cannot_be_hashed():
    class Dtype:
        __hash__ = None
        name = "float64"

        def __eq__(self, other):
            return other == "float64"

    class Array:
        dtype, shape = Dtype(), (6,)

        def __array_namespace__(self, api_version=None):
            return np

    with pytest.raises(TypeError, match="unhashable"):
        hash(Array().dtype)
    plan = DropoutPlan.from_args(Array(), Rate.from_p(0.5))
    assert plan.drops


@pytest.mark.parametrize("axes", [np.array([0]), np.array([0, 1]), [0], range(1)])
def test_accepts_broadcast_axes_of_any_sequence(axes):
    mask = keep_mask((2, 3), 0.5, Key(1), broadcast_axes=axes)
    np.testing.assert_array_equal(mask, keep_mask((2, 3), 0.5, Key(1), broadcast_axes=tuple(axes)))
