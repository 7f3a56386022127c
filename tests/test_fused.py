"""Tests of the fused path: to the bit the portable one's and the specification's, or not taken."""

import gc
import importlib
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
import tensorflow as tf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import unidrop
import unidrop.adapters
import unidrop.adapters.numpy
import unidrop.adapters.tensorflow
import unidrop.adapters.torch
from unidrop import Key, keep_mask
from unidrop.adapters.backends.numpy import Numpy
from unidrop.conformance import Cell, cells, run_cell

pytest.importorskip("numba", reason="without Numba there are no kernels to test")

from unidrop.fused import kernels
from unidrop.fused.kernels import CHUNK, UNIT

FUSED = importlib.import_module("unidrop.fused")
PATH = importlib.import_module("unidrop.path")

KEY = Key(42).fold_in("encoder/0").fold_in(7)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "complex128")
} | {"bfloat16": BFLOAT16}
RATES = [2.0**-40, 0.1, 0.5, 0.9, 1 - 2.0**-20, 1]


# --- Arrays of each library, and what is right ----------------------------------------------------


def to_torch(x):
    """Return a tensor of the same memory layout; PyTorch takes no bfloat16 from NumPy."""
    x = np.array(x, order="K")
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(x)


def from_torch(x):
    x = x.detach()
    return x.view(torch.int16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()


LIBRARIES = {
    "numpy": SimpleNamespace(xp=np, array=np.asarray, back=np.asarray),
    "torch": SimpleNamespace(xp=torch, array=to_torch, back=from_torch),
    "tensorflow": SimpleNamespace(xp=tf, array=tf.constant, back=lambda y: np.asarray(y.numpy())),
    "jax": SimpleNamespace(xp=jnp, array=jnp.asarray, back=np.asarray),
}


@pytest.fixture(params=LIBRARIES)
def library(request):
    """Return each library in turn, JAX with 64-bit numbers."""
    with jax.enable_x64(True) if request.param == "jax" else nullcontext():
        yield LIBRARIES[request.param]


def rng(*seed):
    return np.random.default_rng(seed)


def random_patterns(shape, name, seed=0):
    """Return an array of random bits: NaN, infinities, zeros and subnormals are among them."""
    dtype = DTYPES[name]
    x = np.frombuffer(rng(seed).bytes(math.prod(shape) * dtype.itemsize), dtype).copy()
    components = x.view(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else x
    special = [0.0, -0.0, np.nan, np.inf, -np.inf]
    components[: 5 * (components.size // 5)][:5] = special[: 5 * (components.size // 5)]
    bits = components.view(f"u{components.dtype.itemsize}")
    bits[5::7] &= np.array(3, bits.dtype)  # subnormals and zeros
    return x.reshape(shape)


def values(shape, name="float32"):
    """Return ordinary values, all different as far as the dtype allows, none of them 0."""
    x = np.arange(1, math.prod(shape) + 1, dtype="float64").reshape(shape)
    return (x - 1j * x if name.startswith("complex") else x).astype(DTYPES[name])


def patterns(x):
    """Return the bit patterns of an array's components, in logical order, one NaN for all."""
    x = np.ascontiguousarray(x).reshape(-1)
    form = reference.component_format(x.dtype.name)
    if x.dtype.kind == "c":
        x = x.view(f"f{x.dtype.itemsize // 2}")
    bits = x.view(f"u{x.dtype.itemsize}").copy()
    magnitude = bits & np.array(form.sign - 1, bits.dtype)
    bits[magnitude > form.infinity] = form.nan
    return bits


def assert_bits(y, expected):
    """Compare two arrays of NumPy: shape, dtype and each bit, but for NaN's payload and sign."""
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    np.testing.assert_array_equal(patterns(y), patterns(expected))


def portable(x, p, key=KEY, **options):
    """Return what NumPy's portable operations make of a C-contiguous copy."""
    with unidrop.only("portable"):
        return unidrop.dropout(np.array(x, order="C", subok=False), p, key, **options)


def fused(x, p, key=KEY, **options):
    """Return what kernels make of an array, which they have to take."""
    with unidrop.only("fused"):
        return unidrop.dropout(x, p, key, **options)


def specified(x, p, key=KEY, **options):
    """Return the specification's output, which shares no code with the package."""
    keep = reference.keep_mask(x.shape, p, int(key), **options)
    shape = reference.mask_shape(x.shape, options.get("broadcast_axes", ()))
    keep = np.broadcast_to(np.reshape(keep, shape), x.shape).reshape(-1)
    flat = np.array(x, order="C").reshape(-1)
    components = flat.view(f"f{x.dtype.itemsize // 2}") if x.dtype.kind == "c" else flat
    bits = components.view(f"u{components.dtype.itemsize}")
    wanted = reference.dropout_bits(bits.tolist(), x.dtype.name, keep.tolist(), p)
    return np.asarray(wanted, bits.dtype).view(x.dtype).reshape(x.shape)


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
    for bits, came, right in zip(before, got, wanted, strict=True):
        small = name != "float16" and min(bits & ~form.sign, right & ~form.sign) < form.normal
        assert came == right or (small and came == bits & form.sign and right != 0), hex(bits)


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
    with unidrop.only("fused"):
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
    with unidrop.only("portable"):
        expected = keep_mask((size,), 0.4, KEY)
    with unidrop.only("fused"):
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


# --- Memory layouts -------------------------------------------------------------------------------


def laid_out(x, order):
    """Return a copy of an array whose axes lie in memory in an order, outermost first."""
    inverse = np.argsort(order)
    return np.ascontiguousarray(x.transpose(order)).transpose(inverse)


def subsets(ndim):
    return [axes for n in range(ndim + 1) for axes in itertools.combinations(range(ndim), n)]


PERMUTED = [(57, 3, 67), (3, 7, 5, 9), (11, 1, 60, 3)]


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
    with unidrop.only("fused"):
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


# --- What kernels do not take ---------------------------------------------------------------------


class Subclass(np.ndarray):
    """A subclass that changes nothing."""


def unaligned(x):
    return np.frombuffer(b"0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape)


def field(x):
    """Return a field of records that are no multiple of it apart."""
    records = np.zeros(x.shape, [("x", x.dtype), ("rest", "u1")])
    records["x"] = x
    return records["x"]


REFUSED = {
    "swapped bytes": (lambda x: x.astype(x.dtype.newbyteorder()), "byte order"),
    "unaligned": (unaligned, "aligned"),
    "a field": (field, "aligned"),
    "a subclass": (lambda x: x.view(Subclass), "Subclass"),
    "a masked array": (np.ma.masked_array, "MaskedArray"),
    "a matrix": (lambda x: np.matrix(x, copy=True), "matrix"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_what_kernels_cannot_take_is_portable_with_a_reason_and_the_same_bits(kind):
    make, reason = REFUSED[kind]
    plain = values((37, 11))
    x = make(plain)
    path = unidrop.explain(x)
    assert path.name == "portable"
    assert reason in path.reason
    y = unidrop.dropout(x, 0.4, KEY)
    assert y.dtype == x.dtype
    assert_bits(np.asarray(y).astype("float32"), portable(plain, 0.4))
    with unidrop.only("fused"), pytest.raises(RuntimeError, match=reason):
        unidrop.dropout(x, 0.4, KEY)


def test_a_memory_map_is_taken_and_its_file_left_as_it_is(tmp_path):
    x = values((999,))
    (tmp_path / "x").write_bytes(x.tobytes())
    for mode in ("r", "r+", "c"):
        mapped = np.memmap(tmp_path / "x", "float32", mode)
        y = fused(mapped, 0.4)
        assert_bits(np.asarray(y), portable(x, 0.4))
    assert (tmp_path / "x").read_bytes() == x.tobytes()


def test_out_that_is_mapped_is_written_to_its_file(tmp_path):
    x = values((999,))
    out = np.memmap(tmp_path / "y", "float32", "w+", shape=x.shape)
    unidrop.adapters.numpy.dropout(x, 0.4, key=KEY, out=out)
    out.flush()
    assert (tmp_path / "y").read_bytes() == portable(x, 0.4).tobytes()


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
def test_a_window_of_any_layout_is_that_of_the_specification(window, seed):
    shape, options, order = window
    x = values(shape)
    expected = specified(x, 0.4, Key(seed), **options)
    assert_bits(fused(laid_out(x, order), 0.4, Key(seed), **options), expected)
    with unidrop.only("fused"):
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
def test_windows_far_out_are_those_of_the_specification(library, shape, whole, start, order):
    x = values(shape)
    options = {"global_shape": whole, "start": start}
    y = fused(library.array(np.asarray(x, order=order)), 0.4, **options)
    assert_bits(library.back(y), specified(x, 0.4, **options))
    with unidrop.only("fused"):
        mask = library.back(keep_mask(shape, 0.4, KEY, xp=library.xp, **options))
    wanted = reference.keep_mask(shape, 0.4, int(KEY), **options)
    assert mask.dtype == bool
    assert mask.astype(int).ravel().tolist() == wanted


SCALARS = {
    "torch": lambda value, dtype: torch.tensor(value, dtype=getattr(torch, dtype)),
    "tensorflow": lambda value, dtype: tf.constant(value, dtype),
    "jax": lambda value, dtype: jnp.asarray(np.asarray(value, dtype)),
    "numpy": lambda value, dtype: np.asarray(value, dtype),
}


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize(
    ("start", "dtype"),
    [(5, "int32"), (2**31 - 9, "int32"), (2**35 + 1, "int64"), (2**62 - 20, "int64")],
)
def test_a_start_that_is_an_array_is_its_value(name, start, dtype):
    library = LIBRARIES[name]
    x = values((3, 13))
    with jax.enable_x64(True):
        given_start = (1, SCALARS[name](start, dtype))
        options = {"global_shape": (4, 2**62)}
        y = fused(library.array(x), 0.4, **options, start=given_start)
        with unidrop.only("fused"):
            mask = keep_mask(
                x.shape, 0.4, KEY, xp=library.xp, **options, start=given_start, broadcast_axes=(0,)
            )
    expected = specified(x, 0.4, **options, start=(1, start))
    assert_bits(library.back(y), expected)
    wanted = reference.keep_mask(
        x.shape, 0.4, int(KEY), **options, start=(1, start), broadcast_axes=(0,)
    )
    assert library.back(mask).astype(int).ravel().tolist() == wanted


# --- Keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1])
def test_all_bits_of_a_key_count(library, seed):
    x = values((37,))
    expected = specified(x, 0.5, Key(seed))
    assert_bits(library.back(fused(library.array(x), 0.5, Key(seed))), expected)


@pytest.mark.parametrize("name", ["torch", "tensorflow", "jax"])
@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_a_key_whose_words_are_arrays_is_its_value(name, wide):
    library = LIBRARIES[name]
    x = values((37,))
    step = 2**40 + 3 if wide else 7
    with jax.enable_x64(wide):
        key = KEY.fold_in(SCALARS[name](step, "int64" if wide else "int32"))
        assert key.is_traced
        y = fused(library.array(x), 0.5, key)
        with unidrop.only("fused"):
            mask = keep_mask(x.shape, 0.5, key, xp=library.xp)
    folded = reference.fold_in(int(KEY), step)
    assert_bits(library.back(y), specified(x, 0.5, Key(folded)))
    wanted = reference.keep_mask(x.shape, 0.5, folded)
    assert library.back(mask).astype(int).tolist() == wanted


@pytest.mark.parametrize("axes", subsets(3), ids=str)
def test_masks_of_every_library_are_those_of_the_specification(library, axes):
    options = {"broadcast_axes": axes, "global_shape": (9, 5, 2**33), "start": (2, 0, 2**32 - 3)}
    for given_options in ({"broadcast_axes": axes}, options):
        with unidrop.only("fused"):
            mask = library.back(keep_mask((3, 5, 7), 0.4, KEY, xp=library.xp, **given_options))
        wanted = reference.keep_mask((3, 5, 7), 0.4, int(KEY), **given_options)
        shape = reference.mask_shape((3, 5, 7), axes)
        np.testing.assert_array_equal(mask, np.reshape(wanted, shape).astype(bool), strict=True)


def test_the_output_and_mask_of_one_call_agree(library):
    x = library.array(values((33, 9)))
    with unidrop.only("fused"):
        y, mask = unidrop.dropout(x, 0.4, KEY, broadcast_axes=(1,), return_mask=True)
    y, mask = library.back(y), library.back(mask)
    np.testing.assert_array_equal(np.broadcast_to(mask, y.shape), y != 0)


# --- PyTorch --------------------------------------------------------------------------------------


def kept_by(key, shape=(9,), p=0.5):
    keep = reference.keep_mask(shape, p, int(key))
    return torch.tensor(keep, dtype=torch.bool).reshape(shape)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "complex64"])
def test_the_gradient_is_the_upstream_gradient_by_the_forwards_own_mask(order, name):
    x = to_torch(values((33, 9), name).copy(order)).requires_grad_()
    upstream = to_torch(values((33, 9), name))
    with unidrop.only("fused"):
        y = unidrop.dropout(x, 0.4, KEY)
        y.backward(upstream)
    assert_bits(from_torch(y), portable(from_torch(x), 0.4))
    assert_bits(from_torch(x.grad), portable(from_torch(upstream), 0.4))


def test_the_gradient_of_a_sum_whose_upstream_is_expanded_is_the_scale():
    x = torch.ones(4, 9, requires_grad=True)
    with unidrop.only("fused"):
        unidrop.dropout(x, 0.5, KEY).sum().backward()
    assert torch.equal(x.grad, 2.0 * kept_by(KEY, (4, 9)))


def test_the_second_gradient_has_the_same_mask():
    x = torch.from_numpy(values((9,), "float64")).requires_grad_()
    with unidrop.only("fused"):
        y = unidrop.dropout(x, 0.5, KEY)
        (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    keep = kept_by(KEY)
    assert torch.equal(first, keep * 3 * (2 * x) ** 2 * 2)
    assert torch.equal(second, keep * 6 * (2 * x) * 4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_derivatives_are_the_numerical_ones():
    x = torch.from_numpy(values((3, 5), "float64")).requires_grad_()

    def function(v):
        return unidrop.dropout(v, 0.5, KEY) ** 2

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)


def test_nothing_is_saved_for_the_backward_pass():
    saved = []
    x = torch.ones(4096, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda none: none)
    with hooks, unidrop.only("fused"):
        y = unidrop.dropout(x, 0.5, KEY)
    assert saved == []
    assert y.requires_grad


IN_PLACE = {
    "a leaf that requires grad": lambda: torch.ones(9, requires_grad=True),
    "a view of such a leaf": lambda: torch.ones(9, requires_grad=True)[:5],
    "an expanded tensor": lambda: torch.ones(1, 3).expand(4, 3),
    "an inference tensor": lambda: inference_ones(),
    "a view of an inference tensor": lambda: inference_ones()[:5],
}


def inference_ones():
    with torch.inference_mode():
        return torch.ones(9)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_in_place_refuses_what_pytorchs_own_refuses_and_leaves_it_as_it_was(kind):
    with pytest.raises(RuntimeError) as native:
        torch.nn.functional.dropout(IN_PLACE[kind](), 0.5, inplace=True)
    x = IN_PLACE[kind]()
    version = None if x.is_inference() else x._version
    with pytest.raises(RuntimeError) as raised:
        unidrop.adapters.torch.dropout(x, 0.5, inplace=True, key=KEY)
    assert str(raised.value)[:30] == str(native.value)[:30]
    assert torch.equal(x, torch.ones(x.shape))
    assert x.is_inference() or x._version == version


@pytest.mark.parametrize("make", [inference_ones, lambda: torch.ones(9)], ids=["inference", "not"])
def test_in_place_in_inference_mode_writes_the_output(make):
    x = make()
    with torch.inference_mode(), unidrop.only("fused"):
        y = unidrop.adapters.torch.dropout(x, 0.5, inplace=True, key=KEY)
    assert y is x
    assert torch.equal(x, 2.0 * kept_by(KEY))


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:5], lambda x: x.T, lambda x: x[::2]])
def test_in_place_writes_the_output_over_the_input_and_counts_as_a_change(view):
    x = torch.from_numpy(values((20, 9)))
    part = view(x)
    expected = portable(part.numpy(), 0.4)
    version = x._version
    with unidrop.only("fused"):
        y = unidrop.adapters.torch.dropout(part, 0.4, inplace=True, key=KEY)
    assert y is part
    assert_bits(part.numpy(), expected)
    assert x._version > version


def test_in_place_on_what_a_backward_pass_needs_is_found_out():
    w = torch.ones(9, requires_grad=True)
    x = torch.ones(9)
    y = w * x
    unidrop.adapters.torch.dropout(x, 0.5, inplace=True, key=KEY)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_on_an_intermediate_result_has_the_gradient():
    x = torch.ones(9, requires_grad=True)
    with unidrop.only("fused"):
        y = unidrop.adapters.torch.dropout(x * 3, 0.5, inplace=True, key=KEY)
        y.sum().backward()
    assert torch.equal(x.grad, 6.0 * kept_by(KEY))


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


NO_PLAIN_TENSOR = {
    "conjugated": (lambda x: torch.complex(x, -x).conj(), "conj"),
    "negated": (lambda x: torch.complex(x, -x).conj().imag, "neg"),
    "a subclass": (lambda x: x.as_subclass(Plain), "Plain"),
    "meta": (lambda x: x.to("meta"), "meta"),
}


@pytest.mark.parametrize("kind", NO_PLAIN_TENSOR)
def test_tensors_whose_memory_does_not_hold_their_values_are_portable(kind):
    make, reason = NO_PLAIN_TENSOR[kind]
    x = make(torch.from_numpy(values((9,))))
    path = unidrop.explain(x)
    assert path.name == "portable"
    assert reason in path.reason
    y = unidrop.dropout(x, 0.4, KEY)
    assert y.shape == x.shape
    if kind != "meta":
        plain = torch.clone(x.as_subclass(torch.Tensor)).resolve_conj().resolve_neg()
        assert_bits(
            y.as_subclass(torch.Tensor).resolve_conj().resolve_neg().numpy(),
            portable((plain + 0).numpy(), 0.4),
        )


def test_a_tensor_of_zeros_that_lies_nowhere_is_portable():
    # In a process of its own, which a read of address 0 would end.
    program = """
import torch, unidrop
x = torch._efficientzerotensor((9,))
print(unidrop.explain(x).name)
print(unidrop.dropout(x, 0.5, unidrop.Key(1)).sum().item())
"""
    assert output_of(program) == ["portable", "0.0"]


@contextmanager
def recorded():
    """Record the names of the operations that PyTorch dispatches."""
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Recorder():
        yield names


def test_a_dispatch_mode_sees_the_operation():
    x = torch.ones(9)
    with recorded() as names:
        assert unidrop.explain(x).name == "portable"
        y = unidrop.dropout(x, 0.5, KEY)
    assert "dropout" in names
    assert torch.equal(y, 2.0 * kept_by(KEY))


def dropped(x, key=KEY):
    return unidrop.dropout(x, 0.5, key)


def dropped_in_place(x):
    return unidrop.adapters.torch.dropout(x * 1, 0.5, inplace=True, key=KEY)


def with_dual(function):
    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, 3 * x))).tangent

    return tangent


def batched_gradients(x):
    x = x.clone().requires_grad_()
    y = dropped(x)
    return torch.autograd.grad(y, x, torch.eye(9), is_grads_batched=True)[0]


jacobian = torch.autograd.functional.jacobian
TRANSFORMED = {
    "grad": torch.func.grad(lambda x: (dropped(x) ** 2).sum()),
    "grad of grad": torch.func.grad(
        lambda x: torch.func.grad(lambda v: (dropped(v) ** 3).sum())(x).sum()
    ),
    "grad by another": lambda x: torch.func.grad(lambda v: (v * dropped(x)).sum())(x),
    "vmap": lambda x: torch.func.vmap(dropped, randomness="same")(x.expand(4, 9)),
    "vmap by another": lambda x: torch.func.vmap(lambda v: v * dropped(x))(x.expand(4, 9)),
    "jvp": lambda x: torch.func.jvp(dropped, (x,), (3 * x,)),
    "vjp": lambda x: torch.func.vjp(dropped, x)[1](3 * x),
    "jacrev": torch.func.jacrev(dropped),
    "jacfwd": torch.func.jacfwd(dropped),
    "functionalize": torch.func.functionalize(dropped),
    "jacobian": lambda x: jacobian(dropped, x),
    "vectorized jacobian": lambda x: jacobian(dropped, x, vectorize=True),
    "forward-mode jacobian": lambda x: jacobian(
        dropped, x, vectorize=True, strategy="forward-mode"
    ),
    "batched gradients": batched_gradients,
    "forward mode": with_dual(dropped),
    "forward mode in place": with_dual(dropped_in_place),
    "in place, grad": torch.func.grad(lambda x: (dropped_in_place(x) ** 2).sum()),
    "in place, vmap": lambda x: torch.func.vmap(dropped_in_place, randomness="same")(
        x.expand(4, 9)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMED)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_what_transforms_functions_gives_what_it_gives_of_the_portable_path(transform):
    x = torch.from_numpy(values((9,)))
    with unidrop.only("portable"):
        expected = TRANSFORMED[transform](x)
    came = TRANSFORMED[transform](x)
    torch.testing.assert_close(came, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_the_old_kind_records_dropout():
    x = torch.ones(9)
    traced = torch.jit.trace(dropped, x, check_trace=False)
    assert torch.equal(traced(x * 3), 6.0 * kept_by(KEY))


def test_fake_tensors_give_a_fake_one():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode() as mode:
        y = dropped(mode.from_tensor(torch.ones(9)))
    assert isinstance(y, FakeTensor)


# --- TensorFlow and JAX ---------------------------------------------------------------------------


def test_the_gradient_of_an_eager_tensor_has_the_forwards_mask():
    x = tf.constant(values((33, 9)))
    with unidrop.only("fused"), tf.GradientTape() as tape:
        tape.watch(x)
        y = unidrop.dropout(x, 0.4, KEY)
        z = tf.reduce_sum(y * y)
    with unidrop.only("fused"):
        gradient = tape.gradient(z, x)
    twice = portable(2 * portable(x.numpy(), 0.4), 0.4)
    assert_bits(gradient.numpy(), twice)


@pytest.mark.parametrize("return_mask", [False, True], ids=["output", "output and mask"])
def test_a_variable_is_taken_as_explain_says(return_mask):
    x = values((33, 9))
    variable = tf.Variable(x)
    before = variable.numpy()
    with unidrop.only(unidrop.explain(variable).name):
        y = unidrop.dropout(variable, 0.4, KEY, return_mask=return_mask)
    y = y[0] if return_mask else y
    variable.assign_add(tf.ones_like(variable))
    assert_bits(y.numpy(), portable(x, 0.4))
    assert_bits(variable.numpy(), before + 1)


def test_the_gradient_of_a_variable_has_the_forwards_mask():
    variable = tf.Variable(values((9,)))
    with tf.GradientTape() as tape:
        z = tf.reduce_sum(unidrop.adapters.tensorflow.dropout(variable, 0.5, key=KEY))
    assert_bits(tape.gradient(z, variable).numpy(), 2 * kept_by(KEY).numpy().astype("float32"))


def test_a_graph_is_portable_and_has_the_bits_of_the_kernels():
    names = []

    @tf.function
    def step(x):
        names.append(unidrop.explain(x).name)
        return unidrop.dropout(x, 0.4, KEY)

    x = values((33, 9))
    assert_bits(step(tf.constant(x)).numpy(), fused(x, 0.4))
    assert names == ["portable"]
    with unidrop.only("fused"), pytest.raises(RuntimeError, match="traced"):
        tf.function(dropped)(tf.constant(x))


def test_tensors_made_by_kernels_are_used_in_graphs_and_changed_there():
    x = values((33, 9))
    y = fused(tf.constant(x), 0.4)
    changed = tf.function(lambda v: tf.raw_ops.InplaceAdd(x=v, i=[0], v=v[:1]) + 0)
    expected = portable(x, 0.4)
    assert_bits((y * 2).numpy(), expected * 2)
    assert changed(tf.identity(y)).shape == y.shape


def test_the_gradient_of_jax_is_the_portable_one_by_the_kernels_mask():
    x = jnp.asarray(values((33, 9)))
    y = fused(x, 0.4)
    gradient = jax.grad(lambda v: (unidrop.dropout(v, 0.4, KEY) * y).sum())(x)
    assert_bits(np.asarray(gradient), portable(y, 0.4))


def test_a_jitted_function_says_portable_and_refuses_kernels():
    names = []

    @jax.jit
    def step(x):
        names.append(unidrop.explain(x).name)
        with unidrop.only("fused"):
            return unidrop.dropout(x, 0.4, KEY)

    with pytest.raises(RuntimeError, match="traced"):
        step(jnp.ones(9))
    assert names == ["portable"]


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
def test_a_wide_array_where_jax_has_none_is_never_narrowed():
    with jax.enable_x64(True):
        x = jnp.asarray(values((9,), "float64"))
    with pytest.raises(TypeError, match="x has dtype float64"):
        unidrop.dropout(x, 0.5, KEY)


def test_the_output_is_committed_to_a_device_as_the_portable_one_is():
    x = jax.device_put(jnp.ones(9), jax.devices()[0])
    with unidrop.only("portable"):
        expected = unidrop.dropout(x, 0.5, KEY)
    y = unidrop.dropout(x, 0.5, KEY)
    assert y.committed == expected.committed
    assert y.weak_type == expected.weak_type
    assert y.sharding == expected.sharding


def test_results_outlive_their_inputs_and_everything_else(library):
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
        assert_bits(library.back(y), expected)
        np.testing.assert_array_equal(library.back(mask), expected != 0)


def test_two_results_share_no_memory(library):
    x = library.array(values((99,)))
    first, second = fused(x, 0.5), fused(x, 0.5, Key(1))
    assert_bits(library.back(first), portable(values((99,)), 0.5))
    assert_bits(library.back(second), portable(values((99,)), 0.5, Key(1)))
    assert_bits(library.back(x), values((99,)))


# --- explain and only -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_plain_arrays_are_fused_and_the_dtype_is_said(library, name):
    path = unidrop.explain(library.array(values((9,), name)))
    assert path.name == "fused"
    assert name in path.reason
    assert str(path) == f"fused: {path.reason}"


def test_a_parameter_is_fused():
    assert unidrop.explain(torch.nn.Parameter(torch.ones(9))).name == "fused"


@pytest.mark.parametrize("x", [[1.0], 3.0, None, "text"], ids=repr)
def test_explain_refuses_what_is_no_array(x):
    with pytest.raises(TypeError, match="x has to be an array"):
        unidrop.explain(x)


@pytest.mark.parametrize("dtype", ["int64", "bool", "longdouble"])
def test_explain_refuses_a_dtype_without_dropout(dtype):
    with pytest.raises(TypeError, match="x has to be of a floating-point dtype"):
        unidrop.explain(np.ones(3, dtype))


@pytest.mark.parametrize("path", ["", "Fused", "both", None, 1], ids=repr)
def test_only_refuses_what_is_no_path(path):
    context = unidrop.only(path)
    with pytest.raises(ValueError, match="path has to be one of fused, portable, but got"):
        context.__enter__()
    assert unidrop.explain(np.ones(3)).name == "fused"


def test_only_ends_where_its_block_does_also_by_an_exception():
    x = np.ones(3)
    with unidrop.only("portable"):
        with suppress(ZeroDivisionError), unidrop.only("fused"):
            assert unidrop.explain(x).name == "fused"
            raise ZeroDivisionError
        assert unidrop.explain(x).name == "portable"
        with unidrop.only("fused"):
            assert unidrop.explain(x).name == "fused"
        assert unidrop.explain(x).reason == "unidrop.only says so"
    assert unidrop.explain(x).name == "fused"


def test_only_is_a_decorator_too():
    @unidrop.only("portable")
    def name():
        return unidrop.explain(np.ones(3)).name

    assert [name(), name()] == ["portable", "portable"]
    assert unidrop.explain(np.ones(3)).name == "fused"


def test_each_thread_has_its_own_only():
    both = Barrier(2)

    def name(path):
        with unidrop.only(path) if path else nullcontext():
            both.wait(timeout=60)
            found = unidrop.explain(np.ones(3)).name
            both.wait(timeout=60)
        return found

    with ThreadPoolExecutor(2) as pool, unidrop.only("portable"):
        assert list(pool.map(name, ["portable", None])) == ["portable", "fused"]


def test_many_threads_at_once_give_the_same_bits():
    arrays = [values((3 * UNIT + i,)) for i in range(8)]
    expected = [portable(x, 0.4, Key(i)) for i, x in enumerate(arrays)]
    with ThreadPoolExecutor(8) as pool:
        came = list(pool.map(lambda i: fused(arrays[i], 0.4, Key(i)), range(8)))
    for y, wanted in zip(came, expected, strict=True):
        assert_bits(y, wanted)


# --- Where there are no kernels -------------------------------------------------------------------

PROGRAM = """
import sys
import numpy as np
import unidrop, unidrop.adapters.numpy
assert "numba" not in sys.modules or sys.modules["numba"] is None
x = np.arange(1, 4000, dtype="float32").reshape(3, -1)
y, mask = unidrop.dropout(np.asfortranarray(x), 0.4, unidrop.Key(7), return_mask=True)
out = unidrop.adapters.numpy.dropout(x, 0.4, key=unidrop.Key(7), out=np.empty_like(x))
far = unidrop.dropout(x, 0.4, unidrop.Key(7), global_shape=(3, 2**40), start=(0, 2**35))
parts = (np.ascontiguousarray(y), mask, out, far)
print(unidrop.explain(x))
print("".join(part.tobytes().hex() for part in parts))
"""


def output_of(program, cwd=None, **environment):
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def bits_of_the_program():
    """Return what the program prints of its results, as the specification says it."""
    x = np.arange(1, 4000, dtype="float32").reshape(3, -1)
    y = specified(x, 0.4, Key(7))
    far = specified(x, 0.4, Key(7), global_shape=(3, 2**40), start=(0, 2**35))
    return "".join(part.tobytes().hex() for part in (y, y != 0, y, far))


@pytest.fixture(scope="module")
def without_kernels(tmp_path_factory):
    """Return a folder that holds the package, but for its kernels."""
    folder = tmp_path_factory.mktemp("without_kernels")
    ignored = shutil.ignore_patterns("__pycache__", "fused")
    shutil.copytree(Path(unidrop.__file__).parent, folder / "unidrop", ignore=ignored)
    adapters = Path(unidrop.adapters.__file__).parent
    shutil.copytree(adapters, folder / "unidrop" / "adapters", ignore=ignored)
    return folder


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
BROKEN = """
import sys, types
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "llvmlite":
            raise ImportError("libLLVM is too old", name=name)
sys.meta_path.insert(0, Broken())
"""
ABSENT = {
    "numba is None": ("import sys; sys.modules['numba'] = None\n", {}, "not installed"),
    "numba is not installed": (BLOCKED.format(names=("numba", "llvmlite")), {}, "not installed"),
    "numba can't be imported": (BROKEN, {}, "can't be imported"),
    "compilation is off": ("", {"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT"),
}


@pytest.mark.parametrize("why", ABSENT)
def test_without_numba_the_bits_are_the_same_and_the_reason_is_said(why, bits_of_the_program):
    before, environment, reason = ABSENT[why]
    path, bits = output_of(before + PROGRAM, **environment)
    assert path.startswith("portable: ")
    assert reason in path
    assert bits == bits_of_the_program


# An installed package, also one that can be edited, lends a copy the parts that it lacks.
ALONE = """
import sys
sys.meta_path = [found for found in sys.meta_path if "editable" not in str(found).lower()]
import unidrop
unidrop.__path__[1:] = []
"""


def test_without_the_package_of_kernels_the_bits_are_the_same(without_kernels, bits_of_the_program):
    path, bits = output_of(ALONE + PROGRAM, cwd=without_kernels)
    assert path == "portable: the package unidrop.fused is missing"
    assert bits == bits_of_the_program


def test_without_the_package_of_kernels_fused_is_refused(without_kernels):
    program = """
import numpy, unidrop
try:
    with unidrop.only("fused"):
        unidrop.dropout(numpy.ones(3), 0.5, unidrop.Key(1))
except RuntimeError as error:
    print(error)
"""
    (message,) = output_of(ALONE + program, cwd=without_kernels)
    assert "unidrop.fused is missing" in message


def test_an_error_inside_the_package_of_kernels_is_not_taken_for_its_absence(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(PATH, "import_module", absent)
    PATH._package.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match="other"):
            unidrop.dropout(np.ones(3), 0.5, KEY)
    finally:
        PATH._package.cache_clear()


@pytest.mark.parametrize(
    "code",
    [
        "import unidrop",
        "import unidrop.adapters.numpy",
        "import unidrop, numpy; unidrop.dropout(numpy.ones(9), 0, unidrop.Key(1))",
        "import unidrop, numpy; unidrop.dropout(numpy.ones(9), 1, unidrop.Key(1))",
        "import unidrop, numpy\n"
        "with unidrop.only('portable'): unidrop.dropout(numpy.ones(9), 0.5, unidrop.Key(1))",
        "import unidrop, numpy; unidrop.dropout(numpy.ma.ones(9), 0.5, unidrop.Key(1))",
    ],
)
def test_numba_is_not_imported_before_a_kernel_is_needed(code):
    (found,) = output_of(f"{code}\nimport sys; print('numba' in sys.modules)")
    assert found == "False"


def test_without_a_folder_for_its_cache_numba_compiles_all_the_same(monkeypatch):
    compile_with = kernels._compiled
    asked = []

    def no_folder(function, **options):
        asked.append(options.get("cache", False))
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_with(function, **options)

    monkeypatch.setattr(kernels, "_compiled", no_folder)
    kernels.kernel.cache_clear()
    FUSED._compiled.cache_clear()
    try:
        x = values((99,))
        assert_bits(fused(x, 0.4), portable(x, 0.4))
    finally:
        kernels.kernel.cache_clear()
        FUSED._compiled.cache_clear()
    assert asked == [True, False]


def test_kernels_that_several_processes_compiled_do_not_get_mixed_up(tmp_path):
    # What each compiles first has the same number in Numba's names of functions.
    program = """
import sys, ml_dtypes, numpy as np, unidrop
for name in {names}:
    x = np.arange(1, 301).astype(name)
    y = unidrop.dropout(x, 0.4, unidrop.Key(1))
    with unidrop.only("portable"):
        print((y == unidrop.dropout(x, 0.4, unidrop.Key(1))).all(), end=" ")
"""
    first, second = ("float16",), ("bfloat16",)
    for names in (first, second, first + second):
        (came,) = output_of(program.format(names=names), NUMBA_CACHE_DIR=str(tmp_path))
        assert came.split() == ["True"] * len(names), names


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_forked_after_kernels_ran_still_gives_the_bits():
    program = """
import os, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, unidrop
unidrop.set_num_threads(3)
x = np.arange(1, (1 << 21) + 1, dtype="float32")
y = unidrop.dropout(x, 0.4, unidrop.Key(7))
sys.stdout.flush()
child = os.fork()
again = unidrop.dropout(x, 0.4, unidrop.Key(7))
turned = unidrop.dropout(np.asfortranarray(x.reshape(512, -1)), 0.4, unidrop.Key(7))
same = (again == y).all() and (turned.ravel() == y).all()
if child == 0:
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bool(same))
"""
    assert output_of(program) == ["0 True"]


# --- Planted defects ------------------------------------------------------------------------------

SOURCE = Path(kernels.__file__).read_text(encoding="utf-8")
CORES_PHILOX = Path(sys.modules["unidrop.philox"].__file__).read_text(encoding="utf-8")
TENTH_ROUND = ("ROUNDS: Final = 10", "ROUNDS: Final = 9")


def module_of(name, source, folder):
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replaced(source, old, new):
    assert source.count(old) == 1, f"{old!r} is to be found once, to plant a defect there"
    return source.replace(old, new)


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Return a function that puts kernels of a changed source in place of the real ones."""

    def put(source):
        planted = module_of("planted_kernels", source, tmp_path)
        monkeypatch.setattr(kernels, "kernel", planted.kernel)
        FUSED._compiled.cache_clear()

    yield put
    monkeypatch.undo()
    FUSED._compiled.cache_clear()


def failed(contract, dtype=None):
    chosen = [cell for cell in cells(Numpy(), [contract]) if isinstance(cell, Cell)]
    results = [run_cell(cell) for cell in chosen if dtype in (None, cell.dtype)]
    assert results
    return any(result.status == "failed" for result in results)


DEFECTS = {
    "another multiplier for odd elements": (
        "from unidrop.philox import ODD_MULTIPLIER, philox",
        "from unidrop.philox import philox\n\nODD_MULTIPLIER = 0x6C078967",
        "mask",
        None,
    ),
    "greater for greater or equal": (
        'icmp_unsigned(">="',
        'icmp_unsigned(">"',
        "threshold",
        None,
    ),
    "a signed comparison": ("icmp_unsigned(", "icmp_signed(", "mask", None),
    "bfloat16 half up": ("0x7FFF + ((product >> 16) & 1)", "0x8000", "output", "bfloat16"),
    "float16 half up": ("0xFFF + ((magnitude >> 13) & 1)", "0x1000", "output", "float16"),
    "a product for selection": ("keep.choose(product, 0)", "product", "dropped-is-zero", "float32"),
    "a counter of 32 bits": ("blocks >> 32, zero, zero", "zero, zero, zero", "windows", None),
    "a tile turned wrongly": (
        "line.store(builder.add(turned",
        "lines[i].store(builder.add(turned",
        "layout",
        "float32",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_the_kernels_turns_the_matrix_red(plant, defect):
    old, new, contract, dtype = DEFECTS[defect]
    plant(replaced(SOURCE, old, new))
    assert failed(contract, dtype)


def test_a_round_fewer_in_the_kernels_turns_the_matrix_red(plant, tmp_path, monkeypatch):
    source = replaced(CORES_PHILOX, *TENTH_ROUND)
    monkeypatch.setitem(
        sys.modules, "planted_philox", module_of("planted_philox", source, tmp_path)
    )
    plant(replaced(SOURCE, "from unidrop.philox import", "from planted_philox import"))
    assert failed("mask")


def test_kernels_of_the_same_source_turn_nothing_red(plant):
    plant(SOURCE)
    assert not any(failed(name) for name in ("mask", "threshold", "windows"))
    assert not any(failed(name, "float32") for name in ("layout", "output", "dropped-is-zero"))
