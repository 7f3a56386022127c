"""Masks of the core: their values, windows and pieces, and the memory they take."""

import tracemalloc
from contextlib import nullcontext
from itertools import product

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from standard_arrays import KEY, SITE, assert_mask, assert_output, expected_mask, patterns

from unidrop import Key, dropout, force_path, keep_mask
from unidrop.plan import DropoutPlan
from unidrop.protocols import ArrayLibrary, Arrays, Words
from unidrop.rate import Rate
from unidrop.window import Window

# --- Values --------------------------------------------------------------------------------------

SHAPES = [(), (0,), (3, 0, 2), (8,), (37,), (2, 3, 4)]
AXES = [(), (0,), (1,), (-1,), (0, 2), (-3, 1), (0, 1, 2)]


def made(space, shape, p=0.5, key=KEY, **options):
    """Return the mask of a namespace as NumPy's."""
    return space.numpy(keep_mask(shape, p, key, xp=space.xp, device=space.device, **options))


def test_equals_specification_at_each_shape(space):
    for shape in SHAPES:
        assert_mask(made(space, shape), expected_mask(shape, 0.5), str(shape))


def test_equals_specification_at_each_rate(space):
    for p in (0, 2.0**-34, 0.1, 0.9, 1 - 2.0**-32, 1 - 2.0**-33, 1):
        assert_mask(made(space, (37,), p), expected_mask((37,), p), repr(p))


def test_depends_on_all_bits_of_key(space):
    for seed in (0, 2**32, 2**63 + 1, 2**64 - 1):
        assert_mask(made(space, (37,), key=Key(seed)), expected_mask((37,), 0.5, seed), repr(seed))


def test_gives_decisions_written_in_specification(space):
    mask = made(space, (24,))
    assert "".join(str(int(keep)) for keep in mask) == "100110011000101101101100"


@pytest.mark.parametrize(("above", "kept"), [(0, True), (1, False)], ids=["T = u", "T = u + 1"])
def test_keeps_where_u_reaches_threshold(space, above, kept):
    for i in range(8):
        p = (reference.u(int(KEY), i) + above) / 2**32
        assert made(space, (8,), p)[i] == kept, i


def test_numbers_broadcast_axes_on_their_own(space):
    for axes in AXES:
        mask = made(space, (3, 5, 4), broadcast_axes=axes)
        assert_mask(mask, expected_mask((3, 5, 4), 0.5, broadcast_axes=axes), str(axes))


def test_accepts_integer_as_broadcast_axis():
    mask = keep_mask((3, 5), 0.5, KEY, broadcast_axes=-1)
    np.testing.assert_array_equal(mask, expected_mask((3, 5), 0.5, broadcast_axes=[1]))


def test_keeps_everything_in_evaluation(space):
    mask = made(space, (3, 5), training=False, broadcast_axes=(0,))
    assert_mask(mask, np.ones((1, 5), bool))


def test_defaults_to_numpy():
    assert type(keep_mask((3,), 0.5, KEY)) is np.ndarray


@pytest.mark.parametrize(
    "options",
    [{}, {"training": False}, {"global_shape": (11,), "start": (3,)}],
    ids=["mask", "evaluation", "window"],
)
def test_makes_mask_on_given_device(space, options):
    devices = ["cpu"] if space.xp is np else space.xp.__array_namespace_info__().devices()
    for device in devices:
        assert keep_mask((5,), 0.5, KEY, xp=space.xp, device=device, **options).device == device


def test_accepts_numpy_integers_as_lengths():
    mask = keep_mask((np.int64(3), np.uint8(5)), 0.5, KEY)
    np.testing.assert_array_equal(mask, expected_mask((3, 5), 0.5))


# --- Windows -------------------------------------------------------------------------------------

BLOCKS = {
    "1-d from within a block": ((13,), (100,), (11,)),
    "aligned rows from within a block": ((3, 5), (6, 32), (2, 11)),
    "unaligned rows": ((3, 5), (6, 11), (2, 3)),
    "a column": ((4, 1), (6, 11), (1, 10)),
    "3-d": ((2, 3, 4), (5, 7, 9), (3, 2, 1)),
    "0-d": ((), (), ()),
    "empty": ((0, 3), (4, 5), (4, 1)),
    "across 2^35": ((9,), (2**36,), (2**35 - 4,)),
    "rows across 2^32": ((3, 7), (2**33, 5**2), (2**32 // 25 - 1, 9)),
    "to 2^64": ((3, 7), (2**33, 2**31), (2**33 - 3, 2**31 - 7)),
    "1-d to 2^64": ((9,), (2**64,), (2**64 - 9,)),
    "odd rows to 2^64": ((2, 3), (2, 2**63 - 25), (0, 2**63 - 28)),
    "rows of whole blocks": ((5, 2, 8), (2**31, 2, 8), (2**31 - 5, 0, 0)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_gives_window_its_block_of_whole_mask(space, name):
    shape, whole, start = BLOCKS[name]
    window = {"global_shape": whole, "start": start}
    assert_mask(made(space, shape, **window), expected_mask(shape, 0.5, **window))


@pytest.mark.parametrize("name", BLOCKS)
def test_accepts_arrays_as_start(space, name):
    shape, whole, start = BLOCKS[name]
    largest = np.iinfo(space.integer).max
    arrays = tuple(space.scalar(s) if s <= largest else s for s in start)
    mask = made(space, shape, global_shape=whole, start=arrays)
    assert_mask(mask, expected_mask(shape, 0.5, global_shape=whole, start=start))


def test_accepts_start_of_arrays_and_integers(space):
    mask = made(space, (2, 3, 4), global_shape=(5, 7, 9), start=(2, space.scalar(3), 1))
    window = {"global_shape": (5, 7, 9), "start": (2, 3, 1)}
    assert_mask(mask, expected_mask((2, 3, 4), 0.5, **window))


def test_accepts_array_key_in_window_of_unaligned_rows(space):
    window = {"global_shape": (6, 11), "start": (2, 3)}
    key = SITE.fold_in(space.scalar(7))
    assert_mask(made(space, (3, 5), key=key, **window), expected_mask((3, 5), 0.5, **window))


def test_gives_window_broadcast_axes_of_whole(space):
    for axes in ((0,), (1,), (0, 2)):
        window = {"global_shape": (5, 7, 9), "start": (3, 2, 1), "broadcast_axes": axes}
        assert_mask(made(space, (2, 3, 4), **window), expected_mask((2, 3, 4), 0.5, **window))


def test_ignores_start_along_broadcast_axis():
    window = {"global_shape": (5, 7), "broadcast_axes": (0,)}
    mask = keep_mask((2, 3), 0.5, KEY, start=(99, 2), **window)
    np.testing.assert_array_equal(mask, keep_mask((2, 3), 0.5, KEY, start=(0, 2), **window))


@st.composite
def windows(draw):
    """Draw a block, the whole that contains it, and axes."""
    whole = draw(st.lists(st.integers(1, 12) | st.integers(2**31, 2**33), max_size=3))
    if np.prod(whole, dtype=object) > 2**64:
        whole = [min(length, 12) for length in whole]
    shape = [draw(st.integers(0, min(length, 5))) for length in whole]
    start = [draw(st.integers(0, all_ - n)) for all_, n in zip(whole, shape, strict=True)]
    axes = draw(st.sets(st.integers(0, len(whole) - 1))) if whole else set()
    return shape, {"global_shape": whole, "start": start, "broadcast_axes": tuple(axes)}


@given(windows(), st.integers(0, 2**64 - 1), st.floats(0, 1))
def test_equals_specification_in_any_window_at_any_rate(window, seed, p):
    shape, options = window
    expected = expected_mask(shape, p, seed, **options)
    with force_path("portable"):
        mask = keep_mask(shape, p, Key(seed), **options)
    np.testing.assert_array_equal(mask, expected, strict=True)


# --- Pieces --------------------------------------------------------------------------------------

# Arrays of several pieces, cut along each axis, at and off the blocks' boundaries.
LARGE = [
    ((600_001,), (), None),
    ((3, 200_001), (), None),
    ((200_001, 3), (), None),
    ((300_007, 2), (1,), None),
    ((2, 5, 70_003), (0,), None),
    ((70_003, 9), (), ((2**33, 16), (7, 5))),
    ((70_003, 9), (), ((2**33, 11), (7, 1))),
    ((2, 300_011), (), ((5, 2**32), (3, 2**32 - 300_011))),
]


@pytest.mark.parametrize(("shape", "axes", "window"), LARGE, ids=str)
def test_makes_large_mask_and_output_of_its_windows(space, shape, axes, window):
    whole, first = window or (shape, (0,) * len(shape))
    options = {"broadcast_axes": axes, "global_shape": whole}
    x = np.broadcast_to(np.float32(3), shape)
    mask = made(space, shape, start=first, **options)
    y = space.numpy(dropout(space.array(x), 0.5, KEY, start=first, **options))
    y_mask = np.broadcast_to(mask, shape)
    np.testing.assert_array_equal(y, np.where(y_mask, np.float32(6), 0))
    rng = np.random.default_rng(0)
    for place in range(40):
        inside = [int(rng.integers(0, n)) if place > 1 else place * (n - 1) for n in shape]
        block = tuple(min(40, n - i) for n, i in zip(shape, inside, strict=True))
        part = y_mask[tuple(slice(i, i + n) for i, n in zip(inside, block, strict=True))]
        start = [i + s for i, s in zip(inside, first, strict=True)]
        expected = expected_mask(block, 0.5, start=start, **options)
        np.testing.assert_array_equal(part, np.broadcast_to(expected, block), err_msg=str(start))


@pytest.mark.parametrize(("is_on_cpu", "pieces"), [(True, 4), (False, 2)])
def test_makes_mask_in_larger_pieces_off_the_cpu(monkeypatch, is_on_cpu, pieces):
    class OnDevice(Arrays):
        def is_on_cpu(self, x):
            return is_on_cpu

    class Counted(Words):
        calls = 0

        def keep_flags(self, *args):
            Counted.calls += 1
            return super().keep_flags(*args)

    monkeypatch.setattr("unidrop.mask._DEVICE_PIECE", 1 << 19)
    library, x = ArrayLibrary(OnDevice(), Counted()), np.ones(1 << 20, np.float32)
    plan = DropoutPlan(library, Window.from_args(x.shape), Rate.from_p(0.5), drops=True)
    np.testing.assert_array_equal(plan.run(x, KEY), dropout(x, 0.5, KEY))
    assert Counted.calls == pieces


def test_makes_large_mask_from_array_start(space):
    shape, whole = (70_003, 9), (2**31 - 1, 11)
    mask = made(space, shape, global_shape=whole, start=(space.scalar(7), 1))
    expected = made(space, shape, global_shape=whole, start=(7, 1))
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(("tile", "whole"), [((7,), (100,)), ((2, 24), (5, 64)), ((3, 5), (7, 13))])
def test_tiles_output_of_whole_with_windows(tile, whole):
    x = np.random.default_rng(0).standard_normal(whole).astype("float32")
    y = np.empty_like(x)
    for start in product(*(range(0, n, step) for n, step in zip(whole, tile, strict=True))):
        block = tuple(slice(s, s + n) for s, n in zip(start, tile, strict=True))
        y[block] = dropout(x[block], 0.5, KEY, global_shape=whole, start=start)
    np.testing.assert_array_equal(patterns(y), patterns(dropout(x, 0.5, KEY)))


def test_equals_specification_in_pieces_of_complex_output(space):
    x = np.broadcast_to(np.complex64(1 - 2j), (3, 100_001))
    y = space.numpy(dropout(space.array(x), 0.1, KEY))
    for part in (slice(0, 9), slice(87_370, 87_390), slice(99_990, None)):
        window = {"global_shape": x.shape, "start": (1, part.start)}
        block = x[1:2, part]
        assert_output(y[1:2, part], block, expected_mask(block.shape, 0.1, **window), 0.1)


# --- Memory --------------------------------------------------------------------------------------

MIB = 1 << 20


def peak(run):
    """Return the peak of NumPy's allocations during a call, in bytes, once all is imported."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "path", [lambda: force_path("portable"), nullcontext], ids=["portable", ""]
)
@pytest.mark.parametrize("shape", [(1 << 23,), (1 << 11, 1 << 12), (1 << 19, 16)], ids=str)
def test_takes_16_mib_beyond_output_and_mask(shape, path):
    x = np.ones(shape, "float32")
    with path():
        dropout(np.ones(3, "float32"), 0.5, KEY)
        assert peak(lambda: dropout(x, 0.5, KEY)) < x.nbytes + x.size + 16 * MIB


@pytest.mark.parametrize("columns", [1, 3, 16])
def test_takes_16_mib_beyond_mask_of_narrow_window(columns):
    rows, options = 1 << 20, {"global_shape": (1 << 20, columns + 2), "start": (0, 1)}
    with force_path("portable"):
        keep_mask((3, columns), 0.5, KEY, **options)
        bound = rows * columns + 16 * MIB
        assert peak(lambda: keep_mask((rows, columns), 0.5, KEY, **options)) < bound


@pytest.mark.parametrize("shape", [(2,) * 23, (4,) * 11, (3, 5, 7, 2, 11, 13, 17)], ids=len)
@pytest.mark.parametrize("axes", [(), (0, 3)])
def test_keeps_memory_bound_and_bits_with_many_short_axes(shape, axes):
    x = np.ones(shape, "float32")
    with force_path("portable"):
        mask = keep_mask(shape, 0.5, KEY, broadcast_axes=axes)
        bound = x.nbytes + mask.nbytes + 10 * MIB
        assert peak(lambda: dropout(x, 0.5, KEY, broadcast_axes=axes)) < bound
        actual = dropout(x, 0.5, KEY, broadcast_axes=axes)
    assert np.array_equal(actual != 0, np.broadcast_to(mask, shape))
