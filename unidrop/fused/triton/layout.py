"""Layouts on a GPU: the axes of two arrays and their mask, and the kernel with its tiles."""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

__all__ = ["MAX_BASE", "Axis", "Flat", "Rows", "choose_layout"]

# The elements of a program, in 128 threads. Fewer take more instructions an element, and more leave
# parts of a GPU idle at the end.
TILE = 2048

_BLOCK = 8  # elements that one Philox block decides

# A tile has this many rows at least if rows are adjacent in memory or share their words.
_ADJACENT_ROWS = 64
_SHARED_ROWS = 8

_MAX_OUTER = 3  # axes that the kernel of rows decodes
_MAX_FIRST = (1 << 31) - 1  # programs along the first axis of a grid
_MAX_GRID = (1 << 16) - 1  # along any other

# Numbers of elements below these fit in 32 bits, even at the end of a program and in blocks.
_MAX_SIZE, MAX_BASE = 1 << 30, 1 << 34


class Axis(NamedTuple):
    """An axis: its length, and its strides in the mask's numbering and in the memory of x and y."""

    length: int
    mask: int
    x: int
    y: int


class Flat(NamedTuple):
    """A contiguous array that begins with a block of the mask."""

    size: int
    tile: int
    parts: int
    is_wide: bool


class Rows(NamedTuple):
    """An array in tiles of rows and columns, for the kernel of this name.

    ``loops`` are axes beyond those that the kernel decodes: the host launches once per position.
    """

    columns: Axis
    rows: Axis
    outer: tuple[Axis, ...]
    loops: tuple[Axis, ...]
    tile: tuple[int, int]
    grid: tuple[int, int, int]
    turn: int
    parts: int
    is_shared: bool
    is_aligned: bool
    is_wide: bool
    unit: int
    x_unit: Literal["column", "row", ""]
    y_unit: Literal["column", "row", ""]


@lru_cache(maxsize=4096)
def choose_layout(
    shape: tuple[int, ...],
    mask_strides: tuple[int, ...],
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    item_size: int,
    begins_block: bool,
    is_far: bool,
) -> Flat | Rows:
    """Return the kernel and the tiles for an array without zeros in its shape.

    Parameters
    ----------
    shape, mask_strides, x_strides, y_strides : tuple of int
    item_size : int
        Bytes of an element.
    begins_block : bool
        Whether the first element is known to begin a block of the mask.
    is_far : bool
        Whether the first element's number may exceed 32 bits in blocks.

    Examples
    --------
    >>> choose_layout((4, 6), (6, 1), (6, 1), (6, 1), 4, True, False)
    Flat(size=24, tile=2048, parts=2, is_wide=False)
    """
    axes = _merge(list(map(Axis, shape, mask_strides, x_strides, y_strides)))
    parts = min(max(item_size // 2, 1), 4)  # of 16 bytes, or of two elements
    if begins_block and len(axes) <= 1 and all(axis[1:] == (1, 1, 1) for axis in axes):
        size = math.prod(shape)
        return Flat(size, TILE, parts, is_far or size > _MAX_SIZE)
    return _tile(axes, parts, begins_block)


def _merge(axes: list[Axis]) -> list[Axis]:
    """Join axes that are one axis in the mask and in both memories, and drop axes of length 1."""
    axes = [axis for axis in axes if axis.length != 1]
    merged = True
    while merged:
        merged = False
        for outer in axes:
            inner = next((axis for axis in axes if _is_inner(axis, outer)), None)
            if inner is not None:
                axes.remove(inner)
                axes[axes.index(outer)] = Axis(outer.length * inner.length, *inner[1:])
                merged = True
                break
    return axes


def _is_inner(inner: Axis, outer: Axis) -> bool:
    return inner is not outer and all(
        o == inner.length * i for o, i in zip(outer[1:], inner[1:], strict=True)
    )


def _tile(axes: list[Axis], parts: int, begins_block: bool) -> Rows:
    columns = next((axis for axis in axes if axis.mask == 1), None)
    rest = [axis for axis in axes if axis is not columns]
    if columns is None:
        columns = Axis(1, 1, 0, 0)
    is_aligned = begins_block and all(axis.mask % _BLOCK == 0 for axis in rest)
    blocks = -(-(columns.length + (0 if is_aligned else _BLOCK - 1)) // _BLOCK)
    rows, by_rows = _choose_rows(rest, columns, blocks)
    is_shared = rows.mask == 0
    height, width = _choose_tile(rows, by_rows, is_shared, blocks)
    rest = sorted((axis for axis in rest if axis is not rows), key=lambda axis: -axis.length)
    outer, loops = rest[:_MAX_OUTER], rest[_MAX_OUTER:]
    columns_and_rows = -(-blocks // width), -(-rows.length // height)
    most = _MAX_GRID if max(columns_and_rows) > _MAX_GRID else _MAX_FIRST
    while math.prod(axis.length for axis in outer) > most:
        loops.append(outer.pop())
    grid = (*columns_and_rows, math.prod(axis.length for axis in outer))
    turn = -grid.index(max(grid)) % 3
    x_unit, x_divisor = _get_unit(columns, rows, [*outer, *loops], 2)
    y_unit, y_divisor = _get_unit(columns, rows, [*outer, *loops], 3)
    return Rows(
        columns=columns,
        rows=rows,
        outer=tuple(sorted(outer, key=lambda axis: -abs(axis.y))),
        loops=tuple(loops),
        tile=(height, width),
        grid=(grid[-turn % 3], grid[(1 - turn) % 3], grid[(2 - turn) % 3]),
        turn=turn,
        parts=parts,
        is_shared=is_shared,
        is_aligned=is_aligned,
        is_wide=_is_wide(columns, rows, height, width),
        unit=min(x_divisor, y_divisor) if x_unit == y_unit else 1,
        x_unit=x_unit,
        y_unit=y_unit,
    )


def _choose_rows(rest: list[Axis], columns: Axis, blocks: int) -> tuple[Axis, bool]:
    """Return the axis for the rows of tiles, and whether it is the innermost one in memory.

    Other rows should fill a tile, and share words if they can.
    """
    if not rest:
        return Axis(1, 0, 0, 0), False
    innermost = min(rest, key=lambda axis: abs(axis.y))
    if columns.length == 1 or abs(innermost.y) < abs(columns.y):
        return innermost, True

    def score(axis: Axis) -> tuple[int, bool, int]:
        height = TILE // _BLOCK // min(_round_up(blocks), TILE // _BLOCK)
        if axis.mask == 0:
            height = max(height, _SHARED_ROWS)
        return min(axis.length, height), axis.mask == 0, axis.length

    return max(rest, key=score), False


def _choose_tile(rows: Axis, by_rows: bool, is_shared: bool, blocks: int) -> tuple[int, int]:
    """Return the rows and the blocks per row of a tile, both powers of 2."""
    most = TILE // _BLOCK
    height, width = _round_up(rows.length), min(_round_up(blocks), most)
    if by_rows:
        width = min(width, max(1, most // min(height, most if is_shared else _ADJACENT_ROWS)))
        return min(height, most // width), width
    while width > _BLOCK and -blocks % width > blocks // 8:  # too much of the last tile is empty
        width //= 2
    height = min(height, max(most // width, _SHARED_ROWS if is_shared else 1))
    return height, min(width, most // height)


def _round_up(number: int) -> int:
    """Return the least power of 2 that is not below a number."""
    return 1 << (number - 1).bit_length()


def _is_wide(columns: Axis, rows: Axis, height: int, width: int) -> bool:
    """Return whether positions, or distances within a tile, exceed 32 bits.

    The parts of complex numbers are twice as many.
    """
    distances = [
        height * abs(rows[i]) + (width + 1) * _BLOCK * abs(columns[i]) for i in (2, 3)
    ]  # a tile may begin inside a block
    return 2 * max(*distances, columns.length, rows.length) >= 1 << 31


def _get_unit(
    columns: Axis, rows: Axis, others: list[Axis], memory: int
) -> tuple[Literal["column", "row", ""], int]:
    """Return the axis of stride 1 in a memory, and what divides other strides and its length."""
    unit: Literal["column", "row", ""] = ""
    adjacent = None
    if columns[memory] == 1:
        unit, adjacent = "column", columns
    elif rows[memory] == 1:
        unit, adjacent = "row", rows
    if adjacent is None:
        return unit, 1
    numbers = [axis[memory] for axis in (columns, rows, *others) if axis is not adjacent]
    is_divisible = all(number % _BLOCK == 0 for number in (*numbers, adjacent.length))
    return unit, _BLOCK if is_divisible else 1
