"""Tasks: the numbers and addresses of one run of a kernel, in one array."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidrop.fused import kernels
from unidrop.fused.kernels import Kernel
from unidrop.fused.layout import Layout, same_strides
from unidrop.protocols import Buffer
from unidrop.rate import Rate
from unidrop.threads import run

__all__ = ["PreparedKernel", "prepare_kernel"]


@dataclass(frozen=True, eq=False, slots=True)
class PreparedKernel:
    """A kernel for arrays of one shape, dtype and layout.

    Attributes
    ----------
    compiled : callable
        Computes work items of a task; see `unidrop.fused.kernels`.
    template : array of int64
        A task without addresses, rate and key.
    work_items : int
        The number of work items of a task.
    shape : tuple of int
    size : int
        The size of an array in bytes.
    """

    compiled: Callable[[Any, bool], bool]
    template: NDArray[np.int64]
    work_items: int
    shape: tuple[int, ...]
    size: int

    def can_read(self, source: Buffer, target: Buffer) -> bool:
        """Return whether the kernel can read from source while it writes to target.

        Both must have the same strides. Their memory must be the same or not overlap at all.
        """
        if not same_strides(self.shape, source.strides, target.strides):
            return False
        return not 0 < abs(source.address - target.address) < self.size

    def run(self, x: int, y: int, rate: Rate, key: int, base: int, keep_alive: object) -> None:
        """Write dropout of the elements at address x to address y, which may be x.

        Parameters
        ----------
        x, y : int
        rate : Rate
            A rate that keeps some elements.
        key, base : int
            The key and the number of the first element, in [0, 2^64).
        keep_alive : object
            The owners of the memory. Threads hold a reference until they have finished.

        Raises
        ------
        RuntimeError
            In a child, if a signal handler forked meanwhile and x is y.
        """
        task = self.template.copy()
        task[kernels.X] = x
        task[kernels.Y] = y
        task[kernels.THRESHOLD] = rate.threshold
        task[kernels.SCALE] = _get_bits(rate.scale)
        task[kernels.KEY] = key if key < 1 << 63 else key - (1 << 64)
        task[kernels.BASE] = base if base < 1 << 63 else base - (1 << 64)
        if self.work_items == 1:
            self.compiled(task, False)
        elif not run(self.compiled, task, self.work_items, keep_alive):
            if x == y:
                raise RuntimeError(
                    "a signal handler forked during dropout in place, and the child has no threads "
                    "to finish it: end the child in the handler"
                )
            self.run(x, y, rate, key, base, keep_alive)


def prepare_kernel(
    kernel: Kernel, layout: Layout, shape: tuple[int, ...], size: int
) -> PreparedKernel:
    """Return a kernel with the template of its tasks; size is in bytes."""
    length = math.prod(axis.length for axis in layout.axes)
    template = np.zeros(kernels.AXES + 3 * len(layout.axes), dtype=np.int64)
    template[kernels.GENERATE] = kernel.generate
    template[kernels.SELECT] = kernel.select
    template[kernels.SIZE] = length
    template[kernels.NDIM] = len(layout.axes)
    # Mask strides may exceed int64: the kernel adds them modulo 2^64.
    axes = np.array([n % (1 << 64) for axis in layout.axes for n in axis], dtype=np.uint64)
    template[kernels.AXES :] = axes.view(np.int64)
    if layout.traversal == "rows":
        work_items = -(-length // kernels.WORK_ITEM_SIZE)
    else:
        *outer, rows, columns = layout.axes
        height = min(kernels.TILE_ROWS, rows.length)
        width = min(kernels.get_tile_columns(height, columns.mask_stride), columns.length)
        template[[kernels.HEIGHT, kernels.WIDTH]] = height, width
        tiles = -(-rows.length // height) * -(-columns.length // width)
        work_items = tiles * math.prod(axis.length for axis in outer)
    template[kernels.WORK_ITEMS] = work_items
    return PreparedKernel(kernel.run, template, work_items, shape, size)


@lru_cache(maxsize=1024)
def _get_bits(number: float) -> int:
    """Return the bits of a double as an int64."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits
