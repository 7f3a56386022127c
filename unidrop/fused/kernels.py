"""Kernels: words, masks and products in one pass over memory, compiled by LLVM.

Requirements this design meets:

* Elements are processed in vectors, by LLVM's vector instructions: LLVM's loop vectorizer fails on
  most forms of these loops. LLVM splits a vector into the registers of the processor.
* Where neighbors in the mask are neighbors in memory, words stay in registers. Other words go
  through a buffer that fits into the first-level cache. So a row may begin and end inside a Philox
  block, and a tile can be transposed.
* A kernel has one argument for all arrays, the task: an array of numbers and addresses. So one
  kernel of a dtype serves arrays of any number of dimensions.
* Any number of threads may run one task at once. They claim its work items by an atomic fetch-add
  on its counters, without Python's lock. The caller claims from the front and workers claim from
  the back, so the caches still fit when the same array is used again. No result depends on the
  thread that computes a work item.
* A kernel compiles in a fraction of a second, so there is no cache on disk.

This module imports llvmlite, so `unidrop.fused` imports it for the first array that kernels accept.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from llvmlite import ir

from unidrop.fused.generator import BLOCKS, LANES
from unidrop.fused.llvm import I32, I64, Function, Value, Variable, compile_module, least
from unidrop.fused.pieces import BLOCK_SIZE, GROUP, MANY_BLOCKS, Pieces
from unidrop.fused.products import KINDS

__all__ = ["AXES", "WORK_ITEM_SIZE", "Kernel", "get_tile", "make_kernel"]

# The fields of a task, all int64. The axes follow, outermost first, three numbers each: the length,
# the stride in the mask's numbering, and the stride in memory.
CLAIMED, CLAIMED_BY_WORKERS, DONE, WORK_ITEMS, X, Y, SIZE = range(7)
THRESHOLD, SCALE, KEY, BASE, HEIGHT, WIDTH, NDIM, AXES = range(7, 15)

WORK_ITEM_SIZE: Final = 1 << 16  # elements of a work item in rows
_SPINS = 20_000  # reads of the counter before the caller yields to Python

# Rows below this length are joined, because each alone would generate words that it does not use.
_SHORT_ROW = 192
_JOINED = 2048  # elements
_JOINED_BLOCKS = 512

# A full tile has 256 columns, enough for the processor to prefetch each row.
_TILE_ROWS = 56
_TILE_COLUMNS = 256
_BROADCAST_TILE_COLUMNS = 2048  # if all columns share the words of their row
_SIDE = 8  # the side of a square that is transposed at a time


# --- The two traversals ---------------------------------------------------------------------------


def get_tile(rows: int, columns: int, mask_stride: int) -> tuple[int, int]:
    """Return the rows and columns of a tile of two axes; the columns have a stride in the mask."""
    tiles = -(-rows // _TILE_ROWS)
    height = min(rows, -(-rows // tiles // _SIDE) * _SIDE) if tiles > 1 else rows
    if mask_stride == 0:
        return height, min(columns, _BROADCAST_TILE_COLUMNS)
    return height, min(columns, _TILE_ROWS * _TILE_COLUMNS // (-(-height // _SIDE) * _SIDE))


class _Task:
    """The numbers of a task, and of the elements that one of its work items covers."""

    def __init__(self, f: Function, address: Value) -> None:
        self.f, self.address = f, address

    def field(self, number: int | Value) -> Value:
        """Return the address of a field."""
        return self.address + (number * 8 if isinstance(number, Value) else 8 * number)

    def get(self, number: int | Value) -> Value:
        """Return a field."""
        return self.f.load(self.field(number), I64)

    def axis(self, ndim: Value, from_last: int) -> tuple[Value, Value, Value]:
        """Return the length, the stride in the mask's numbering and the stride of an axis."""
        first = (ndim - from_last) * 3 + AXES
        return self.get(first), self.get(first + 1), self.get(first + 2)

    def locate(self, number: Value, ndim: Value) -> tuple[Value, Value]:
        """Return the offsets of a position of the outer axes, in the mask and in memory."""
        f = self.f
        number_left, index, start = f.variable(number), f.variable(0), f.variable(0)
        with f.loop(0, ndim) as k:
            length, mask_stride, stride = self.axis(ndim - k, 1)
            left = number_left.get()
            position = left % length
            number_left.set(left // length)
            index.set(index.get() + position * mask_stride)
            start.set(start.get() + position * stride)
        return index.get(), start.get()


def _define_rows(module: Any, pieces: Pieces) -> Function:
    """Process a work item of rows: neighbors in memory and in the mask's numbering."""
    f = Function(module, "rows", 8)
    address, x, y, threshold, scale, key, base, item = f.arguments
    task, size = _Task(f, address), pieces.kind.size
    ndim = task.get(NDIM)
    length, _, _ = task.axis(ndim, 1)
    done = f.variable(item * WORK_ITEM_SIZE)
    end = least(done.get() + WORK_ITEM_SIZE, task.get(SIZE))
    row, column = f.variable(done.get() // length), f.variable(done.get() % length)
    with f.choose(length < _SHORT_ROW) as (short, long):
        with long, f.repeat(lambda: done.get() < end):
            now = done.get()
            index = task.locate(row.get(), ndim - 1)[0] + base + column.get()
            count = least(end - now, length - column.get())
            f.call(pieces.span, x + now * size, y + now * size, index, count, key, threshold, scale)
            done.set(now + count)
            row.set(row.get() + 1)
            column.set(0)
        with short:
            _join_rows(f, pieces, task, done, end, row, column)
    f.finish()
    return f


def _join_rows(
    f: Function,
    pieces: Pieces,
    task: _Task,
    done: Variable,
    end: Value,
    row: Variable,
    column: Variable,
) -> None:
    """Write the part of `_define_rows` for short rows: generate and select many at a time."""
    _, x, y, threshold, scale, key, base, _ = f.arguments
    size, ndim = pieces.kind.size, task.get(NDIM)
    length, _, _ = task.axis(ndim, 1)
    outer, step, _ = task.axis(ndim, 2)
    outer = (ndim < 2).select(1, outer)  # the only axis is a single row
    numbers = f.allocate(8 * (_JOINED_BLOCKS + MANY_BLOCKS))
    words = f.allocate(BLOCK_SIZE * (_JOINED_BLOCKS + BLOCKS))
    starts, counts = f.allocate(8 * _JOINED), f.allocate(8 * _JOINED)
    joined = f.allocate(4 * (_JOINED + _SHORT_ROW + LANES))
    start = f.variable(task.locate(row.get(), ndim - 1)[0])
    left = f.variable(outer - row.get() % outer)
    blocks, rows, filled = f.variable(0), f.variable(0), f.variable(0)
    previous, source = f.variable(0), f.variable(0)
    with f.repeat(lambda: done.get() < end):
        first = done.get()
        blocks.set(0)
        rows.set(0)
        filled.set(0)

        def has_room() -> Value:
            has_blocks: Value = blocks.get() < _JOINED_BLOCKS - (_SHORT_ROW + 14) // 8
            return has_blocks & (done.get() - first < _JOINED) & (done.get() < end)

        with f.repeat(has_room):
            index = start.get() + base + column.get()
            count = least(end - done.get(), length - column.get())
            number = rows.get()
            # Rows along a broadcast axis share their words.
            with f.when((number < 1) | (previous.get() ^ index >= 1)):
                source.set(words + blocks.get() * BLOCK_SIZE + (index & 7) * 4)
                needed = ((index & 7) + count + 7) >> 3
                with f.loop(0, needed) as i:
                    f.store((index >> 3) + i, numbers + (blocks.get() + i) * 8)
                blocks.set(blocks.get() + needed)
            previous.set(index)
            f.store(source.get(), starts + number * 8)
            f.store(count, counts + number * 8)
            rows.set(number + 1)
            done.set(done.get() + count)
            row.set(row.get() + 1)
            column.set(0)
            left.set(left.get() - 1)
            with f.choose(left.get().equals(0)) as (is_last, is_inner):
                with is_last:
                    left.set(outer)
                    start.set(task.locate(row.get(), ndim - 1)[0])
                with is_inner:
                    start.set(start.get() + step)
        f.call(pieces.generate, words, numbers, blocks.get(), key)
        with f.loop(0, rows.get()) as i:
            own, count = f.load(starts + i * 8, I64), f.load(counts + i * 8, I64)
            target = joined + filled.get() * 4
            with f.loop(0, count, LANES) as j:
                f.store(f.load(own + j * 4, I32, LANES), target + j * 4)
            filled.set(filled.get() + count)
        where = first * size
        f.call(pieces.select, joined, x + where, y + where, filled.get(), threshold, scale)


def _define_tiles(module: Any, pieces: Pieces) -> Function:
    """Process a work item of tiles of two axes.

    Rows are neighbors in the mask's numbering, columns in memory. The words of a tile are generated
    by columns, and transposed in the cache.
    """
    f = Function(module, "tiles", 8)
    address, x, y, threshold, scale, key, base, item = f.arguments
    task, size = _Task(f, address), pieces.kind.size
    ndim = task.get(NDIM)
    rows, _, row_stride = task.axis(ndim, 2)
    columns, mask_stride, _ = task.axis(ndim, 1)
    full_height, full_width = task.get(HEIGHT), task.get(WIDTH)
    across = (columns + full_width - 1) // full_width
    down = (rows + full_height - 1) // full_height
    column, row = item % across * full_width, item // across % down * full_height
    index, start = task.locate(item // across // down, ndim - 2)
    index += base + row + column * mask_stride
    start += row * row_stride + column
    height, width = least(full_height, rows - row), least(full_width, columns - column)
    # The last square of a row of squares may end beyond the last column.
    tile = f.allocate(4 * (_TILE_ROWS * _TILE_COLUMNS + _TILE_ROWS * _SIDE))

    def select(words: Value, at: Value, count: Value) -> None:
        f.call(pieces.select, words, x + at * size, y + at * size, count, threshold, scale)

    with f.choose(mask_stride.equals(0)) as (is_shared, is_own):
        with is_shared:
            words = f.allocate(BLOCK_SIZE * (_TILE_ROWS // 8 + 2 * BLOCKS))
            first = f.call(pieces.generate_run, words, index, height, key)
            # Short rows that are adjacent in memory are selected together.
            is_adjacent = width.equals(row_stride) & (width < _BROADCAST_TILE_COLUMNS)
            most = is_adjacent.select(f.number(_BROADCAST_TILE_COLUMNS) // width, f.number(1))
            with f.loop(0, height, most) as i:
                together = least(most, height - i)
                with f.loop(0, together) as k:
                    word = f.load(first + (i + k) * 4, I32).fill(LANES)
                    with f.loop(0, width, LANES) as j:
                        f.store(word, tile + (k * width + j) * 4)
                select(tile, start + i * row_stride, together * width)
        with is_own:
            _transpose_words(f, pieces, tile, index, height, width, mask_stride)
            with f.choose(width.equals(row_stride)) as (is_one, is_many):
                with is_one:
                    select(tile, start, height * width)
                with is_many, f.loop(0, height) as i:
                    select(tile + i * width * 4, start + i * row_stride, width)
    f.finish()
    return f


def _transpose_words(
    f: Function, pieces: Pieces, tile: Value, index: Value, height: Value, width: Value,
    mask_stride: Value,
) -> None:  # fmt: skip
    """Write the part of `_define_tiles` that generates words by columns and stores them by rows."""
    key = f.arguments[5]
    words = f.allocate(BLOCK_SIZE * (8 * _SIDE + 2 * BLOCKS))
    numbers, starts = f.allocate(8 * (8 * _SIDE + MANY_BLOCKS)), f.allocate(8 * _SIDE)
    blocks = f.variable(0)
    # If columns are adjacent in the mask's numbering, no block is generated twice.
    is_adjacent = mask_stride.equals(height)
    together = (is_adjacent & (height < _SIDE)).select(f.number(GROUP), f.number(_SIDE))
    # Backwards: a square may end beyond the last column, at the start of the next row.
    groups = (width + together - 1) // together
    with f.loop(0, groups) as done:
        column = (groups - 1 - done) * together
        at = index + column * mask_stride
        count = least(width - column, together)
        with f.choose(is_adjacent) as (adjacent, apart):
            with adjacent:
                first = f.call(pieces.generate_run, words, at, height * count, key)
                with f.loop(0, _SIDE) as j:
                    f.store(first + height * j * 4, starts + j * 8)
            with apart:
                blocks.set(0)
                with f.loop(0, count) as j:
                    own = at + j * mask_stride
                    f.store(words + blocks.get() * BLOCK_SIZE + (own & 7) * 4, starts + j * 8)
                    needed = ((own & 7) + height + 7) >> 3
                    with f.loop(0, needed) as i:
                        f.store((own >> 3) + i, numbers + (blocks.get() + i) * 8)
                    blocks.set(blocks.get() + needed)
                with f.loop(count, _SIDE) as j:
                    f.store(words, starts + j * 8)
                f.call(pieces.generate, words, numbers, blocks.get(), key)
        squares = (count + _SIDE - 1) // _SIDE
        with f.loop(0, squares) as g:
            j = (squares - 1 - g) * _SIDE
            with f.loop(0, height, _SIDE) as i:
                target = tile + (i * width + column + j) * 4
                _transpose(f, target, width * 4, starts, (i + j * height) * 4)


def _transpose(f: Function, tile: Value, pitch: Value, starts: Value, offset: Value) -> None:
    """Write a square of a tile, from words that are stored by columns.

    Each column begins ``offset`` bytes after one of the addresses stored at ``starts``. The rows of
    the square begin at ``tile``, ``pitch`` bytes apart.
    """
    addresses = f.load(starts, I64, _SIDE)
    vectors = [f.load(addresses.lane(i) + offset, I32, _SIDE) for i in range(_SIDE)]
    bit = 1
    while bit < _SIDE:
        # Two vectors whose numbers differ in this bit exchange the lanes that differ in it.
        low = [lane if not lane & bit else _SIDE + lane - bit for lane in range(_SIDE)]
        high = [lane + bit if not lane & bit else _SIDE + lane for lane in range(_SIDE)]
        vectors = [
            vectors[i - bit].shuffle(high, v) if i & bit else v.shuffle(low, vectors[i + bit])
            for i, v in enumerate(vectors)
        ]
        bit *= 2
    for i, row in enumerate(vectors):
        f.store(row, tile + pitch * i)


# --- Kernels --------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A compiled traversal of a dtype. All arguments are integers of 64 bits.

    ``run(task, is_worker)`` claims and computes work items of a task until all are claimed, from
    the back if a worker runs it. It returns whether all work items are finished. It releases
    Python's lock.

    ``run_alone(task, x, y, threshold, scale, key, base)`` computes all work items, and reads of the
    task only what calls share: it may be a template. It keeps Python's lock. ``run_unlocked`` is
    the same function, and releases the lock. ``address`` is the address of this function.
    """

    run: Callable[[int, bool], int]
    run_alone: Callable[..., int]
    run_unlocked: Callable[..., int]
    address: int


def make_kernel(traversal: str, kind: str) -> Kernel:
    """Compile a kernel.

    Parameters
    ----------
    traversal : {"rows", "tiles"}
    kind : str
        The name of the dtype.
    """
    module = ir.Module(f"{traversal}_{kind}")
    pieces = Pieces(module, KINDS[kind])
    compute = (_define_rows if traversal == "rows" else _define_tiles)(module, pieces)
    _define_run(module, compute)
    _define_run_alone(module, compute)
    run, alone = compile_module(module, ["run", "run_alone"])
    return Kernel(
        ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(run),
        ctypes.PYFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 7)(alone),
        ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 7)(alone),
        alone,
    )


def _define_run(module: Any, compute: Function) -> None:
    f = Function(module, "run", 2, is_exported=True)
    address, is_worker = f.arguments
    task = _Task(f, address)
    items = task.get(WORK_ITEMS)
    front, item, spins = f.variable(0), f.variable(0), f.variable(0)
    with f.repeat(lambda: f.fetch_add(task.field(CLAIMED)) < items):
        with f.choose(is_worker.equals(0)) as (is_caller, is_other):
            with is_caller:
                item.set(front.get())
                front.set(front.get() + 1)
            with is_other:
                item.set(items - 1 - f.fetch_add(task.field(CLAIMED_BY_WORKERS)))
        fields = (X, Y, THRESHOLD, SCALE, KEY, BASE)
        f.call(compute, address, *(task.get(field) for field in fields), item.get())
        f.fetch_add(task.field(DONE))
    # Wait briefly for the work items of other threads.
    with f.repeat(lambda: (spins.get() < _SPINS) & (f.load_acquire(task.field(DONE)) < items)):
        spins.set(spins.get() + 1)
    f.finish((f.load_acquire(task.field(DONE)) >= items).convert("zext", I64))


def _define_run_alone(module: Any, compute: Function) -> None:
    f = Function(module, "run_alone", 7, is_exported=True)
    address, *others = f.arguments
    with f.loop(0, _Task(f, address).get(WORK_ITEMS)) as item:
        f.call(compute, address, *others, item)
    f.finish()
