# ruff: noqa: N803 - Triton writes constants in capitals
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
"""Kernels of dropout for a GPU: words, mask and product in one pass over memory, in Triton.

Requirements this design meets:

* One Philox block decides eight elements, so a thread generates a block and keeps its words in
  registers. Arithmetic then takes less time than memory.
* Where neighbors in the mask are neighbors in memory, a thread loads and stores 16 bytes at once.
  Eight elements of 4 or 8 bytes are more than that, so a block has *parts* of 16 bytes.
* Each number that changes between calls is a 64-bit or 32-bit argument of a fixed type, and Triton
  compiles nothing for its value. A float64 scale and the threshold enter as their bits, because
  Triton passes a Python float as float32, and types an integer by its value.
* A key, a call number and the number of the first element may be in device memory. So no caller
  waits for the device, and a captured graph reads their present values at each replay.

Products of words are 64-bit: NVIDIA's multiply-add of 32 by 32 bits returns both halves at once.
Sums and products of 32 bits go through 64 bits too, where Triton's overflow checks do not apply;
LLVM narrows them again.
"""

import triton
import triton.language as tl

from unidrop.philox import KEY_INCREMENTS, MULTIPLIERS, ODD_MULTIPLIER, ROUNDS

__all__ = ["flat", "fold", "next_key", "rows"]

_ROUNDS: tl.constexpr = tl.constexpr(ROUNDS)
_MULTIPLIER0: tl.constexpr = tl.constexpr(MULTIPLIERS[0])
_MULTIPLIER1: tl.constexpr = tl.constexpr(MULTIPLIERS[1])
_INCREMENT0: tl.constexpr = tl.constexpr(KEY_INCREMENTS[0])
_INCREMENT1: tl.constexpr = tl.constexpr(KEY_INCREMENTS[1])
_ODD_MULTIPLIER: tl.constexpr = tl.constexpr(ODD_MULTIPLIER)


# --- The stream -----------------------------------------------------------------------------------


@triton.jit
def _philox(lo, hi, tag: tl.constexpr, k0, k1):
    """Return the four words of a counter ``(lo, hi, 0, tag)`` under a key; all are uint32."""
    c0, c1 = lo, hi
    c2 = tl.zeros_like(lo)
    c3 = c2 + tag
    for _ in tl.static_range(_ROUNDS):
        product0 = c0.to(tl.uint64) * _MULTIPLIER0
        product1 = c2.to(tl.uint64) * _MULTIPLIER1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + _INCREMENT0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + _INCREMENT1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _philox_of_blocks(block, k0, k1):
    """Return the four words of mask blocks, whose numbers are uint32 or uint64."""
    lo = block.to(tl.uint32)
    if block.dtype == tl.uint64:
        return _philox(lo, (block >> 32).to(tl.uint32), 0, k0, k1)
    return _philox(lo, tl.zeros_like(lo), 0, k0, k1)


@triton.jit
def _get_u(w0, w1, w2, w3, PART: tl.constexpr, PARTS: tl.constexpr):
    """Return u of one of the parts of each block, in order, along new axes of length 2.

    The last axis is the parity of an element, and those before it number the words of the part.
    """
    if PARTS == 1:
        even = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    elif PARTS == 2:
        even = tl.join(w0, w1) if PART == 0 else tl.join(w2, w3)
    elif PART < 2:
        even = w0 if PART == 0 else w1
    else:
        even = w2 if PART == 2 else w3
    odd = (even.to(tl.uint64) * _ODD_MULTIPLIER).to(tl.uint32)
    return tl.join(even, odd)


@triton.jit
def _get_key(key_ptr, key):
    """Return the two words of a key: of a 64-bit number, or of ``[lo, hi]`` in device memory."""
    if key_ptr is None:
        bits = key.to(tl.uint64)
        return bits.to(tl.uint32), (bits >> 32).to(tl.uint32)
    return tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32)


# --- The output -----------------------------------------------------------------------------------


@triton.jit
def _write(x_ptr, y_ptr, keep, scale, inside):
    """Store kept elements times the scale and zeros for the others, or the mask itself.

    The product is float32, or float64 for float64, and is rounded once. A dropped element becomes 0
    before the product, and stays 0, because no rate that keeps an element has an infinite scale.
    LLVM would move a later selection behind the rounding, and unpack pairs of 16 bits for it.
    Without ``inside``, all elements exist.
    """
    dtype = y_ptr.dtype.element_ty
    if dtype == tl.int1:
        y = keep
    else:
        x = tl.load(x_ptr, mask=inside)
        if dtype == tl.float64:
            y = tl.where(keep, x, 0.0) * scale.to(tl.int64).to(tl.float64, bitcast=True)
        else:
            kept = tl.where(keep, x.to(tl.float32), 0.0)
            y = (kept * scale.to(tl.int32).to(tl.float32, bitcast=True)).to(dtype)
    tl.store(y_ptr, y, mask=inside)


@triton.jit
def _repeat(keep, COMPONENTS: tl.constexpr):
    """Return the decision for each component, along a new axis if there are two."""
    if COMPONENTS == 2:
        return tl.join(keep, keep)
    else:  # noqa: RET505 - Triton compares the types of returns unless one excludes the other
        return keep


_FLAT_NUMBERS = ["key_ptr", "key", "base", "size", "threshold", "scale"]


@triton.jit(do_not_specialize=_FLAT_NUMBERS)
def flat(
    x_ptr, y_ptr, key_ptr,
    key: tl.int64, base: tl.int64, size: tl.int64, threshold: tl.int32, scale: tl.int64,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, COMPONENTS: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Process a contiguous array that begins with a block of the mask.

    COMPONENTS: 2 for complex numbers, whose parts share a decision. WIDE: numbers of blocks exceed
    32 bits. WHOLE: the array ends with a block of the mask.
    """
    k0, k1 = _get_key(key_ptr, key)
    least = threshold.to(tl.uint32)
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    lane = tl.arange(0, BLOCKS)
    block = (base.to(tl.uint64) >> 3) + first.to(tl.uint64)
    if WIDE:
        w0, w1, w2, w3 = _philox_of_blocks(block + lane.to(tl.uint64), k0, k1)
    else:
        w0, w1, w2, w3 = _philox_of_blocks(block.to(tl.uint32) + lane.to(tl.uint32), k0, k1)
    start = first * (8 * COMPONENTS)
    left = tl.minimum(size.to(tl.int64) * COMPONENTS - start, BLOCKS * 8 * COMPONENTS).to(tl.int32)
    x_first, y_first = x_ptr + start, y_ptr + start
    width: tl.constexpr = 8 // PARTS * COMPONENTS
    for part in tl.static_range(PARTS):
        u = _get_u(w0, w1, w2, w3, part, PARTS)
        keep = _repeat(u >= least, COMPONENTS)
        keep = tl.reshape(keep, [BLOCKS, width])
        at = lane[:, None] * (8 * COMPONENTS) + (part * width + tl.arange(0, width))[None, :]
        if WHOLE:
            _write(x_first + at, y_first + at, keep, scale, at < tl.multiple_of(left, 8))
        elif left == BLOCKS * 8 * COMPONENTS:
            _write(x_first + at, y_first + at, keep, scale, None)
        else:
            _write(x_first + at, y_first + at, keep, scale, at < left)


_ROWS_NUMBERS = [
    *("key_ptr", "base_ptr", "key", "base", "threshold", "scale", "x_start", "y_start"),
    *("columns", "x_column", "y_column", "rows", "mask_row", "x_row", "y_row"),
    *("mask0", "x0", "y0", "length1", "mask1", "x1", "y1", "length2", "mask2", "x2", "y2"),
]


@triton.jit(do_not_specialize=_ROWS_NUMBERS)
def rows(
    x_ptr, y_ptr, key_ptr, base_ptr,
    key: tl.int64, base: tl.int64, threshold: tl.int32, scale: tl.int64,
    x_start: tl.int64, y_start: tl.int64,
    columns: tl.int64, x_column: tl.int64, y_column: tl.int64,
    rows: tl.int64, mask_row: tl.int64, x_row: tl.int64, y_row: tl.int64,
    mask0: tl.int64, x0: tl.int64, y0: tl.int64,
    length1: tl.int64, mask1: tl.int64, x1: tl.int64, y1: tl.int64,
    length2: tl.int64, mask2: tl.int64, x2: tl.int64, y2: tl.int64,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, COMPONENTS: tl.constexpr,
    OUTER: tl.constexpr, SHARED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Process tiles of any array: ROWS along one axis by BLOCKS along the columns.

    Columns have mask stride 1. Up to three outer axes have one position per tile. Strides are in
    elements, and an element has COMPONENTS, as in `flat`.

    SHARED: all rows have the mask stride 0, so they share their words. ALIGNED: every row begins
    with a block of the mask. WIDE: numbers within a tile exceed 32 bits. UNIT: a number that
    divides starts, strides and lengths, but for those that X_UNIT and Y_UNIT mean. These name the
    axis that has stride 1 in memory: "column", "row", or "" for neither. TURN: which axis of the
    grid numbers the column tiles.
    """
    index_type: tl.constexpr = tl.int64 if WIDE else tl.int32
    unsigned_type: tl.constexpr = tl.uint64 if WIDE else tl.uint32
    k0, k1 = _get_key(key_ptr, key)
    least = threshold.to(tl.uint32)
    tile_column = tl.program_id(TURN).to(index_type)
    tile_row = tl.program_id((TURN + 1) % 3)
    outer = tl.program_id((TURN + 2) % 3)

    # Where the tile begins: in the mask's numbering modulo 2^64, and in memory.
    first_row = tile_row.to(tl.int64) * ROWS
    index = base.to(tl.uint64) + first_row.to(tl.uint64) * mask_row.to(tl.uint64)
    if base_ptr is not None:
        index += tl.load(base_ptr).to(tl.uint64)
    x_at = x_start.to(tl.int64) + first_row * x_row
    y_at = y_start.to(tl.int64) + first_row * y_row
    if OUTER > 2:
        position = outer % length2.to(tl.int32)
        outer = outer // length2.to(tl.int32)
        index += position.to(tl.uint64) * mask2.to(tl.uint64)
        x_at += position * x2.to(tl.int64)
        y_at += position * y2.to(tl.int64)
    if OUTER > 1:
        position = outer % length1.to(tl.int32)
        outer = outer // length1.to(tl.int32)
        index += position.to(tl.uint64) * mask1.to(tl.uint64)
        x_at += position * x1.to(tl.int64)
        y_at += position * y1.to(tl.int64)
    if OUTER > 0:
        index += outer.to(tl.uint64) * mask0.to(tl.uint64)
        x_at += outer * x0.to(tl.int64)
        y_at += outer * y0.to(tl.int64)
    x_at += tile_column.to(tl.int64) * (BLOCKS * 8) * x_column
    y_at += tile_column.to(tl.int64) * (BLOCKS * 8) * y_column
    x_first = x_ptr + tl.multiple_of(x_at, UNIT) * COMPONENTS
    y_first = y_ptr + tl.multiple_of(y_at, UNIT) * COMPONENTS

    row = tl.arange(0, ROWS)
    if not SHARED:
        index += row.to(tl.uint64) * mask_row.to(tl.uint64)
    first_block = index >> 3
    if not SHARED:
        first_block = first_block[:, None]
    block = tile_column.to(tl.uint64) * BLOCKS + tl.arange(0, BLOCKS).to(tl.uint64)[None, :]
    w0, w1, w2, w3 = _philox_of_blocks(first_block + block, k0, k1)

    # Positions from the start of the tile, and the part of the array from there on.
    row = row[:, None, None].to(index_type)
    x_offset = row * _get_stride(x_row, X_UNIT == "row", UNIT, index_type)
    y_offset = row * _get_stride(y_row, Y_UNIT == "row", UNIT, index_type)
    x_step = _get_stride(x_column, X_UNIT == "column", UNIT, index_type)
    y_step = _get_stride(y_column, Y_UNIT == "column", UNIT, index_type)
    skipped = (index & 7).to(index_type)
    if not SHARED:
        skipped = skipped[:, None, None]
    if not ALIGNED:  # a row begins with a block that it does not own whole
        x_offset -= skipped * x_step
        y_offset -= skipped * y_step
    x_rows, y_rows = x_first + x_offset * COMPONENTS, y_first + y_offset * COMPONENTS
    rows_left = rows.to(index_type) - tile_row.to(index_type) * ROWS
    columns_left = columns.to(index_type) - tile_column * (BLOCKS * 8)
    if X_UNIT == "row":
        rows_left = tl.multiple_of(rows_left, UNIT)
    if X_UNIT == "column":
        columns_left = tl.multiple_of(columns_left, UNIT)
    width: tl.constexpr = 8 // PARTS * COMPONENTS
    lane = tl.arange(0, width)[None, None, :].to(index_type)
    for part in tl.static_range(PARTS):
        u = _get_u(w0, w1, w2, w3, part, PARTS)
        keep = _repeat(u >= least, COMPONENTS)
        keep = tl.reshape(keep, [1 if SHARED else ROWS, BLOCKS, width])
        column = (tl.arange(0, BLOCKS) * 8 + part * (8 // PARTS))[None, :, None].to(index_type)
        if ALIGNED:
            inside = (row < rows_left) & (column + lane // COMPONENTS < columns_left)
        else:
            # A negative position is a large one without its sign, so one comparison suffices.
            position = column + lane // COMPONENTS + (tile_column * (BLOCKS * 8) - skipped)
            length = tl.where(row < rows_left, columns.to(index_type), 0)
            inside = position.to(unsigned_type) < length.to(unsigned_type)
        x = x_rows + _get_offset(column, lane, x_step, X_UNIT == "column", COMPONENTS)
        y = y_rows + _get_offset(column, lane, y_step, Y_UNIT == "column", COMPONENTS)
        _write(x, y, keep, scale, inside)


@triton.jit
def _get_stride(stride, IS_ONE: tl.constexpr, UNIT: tl.constexpr, dtype: tl.constexpr):
    """Return a stride in memory: 1, or a number that UNIT divides."""
    if IS_ONE:
        return 1
    else:  # noqa: RET505
        return stride.to(dtype) // UNIT * UNIT


@triton.jit
def _get_offset(column, lane, step, IS_CONTIGUOUS: tl.constexpr, COMPONENTS: tl.constexpr):
    """Return the offset in memory of each lane, a component of elements from a column on."""
    if IS_CONTIGUOUS:
        return column * COMPONENTS + lane
    else:  # noqa: RET505
        return (column + lane // COMPONENTS) * step * COMPONENTS + lane % COMPONENTS


# --- Keys -----------------------------------------------------------------------------------------


@triton.jit
def _fold(number, tag: tl.constexpr, k0, k1):
    """Return the two words of a key and an integer, as int64."""
    lo, hi, _, _ = _philox(number.to(tl.uint32), (number >> 32).to(tl.uint32), tag, k0, k1)
    return lo.to(tl.int64), hi.to(tl.int64)


@triton.jit(do_not_specialize=["calls_ptr", "key_ptr", "out_ptr", "key", "key_stride"])
def next_key(calls_ptr, key_ptr, out_ptr, key: tl.int64, key_stride: tl.int64, TAG: tl.constexpr):
    """Take a call number, advance it and its complement, and fold it into a key."""
    i = tl.program_id(0).to(tl.int64)
    number = tl.load(calls_ptr + 2 * i)
    complement = tl.load(calls_ptr + 2 * i + 1)
    if key_ptr is None:
        k0, k1 = _get_key(None, key)
    else:
        k0, k1 = _get_key(key_ptr + i * key_stride, key)
    lo, hi = _fold(number, TAG, k0, k1)
    tl.store(calls_ptr + 2 * i, number + 1)
    tl.store(calls_ptr + 2 * i + 1, complement - 1)
    tl.store(out_ptr + 3 * i, lo)
    tl.store(out_ptr + 3 * i + 1, hi)
    tl.store(out_ptr + 3 * i + 2, number)


@triton.jit(do_not_specialize=["key_ptr", "data_ptr", "out_ptr", "key"])
def fold(key_ptr, data_ptr, out_ptr, key: tl.int64, TAG: tl.constexpr):
    """Fold an integer into a key."""
    k0, k1 = _get_key(key_ptr, key)
    lo, hi = _fold(tl.load(data_ptr), TAG, k0, k1)
    tl.store(out_ptr, lo)
    tl.store(out_ptr + 1, hi)
