"""The fused path in every memory layout, and into an output of any."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fused_arrays import (
    DTYPES,
    KEY,
    assert_bits,
    from_torch,
    fused,
    laid_out,
    portable,
    random_patterns,
    specified,
    subsets,
    to_torch,
    values,
)

import unidrop
import unidrop.adapters.numpy
import unidrop.adapters.torch
from unidrop import Key

# --- Memory layouts -------------------------------------------------------------------------------


PERMUTED = [(57, 3, 67), (3, 7, 5, 9), (11, 1, 60, 3), (4, 2, 9)]


@pytest.mark.parametrize(
    ("shape", "order"),
    [(shape, order) for shape in PERMUTED for order in itertools.permutations(range(len(shape)))],
    ids=str,
)
def test_any_order_of_axes_in_memory_and_any_broadcast_axes_give_the_portable_bits(shape, order):
    x = values(shape)
    turned = laid_out(x, order)
    for axes in subsets(len(shape)):
        y = fused(turned, 0.4, broadcast_axes=axes)
        assert_bits(y, portable(x, 0.4, broadcast_axes=axes))


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_any_order_of_axes_gives_the_portable_bits_of_every_dtype(order, name):
    x = random_patterns((13, 70, 9), name)
    turned = laid_out(x, order)
    for axes in ((), (0,), (2,)):
        y = fused(turned, 0.4, broadcast_axes=axes)
        assert_bits(y, portable(x, 0.4, broadcast_axes=axes))
        tensor = fused(to_torch(turned), 0.4, broadcast_axes=axes)
        assert_bits(from_torch(tensor), portable(x, 0.4, broadcast_axes=axes))


@pytest.mark.parametrize("axes", subsets(4), ids=str)
def test_any_broadcast_axes_of_any_library_are_those_of_the_specification(library, axes):
    x = values((3, 4, 5, 6))
    y = library.back(fused(library.array(x), 0.4, broadcast_axes=axes))
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
@pytest.mark.parametrize("axes", [(), (0,), (-1,)], ids=str)
def test_views_give_the_portable_bits_and_are_left_as_they_are(view, axes):
    x = VIEWS[view]()
    if x.flags.writeable:
        x.flags.writeable = False
    before = x.tobytes()
    assert_bits(fused(x, 0.4, broadcast_axes=axes), portable(x, 0.4, broadcast_axes=axes))
    assert x.tobytes() == before


def test_the_output_has_the_layout_that_empty_like_gives():
    x = values((3, 4, 5))
    for order in itertools.permutations(range(3)):
        turned = laid_out(x, order)
        assert fused(turned, 0.4).strides == np.empty_like(turned).strides
        tensor = to_torch(turned)
        assert fused(tensor, 0.4).stride() == torch.empty_like(tensor).stride()


TENSOR_VIEWS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1, :, :1].expand(4, 5, 6, 7),
    "transposed": lambda x: x.transpose(1, 3),
    "sliced": lambda x: x[:, ::2, 1:, ::3],
    "offset": lambda x: x.flatten()[5:],
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "unfolded": lambda x: x.flatten().unfold(0, 9, 4),
}


@pytest.mark.parametrize("view", TENSOR_VIEWS)
@pytest.mark.parametrize("axes", [(), (0,), (-1,), (-1, -2)], ids=str)
def test_views_of_tensors_give_the_portable_bits(view, axes):
    x = TENSOR_VIEWS[view](torch.from_numpy(values((4, 5, 6, 7))))
    if len(axes) > x.dim():
        axes = axes[:1]
    y = fused(x, 0.4, broadcast_axes=axes)
    assert_bits(y.numpy(), portable(x.numpy(), 0.4, broadcast_axes=axes))
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_channels_dropped_in_channels_last_are_those_of_the_contiguous_tensor(rank):
    x = torch.from_numpy(values((2, 5, *(3, 4, 2)[:rank])))
    drop = getattr(unidrop.adapters.torch, f"dropout{rank}d")
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with unidrop.force_path("fused"):
        assert torch.equal(drop(turned, 0.4, key=KEY), drop(x, 0.4, key=KEY))


def test_an_array_of_jax_in_another_order_gives_the_same_bits():
    layout = pytest.importorskip("jax.experimental.layout", reason="this JAX sets no layouts")
    x = jnp.asarray(values((6, 5)))
    turned = jax.device_put(x, layout.Format(layout.Layout((1, 0)), x.sharding))
    for axes in subsets(2):
        for seed in range(3):
            y = unidrop.dropout(turned, 0.5, Key(seed), broadcast_axes=axes)
            assert_bits(np.asarray(y), portable(x, 0.5, Key(seed), broadcast_axes=axes))


# --- out= -----------------------------------------------------------------------------------------


INTO = {
    "the same layout": np.empty_like,
    "C order": lambda x: np.empty_like(x, order="C"),
    "Fortran order": lambda x: np.empty_like(x, order="F"),
    "with gaps": lambda x: np.empty(tuple(2 * n for n in x.shape), x.dtype)[
        tuple(slice(None, None, 2) for _ in x.shape)
    ],
    "reversed": lambda x: np.empty_like(x, order="C")[::-1],
    "a subclass": lambda x: np.ma.masked_array(np.empty_like(x)),
    "x itself": lambda x: x,
    "x reversed": lambda x: x[::-1],
}


@pytest.mark.parametrize("into", INTO)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("axes", subsets(3), ids=str)
def test_out_of_any_layout_gets_the_portable_bits(into, order, axes):
    # The first and the last axis are of one length, so that their places can be mistaken.
    for seed in range(3):
        x = laid_out(values((7, 9, 7)), order)
        expected = portable(x, 0.5, Key(seed), broadcast_axes=axes)
        out = INTO[into](x)
        y = unidrop.adapters.numpy.dropout(x, 0.5, key=Key(seed), broadcast_axes=axes, out=out)
        assert y is out
        assert_bits(np.asarray(out), expected)


@pytest.mark.parametrize("shift", [-77, -9, -1, 1, 9, 77])
@pytest.mark.parametrize("shape", [(500,), (20, 25)], ids=str)
@pytest.mark.parametrize("turn", [False, True], ids=["straight", "transposed"])
def test_out_that_overlaps_x_gets_the_bits_of_x_before(shift, shape, turn):
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


def test_out_that_is_the_transpose_of_x_gets_the_bits_of_x_before():
    x = values((40, 40))
    expected = portable(x, 0.4)
    assert_bits(unidrop.adapters.numpy.dropout(x, 0.4, key=KEY, out=x.T), expected)


def test_nothing_is_written_outside_the_output():
    for size in (1, 7, 33, 2049):
        for name in DTYPES:
            memory = values((size + 64,), name)
            before = memory.copy()
            part = memory[32 : 32 + size]
            unidrop.adapters.numpy.dropout(part, 0.4, key=KEY, out=part)
            assert_bits(memory[:32], before[:32])
            assert_bits(memory[32 + size :], before[32 + size :])


def test_out_gets_the_mask_of_the_call_too():
    x = values((33, 5))
    out = np.empty_like(x)
    y, mask = unidrop.adapters.numpy.dropout(x, 0.4, key=KEY, out=out, return_mask=True)
    np.testing.assert_array_equal(mask, y != 0)
