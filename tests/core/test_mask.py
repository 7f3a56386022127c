"""Tests of the core, through the namespace of each array library: masks, outputs, bad input."""

import importlib
import re
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import array_api_strict
import dask
import dask.array
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
import tensorflow as tf
import torch
from hypothesis import given
from hypothesis import strategies as st

import unidrop
from unidrop import Key, dropout, keep_mask

KEY = Key(42).fold_in("encoder/0").fold_in(7)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "complex128")
} | {"bfloat16": BFLOAT16}
STRICTEST = {"boolean_indexing": False, "data_dependent_shapes": False, "enabled_extensions": ()}


@dataclass(frozen=True)
class Space:
    """A namespace under test, how NumPy's arrays get there and back, and what it lacks."""

    xp: Any
    array: Callable[[np.ndarray], Any]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    wide: bool = True  # has 64-bit integers
    flushes: bool = False  # takes subnormals for zeros of their sign

    def numpy(self, array: Any) -> np.ndarray:
        """Return an array's values, in its dtype."""
        if getattr(array, "dtype", None) is torch.bfloat16:
            return array.view(torch.int16).numpy().view(BFLOAT16)
        return np.asarray(array)

    def scalar(self, value: int) -> Any:
        """Return a 0-d integer array, of 64 bits where there are any."""
        return self.array(np.asarray(value, "int64" if self.wide else "int32"))


def torch_array(array: np.ndarray) -> torch.Tensor:
    """Return a tensor; PyTorch takes no bfloat16 from NumPy."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


SPACES = {
    "numpy": Space(np, np.asarray),
    "torch": Space(torch, torch_array),
    "jax": Space(
        jnp,
        jnp.asarray,
        ("float16", "bfloat16", "float32", "complex64"),
        lambda: jax.enable_x64(False),
        wide=False,
        flushes=True,
    ),
    "jax-x64": Space(jnp, jnp.asarray, context=lambda: jax.enable_x64(True), flushes=True),
    "tensorflow": Space(tf, tf.constant, flushes=True),
    "strict": Space(
        array_api_strict,
        array_api_strict.asarray,
        ("float32", "float64", "complex64", "complex128"),  # it has no 16-bit floats
        lambda: array_api_strict.ArrayAPIStrictFlags(**STRICTEST),
    ),
    "dask": Space(
        dask.array,
        dask.array.from_array,
        context=lambda: dask.config.set(scheduler="synchronous"),
    ),
}


def chosen(request):
    found = SPACES[request.param]
    with found.context():
        yield found


every_space = pytest.fixture(chosen, params=SPACES, name="every_space")
# JAX with 64-bit integers is left to the tests of masks, outputs, windows and compilation.
space = pytest.fixture(chosen, params=[name for name in SPACES if name != "jax-x64"], name="space")


def expected_mask(shape, p, key=KEY, **options):
    """Return the mask of the specification as a NumPy array."""
    keep = reference.keep_mask(shape, p, int(key), **options)
    axes = options.get("broadcast_axes", ())
    return np.reshape(np.asarray(keep, bool), reference.mask_shape(shape, axes))


def patterns(array):
    """Return the bit patterns of an array's real components, flat and in logical order."""
    array = np.ascontiguousarray(array).reshape(-1)
    if array.dtype.kind == "c":
        array = array.view(f"f{array.dtype.itemsize // 2}")
    return array.view(f"u{array.dtype.itemsize}")


def from_patterns(values, name, shape=(-1,)):
    """Return the array of a dtype that has these patterns."""
    component = np.dtype(reference.COMPONENTS.get(name, "float32")).itemsize
    width = component if name in reference.COMPONENTS else DTYPES[name].itemsize
    return np.asarray(values, f"u{width}").view(DTYPES[name]).reshape(shape)


def assert_output(y, x, keep, p, *, flushes=False):
    """Compare an output with the specification: bit for bit, but for NaN's payload.

    Where subnormals may be flushed, a zero of the same sign passes for what must do with one.
    """
    name = x.dtype.name
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    bits, actual = patterns(x).tolist(), patterns(y).tolist()
    keep = np.broadcast_to(keep, x.shape).reshape(-1).tolist()
    expected = reference.dropout_bits(bits, name, keep, p)
    form = reference.component_format(name)
    for before, got, wanted in zip(bits, actual, expected, strict=True):
        magnitudes = [pattern & ~form.sign for pattern in (got, wanted)]
        if min(magnitudes) > form.infinity:
            continue
        small = min(before & ~form.sign, magnitudes[1]) < form.normal
        if flushes and name != "float16" and small and got == wanted & form.sign:
            continue
        assert f"{got:#x}" == f"{wanted:#x}", f"of x = {before:#x}"


def assert_mask(mask, expected, space):
    """Compare a mask of a library with one of NumPy: shape, dtype and decisions."""
    mask = space.numpy(mask)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected, strict=True)


@pytest.fixture(params=[5, 64])
def small_pieces(request, monkeypatch):
    """Have masks and outputs made in many pieces, of sizes that cut through blocks and not."""
    for module in ("unidrop.mask", "unidrop.output"):
        monkeypatch.setattr(importlib.import_module(module), "PIECE", request.param)
    return request.param


# --- Masks -------------------------------------------------------------------------------------

SHAPES = [(), (0,), (3, 0, 2), (8,), (37,), (2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_mask_is_that_of_the_specification(every_space, shape):
    assert_mask(
        keep_mask(shape, 0.5, KEY, xp=every_space.xp), expected_mask(shape, 0.5), every_space
    )


@pytest.mark.parametrize("p", [0, 2.0**-34, 0.1, 0.9, 1 - 2.0**-32, 1 - 2.0**-33, 1])
def test_the_mask_at_each_rate_is_that_of_the_specification(space, p):
    assert_mask(keep_mask((37,), p, KEY, xp=space.xp), expected_mask((37,), p), space)


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 + 1, 2**64 - 1])
def test_the_mask_depends_on_all_bits_of_the_key(space, seed):
    mask = keep_mask((37,), 0.5, Key(seed), xp=space.xp)
    assert_mask(mask, expected_mask((37,), 0.5, seed), space)


def test_decisions_are_those_written_in_the_specification(space):
    mask = space.numpy(keep_mask((24,), 0.5, KEY, xp=space.xp))
    assert "".join(str(int(keep)) for keep in mask) == "100110011000101101101100"


@pytest.mark.parametrize("i", [0, 1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize(("above", "kept"), [(0, True), (1, False)], ids=["T = u", "T = u + 1"])
def test_an_element_is_kept_where_u_is_at_least_the_threshold(space, i, above, kept):
    p = (reference.u(int(KEY), i) + above) / 2**32
    assert space.numpy(keep_mask((8,), p, KEY, xp=space.xp))[i] == kept


AXES = [(), (0,), (1,), (-1,), (0, 2), (-3, 1), (0, 1, 2)]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_broadcast_axes_have_length_1_and_a_numbering_of_their_own(space, axes):
    mask = keep_mask((3, 5, 4), 0.5, KEY, xp=space.xp, broadcast_axes=axes)
    assert_mask(mask, expected_mask((3, 5, 4), 0.5, broadcast_axes=axes), space)


def test_a_single_broadcast_axis_may_be_an_integer():
    mask = keep_mask((3, 5), 0.5, KEY, broadcast_axes=-1)
    np.testing.assert_array_equal(mask, expected_mask((3, 5), 0.5, broadcast_axes=[1]))


def test_a_mask_of_evaluation_keeps_everything(space):
    mask = keep_mask((3, 5), 0.5, KEY, xp=space.xp, training=False, broadcast_axes=(0,))
    assert_mask(mask, np.ones((1, 5), bool), space)


def test_the_default_namespace_is_numpys():
    assert type(keep_mask((3,), 0.5, KEY)) is np.ndarray


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("numpy", "cpu"),
        ("torch", "cpu"),
        ("torch", torch.device("cpu")),
        ("jax", jax.devices()[0]),
        ("tensorflow", "/CPU:0"),
        ("strict", array_api_strict.Device("device1")),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [{}, {"training": False}, {"global_shape": (11,), "start": (3,)}],
    ids=["mask", "evaluation", "window"],
)
def test_the_mask_is_made_on_the_device(name, device, options):
    mask = keep_mask((5,), 0.5, KEY, xp=SPACES[name].xp, device=device, **options)
    assert str(device).strip("/").lower() in str(mask.device).lower()


def test_lengths_may_be_numpy_integers():
    mask = keep_mask((np.int64(3), np.uint8(5)), 0.5, KEY)
    np.testing.assert_array_equal(mask, expected_mask((3, 5), 0.5))


# --- Windows -----------------------------------------------------------------------------------

BLOCKS = [
    pytest.param((13,), (100,), (11,), id="1-d from within a block"),
    pytest.param((3, 5), (6, 32), (2, 11), id="aligned rows from within a block"),
    pytest.param((3, 5), (6, 11), (2, 3), id="unaligned rows"),
    pytest.param((4, 1), (6, 11), (1, 10), id="a column"),
    pytest.param((2, 3, 4), (5, 7, 9), (3, 2, 1), id="3-d"),
    pytest.param((), (), (), id="0-d"),
    pytest.param((0, 3), (4, 5), (4, 1), id="empty"),
    pytest.param((9,), (2**36,), (2**35 - 4,), id="across 2^35"),
    pytest.param((3, 7), (2**33, 5**2), (2**32 // 25 - 1, 9), id="rows across 2^32"),
    pytest.param((3, 7), (2**33, 2**31), (2**33 - 3, 2**31 - 7), id="to 2^64"),
    pytest.param((9,), (2**64,), (2**64 - 9,), id="1-d to 2^64"),
    pytest.param((2, 3), (2, 2**63 - 25), (0, 2**63 - 28), id="odd rows to 2^64"),
]


@pytest.mark.parametrize(("shape", "whole", "start"), BLOCKS)
def test_a_window_gets_its_block_of_the_whole_mask(every_space, shape, whole, start):
    mask = keep_mask(shape, 0.5, KEY, xp=every_space.xp, global_shape=whole, start=start)
    assert_mask(mask, expected_mask(shape, 0.5, global_shape=whole, start=start), every_space)


TRACED_BLOCKS = [
    block
    for block in BLOCKS
    if block.id in ("1-d from within a block", "aligned rows from within a block", "unaligned rows")
    or block.id.endswith(("2^32", "2^64"))
]


def fits(space, start):
    """Tell whether a library's integers hold a start."""
    return max(start) < (2**63 if space.wide else 2**31)


@pytest.mark.parametrize(("shape", "whole", "start"), TRACED_BLOCKS)
def test_a_start_may_be_an_array(every_space, shape, whole, start):
    traced = tuple(every_space.scalar(s) if fits(every_space, (s,)) else s for s in start)
    mask = keep_mask(shape, 0.5, KEY, xp=every_space.xp, global_shape=whole, start=traced)
    assert_mask(mask, expected_mask(shape, 0.5, global_shape=whole, start=start), every_space)


@pytest.mark.parametrize("start", [0, 3, 2**31 - 5])
def test_rows_of_whole_blocks_may_start_at_an_array(every_space, start):
    options = {"xp": every_space.xp, "global_shape": (2**31, 2, 8)}
    mask = keep_mask((5, 2, 8), 0.5, KEY, start=(every_space.scalar(start), 0, 0), **options)
    wanted = expected_mask((5, 2, 8), 0.5, global_shape=(2**31, 2, 8), start=(start, 0, 0))
    assert_mask(mask, wanted, every_space)


def test_some_starts_may_be_arrays_and_others_not(space):
    start = (2, space.scalar(3), 1)
    mask = keep_mask((2, 3, 4), 0.5, KEY, xp=space.xp, global_shape=(5, 7, 9), start=start)
    wanted = expected_mask((2, 3, 4), 0.5, global_shape=(5, 7, 9), start=(2, 3, 1))
    assert_mask(mask, wanted, space)


JITS = {
    "jax": jax.jit,
    "jax-x64": jax.jit,
    "tensorflow": tf.function,
    "tensorflow-xla": tf.function(jit_compile=True),
}


@pytest.fixture(params=JITS)
def compiled(request):
    """Return each compiler in turn, and the namespace that it compiles."""
    found = SPACES[request.param.removesuffix("-xla")]
    with found.context():
        yield found, JITS[request.param]


@pytest.mark.parametrize(
    ("shape", "whole", "start"),
    [
        ((13,), (100,), (11,)),
        ((3, 5), (6, 11), (2, 3)),
        ((3, 16), (6, 16), (2, 0)),
        ((3, 24), (2**38, 24), (2**31 - 3, 0)),
        ((3, 7), (2**33, 2**31), (2**31 - 3, 2**31 - 7)),
    ],
    ids=str,
)
def test_a_start_may_be_traced(compiled, shape, whole, start):
    space, jit = compiled

    @jit
    def mask(*start):
        return keep_mask(shape, 0.5, KEY, xp=space.xp, global_shape=whole, start=start)

    expected = expected_mask(shape, 0.5, global_shape=whole, start=start)
    assert_mask(mask(*map(space.scalar, start)), expected, space)


@pytest.mark.parametrize("shape", [(), (0, 3), (37,)], ids=str)
def test_a_compiled_mask_of_a_traced_key_is_the_eager_one(compiled, shape):
    space, jit = compiled
    site = Key(42).fold_in("encoder/0")
    mask = jit(lambda step: keep_mask(shape, 0.5, site.fold_in(step), xp=space.xp))
    assert_mask(mask(space.scalar(7)), expected_mask(shape, 0.5), space)


def test_a_traced_key_that_is_folded_on_gives_the_same_mask(compiled):
    space, jit = compiled
    site = Key(42).fold_in("encoder/0")
    mask = jit(lambda step: keep_mask((37,), 0.5, site.fold_in(step).fold_in(2**40), xp=space.xp))
    assert_mask(mask(space.scalar(7)), expected_mask((37,), 0.5, KEY.fold_in(2**40)), space)


def test_a_traced_key_in_a_window_of_unaligned_rows_gives_the_same_mask(space):
    window = {"global_shape": (6, 11), "start": (2, 3)}
    key = Key(42).fold_in("encoder/0").fold_in(space.scalar(7))
    mask = keep_mask((3, 5), 0.5, key, xp=space.xp, **window)
    assert_mask(mask, expected_mask((3, 5), 0.5, **window), space)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2)], ids=str)
def test_a_window_has_the_broadcast_axes_of_the_whole(space, axes):
    window = {"global_shape": (5, 7, 9), "start": (3, 2, 1), "broadcast_axes": axes}
    mask = keep_mask((2, 3, 4), 0.5, KEY, xp=space.xp, **window)
    assert_mask(mask, expected_mask((2, 3, 4), 0.5, **window), space)


def test_start_along_a_broadcast_axis_is_ignored():
    window = {"global_shape": (5, 7), "broadcast_axes": (0,)}
    mask = keep_mask((2, 3), 0.5, KEY, start=(99, 2), **window)
    np.testing.assert_array_equal(mask, keep_mask((2, 3), 0.5, KEY, start=(0, 2), **window))


@st.composite
def windows(draw):
    """Draw a block, the whole that it lies in, and axes."""
    whole = draw(st.lists(st.integers(1, 12) | st.integers(2**31, 2**33), max_size=3))
    if np.prod(whole, dtype=object) > 2**64:
        whole = [min(length, 12) for length in whole]
    shape = [draw(st.integers(0, min(length, 5))) for length in whole]
    start = [draw(st.integers(0, all_ - n)) for all_, n in zip(whole, shape, strict=True)]
    axes = draw(st.sets(st.integers(0, len(whole) - 1))) if whole else set()
    return shape, {"global_shape": whole, "start": start, "broadcast_axes": tuple(axes)}


@given(windows(), st.integers(0, 2**64 - 1), st.floats(0, 1))
def test_any_window_at_any_rate_is_that_of_the_specification(window, seed, p):
    shape, options = window
    expected = expected_mask(shape, p, seed, **options)
    np.testing.assert_array_equal(keep_mask(shape, p, Key(seed), **options), expected, strict=True)


@pytest.mark.parametrize(("tile", "whole"), [((7,), (100,)), ((2, 24), (5, 64)), ((3, 5), (7, 13))])
def test_windows_tile_the_output_of_the_whole(tile, whole):
    x = np.random.default_rng(0).standard_normal(whole).astype("float32")
    y = np.empty_like(x)
    for start in product(*(range(0, n, step) for n, step in zip(whole, tile, strict=True))):
        block = tuple(slice(s, s + n) for s, n in zip(start, tile, strict=True))
        y[block] = dropout(x[block], 0.5, KEY, global_shape=whole, start=start)
    np.testing.assert_array_equal(patterns(y), patterns(dropout(x, 0.5, KEY)))


# --- Pieces ------------------------------------------------------------------------------------

EAGER = ["numpy", "torch", "jax", "tensorflow", "strict"]


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 37), {}),
        ((3, 37), {"broadcast_axes": (0,)}),
        ((13, 5), {"global_shape": (40, 16), "start": (7, 9)}),
        ((13, 5), {"global_shape": (40, 11), "start": (7, 3)}),
        ((2, 3, 11), {"global_shape": (5, 7, 2**30), "start": (3, 2, 2**30 - 11)}),
    ],
    ids=str,
)
def test_a_mask_made_in_pieces_is_that_of_the_specification(name, shape, options, small_pieces):
    space = SPACES[name]
    with space.context():
        mask = keep_mask(shape, 0.5, KEY, xp=space.xp, **options)
        assert_mask(mask, expected_mask(shape, 0.5, **options), space)


@pytest.mark.parametrize("name", EAGER)
def test_a_window_with_a_traced_start_made_in_pieces_is_that_of_the_specification(
    name, small_pieces
):
    space = SPACES[name]
    with space.context():
        start = (space.scalar(7), 3)
        mask = keep_mask((31, 5), 0.5, KEY, xp=space.xp, global_shape=(40, 11), start=start)
        expected = expected_mask((31, 5), 0.5, global_shape=(40, 11), start=(7, 3))
        assert_mask(mask, expected, space)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_an_output_made_in_pieces_is_that_of_the_specification(name, axes, dtype, small_pieces):
    space = SPACES[name]
    x = np.random.default_rng(0).standard_normal((3, 37)).astype(dtype)
    with space.context():
        y = space.numpy(dropout(space.array(x), 0.1, KEY, broadcast_axes=axes))
    assert_output(y, x, expected_mask((3, 37), 0.1, broadcast_axes=axes), 0.1)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "tensorflow"])
@pytest.mark.parametrize("shape", [(300_001,), (3, 100_001), (100_001, 3)], ids=str)
def test_a_large_array_is_dropped_as_its_windows_are(name, shape):
    space = SPACES[name]
    x = np.ones(shape, "float32")
    with space.context():
        y = space.numpy(dropout(space.array(x), 0.5, KEY))
    starts = [(0,) * len(shape), tuple(n // 2 for n in shape), tuple(max(n - 40, 0) for n in shape)]
    for start in starts:
        block = tuple(min(40, n - s) for n, s in zip(shape, start, strict=True))
        part = y[tuple(slice(s, s + n) for s, n in zip(start, block, strict=True))]
        expected = expected_mask(block, 0.5, global_shape=shape, start=start)
        np.testing.assert_array_equal(part != 0, expected)


MIB = 1 << 20


def peak(run):
    """Return the peak of what NumPy allocates in a call, in bytes, once everything is imported."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(1 << 24,), (1 << 12, 1 << 12), (1 << 20, 16)], ids=str)
def test_beyond_output_and_mask_a_64_mib_array_takes_less_than_16_mib(shape):
    x = np.ones(shape, "float32")
    dropout(np.ones(3, "float32"), 0.5, KEY)
    assert peak(lambda: dropout(x, 0.5, KEY)) < x.nbytes + x.size + 16 * MIB


@pytest.mark.parametrize("columns", [1, 3, 16])
def test_beyond_the_mask_a_narrow_window_takes_less_than_16_mib(columns):
    rows, options = 1 << 20, {"global_shape": (1 << 20, columns + 2), "start": (0, 1)}
    keep_mask((3, columns), 0.5, KEY, **options)
    bound = rows * columns + 16 * MIB
    assert peak(lambda: keep_mask((rows, columns), 0.5, KEY, **options)) < bound


# --- Outputs -----------------------------------------------------------------------------------


def specials(name):
    """Return arrays' worth of patterns: zeros, least, greatest, infinite, NaN and ordinary."""
    form = reference.component_format(name)
    ordinary = np.random.default_rng(0).standard_normal(39).astype(DTYPES[name])
    ends = [0, 1, form.normal - 1, form.normal, form.infinity - 1, form.infinity, form.nan]
    signed = [pattern | sign for sign in (0, form.sign) for pattern in ends]
    return np.concatenate([from_patterns(signed * 6, name), ordinary])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # as of any product
@pytest.mark.parametrize("p", [0.1, 1 / 3, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_is_that_of_the_specification(every_space, dtype, p):
    if dtype not in every_space.dtypes:
        pytest.skip(f"{every_space.xp.__name__} has no {dtype}")
    x = specials(dtype)
    y = every_space.numpy(dropout(every_space.array(x), p, KEY))
    assert_output(y, x, expected_mask(x.shape, p), p, flushes=every_space.flushes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_infinities_and_nan_are_positive_zeros(space, dtype):
    if dtype not in space.dtypes:
        pytest.skip(f"{space.xp.__name__} has no {dtype}")
    x = from_patterns([reference.component_format(dtype).nan] * 8, dtype)
    y = space.numpy(dropout(space.array(x), 1, KEY))
    np.testing.assert_array_equal(patterns(y), 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_output_of_any_shape_is_that_of_the_specification(space, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    x = np.asarray(x)
    y, mask = dropout(space.array(x), 0.5, KEY, return_mask=True)
    assert_mask(mask, expected_mask(shape, 0.5), space)
    assert_output(space.numpy(y), x, expected_mask(shape, 0.5), 0.5)


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_a_decision_is_shared_along_broadcast_axes(space, axes):
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype("float32")
    y, mask = dropout(space.array(x), 0.5, KEY, broadcast_axes=axes, return_mask=True)
    expected = expected_mask(x.shape, 0.5, broadcast_axes=axes)
    assert_mask(mask, expected, space)
    assert_output(space.numpy(y), x, expected, 0.5)


def test_a_window_of_the_output_has_the_mask_of_its_block(space):
    x = np.random.default_rng(0).standard_normal((3, 5)).astype("float32")
    window = {"global_shape": (6, 11), "start": (2, 3)}
    y = space.numpy(dropout(space.array(x), 0.5, KEY, **window))
    assert_output(y, x, expected_mask((3, 5), 0.5, **window), 0.5)


@pytest.mark.parametrize("options", [{"p": 0}, {"p": 0.5, "training": False}], ids=str)
def test_where_nothing_is_dropped_x_itself_is_returned(space, options):
    x = space.array(np.ones((3, 5), "float32"))
    assert dropout(x, key=KEY, **options) is x


@pytest.mark.parametrize("options", [{"p": 0}, {"p": 0.5, "training": False}], ids=str)
def test_where_nothing_is_dropped_the_mask_keeps_everything(space, options):
    x = space.array(np.ones((3, 5), "float32"))
    y, mask = dropout(x, key=KEY, broadcast_axes=(1,), return_mask=True, **options)
    assert y is x
    assert_mask(mask, np.ones((3, 1), bool), space)


def test_the_input_is_left_as_it_was(space):
    x = space.array(np.arange(37, dtype="float32"))
    dropout(x, 0.5, KEY)
    np.testing.assert_array_equal(space.numpy(x), np.arange(37))


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_a_compiled_output_is_that_of_the_specification(compiled, dtype):
    space, jit = compiled
    x = np.random.default_rng(0).standard_normal((3, 37)).astype(dtype)
    drop = jit(lambda x, step: dropout(x, 0.1, Key(42).fold_in("encoder/0").fold_in(step)))
    y = space.numpy(drop(space.array(x), space.scalar(7)))
    assert_output(y, x, expected_mask(x.shape, 0.1), 0.1)


def test_the_gradient_of_jax_is_the_scale_where_kept():
    gradient = jax.grad(lambda x: dropout(x, 0.1, KEY).sum())(jnp.ones(37))
    expected = np.where(expected_mask((37,), 0.1), np.float32(reference.scale(0.1)), 0)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("device", ["device1", "device2", "no_float64", "no_x64"])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize(
    "options", [{}, {"global_shape": (50,), "start": (3,)}], ids=["whole", "window"]
)
def test_the_output_stays_on_its_device(device, dtype, options):
    device = array_api_strict.Device(device)
    x = np.random.default_rng(0).standard_normal(37).astype(dtype)
    with array_api_strict.ArrayAPIStrictFlags(**STRICTEST):
        y = dropout(array_api_strict.asarray(x, device=device), 0.1, KEY, **options)
        assert y.device == device
        y = np.asarray(y.to_device(array_api_strict.Device("CPU_DEVICE")))
    assert_output(y, x, expected_mask(x.shape, 0.1, **options), 0.1)


@pytest.mark.parametrize("device", ["device1", "device2", "no_float64", "no_x64"])
def test_a_traced_step_and_start_stay_on_their_device(device):
    device = array_api_strict.Device(device)
    seven, three = (
        array_api_strict.asarray(n, dtype=array_api_strict.int32, device=device) for n in (7, 3)
    )
    x = array_api_strict.ones((5,), dtype=array_api_strict.float32, device=device)
    key = Key(42).fold_in("encoder/0").fold_in(seven)
    y = dropout(x, 0.5, key, global_shape=(50,), start=(three,))
    assert y.device == device
    y = np.asarray(y.to_device(array_api_strict.Device("CPU_DEVICE")))
    np.testing.assert_array_equal(y != 0, expected_mask((5,), 0.5, global_shape=(50,), start=(3,)))


# --- Bad input ---------------------------------------------------------------------------------

ONES = np.ones((3, 5), "float32")
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "p",
    [
        True,
        False,
        np.True_,
        np.float32(0.1),
        np.float16(0.5),
        np.asarray(0.5),
        torch.tensor(0.5),
        jnp.asarray(0.5),
        tf.constant(0.5),
        "0.5",
        b"0.5",
        None,
        0.5j,
        (0.5,),
    ],
    ids=lambda p: f"{type(p).__name__}-{getattr(p, 'dtype', '')}",
)
def test_a_rate_that_is_no_python_number_raises_and_is_named(call, p, training):
    with pytest.raises(TypeError, match=rf"probability p .*got {re.escape(repr(p))} of type"):
        call(p=p, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [-0.1, 1.1, -1, 2, -5e-324, 1 + 2**-52, float("nan"), float("inf")])
def test_a_rate_outside_0_and_1_raises_and_is_named(call, p, training):
    message = f"probability p has to be between 0 and 1, but got {p}"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(p=p, training=training)


def test_a_traced_rate_raises_and_is_named():
    with pytest.raises(TypeError, match=r"probability p .*got .*Trace"):
        jax.jit(lambda p: keep_mask((3,), p, KEY, xp=jnp))(0.5)


@pytest.mark.parametrize("p", [np.float64(0.1), 0.1])
def test_a_double_of_numpy_is_a_rate(p):
    np.testing.assert_array_equal(keep_mask((37,), p, KEY), expected_mask((37,), 0.1))


@pytest.mark.parametrize("key", [42, "encoder", None, 0.5, np.uint64(42)], ids=repr)
def test_a_key_that_is_none_raises_and_is_named(call, key):
    with pytest.raises(TypeError, match=rf"key must be a unidrop.Key.*{re.escape(repr(key))}"):
        call(key=key)


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ((2,), ValueError, "broadcast_axes must name axes of the 2-d array, got 2"),
        ((-3,), ValueError, "broadcast_axes must name axes of the 2-d array, got -3"),
        ((0, 0), ValueError, "broadcast_axes must name each axis once, got (0, 0)"),
        ((0, -2), ValueError, "broadcast_axes must name each axis once, got (0, -2)"),
        ((0.0,), TypeError, "broadcast_axes must hold integers, got 0.0"),
        ((True,), TypeError, "broadcast_axes must hold integers, got True"),
        (True, TypeError, "broadcast_axes must"),
        ("01", TypeError, "broadcast_axes must be a sequence of integers, got '01'"),
        (None, TypeError, "broadcast_axes must be a sequence of integers, got None"),
        (1.0, TypeError, "broadcast_axes must be a sequence of integers, got 1.0"),
        ((torch.tensor(0),), TypeError, "broadcast_axes must hold integers, got tensor(0)"),
    ],
    ids=repr,
)
def test_axes_that_do_not_fit_raise_and_are_named(call, axes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(broadcast_axes=axes)


@pytest.mark.parametrize(
    ("whole", "start", "error", "message"),
    [
        (None, (0, 0), ValueError, "got start without global_shape"),
        ((3, 5), None, ValueError, "got global_shape without start"),
        ((15,), (0, 0), ValueError, "global_shape must have one length per axis"),
        ((3, 5), (0,), ValueError, "start must have one element per axis"),
        ((3, 5), (0, 1), ValueError, "got start 1 and 5 elements along axis 1"),
        ((3, 5), (-1, 0), ValueError, "got start -1 and 3 elements along axis 0"),
        ((2, 5), (0, 0), ValueError, "got start 0 and 3 elements along axis 0"),
        ((2, 5), (torch.tensor(0), 0), ValueError, "along axis 0"),
        ((-3, 5), (0, 0), ValueError, "global_shape must hold lengths of 0 or more"),
        ((2**33, 2**32), (0, 0), ValueError, "global_shape must have at most 2**64 elements"),
        ((3.0, 5), (0, 0), TypeError, "global_shape must hold integers, got 3.0"),
        ((True, 5), (0, 0), TypeError, "global_shape must hold integers, got True"),
        ((torch.tensor(3), 5), (0, 0), TypeError, "global_shape must hold integers"),
        ("35", (0, 0), TypeError, "global_shape must be a sequence of integers, got '35'"),
        (15, (0, 0), TypeError, "global_shape must be a sequence of integers, got 15"),
        ((3, 5), (0.0, 0), TypeError, "start must hold integers, got 0.0"),
        ((3, 5), (False, 0), TypeError, "start must hold integers, got False"),
        ((3, 5), (None, 0), TypeError, "start must hold integers, got None"),
        ((3, 5), 0, TypeError, "start must be a sequence of integers, got 0"),
    ],
    ids=repr,
)
def test_a_window_that_does_not_fit_raises_and_is_named(call, whole, start, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(global_shape=whole, start=start)


@pytest.mark.parametrize(
    ("value", "error"), [(0.5, TypeError), (True, TypeError), ([0], ValueError)], ids=repr
)
@pytest.mark.parametrize("name", ["torch", "jax", "tensorflow", "strict"])
def test_a_start_that_is_an_array_but_no_integer_raises_and_is_named(name, value, error):
    space = SPACES[name]
    start = (space.array(np.asarray(value)),)
    with pytest.raises(error, match=r"start must be"):
        keep_mask((5,), 0.5, KEY, xp=space.xp, global_shape=(50,), start=start)


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((-1,), ValueError, "shape must hold lengths of 0 or more, got (-1,)"),
        ((2**33, 2**32), ValueError, "shape must have at most 2**64 elements"),
        ((2.0,), TypeError, "shape must hold integers, got 2.0"),
        ((True,), TypeError, "shape must hold integers, got True"),
        ("35", TypeError, "shape must be a sequence of integers, got '35'"),
        (5, TypeError, "shape must be a sequence of integers, got 5"),
        (None, TypeError, "shape must be a sequence of integers, got None"),
    ],
    ids=repr,
)
def test_a_shape_that_is_none_raises_and_is_named(shape, error, message):
    with pytest.raises(error, match=re.escape(message)):
        keep_mask(shape, 0.5, KEY)


@pytest.mark.parametrize("xp", ["numpy", np.ones(3), 42], ids=repr)
def test_a_namespace_that_is_none_raises_and_is_named(xp):
    with pytest.raises(TypeError, match=rf"xp must be .*got {re.escape(repr(xp))}"):
        keep_mask((3,), 0.5, KEY, xp=xp)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "uint8"])
def test_an_integer_array_raises_and_its_dtype_is_named(space, dtype, training):
    x = space.array(np.ones(5, dtype))
    with pytest.raises(TypeError, match=rf"x must be of a floating-point dtype.*{dtype}"):
        dropout(x, 0.5, KEY, training=training)


@pytest.mark.parametrize(
    "x", [[1.0, 2.0], 1.0, "x", None, {"x": 1.0}, np.asarray(["a"]), np.asarray([None])], ids=repr
)
def test_what_is_no_array_of_numbers_raises_and_is_named(x):
    with pytest.raises(TypeError, match=r"^x must be"):
        dropout(x, 0.5, KEY)


def test_what_is_public_is_what_is_listed():
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


def test_a_traced_key_made_with_64_bit_integers_means_the_same_without():
    with jax.enable_x64(True):
        key = Key(2**63 + 12345).fold_in(jnp.uint64(2**63 + 9))
    expected = Key(2**63 + 12345).fold_in(2**63 + 9)
    with jax.enable_x64(False):
        assert np.array_equal(keep_mask((64,), 0.5, key, xp=jnp), keep_mask((64,), 0.5, expected))
        lo, hi = key.fold_in(7).fold_in("a").fold_in(jnp.int32(3)).words
    assert int(hi) << 32 | int(lo) == int(expected.fold_in(7).fold_in("a").fold_in(3))


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
def test_a_float64_array_where_jax_has_none_raises_rather_than_change_its_dtype():
    with jax.enable_x64(True):
        x = jnp.ones(9, dtype="float64")
    with jax.enable_x64(False), pytest.raises(TypeError, match="x has dtype float64"):
        dropout(x, 0.5, KEY)


@pytest.mark.parametrize("shape", [(2,) * 23, (4,) * 11, (3, 5, 7, 2, 11, 13, 17)], ids=len)
@pytest.mark.parametrize("axes", [(), (0, 3)])
def test_many_short_axes_stay_within_the_memory_bound_and_keep_their_bits(shape, axes):
    x = np.ones(shape, "float32")
    mask = keep_mask(shape, 0.5, KEY, broadcast_axes=axes)
    bound = x.nbytes + mask.nbytes + 10 * MIB
    assert peak(lambda: dropout(x, 0.5, KEY, broadcast_axes=axes)) < bound
    actual = dropout(x, 0.5, KEY, broadcast_axes=axes)
    assert np.array_equal(actual != 0, np.broadcast_to(mask, shape))
