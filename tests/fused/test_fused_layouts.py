"""The fused path in every memory layout of inputs and outputs."""

import itertools
import math

import numpy as np
import pytest
from fused_arrays import (
    DTYPES,
    KEY,
    assert_bits,
    fused,
    laid_out,
    portable,
    random_patterns,
    specified,
    subsets,
    values,
)

import unidrop
import unidrop.adapters.numpy
from unidrop import Key

# --- Memory layouts -------------------------------------------------------------------------------


PERMUTED = [(57, 3, 67), (3, 7, 5, 9), (11, 1, 60, 3), (4, 2, 9)]


@pytest.mark.parametrize(
    ("shape", "order"),
    [(shape, order) for shape in PERMUTED for order in itertools.permutations(range(len(shape)))],
    ids=str,
)
def test_gives_portable_bits_in_any_order_of_axes(shape, order):
    x = values(shape)
    turned = laid_out(x, order)
    for axes in subsets(len(shape)):
        y = fused(turned, 0.4, broadcast_axes=axes)
        assert_bits(y, portable(x, 0.4, broadcast_axes=axes))


@pytest.mark.parametrize("name", DTYPES)
def test_gives_portable_bits_of_every_dtype_in_any_order_of_axes(name):
    x = random_patterns((13, 70, 9), name)
    for axes in ((), (0,), (2,)):
        expected = portable(x, 0.4, broadcast_axes=axes)
        for order in itertools.permutations(range(3)):
            assert_bits(fused(laid_out(x, order), 0.4, broadcast_axes=axes), expected)


def test_gives_specified_bits_along_any_broadcast_axes():
    x = values((3, 4, 5, 6))
    for axes in subsets(4):
        y = fused(x, 0.4, broadcast_axes=axes)
        assert_bits(y, specified(x, 0.4, broadcast_axes=axes))


VIEWS = {
    "transposed wide": lambda: values((2, 5000)).T,
    "transposed tall": lambda: values((5000, 2)).T,
    "one column": lambda: values((300, 1)).T,
    "length-1 axes": lambda: values((1, 40, 1, 70, 1)).transpose(4, 3, 2, 1, 0),
    "every second": lambda: values((80, 90))[::2, ::2],
    "a part": lambda: values((80, 90))[3:70, 5:77],
    "a column": lambda: values((80, 90))[:, 7],
    "reversed": lambda: values((80, 90))[::-1],
    "reversed in all": lambda: values((80, 90))[::-1, ::-1].T,
    "reversed, one-dimensional": lambda: values((999,))[::-1],
    "broadcast in front": lambda: np.broadcast_to(values((90,)), (80, 90)),
    "broadcast behind": lambda: np.broadcast_to(values((80, 1)), (80, 90)),
    "broadcast scalar": lambda: np.broadcast_to(np.float32(3), (8, 9)),
    "overlapping": lambda: np.lib.stride_tricks.sliding_window_view(values((99,)), 40),
    "new axis": lambda: values((33, 5))[:, None],
    "diagonal": lambda: np.einsum("ii->i", values((90, 90))),
    "real parts": lambda: values((40, 30), "complex64").real,
    "imaginary parts": lambda: values((40, 30), "complex128").imag.T,
}


@pytest.mark.parametrize("view", VIEWS)
def test_gives_portable_bits_of_views_and_leaves_them(view):
    x = VIEWS[view]()
    if x.flags.writeable:
        x.flags.writeable = False
    before = x.tobytes()
    for axes in ((), (0,), (-1,)):
        assert_bits(fused(x, 0.4, broadcast_axes=axes), portable(x, 0.4, broadcast_axes=axes))
    assert x.tobytes() == before


def test_has_layout_of_empty_like():
    x = values((3, 4, 5))
    for order in itertools.permutations(range(3)):
        turned = laid_out(x, order)
        assert fused(turned, 0.4).strides == np.empty_like(turned).strides


# --- out= -----------------------------------------------------------------------------------------


INTO = {
    "the same layout": np.empty_like,
    "C order": lambda x: np.empty_like(x, order="C"),
    "Fortran order": lambda x: np.empty_like(x, order="F"),
    "with gaps": lambda x: np.empty(tuple(2 * n for n in x.shape), x.dtype)[
        tuple(slice(None, None, 2) for _ in x.shape)
    ],
    "reversed": lambda x: np.empty_like(x, order="C")[::-1],
    "x itself": lambda x: x,
    "x reversed": lambda x: x[::-1],
}


@pytest.mark.parametrize("into", INTO)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_writes_portable_bits_to_out_of_any_layout(into, order):
    # The first and the last axis have the same length, so no shape reveals a mix-up of them.
    for seed, axes in itertools.product(range(3), subsets(3)):
        x = laid_out(values((7, 9, 7)), order)
        expected = portable(x, 0.5, Key(seed), broadcast_axes=axes)
        out = INTO[into](x)
        y = unidrop.adapters.numpy.dropout(x, 0.5, key=Key(seed), broadcast_axes=axes, out=out)
        assert y is out
        assert_bits(np.asarray(out), expected)


@pytest.mark.parametrize("shift", [-77, -9, -1, 1, 9, 77])
@pytest.mark.parametrize(("shape", "turn"), [((500,), False), ((20, 25), False), ((20, 25), True)])
def test_writes_bits_of_x_before_to_out_that_overlaps_x(shift, shape, turn):
    memory = values((1000,), "float64")
    size = math.prod(shape)
    x = memory[200 : 200 + size].reshape(shape)
    out = memory[200 + shift : 200 + shift + size].reshape(shape[::-1] if turn else shape)
    out = out.T if turn else out
    expected = portable(x, 0.4)
    others = np.ones(1000, bool)
    others[200 + shift : 200 + shift + size] = False
    before = memory[others]
    unidrop.adapters.numpy.dropout(x, 0.4, key=KEY, out=out)
    assert_bits(out, expected)
    assert_bits(memory[others], before)


def test_writes_bits_of_x_before_to_its_transpose():
    x = values((40, 40))
    expected = portable(x, 0.4)
    assert_bits(unidrop.adapters.numpy.dropout(x, 0.4, key=KEY, out=x.T), expected)


def test_writes_nothing_outside_output():
    for size in (1, 7, 33, 2049):
        for name in DTYPES:
            memory = values((size + 64,), name)
            before = memory.copy()
            part = memory[32 : 32 + size]
            unidrop.adapters.numpy.dropout(part, 0.4, key=KEY, out=part)
            assert_bits(memory[:32], before[:32])
            assert_bits(memory[32 + size :], before[32 + size :])


def test_returns_mask_beside_out():
    x = values((33, 5))
    out = np.empty_like(x)
    y, mask = unidrop.adapters.numpy.dropout(x, 0.4, key=KEY, out=out, return_mask=True)
    np.testing.assert_array_equal(mask, y != 0)
