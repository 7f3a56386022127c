"""Kernels on the memory of each framework's arrays: the bits of NumPy's portable operations."""

import gc
import itertools

import numpy as np
import pytest
import reference
from array_libraries import LIBRARIES
from fused_arrays import (
    DTYPES,
    KEY,
    RATES,
    assert_bits,
    fused,
    portable,
    random_patterns,
    specified,
    subsets,
    values,
)

import unidrop
from unidrop import Key, keep_mask


@pytest.fixture(params=["torch", "tensorflow", "jax-x64"])
def library(request):
    """Return each library in turn, JAX with 64-bit numbers."""
    found = LIBRARIES[request.param]
    with found.context():
        yield found


def fused_mask(library, shape, key=KEY, **options):
    """Return a mask of kernels as NumPy's."""
    with unidrop.force_path("fused"):
        return library.numpy(keep_mask(shape, 0.4, key, xp=library.xp, **options))


# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_gives_portable_bits_of_random_bits(library, name):
    x = random_patterns((5003,), name)
    for p in RATES:
        assert_bits(library.numpy(fused(library.array(x), p)), portable(x, p))


@pytest.mark.parametrize("name", DTYPES)
def test_explains_that_arrays_are_fused_and_their_dtype(library, name):
    path = unidrop.explain_path(library.array(values((9,), name)))
    assert path.name == "fused"
    assert name in path.reason
    assert str(path) == f"fused: {path.reason}"


def test_gives_specified_bits_along_any_broadcast_axes(library):
    x = values((3, 4, 5, 6))
    for axes in subsets(4):
        y = library.numpy(fused(library.array(x), 0.4, broadcast_axes=axes))
        assert_bits(y, specified(x, 0.4, broadcast_axes=axes))


def test_numbers_single_element_of_any_rank_0(library):
    for shape, name, seed in itertools.product([(), (1,), (1, 1, 1)], DTYPES, range(4)):
        x = values(shape, name)
        y = unidrop.dropout(library.array(x), 0.5, Key(seed))
        assert_bits(library.numpy(y), specified(x, 0.5, Key(seed)))


def test_leaves_empty_arrays_empty_along_any_broadcast_axes(library):
    for shape in [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0), (2, 3, 0, 5)]:
        x = library.array(np.zeros(shape, "float32"))
        for axes in subsets(len(shape)):
            y, mask = unidrop.dropout(x, 0.5, KEY, broadcast_axes=axes, return_mask=True)
            assert tuple(y.shape) == shape
            assert tuple(mask.shape) == reference.mask_shape(shape, axes)


# --- Windows, keys and masks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "whole", "start"),
    [
        ((40,), (2**64,), (2**64 - 40,)),
        ((40,), (2**64,), (2**63 - 17,)),
        ((5, 7), (2**31, 2**33), (2**31 - 5, 2**33 - 7)),
        ((3, 40), (3, 2**62), (0, 2**62 - 40)),
    ],
    ids=str,
)
def test_gives_specified_bits_of_windows_far_out(library, shape, whole, start):
    x = values(shape)
    options = {"global_shape": whole, "start": start}
    y = library.numpy(fused(library.array(x), 0.4, **options))
    assert_bits(y, specified(x, 0.4, **options))
    np.testing.assert_array_equal(fused_mask(library, shape, **options), y != 0, strict=True)


@pytest.mark.parametrize(
    ("start", "dtype"),
    [(5, "int32"), (2**31 - 9, "int32"), (2**35 + 1, "int64"), (2**62 - 20, "int64")],
)
def test_accepts_array_as_start(library, start, dtype):
    x = values((3, 13))
    options = {"global_shape": (4, 2**62), "start": (1, library.scalar(start, dtype))}
    y = fused(library.array(x), 0.4, **options)
    mask = fused_mask(library, x.shape, broadcast_axes=(0,), **options)
    options["start"] = (1, start)
    assert_bits(library.numpy(y), specified(x, 0.4, **options))
    wanted = reference.keep_mask(x.shape, 0.4, int(KEY), broadcast_axes=(0,), **options)
    assert mask.astype(int).ravel().tolist() == wanted


def test_depends_on_all_bits_of_key(library):
    x = values((37,))
    for seed in (0, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1):
        y = library.numpy(fused(library.array(x), 0.4, Key(seed)))
        assert_bits(y, specified(x, 0.4, Key(seed)))


@pytest.mark.parametrize(("step", "dtype"), [(7, "int32"), (2**40 + 3, "int64")])
@pytest.mark.parametrize("name", LIBRARIES)
def test_accepts_key_of_arrays(name, step, dtype):
    library, x = LIBRARIES[name], values((37,))
    if np.dtype(dtype) > np.dtype(library.integer):
        return
    with library.context():
        key = KEY.fold_in(library.scalar(step, dtype))
        assert key.is_traced
        y = library.numpy(fused(library.array(x), 0.4, key))
        mask = fused_mask(library, x.shape, key)
    assert_bits(y, specified(x, 0.4, Key(reference.fold_in(int(KEY), step))))
    np.testing.assert_array_equal(mask, y != 0, strict=True)


def test_gives_specified_masks(library):
    window = {"global_shape": (9, 5, 2**33), "start": (2, 0, 2**32 - 3)}
    for axes, options in itertools.product(subsets(3), ({}, window)):
        mask = fused_mask(library, (3, 5, 7), broadcast_axes=axes, **options)
        wanted = reference.keep_mask((3, 5, 7), 0.4, int(KEY), broadcast_axes=axes, **options)
        shape = reference.mask_shape((3, 5, 7), axes)
        np.testing.assert_array_equal(mask, np.reshape(wanted, shape).astype(bool), strict=True)


def test_returns_mask_of_its_output(library):
    x = library.array(values((33, 9)))
    with unidrop.force_path("fused"):
        y, mask = unidrop.dropout(x, 0.4, KEY, broadcast_axes=(1,), return_mask=True)
    y, mask = library.numpy(y), library.numpy(mask)
    np.testing.assert_array_equal(np.broadcast_to(mask, y.shape), y != 0)


# --- Memory --------------------------------------------------------------------------------------


def test_keeps_results_beyond_their_inputs(library):
    outputs = []
    for seed in range(12):
        x = library.array(np.full((40_000,), seed + 1, "float32"))
        y, mask = unidrop.dropout(x, 0.5, Key(seed), return_mask=True)
        outputs.append((y, mask))
        del x, y, mask
        np.full((40_000,), np.nan, "float32")
        np.full((40_000,), 7, "uint8")
    gc.collect()
    for seed, (y, mask) in enumerate(outputs):
        expected = portable(np.full((40_000,), seed + 1, "float32"), 0.5, Key(seed))
        assert_bits(library.numpy(y), expected)
        np.testing.assert_array_equal(library.numpy(mask), expected != 0)


def test_shares_no_memory_between_results(library):
    x = library.array(values((99,)))
    first, second = fused(x, 0.5), fused(x, 0.5, Key(1))
    assert_bits(library.numpy(first), portable(values((99,)), 0.5))
    assert_bits(library.numpy(second), portable(values((99,)), 0.5, Key(1)))
    assert_bits(library.numpy(x), values((99,)))
