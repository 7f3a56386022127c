"""The values of the fused path, at every dtype, rate and size: to the bit the portable one's."""

import itertools

import numpy as np
import pytest
import reference
import torch
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
    values,
)

import unidrop
from unidrop import Key, keep_mask
from unidrop.fused.kernels import CHUNK, UNIT

# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("p", RATES)
def test_random_bits_of_every_dtype_give_the_portable_bits(library, name, p):
    x = random_patterns((5003,), name)
    assert_bits(library.back(fused(library.array(x), p)), portable(x, p))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("way", ["rows", "tiles"])
def test_random_bits_of_every_dtype_give_the_bits_of_the_specification(name, p, way):
    x = random_patterns((19, 17), name, seed=1)
    laid_out = np.asfortranarray(x) if way == "tiles" else x
    assert_bits(fused(laid_out, p), specified(x, p))


def all_of_16_bits(name):
    return np.arange(1 << 16, dtype="uint16").view(DTYPES[name])


def keeping(p):
    """Return a key that keeps element 0 at a rate."""
    return Key(next(k for k in itertools.count() if reference.u(k, 0) >= reference.threshold(p)))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("p", [2.0**-40, 0.05, 0.1, 0.3, 0.5, 2 / 3, 0.9, 0.99, 1 - 2.0**-13])
def test_each_of_65536_values_is_scaled_as_the_portable_path_does(name, p):
    x = all_of_16_bits(name)
    key = keeping(p)
    y = fused(x, p, key, broadcast_axes=(0,))
    assert np.count_nonzero(y) > 60_000
    assert_bits(y, portable(x, p, key, broadcast_axes=(0,)))
    assert_bits(fused(x, p), portable(x, p))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_each_of_65536_values_is_scaled_as_the_specification_says(name):
    p = 0.1
    x = all_of_16_bits(name)
    bits = reference.dropout_bits(range(1 << 16), name, [1] * (1 << 16), p)
    y = fused(x, p, keeping(p), broadcast_axes=(0,))
    assert_bits(y, np.asarray(bits, "uint16").view(x.dtype))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_a_thread_that_flushes_subnormals_gives_what_the_output_rule_allows(name):
    x = random_patterns((4096,), name, seed=2)
    expected = portable(x, 0.3)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormals")
    try:
        y = fused(x, 0.3)
    finally:
        torch.set_flush_denormal(False)
    form = reference.FORMATS[name]
    before, got, wanted = (patterns(array).tolist() for array in (x, y, expected))
    for bits, actual, right in zip(before, got, wanted, strict=True):
        small = name != "float16" and min(bits & ~form.sign, right & ~form.sign) < form.normal
        assert actual == right or (small and actual == bits & form.sign and right != 0), hex(bits)


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_dropped_is_positive_zero_whatever_it_was(name):
    x = random_patterns((999,), name)
    kept = np.asarray(reference.keep_mask(x.shape, 0.5, int(KEY)), bool)
    assert not patterns(fused(x, 0.5)[~kept]).any()


# --- Rates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", [*range(9), 30, 31, 32, 33, 38])
@pytest.mark.parametrize(("above", "kept"), [(0, True), (1, False)], ids=["T = u", "T = u + 1"])
@pytest.mark.parametrize("way", ["rows", "tiles", "shared", "mask"])
def test_an_element_is_kept_where_u_is_at_least_the_threshold(i, above, kept, way):
    p = (reference.u(int(KEY), i) + above) / 2**32
    if way == "mask":
        keep = keep_mask((39,), p, KEY)[i]
    elif way == "rows":
        keep = fused(np.ones(39), p)[i] != 0
    elif way == "tiles":
        keep = fused(np.asfortranarray(np.ones((13, 3))), p)[divmod(i, 3)] != 0
    else:
        keep = fused(np.ones((39, 70)), p, broadcast_axes=(1,))[i].all()
    assert keep == kept


@pytest.mark.parametrize(
    "p", [5e-324, 2.0**-34, 2.0**-33, 3 * 2.0**-33, 1 - 2.0**-32, 1 - 2.0**-33, 1 - 2.0**-53, 1]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_smallest_and_largest_rates_are_those_of_the_specification(p, order):
    x = values((9, 7)).astype("float64", order=order)
    assert_bits(unidrop.dropout(x, p, KEY), specified(x, p))
    expected = np.reshape(reference.keep_mask((9, 7), p, int(KEY)), (9, 7)).astype(bool)
    np.testing.assert_array_equal(keep_mask((9, 7), p, KEY), expected)


def test_a_rate_that_keeps_nothing_and_one_that_drops_nothing_need_no_kernel():
    x = values((9,))
    with unidrop.force_path("fused"):
        assert unidrop.dropout(x, 0, KEY) is x
        assert unidrop.dropout(x, 0.5, KEY, training=False) is x
        assert not unidrop.dropout(x, 1, KEY).any()


# --- Sizes ----------------------------------------------------------------------------------------


EDGES = [0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 255, 256, 257, CHUNK - 1, CHUNK, CHUNK + 1]
UNITS = [UNIT - 1, UNIT, UNIT + 1, 2 * UNIT + 5, 17 * UNIT + 3]


@pytest.mark.parametrize("size", EDGES + UNITS)
@pytest.mark.parametrize("name", ["float32", "complex64", "bfloat16"])
def test_sizes_about_each_boundary_give_the_portable_bits(size, name):
    x = values((size,), name)
    assert_bits(fused(x, 0.4), portable(x, 0.4))


@pytest.mark.parametrize("size", EDGES + UNITS)
def test_masks_of_sizes_about_each_boundary_are_the_portable_ones(size):
    with unidrop.force_path("portable"):
        expected = keep_mask((size,), 0.4, KEY)
    with unidrop.force_path("fused"):
        np.testing.assert_array_equal(keep_mask((size,), 0.4, KEY), expected, strict=True)


@pytest.mark.parametrize("size", [size for size in EDGES if size < 300])
@pytest.mark.parametrize("first", range(9))
def test_rows_that_begin_and_end_inside_a_block_are_those_of_the_specification(size, first):
    x = values((size,))
    options = {"global_shape": (size + first + 3,), "start": (first,)}
    assert_bits(unidrop.dropout(x, 0.4, KEY, **options), specified(x, 0.4, **options))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 55, 56, 57, 111, 112, 113, 300])
@pytest.mark.parametrize("columns", [2, 7, 8, 9, 33, 255, 256, 257, 300, 1800])
def test_tiles_of_sizes_about_each_boundary_give_the_portable_bits(rows, columns):
    x = values((columns, rows))
    expected = portable(x, 0.4)
    assert_bits(fused(np.asfortranarray(x), 0.4), expected)


@pytest.mark.parametrize("rows", [1, 3, 55, 56, 57, 130])
@pytest.mark.parametrize("columns", [2, 31, 32, 33, 2047, 2048, 2049, 5000])
def test_shared_columns_of_sizes_about_each_boundary_give_the_portable_bits(rows, columns):
    x = values((rows, columns))
    assert_bits(fused(x, 0.4, broadcast_axes=(1,)), portable(x, 0.4, broadcast_axes=(1,)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_a_single_element_of_any_rank_is_element_0(library, shape, name):
    x = values(shape, name)
    array = library.array(x)
    for seed in range(4):
        key = Key(seed)
        assert_bits(library.back(unidrop.dropout(array, 0.5, key)), specified(x, 0.5, key))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0), (2, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_empty_arrays_stay_empty_along_any_broadcast_axes(library, shape, order):
    x = library.array(np.zeros(shape, "float32", order=order))
    for count in range(len(shape) + 1):
        for axes in itertools.combinations(range(len(shape)), count):
            y, mask = unidrop.dropout(x, 0.5, KEY, broadcast_axes=axes, return_mask=True)
            assert tuple(y.shape) == shape
            assert tuple(mask.shape) == reference.mask_shape(shape, axes)
