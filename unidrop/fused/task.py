"""Jobs: the numbers and addresses that a kernel needs, in one array."""

import math
import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unidrop.fused import kernels
from unidrop.fused.kernels import Kernel
from unidrop.fused.layout import Layout
from unidrop.rate import Rate

__all__ = ["Job", "make_task"]


class Job(NamedTuple):
    """What a kernel takes, and how many units it has."""

    numbers: NDArray[np.int64]
    units: int


def make_task(
    kernel: Kernel, layout: Layout, x: int, y: int, rate: Rate, key: int, base: int
) -> Job:
    """Return a kernel's job of writing to address y what becomes of the elements at address x.

    ``base`` is the first element's place in the mask's numbering. Both x and y lie as the layout
    says, and may be the same.
    """
    blank, units = _blank(layout, kernel.decide, kernel.select)
    numbers = blank.copy()
    numbers[kernels.X] = x
    numbers[kernels.Y] = y
    numbers[kernels.THRESHOLD] = rate.threshold
    numbers[kernels.SCALE] = _bits(rate.scale)
    numbers[kernels.KEY] = _signed(key)
    numbers[kernels.BASE] = _signed(base)
    return Job(numbers, units)


@lru_cache(maxsize=4096)
def _blank(layout: Layout, decide: int, select: int) -> Job:
    """Return the part of a job that depends on the layout and the functions' addresses alone."""
    size = math.prod(axis.length for axis in layout.axes)
    numbers = np.zeros(kernels.AXES + 3 * len(layout.axes), dtype=np.int64)
    numbers[kernels.DECIDE] = decide
    numbers[kernels.SELECT] = select
    numbers[kernels.SIZE] = size
    numbers[kernels.NDIM] = len(layout.axes)
    numbers[kernels.AXES :] = [_signed(n) for axis in layout.axes for n in axis]
    if layout.way == "rows":
        units = -(-size // kernels.UNIT)
    else:
        *outer, rows, columns = layout.axes
        height = min(kernels.TILE_ROWS, rows.length)
        width = min(kernels.tile_columns(height, columns.stride), columns.length)
        numbers[[kernels.ROWS, kernels.COLUMNS]] = height, width
        tiles = -(-rows.length // height) * -(-columns.length // width)
        units = tiles * math.prod(axis.length for axis in outer)
    numbers[kernels.UNITS] = units
    return Job(numbers, units)


def _signed(number: int) -> int:
    """Return the int64 of the same 64 bits as an unsigned number."""
    return number if number < 1 << 63 else number - (1 << 64)


@lru_cache(maxsize=1024)
def _bits(number: float) -> int:
    """Return the int64 of the same 64 bits as a double."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits
