"""Contracts of masks: which elements are kept, of any shape, window, layout and thread."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

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
from unidrop.conformance.diagnosis.search import causes_of_mask, causes_of_masks
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.conformance.golden import GoldenMask, golden_masks, read_golden

# Where each shape and rate is compiled anew, of as many golden vectors as there are, these few.
# That of the threshold has the shape of most contracts, at another rate.
_TELLING = (
    "shape-0d",
    "shape-2x3x5x7",
    "threshold-between-even-52-and-odd-19",
    "even-u-0-rate-2^-32-drops",
    "broadcast-channel-dropout",
    "window-across-index-2^35-2d",
)

# The masks that show how the elements of a block are decided.
_LONG = ("shape-2x3x5x7", "size-257", "size-1000")

# At which rates, and whether in training, a mask is returned.
_CALLS = ((0.4, True), (0, True), (0.4, False), (1, True))


# The first of all: what it has traced serves most of the others.
@contract(
    "traces",
    "A compiled mode is traced once, however often the step moves.",
    ("traces",),
    compiled_only=True,
)
def _traces(cell: Cell) -> None:
    before = cell.able.traces(cell.mode)
    for step in range(STEPS):
        cell.keeps(SHAPE, RATE, step)
    traced = cell.able.traces(cell.mode) - before
    if cell.is_fresh or traced != 0:  # else it may have been traced for another contract
        check_equal(traced, 1, f"traces over {STEPS} steps:")


@contract("steps", "Each step has a mask of its own, the same one whatever ran before.")
def _steps(cell: Cell) -> None:
    masks: dict[int, NDArray[np.bool]] = {}
    for step in (0, 1, 2, 1, 2**31 - 1, 0):
        keep = cell.keeps(SHAPE, RATE, step)
        check_mask(keep, masks.setdefault(step, keep), f"mask of step {step} again")
    for one, other in combinations(masks, 2):
        if np.array_equal(masks[one], masks[other]):
            raise ContractError(f"two masks for steps {one} and {other}", "the same one")


@contract(
    "word-order", "The four words of a block decide its elements two by two, the first word first."
)
def _word_order(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: g.name in _LONG, half=0)


@contract("odd-elements", "Odd elements are decided by their word times 0x6C078965.")
def _odd_elements(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: g.name in _LONG, half=1)


@contract("mask", "The mask is that of the golden vectors, bit for bit, at any shape and rate.")
def _mask(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: not g.options and not _is_threshold_case(g))


@contract("step-keys", "Step n has the mask of the key into which n is folded, however large n is.")
def _step_keys(cell: Cell) -> None:
    steps = (1, 2, 255, 65537, 2**24 + 1, 2**31 - 1, 2**53 + 1)
    named = [(cell.seed, step) for step in steps] + [(2**64 - 1, 2**31 - 1)]
    for seed, step in named:
        if step >= cell.backend.step_limit:
            continue
        recipe = StreamModel(seed, (step,), RATE, SHAPE)
        expected = reference_result(unidrop.keep_mask, SHAPE, RATE, recipe.key)
        keep = cell.keeps(SHAPE, RATE, step, seed=seed)
        try:
            check_mask(keep, expected, f"mask of step {step} of seed {seed:#x}")
        except ContractError as error:
            if keep.shape != SHAPE:
                raise
            causes = causes_of_mask(recipe, keep, pairs=False)
            raise error.explained(causes, cell.diff(recipe)) from None


@contract(
    "threshold",
    "An element is kept where u >= T: at u = T kept, at u = T - 1 dropped.",
    in_derived_modes=False,
)
def _threshold(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: _is_threshold_case(g) and g.global_shape is None)


@contract(
    "threshold-ends",
    "That is so at the ends too, where u is 0, 1 or 2^32 - 1, in windows that hold such elements.",
    ("windows",),
    in_derived_modes=False,
)
def _threshold_ends(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: _is_threshold_case(g) and g.global_shape is not None)


@contract(
    "broadcast-axes",
    "Along broadcast axes one decision is shared, and the mask is numbered without them.",
    ("broadcast_axes",),
    in_derived_modes=False,
)
def _broadcast_axes(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: bool(g.broadcast_axes) and g.global_shape is None)


@contract(
    "windows",
    "A window gets its block of the whole mask, also beyond 2^32 elements.",
    ("windows", "broadcast_axes"),
    in_derived_modes=False,
)
def _windows(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: g.global_shape is not None and not _is_threshold_case(g))


@contract(
    "windows-tile", "Windows of any cut tile the whole.", ("windows",), in_derived_modes=False
)
def _windows_tile(cell: Cell) -> None:
    whole = (6, 5, 11)
    expected = reference_result(unidrop.keep_mask, whole, 0.3, cell.key(5))
    actual = np.zeros(whole, dtype=bool)
    cuts = [(r, c) for r in (slice(0, 1), slice(1, 6)) for c in (slice(0, 3), slice(3, 11))]
    if cell.is_compiled:  # where each window is another program
        cuts, actual = cuts[-1:], expected.copy()
    for rows, columns in cuts:
        block = actual[rows, :, columns]
        start = (rows.start, 0, columns.start)
        block[...] = cell.keeps(block.shape, 0.3, 5, global_shape=whole, start=start)
    check_mask(
        actual, expected, f"the whole of shape {whole} at p = 0.3, step 5 of seed {cell.seed}"
    )


@contract("large-mask", "A large mask, made in pieces or at once, is that of the specification.")
def _large_mask(cell: Cell) -> None:
    for digest in read_golden()["digests"]:
        keep = cell.keeps(
            tuple(digest["shape"]), digest["p"], digest["step"], seed=int(digest["seed"], 16)
        )
        check_equal(int(keep.sum()), digest["kept"], f"mask {digest['name']!r}: number kept")
        packed = np.packbits(keep).tobytes()
        actual = hashlib.blake2b(packed, digest_size=8).hexdigest()
        check_equal(actual, digest["blake2b"], f"mask {digest['name']!r}: digest of its bits")


@contract("returned-mask", "return_mask returns the mask that was applied.", ("mask",))
def _returned_mask(cell: Cell) -> None:
    x = cell.ones((9, 11))
    for p, training in _CALLS[:1] if cell.is_compiled else _CALLS:
        y, mask = cell.backend.dropout(
            cell.array(x), p, cell.seed, 1, mode=cell.mode, training=training, return_mask=True
        )
        expected = reference_result(unidrop.keep_mask, (9, 11), p, cell.key(1), training=training)
        check_mask(cell.backend.to_numpy(mask), expected, f"mask at p = {p}, training = {training}")
        check_mask(cell.backend.to_numpy(y) != 0, expected, f"output at p = {p}")


@contract(
    "mask-dtype", "A returned mask is of bools, whatever x's dtype.", ("mask",), every_dtype=True
)
def _mask_dtype(cell: Cell) -> None:
    x = cell.array(cell.ones((9, 11)))
    p, training = _CALLS[0]
    _, mask = cell.backend.dropout(
        x, p, cell.seed, 1, mode=cell.mode, training=training, return_mask=True
    )
    check_equal(cell.backend.to_numpy(mask).dtype, np.dtype(bool), "dtype of the mask")


@contract(
    "layout",
    "The mask follows logical indices, whatever the memory layout.",
    ("layouts",),
    in_derived_modes=False,
)
def _layout(cell: Cell) -> None:
    x = cell.values((4, 6, 5, 3))
    recipe = StreamModel(cell.seed, (4,), 0.4, x.shape)
    expected = reference_result(unidrop.dropout, x, 0.4, recipe.key)
    layouts = cell.able.layouts(cell.array(x))
    require_nonempty(layouts)
    for name, array in layouts.items():
        y = cell.backend.to_numpy(cell.backend.dropout(array, 0.4, cell.seed, 4, mode=cell.mode))
        check_model_output(recipe, y, expected, x, f"output of layout {name!r}")


@contract("threads", "Calls from many threads give the masks of their keys.")
def _threads(cell: Cell) -> None:
    shape, p, others = ((65, 33), 0.2, 7)
    if cell.is_compiled:  # where a layer of each thread is another program
        shape, p, others = (SHAPE, RATE, 1)

    def keeps(step: int) -> NDArray[np.bool]:
        return cell.keeps(shape, p, step)

    if cell.is_compiled:
        keeps(0)  # compiled here, and not by each of the threads at once
    with ThreadPoolExecutor(others) as pool:
        theirs = pool.map(keeps, range(1, 16))
        ours = [keeps(step) for step in range(16, 24)]  # this thread, meanwhile
    for step, keep in enumerate((*theirs, *ours), start=1):
        expected = reference_result(unidrop.keep_mask, shape, p, cell.key(step))
        check_mask(keep, expected, f"mask of step {step}")


def _check_golden_masks(
    cell: Cell, where: Callable[[GoldenMask], bool], half: int | None = None
) -> None:
    """Compare golden masks; of each word's two elements only the even (0) or odd (1) one if told.

    All are made before the first is compared: which of them are right tells of the mistake too.
    """
    chosen = [g for g in golden_masks() if g.step < cell.backend.step_limit and where(g)]
    if cell.is_compiled:
        chosen = [g for g in chosen if g.name in _TELLING]
    require_nonempty(chosen)
    actual = [(g, cell.keeps(g.shape, g.p, g.step, seed=g.seed, **g.options)) for g in chosen]
    # What differs most is told of: it leaves the least in doubt.
    for golden, keep in sorted(actual, key=lambda pair: -_differing(*pair)):
        expected = np.broadcast_to(golden.keep, golden.shape)
        if half is not None and keep.shape == expected.shape:
            halves = np.arange(keep.size).reshape(keep.shape) % 2
            keep = np.where(halves == half, keep, expected)
        try:
            check_mask(keep, expected, f"mask {golden.name!r} ({golden.command})")
        except ContractError as error:
            raise _explained(error, cell, golden, actual) from None


def _differing(golden: GoldenMask, keep: NDArray[np.bool]) -> int:
    return keep.shape == golden.shape and int(np.count_nonzero(keep != golden.keep))


def _explained(
    error: ContractError,
    cell: Cell,
    wrong: GoldenMask,
    actual: Sequence[tuple[GoldenMask, NDArray[np.bool]]],
) -> ContractError:
    """Return an error of one of the masks that actual, with what is known of its cause."""
    wrong_first = sorted(actual, key=lambda pair: pair[0] is not wrong)
    if wrong_first[0][1].shape != wrong.shape:
        return error
    masks = [(g.recipe, keep) for g, keep in wrong_first if keep.shape == g.shape]
    return error.explained(causes_of_masks(masks), cell.diff(wrong.recipe))


def _is_threshold_case(golden: GoldenMask) -> bool:
    return golden.name.startswith("threshold") or "-u-" in golden.name
