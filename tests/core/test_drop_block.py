"""DropBlock: its blocks, the exact count that scales the rest, and its errors."""

import itertools
import math

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from unidrop import Key, keep_mask
from unidrop.family import drop_block

KEY = Key(42).fold_in("encoder/0").fold_in(7)
X = (3 * np.random.default_rng(0).standard_normal((4, 3, 12, 10))).astype("float32")
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]


def find_kept(shape, p, size, axes):
    """Return the mask of the specification, corner by corner."""
    lengths = [shape[axis] for axis in axes]
    corners = [n - size + 1 if i in axes else n for i, n in enumerate(shape)]
    places = math.prod(corners[axis] for axis in axes)
    gamma = p * math.prod(lengths) / (size ** len(axes) * places)
    keep = np.ones(shape, bool)
    for corner in np.argwhere(~keep_mask(corners, gamma, KEY)):
        block = tuple(slice(i, i + (size if a in axes else 1)) for a, i in enumerate(corner))
        keep[block] = False
    return keep


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 10])
def test_drops_square_blocks(size):
    y, mask = drop_block(X, 0.3, KEY, block_size=size, axes=(2, 3), return_mask=True)
    assert np.array_equal(mask, find_kept(X.shape, 0.3, size, (2, 3)))
    assert np.array_equal(y == 0, ~mask)


@pytest.mark.parametrize(("shape", "axes"), [((2, 9, 8, 3), (1, 2)), ((2, 2, 6, 5, 7), (2, 3, 4))])
def test_drops_blocks_along_other_axes(shape, axes):
    x = np.ones(shape)
    _, mask = drop_block(x, 0.4, KEY, block_size=3, axes=axes, return_mask=True)
    assert np.array_equal(mask, find_kept(shape, 0.4, 3, axes))
    negative = [axis - x.ndim for axis in reversed(axes)]
    assert np.array_equal(drop_block(x, 0.4, KEY, block_size=3, axes=negative) != 0, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_by_the_count_of_kept_elements(dtype):
    x = X.astype(dtype)
    compute = np.float64 if dtype == "float64" else np.float32
    mask = find_kept(X.shape, 0.3, 3, (2, 3))
    scale = compute(mask.size) / compute(mask.sum())
    expected = np.where(mask, x.astype(compute) * scale, compute(0)).astype(dtype)
    assert drop_block(x, 0.3, KEY, block_size=3, axes=(2, 3)).tobytes() == expected.tobytes()


def test_zeros_infinite_values_in_blocks():
    y, mask = drop_block(X * np.inf, 0.3, KEY, block_size=3, axes=(2, 3), return_mask=True)
    assert np.array_equal(y == 0, ~mask)


def test_gives_zeros_if_blocks_cover_all():
    x = np.ones((2, 3, 4, 4))
    for size in (1, 4):
        assert not drop_block(x, 1, KEY, block_size=size, axes=(2, 3)).any()
    y = drop_block(x[:, :, :, :0], 0.5, KEY, block_size=1, axes=(2,))
    assert y.shape == (2, 3, 4, 0)


def test_is_the_identity_without_blocks():
    for options in ({"p": 0}, {"p": 0.5, "training": False}):
        y, mask = drop_block(X, key=KEY, block_size=3, axes=(2, 3), return_mask=True, **options)
        assert y is X
        assert mask.all()
        assert mask.shape == X.shape


def test_gives_blocks_in_every_library_of_the_standard():
    y = drop_block(array_api_strict.asarray(X), 0.3, KEY, block_size=3, axes=(2, 3))
    assert np.array_equal(np.asarray(y), drop_block(X, 0.3, KEY, block_size=3, axes=(2, 3)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 2.0}, TypeError, "block_size"),
        ({"block_size": 11}, ValueError, r"block_size must be at most the lengths along axes "),
        ({"axes": (4,)}, ValueError, "axes must name axes of the 4-d array, got 4"),
        ({"axes": (2, -2)}, ValueError, r"axes must name each axis once, got \(2, -2\)"),
        ({"axes": ()}, ValueError, "axes must name at least one axis"),
        ({"p": 1.5}, ValueError, r"dropout probability p .* 1\.5"),
        ({"x": np.ones((2, 3, 4, 4), int)}, TypeError, "x must be of a floating-point dtype"),
    ],
    ids=itertools.count(),
)
def test_refuses_blocks_that_do_not_fit(options, error, message):
    arguments = {"x": X, "p": 0.3, "key": KEY, "block_size": 3, "axes": (2, 3), **options}
    for training in (True, False):
        with pytest.raises(error, match=message):
            drop_block(**arguments, training=training)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_drops_everything_at_rate_one(block_size):
    x = np.ones((2, 3, 6, 6), "float32")
    y, mask = drop_block(x, 1, KEY, block_size=block_size, axes=(2, 3), return_mask=True)
    assert not y.any()
    assert not mask.any()
