"""Tasks: the numbers and addresses of one run of a kernel, in one array."""

import math
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unidrop.fused import kernels
from unidrop.fused.kernels import Kernel
from unidrop.fused.layout import Layout
from unidrop.rate import Rate

__all__ = ["PreparedKernel", "prepare_kernel"]


class PreparedKernel(NamedTuple):
    """A kernel for one layout.

    Attributes
    ----------
    run : callable
        The compiled kernel, which takes a task.
    template : array of int64
        The task, without addresses, rate and key.
    work_items : int
        The number of work items of the task.
    """

    run: Callable[[Any, bool], bool]
    template: NDArray[np.int64]
    work_items: int

    def make_task(self, x: int, y: int, rate: Rate, key: int, base: int) -> NDArray[np.int64]:
        """Return the task of reading elements at address x and writing them at address y.

        ``base`` is the number of the first element in the mask.
        """
        task = self.template.copy()
        task[kernels.X] = x
        task[kernels.Y] = y
        task[kernels.THRESHOLD] = rate.threshold
        task[kernels.SCALE] = _get_bits(rate.scale)
        task[kernels.KEY] = key if key < 1 << 63 else key - (1 << 64)
        task[kernels.BASE] = base if base < 1 << 63 else base - (1 << 64)
        return task


def prepare_kernel(kernel: Kernel, layout: Layout) -> PreparedKernel:
    """Return a kernel with the template of its tasks for a layout."""
    size = math.prod(axis.length for axis in layout.axes)
    template = np.zeros(kernels.AXES + 3 * len(layout.axes), dtype=np.int64)
    template[kernels.DECIDE] = kernel.decide
    template[kernels.SELECT] = kernel.select
    template[kernels.SIZE] = size
    template[kernels.NDIM] = len(layout.axes)
    # Strides may exceed int64: the kernel adds them modulo 2^64.
    axes = np.array([n % (1 << 64) for axis in layout.axes for n in axis], dtype=np.uint64)
    template[kernels.AXES :] = axes.view(np.int64)
    if layout.traversal == "rows":
        work_items = -(-size // kernels.UNIT)
    else:
        *outer, rows, columns = layout.axes
        height = min(kernels.TILE_ROWS, rows.length)
        width = min(kernels.tile_columns(height, columns.stride), columns.length)
        template[[kernels.ROWS, kernels.COLUMNS]] = height, width
        tiles = -(-rows.length // height) * -(-columns.length // width)
        work_items = tiles * math.prod(axis.length for axis in outer)
    template[kernels.UNITS] = work_items
    return PreparedKernel(kernel.run, template, work_items)


@lru_cache(maxsize=1024)
def _get_bits(number: float) -> int:
    """Return the int64 of the same 64 bits as a double."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits
