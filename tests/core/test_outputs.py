"""Outputs of the core: the product and the selection, on NumPy and array-api-strict."""

from itertools import product

import array_api_strict
import numpy as np
import pytest
from standard_arrays import (
    CPU,
    KEY,
    SITE,
    assert_mask,
    assert_output,
    expected_mask,
    patterns,
    special_values,
)

import unidrop
from unidrop import dropout

NOTHING_TO_DROP = [{"p": 0}, {"p": 0.5, "training": False}]


def ones(space, shape, dtype="float32"):
    return space.array(np.ones(shape, dtype))


def normal(shape, dtype="float32"):
    return np.asarray(np.random.default_rng(0).standard_normal(shape)).astype(dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # as of any product
def test_equals_specification_at_each_dtype(space):
    for dtype, p in product(space.dtypes, (0.1, 1 / 3, 0.9)):
        x = special_values(dtype)
        y = space.numpy(dropout(space.array(x), p, KEY))
        assert_output(y, x, expected_mask(x.shape, p), p)


def test_replaces_dropped_infinities_and_nan_by_positive_zeros(space):
    for dtype in space.dtypes:
        y = space.numpy(dropout(space.array(special_values(dtype)), 1, KEY))
        np.testing.assert_array_equal(patterns(y), 0, err_msg=dtype)


def test_equals_specification_at_each_shape(space):
    for shape in [(), (0,), (3, 0, 2), (8,), (37,), (2, 3, 4)]:
        x = normal(shape)
        y, mask = dropout(space.array(x), 0.5, KEY, return_mask=True)
        assert_mask(space.numpy(mask), expected_mask(shape, 0.5))
        assert_output(space.numpy(y), x, expected_mask(shape, 0.5), 0.5)


def test_shares_decisions_along_broadcast_axes(space):
    x = normal((3, 5, 4))
    for axes in [(), (0,), (1,), (-1,), (0, 2), (-3, 1), (0, 1, 2)]:
        y, mask = dropout(space.array(x), 0.5, KEY, broadcast_axes=axes, return_mask=True)
        expected = expected_mask(x.shape, 0.5, broadcast_axes=axes)
        assert_mask(space.numpy(mask), expected)
        assert_output(space.numpy(y), x, expected, 0.5)


def test_gives_window_mask_of_its_block(space):
    window = {"global_shape": (6, 11), "start": (2, 3)}
    y = space.numpy(dropout(space.array(normal((3, 5))), 0.5, KEY, **window))
    assert_output(y, normal((3, 5)), expected_mask((3, 5), 0.5, **window), 0.5)


@pytest.mark.parametrize("options", NOTHING_TO_DROP, ids=str)
def test_returns_x_itself_if_nothing_is_dropped(space, options):
    x = ones(space, (3, 5))
    assert dropout(x, key=KEY, **options) is x
    y, mask = dropout(x, key=KEY, broadcast_axes=(1,), return_mask=True, **options)
    assert y is x
    assert_mask(space.numpy(mask), np.ones((3, 1), bool))


def test_leaves_input_as_it_was(space):
    x = space.array(np.arange(37, dtype="float32"))
    dropout(x, 0.5, KEY)
    np.testing.assert_array_equal(space.numpy(x), np.arange(37))


@pytest.mark.parametrize("name", ["device1", "device2", "no_float64", "no_x64"])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_stays_on_device_of_input(name, dtype):
    device = array_api_strict.Device(name)
    x = normal(37, dtype)
    for options in ({}, {"global_shape": (50,), "start": (3,)}):
        y = dropout(array_api_strict.asarray(x, device=device), 0.1, KEY, **options)
        assert y.device == device
        assert_output(np.asarray(y.to_device(CPU)), x, expected_mask(x.shape, 0.1, **options), 0.1)
        for p in (0.0, 0.1, 1.0):
            x_on = array_api_strict.asarray(x, device=device)
            _, mask = dropout(x_on, p, KEY, return_mask=True, **options)
            assert mask.device == device


@pytest.mark.parametrize("name", ["device1", "device2", "no_float64", "no_x64"])
def test_keeps_array_step_and_start_on_their_device(name):
    device = array_api_strict.Device(name)
    seven, three = (
        array_api_strict.asarray(n, dtype=array_api_strict.int32, device=device) for n in (7, 3)
    )
    x = array_api_strict.ones((5,), dtype=array_api_strict.float32, device=device)
    y = dropout(x, 0.5, SITE.fold_in(seven), global_shape=(50,), start=(three,))
    assert y.device == device
    y = np.asarray(y.to_device(CPU))
    np.testing.assert_array_equal(y != 0, expected_mask((5,), 0.5, global_shape=(50,), start=(3,)))


def test_lists_public_names():
    assert unidrop.__all__ == [
        "STREAM_VERSION",
        "Key",
        "dropout",
        "explain_path",
        "force_path",
        "get_num_threads",
        "keep_mask",
        "set_num_threads",
    ]
    assert unidrop.STREAM_VERSION == 1
