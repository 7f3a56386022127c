"""Values of the fused path at every dtype, rate and size: the bits of the portable path."""

import itertools

import numpy as np
import pytest
import reference
from fused_arrays import (
    DTYPES,
    KEY,
    RATES,
    assert_bits,
    fused,
    patterns,
    portable,
    random_patterns,
    specified,
    subsets,
    values,
)

import unidrop
from unidrop import Key, keep_mask
from unidrop.fused.kernels import WORK_ITEM_SIZE

# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("p", RATES)
def test_gives_portable_bits_of_random_bits(name, p):
    x = random_patterns((5003,), name)
    assert_bits(fused(x, p), portable(x, p))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("traversal", ["rows", "tiles"])
def test_gives_specified_bits_of_random_bits(name, traversal):
    x = random_patterns((19, 17), name, seed=1)
    laid_out = np.asfortranarray(x) if traversal == "tiles" else x
    for p in RATES:
        assert_bits(fused(laid_out, p), specified(x, p))


def all_of_16_bits(name):
    return np.arange(1 << 16, dtype="uint16").view(DTYPES[name])


def keeping(p):
    """Return a key that keeps element 0 at a rate."""
    return Key(next(k for k in itertools.count() if reference.u(k, 0) >= reference.threshold(p)))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("p", [2.0**-40, 0.05, 0.1, 0.3, 0.5, 2 / 3, 0.9, 0.99, 1 - 2.0**-13])
def test_scales_all_65536_values_as_portable_path(name, p):
    x = all_of_16_bits(name)
    key = keeping(p)
    y = fused(x, p, key, broadcast_axes=(0,))
    assert np.count_nonzero(y) > 60_000
    assert_bits(y, portable(x, p, key, broadcast_axes=(0,)))
    assert_bits(fused(x, p), portable(x, p))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_scales_all_65536_values_as_specified(name):
    p = 0.1
    x = all_of_16_bits(name)
    bits = reference.dropout_bits(range(1 << 16), name, [1] * (1 << 16), p)
    y = fused(x, p, keeping(p), broadcast_axes=(0,))
    assert_bits(y, np.asarray(bits, "uint16").view(x.dtype))


@pytest.mark.parametrize("name", DTYPES)
def test_replaces_dropped_bits_by_positive_zero(name):
    x = random_patterns((999,), name)
    kept = np.asarray(reference.keep_mask(x.shape, 0.5, int(KEY)), bool)
    assert not patterns(fused(x, 0.5)[~kept]).any()


# --- Rates ----------------------------------------------------------------------------------------


WAYS = {
    "rows": lambda p, i: fused(np.ones(39), p)[i] != 0,
    "tiles": lambda p, i: fused(np.asfortranarray(np.ones((13, 3))), p)[divmod(i, 3)] != 0,
    "broadcast": lambda p, i: fused(np.ones((39, 70)), p, broadcast_axes=(1,))[i].all(),
    "mask": lambda p, i: keep_mask((39,), p, KEY)[i],
}


@pytest.mark.parametrize(("above", "kept"), [(0, True), (1, False)], ids=["T = u", "T = u + 1"])
@pytest.mark.parametrize("traversal", WAYS)
def test_keeps_where_u_reaches_threshold(above, kept, traversal):
    for i in (*range(9), 30, 31, 32, 33, 38):
        p = (reference.u(int(KEY), i) + above) / 2**32
        assert WAYS[traversal](p, i) == kept, i


@pytest.mark.parametrize(
    "p", [5e-324, 2.0**-34, 2.0**-33, 3 * 2.0**-33, 1 - 2.0**-32, 1 - 2.0**-33, 1 - 2.0**-53, 1]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_gives_specified_bits_at_smallest_and_largest_rates(p, order):
    x = values((9, 7)).astype("float64", order=order)
    assert_bits(unidrop.dropout(x, p, KEY), specified(x, p))
    expected = np.reshape(reference.keep_mask((9, 7), p, int(KEY)), (9, 7)).astype(bool)
    np.testing.assert_array_equal(keep_mask((9, 7), p, KEY), expected)


def test_needs_no_kernel_to_keep_all_or_nothing():
    x = values((9,))
    with unidrop.force_path("fused"):
        assert unidrop.dropout(x, 0, KEY) is x
        assert unidrop.dropout(x, 0.5, KEY, training=False) is x
        assert not unidrop.dropout(x, 1, KEY).any()


# --- Sizes ----------------------------------------------------------------------------------------


EDGES = [0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 2047, 2048, 2049]
WORK_ITEMS = [(1, -1), (1, 0), (1, 1), (2, 5), (17, 3)]
SIZES = EDGES + [count * WORK_ITEM_SIZE + more for count, more in WORK_ITEMS]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["float32", "complex64", "bfloat16"])
def test_gives_portable_bits_of_sizes_about_each_boundary(size, name):
    x = values((size,), name)
    assert_bits(fused(x, 0.4), portable(x, 0.4))


@pytest.mark.parametrize("size", SIZES)
def test_gives_portable_masks_of_sizes_about_each_boundary(size):
    with unidrop.force_path("portable"):
        expected = keep_mask((size,), 0.4, KEY)
    with unidrop.force_path("fused"):
        np.testing.assert_array_equal(keep_mask((size,), 0.4, KEY), expected, strict=True)


@pytest.mark.parametrize("first", range(9))
def test_gives_specified_bits_of_rows_from_within_a_block(first):
    for size in (size for size in EDGES if size < 300):
        x = values((size,))
        options = {"global_shape": (size + first + 3,), "start": (first,)}
        assert_bits(unidrop.dropout(x, 0.4, KEY, **options), specified(x, 0.4, **options))


@pytest.mark.parametrize("columns", [2, 7, 8, 9, 33, 255, 256, 257, 300, 1800])
def test_gives_portable_bits_of_tiles_at_boundaries(columns):
    for rows in (1, 2, 7, 8, 9, 55, 56, 57, 111, 112, 113, 300):
        x = values((columns, rows))
        assert_bits(fused(np.asfortranarray(x), 0.4), portable(x, 0.4))


@pytest.mark.parametrize("columns", [2, 31, 32, 33, 2047, 2048, 2049, 5000])
def test_gives_portable_bits_of_broadcast_columns_at_boundaries(columns):
    for rows in (1, 3, 55, 56, 57, 130):
        x = values((rows, columns))
        assert_bits(fused(x, 0.4, broadcast_axes=(1,)), portable(x, 0.4, broadcast_axes=(1,)))


@pytest.mark.parametrize("name", DTYPES)
def test_gives_specified_bits_of_single_element(name):
    for shape, seed in itertools.product([(), (1,), (1, 1, 1)], range(4)):
        x = values(shape, name)
        assert_bits(unidrop.dropout(x, 0.5, Key(seed)), specified(x, 0.5, Key(seed)))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0), (2, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_leaves_empty_arrays_empty_along_any_broadcast_axes(shape, order):
    x = np.zeros(shape, "float32", order=order)
    for axes in subsets(len(shape)):
        y, mask = unidrop.dropout(x, 0.5, KEY, broadcast_axes=axes, return_mask=True)
        assert y.shape == shape
        assert mask.shape == reference.mask_shape(shape, axes)
