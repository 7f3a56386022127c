"""Define the contracts of masks, at any shape, rate, window, layout and thread."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

import unidrop
from unidrop.conformance.compare import ContractError, check_equal, check_mask
from unidrop.conformance.contracts.contract import (
    RATE,
    SHAPE,
    STEPS,
    Cell,
    check_model_output,
    contract,
    reference_result,
    require_nonempty,
)
from unidrop.conformance.diagnosis.search import find_common_causes, find_mask_causes
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.conformance.golden import GoldenMask, golden_masks, read_golden

# The golden masks of compiled modes, which compile each shape and rate. The mask of the threshold
# has the shape of most contracts, with another rate.
_COMPILED_MASKS = (
    "shape-0d",
    "shape-2x3x5x7",
    "threshold-between-even-52-and-odd-19",
    "even-u-0-rate-2^-32-drops",
    "even-u-2^32-1-rate-1-2^-32-keeps",  # of a window with a start above 2^32
    "broadcast-channel-dropout",
    "window-across-index-2^35-2d",
)

# Golden masks with enough elements to show how a block decides them.
_LONG_MASKS = ("shape-2x3x5x7", "size-257", "size-1000")

# The low word of the counter wraps inside these windows. One has long rows that begin inside a
# block. The other has so many short rows that kernels process them in several parts.
_WRAPPING_WINDOWS: tuple[tuple[tuple[int, int], dict[str, Any]], ...] = (
    ((2, 800), {"global_shape": (2, 2**36), "start": (0, 2**35 - 405)}),
    ((700, 100), {"global_shape": (2**29, 128), "start": (2**28 - 350, 0)}),
)

# Shapes of the contract on layouts; compiled modes use the first one only. If the second axis is
# the last in memory, kernels transpose words. Their columns are apart or adjacent in the mask, and
# they are short, long, or longer than a tile.
_LAYOUT_SHAPES = ((4, 6, 5, 3), (1, 20, 2, 9), (1, 100, 1, 3), (1, 600, 1, 63))

# Rates and training flags of the contracts on returned masks.
_RATES_AND_TRAINING = ((0.4, True), (0, True), (0.4, False), (1, True))


# Runs before most other contracts, which reuse its trace.
@contract(
    "traces",
    "Changing the step does not retrace a compiled mode.",
    ("traces",),
    compiled_only=True,
)
def _traces(cell: Cell) -> None:
    before = cell.capable.traces(cell.mode)
    for step in range(STEPS):
        cell.keeps(SHAPE, RATE, step)
    traced = cell.capable.traces(cell.mode) - before
    if cell.is_untraced or traced != 0:  # else an earlier contract may have traced it
        check_equal(traced, 1, f"traces over {STEPS} steps:")


@contract("steps", "Each step has its own mask, independent of earlier calls.")
def _steps(cell: Cell) -> None:
    masks: dict[int, NDArray[np.bool]] = {}
    for step in (0, 1, 2, 1, 2**31 - 1, 0):
        keep = cell.keeps(SHAPE, RATE, step)
        check_mask(keep, masks.setdefault(step, keep), f"mask of step {step} again")
    for one, other in combinations(masks, 2):
        if np.array_equal(masks[one], masks[other]):
            raise ContractError(f"two masks for steps {one} and {other}", "the same mask")


@contract("word-order", "The four words of a block decide two elements each, in order.")
def _word_order(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: g.name in _LONG_MASKS, half=0)


@contract("odd-elements", "Odd elements use their word times 0x6C078965.")
def _odd_elements(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: g.name in _LONG_MASKS, half=1)


@contract("mask", "The mask equals the golden masks bit for bit, at any shape and rate.")
def _mask(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: not g.options and not _is_threshold_case(g))


@contract("step-keys", "Step n uses the key with n folded in, for every n below step_limit.")
def _step_keys(cell: Cell) -> None:
    steps = (1, 2, 255, 65537, 2**24 + 1, 2**31 - 1, 2**53 + 1)
    pairs = [(cell.seed, step) for step in steps] + [(2**64 - 1, 2**31 - 1)]
    for seed, step in pairs:
        if step >= cell.backend.step_limit:
            continue
        model = StreamModel(seed, (step,), RATE, SHAPE)
        expected = reference_result(unidrop.keep_mask, SHAPE, RATE, model.key)
        keep = cell.keeps(SHAPE, RATE, step, seed=seed)
        try:
            check_mask(keep, expected, f"mask of step {step} of seed {seed:#x}")
        except ContractError as error:
            if keep.shape != SHAPE:
                raise
            causes = find_mask_causes(model, keep, pairs=False)
            raise error.with_causes(causes, cell.diff_command(model)) from None


@contract(
    "threshold",
    "An element is kept if u >= T: kept at u = T, dropped at u = T - 1.",
    in_derived_modes=False,
)
def _threshold(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: _is_threshold_case(g) and g.global_shape is None)


@contract(
    "threshold-ends",
    "An element is kept if u >= T, also if u is 0, 1 or 2^32 - 1.",
    ("windows",),
    in_derived_modes=False,
)
def _threshold_ends(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: _is_threshold_case(g) and g.global_shape is not None)


@contract(
    "broadcast-axes",
    "Elements along a broadcast axis share one decision and one index.",
    ("broadcast_axes",),
    in_derived_modes=False,
)
def _broadcast_axes(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: bool(g.broadcast_axes) and g.global_shape is None)


@contract(
    "windows",
    "A window has its slice of the global mask, also beyond 2^32 elements.",
    ("windows", "broadcast_axes"),
    in_derived_modes=False,
)
def _windows(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: g.global_shape is not None and not _is_threshold_case(g))
    for shape, options in () if cell.is_compiled else _WRAPPING_WINDOWS:
        expected = reference_result(unidrop.keep_mask, shape, 0.3, cell.key(5), **options)
        actual = cell.keeps(shape, 0.3, 5, **options)
        check_mask(actual, expected, f"mask of a window at {options} and p = 0.3, step 5")


@contract(
    "windows-tile",
    "Windows that tile an array give its mask.",
    ("windows",),
    in_derived_modes=False,
)
def _windows_tile(cell: Cell) -> None:
    whole = (6, 5, 11)
    expected = reference_result(unidrop.keep_mask, whole, 0.3, cell.key(5))
    actual = np.zeros(whole, dtype=bool)
    cuts = [(r, c) for r in (slice(0, 1), slice(1, 6)) for c in (slice(0, 3), slice(3, 11))]
    if cell.is_compiled:  # each window costs a compilation
        cuts, actual = cuts[-1:], expected.copy()
    for rows, columns in cuts:
        block = actual[rows, :, columns]
        start = (rows.start, 0, columns.start)
        block[...] = cell.keeps(block.shape, 0.3, 5, global_shape=whole, start=start)
    check_mask(
        actual, expected, f"tiled mask of shape {whole} at p = 0.3, step 5 of seed {cell.seed}"
    )


@contract("large-mask", "A mask too large for one piece equals the specification.")
def _large_mask(cell: Cell) -> None:
    for digest in read_golden()["digests"]:
        keep = cell.keeps(
            tuple(digest["shape"]), digest["p"], digest["step"], seed=int(digest["seed"], 16)
        )
        check_equal(int(keep.sum()), digest["kept"], f"mask {digest['name']!r}: kept elements")
        packed = np.packbits(keep).tobytes()
        actual = hashlib.blake2b(packed, digest_size=8).hexdigest()
        check_equal(actual, digest["blake2b"], f"mask {digest['name']!r}: digest of its bits")


@contract("returned-mask", "return_mask=True also returns the applied mask.", ("mask",))
def _returned_mask(cell: Cell) -> None:
    x = cell.ones((9, 11))
    for p, training in _RATES_AND_TRAINING[:1] if cell.is_compiled else _RATES_AND_TRAINING:
        y, mask = cell.backend.dropout(
            cell.array(x), p, cell.seed, 1, mode=cell.mode, training=training, return_mask=True
        )
        expected = reference_result(unidrop.keep_mask, (9, 11), p, cell.key(1), training=training)
        check_mask(cell.backend.to_numpy(mask), expected, f"mask at p = {p}, training = {training}")
        check_mask(cell.backend.to_numpy(y) != 0, expected, f"output at p = {p}")


@contract("mask-dtype", "A returned mask has the dtype bool.", ("mask",), every_dtype=True)
def _mask_dtype(cell: Cell) -> None:
    x = cell.array(cell.ones((9, 11)))
    p, training = _RATES_AND_TRAINING[0]
    _, mask = cell.backend.dropout(
        x, p, cell.seed, 1, mode=cell.mode, training=training, return_mask=True
    )
    check_equal(cell.backend.to_numpy(mask).dtype, np.dtype(bool), "dtype of the mask")


@contract(
    "layout",
    "The mask does not depend on the memory layout.",
    ("layouts",),
    in_derived_modes=False,
)
def _layout(cell: Cell) -> None:
    for shape in _LAYOUT_SHAPES[:1] if cell.is_compiled else _LAYOUT_SHAPES:
        x = cell.values(shape)
        model = StreamModel(cell.seed, (4,), 0.4, shape)
        expected = reference_result(unidrop.dropout, x, 0.4, model.key)
        layouts = cell.capable.layouts(cell.array(x))
        require_nonempty(layouts)
        for name, array in layouts.items():
            y = cell.backend.dropout(array, 0.4, cell.seed, 4, mode=cell.mode)
            actual = cell.backend.to_numpy(y)
            check_model_output(model, actual, expected, x, f"output of layout {name!r}, {shape}")


@contract("threads", "Concurrent calls from several threads return the masks of their keys.")
def _threads(cell: Cell) -> None:
    shape, p, workers = ((65, 33), 0.2, 7)
    if cell.is_compiled:  # a layer of each thread costs a compilation
        shape, p, workers = (SHAPE, RATE, 1)

    def keeps(step: int) -> NDArray[np.bool]:
        return cell.keeps(shape, p, step)

    if cell.is_compiled:
        keeps(0)  # compile once here, not concurrently in each worker
    with ThreadPoolExecutor(workers) as pool:
        from_workers = pool.map(keeps, range(1, 16))
        from_here = [keeps(step) for step in range(16, 24)]  # concurrently with the workers
    for step, keep in enumerate((*from_workers, *from_here), start=1):
        expected = reference_result(unidrop.keep_mask, shape, p, cell.key(step))
        check_mask(keep, expected, f"mask of step {step}")


def _check_golden_masks(
    cell: Cell, select: Callable[[GoldenMask], bool], half: int | None = None
) -> None:
    """Compare the selected golden masks; half = 0 compares even elements only, half = 1 odd ones.

    Computes all masks before it compares the first, since right masks exclude causes too.
    """
    selected = [g for g in golden_masks() if g.step < cell.backend.step_limit and select(g)]
    if cell.is_compiled:
        selected = [g for g in selected if g.name in _COMPILED_MASKS]
    require_nonempty(selected)
    actual = [(g, cell.keeps(g.shape, g.p, g.step, seed=g.seed, **g.options)) for g in selected]
    # The error describes the mask with the most wrong elements, which excludes the most causes.
    for golden, keep in sorted(actual, key=lambda pair: -_count_wrong(*pair)):
        expected = np.broadcast_to(golden.keep, golden.shape)
        if half is not None and keep.shape == expected.shape:
            halves = np.arange(keep.size).reshape(keep.shape) % 2
            keep = np.where(halves == half, keep, expected)
        try:
            check_mask(keep, expected, f"mask {golden.name!r} ({golden.command})")
        except ContractError as error:
            raise _add_causes(error, cell, golden, actual) from None


def _count_wrong(golden: GoldenMask, keep: NDArray[np.bool]) -> int:
    return keep.shape == golden.shape and int(np.count_nonzero(keep != golden.keep))


def _add_causes(
    error: ContractError,
    cell: Cell,
    wrong: GoldenMask,
    actual: Sequence[tuple[GoldenMask, NDArray[np.bool]]],
) -> ContractError:
    """Return the error of a wrong mask with the causes that all actual masks allow."""
    wrong_first = sorted(actual, key=lambda pair: pair[0] is not wrong)
    if wrong_first[0][1].shape != wrong.shape:
        return error
    masks = [(g.model, keep) for g, keep in wrong_first if keep.shape == g.shape]
    return error.with_causes(find_common_causes(masks), cell.diff_command(wrong.model))


def _is_threshold_case(golden: GoldenMask) -> bool:
    return golden.name.startswith("threshold") or "-u-" in golden.name
