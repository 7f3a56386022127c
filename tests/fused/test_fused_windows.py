"""Windows, keys and masks of the fused path: the bits of the specification."""

import math

import numpy as np
import pytest
import reference
from fused_arrays import KEY, assert_bits, fused, laid_out, specified, subsets, values
from hypothesis import given, settings
from hypothesis import strategies as st

import unidrop
from unidrop import Key, keep_mask

# --- Windows --------------------------------------------------------------------------------------


@st.composite
def windows(draw):
    """Return the shape, options and memory order of a small window of a large array."""
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, 12 if ndim < 3 else 5)) for _ in range(ndim))
    whole, start, room = [], [], 2**64
    for axis, length in enumerate(shape):
        rest = math.prod(shape[axis + 1 :])
        most = room // rest
        near = draw(st.sampled_from([length, length + 3, length + 40, 2**20, 2**33, most]))
        total = min(max(near, length), most)
        whole.append(total)
        start.append(draw(st.integers(0, total - length) | st.just(total - length)))
        room //= total
    axes = tuple(axis for axis in range(ndim) if draw(st.integers(0, 3)) == 0)
    order = tuple(draw(st.permutations(range(ndim))))
    options = {"global_shape": tuple(whole), "start": tuple(start), "broadcast_axes": axes}
    return shape, options, order


@settings(deadline=None, max_examples=150)
@given(windows(), st.integers(0, 2**64 - 1))
def test_gives_specified_bits_of_window_in_any_layout(window, seed):
    shape, options, order = window
    x = values(shape)
    expected = specified(x, 0.4, Key(seed), **options)
    assert_bits(fused(laid_out(x, order), 0.4, Key(seed), **options), expected)
    with unidrop.force_path("fused"):
        mask = keep_mask(shape, 0.4, Key(seed), **options)
    wanted = reference.keep_mask(shape, 0.4, seed, **options)
    assert mask.astype(int).ravel().tolist() == wanted


FAR = [
    ((40,), (2**64,), (2**64 - 40,)),
    ((40,), (2**64,), (2**63 - 17,)),
    ((40,), (2**40,), (2**35 - 3,)),
    ((5, 7), (2**31, 2**33), (2**31 - 5, 2**33 - 7)),
    ((5, 7), (2**60, 9), (2**59, 1)),
    ((3, 40), (3, 2**62), (0, 2**62 - 40)),
]


@pytest.mark.parametrize(("shape", "whole", "start"), FAR, ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_gives_specified_bits_of_windows_far_out(shape, whole, start, order):
    x = values(shape)
    options = {"global_shape": whole, "start": start}
    y = fused(np.asarray(x, order=order), 0.4, **options)
    assert_bits(y, specified(x, 0.4, **options))
    with unidrop.force_path("fused"):
        mask = keep_mask(shape, 0.4, KEY, **options)
    wanted = reference.keep_mask(shape, 0.4, int(KEY), **options)
    assert mask.dtype == bool
    assert mask.astype(int).ravel().tolist() == wanted


@pytest.mark.parametrize(
    ("start", "dtype"),
    [(5, "int32"), (2**31 - 9, "int32"), (2**35 + 1, "int64"), (2**62 - 20, "int64")],
)
def test_accepts_array_as_start(start, dtype):
    x = values((3, 13))
    options = {"global_shape": (4, 2**62), "start": (1, np.asarray(start, dtype))}
    y = fused(x, 0.4, **options)
    with unidrop.force_path("fused"):
        mask = keep_mask(x.shape, 0.4, KEY, **options, broadcast_axes=(0,))
    options["start"] = (1, start)
    assert_bits(y, specified(x, 0.4, **options))
    wanted = reference.keep_mask(x.shape, 0.4, int(KEY), **options, broadcast_axes=(0,))
    assert mask.astype(int).ravel().tolist() == wanted


# --- Keys -----------------------------------------------------------------------------------------


def test_depends_on_all_bits_of_key():
    x = values((37,))
    for seed in (0, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1):
        assert_bits(fused(x, 0.5, Key(seed)), specified(x, 0.5, Key(seed)))


@pytest.mark.parametrize("axes", subsets(3), ids=str)
def test_gives_specified_masks(axes):
    options = {"broadcast_axes": axes, "global_shape": (9, 5, 2**33), "start": (2, 0, 2**32 - 3)}
    for given_options in ({"broadcast_axes": axes}, options):
        with unidrop.force_path("fused"):
            mask = keep_mask((3, 5, 7), 0.4, KEY, **given_options)
        wanted = reference.keep_mask((3, 5, 7), 0.4, int(KEY), **given_options)
        shape = reference.mask_shape((3, 5, 7), axes)
        np.testing.assert_array_equal(mask, np.reshape(wanted, shape).astype(bool), strict=True)


def test_returns_mask_of_its_output():
    with unidrop.force_path("fused"):
        y, mask = unidrop.dropout(values((33, 9)), 0.4, KEY, broadcast_axes=(1,), return_mask=True)
    np.testing.assert_array_equal(np.broadcast_to(mask, y.shape), y != 0)
