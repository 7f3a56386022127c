"""Tasks: the numbers and addresses of one run of a kernel, in one array."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from unidrop.fused import kernels
from unidrop.fused.kernels import Kernel
from unidrop.fused.layout import Layout, same_strides
from unidrop.protocols import Buffer
from unidrop.rate import Rate
from unidrop.threads import run

__all__ = ["PreparedKernel", "prepare_kernel"]

# The caller finishes fewer elements alone before a worker wakes up. For half as many, a second
# thread saves a fifth of the time, but takes as much more where another library's threads spin.
_MIN_SHARED = 1 << 20

# Smaller arrays take less time than another thread needs to take Python's lock and return it.
_MIN_UNLOCKED = 1 << 15


@dataclass(frozen=True, eq=False, slots=True)
class PreparedKernel:
    """A kernel for arrays of one shape, dtype and layout.

    Attributes
    ----------
    kernel : Kernel
    run_alone : callable
        Computes an array in the calling thread.
    template : array of int64
        A task without addresses, rate and key.
    template_address : int
    work_items : int
        The number of work items of a task.
    shape : tuple of int
    size : int
        The size of an array in bytes.
    is_shared : bool
        Whether an array is large enough for several threads.
    """

    kernel: Kernel
    run_alone: Callable[..., int]
    template: NDArray[np.int64]
    template_address: int
    work_items: int
    shape: tuple[int, ...]
    size: int
    is_shared: bool

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
        numbers = (rate.threshold, get_bits(rate.scale), key, base)
        if not self.is_shared:
            self.run_alone(self.template_address, x, y, *numbers)
            return
        task = self.template.copy()
        fields = [kernels.X, kernels.Y, kernels.THRESHOLD, kernels.SCALE, kernels.KEY, kernels.BASE]
        task.view(np.uint64)[fields] = x, y, *numbers
        address = _get_address(task)
        if not run(self.kernel.run, address, self.work_items, (task, keep_alive)):
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
    template[kernels.SIZE] = length
    template[kernels.NDIM] = len(layout.axes)
    # Mask strides may exceed int64: the kernel adds them modulo 2^64.
    axes = np.array([n % (1 << 64) for axis in layout.axes for n in axis], dtype=np.uint64)
    template[kernels.AXES :] = axes.view(np.int64)
    if layout.traversal == "rows":
        work_items = -(-length // kernels.WORK_ITEM_SIZE)
    else:
        *outer, rows, columns = layout.axes
        height, width = kernels.get_tile(rows.length, columns.length, columns.mask_stride)
        template[[kernels.HEIGHT, kernels.WIDTH]] = height, width
        tiles = -(-rows.length // height) * -(-columns.length // width)
        work_items = tiles * math.prod(axis.length for axis in outer)
    template[kernels.WORK_ITEMS] = work_items
    run_alone = kernel.run_alone if length < _MIN_UNLOCKED else kernel.run_unlocked
    address, is_shared = _get_address(template), length >= _MIN_SHARED
    return PreparedKernel(kernel, run_alone, template, address, work_items, shape, size, is_shared)


def _get_address(array: NDArray[np.int64]) -> int:
    """Return the address of an array; unlike `ctypes`, this imports nothing while Python exits."""
    address: int = array.__array_interface__["data"][0]
    return address


@lru_cache(maxsize=1024)
def get_bits(number: float) -> int:
    """Return the bits of a double."""
    bits: int = struct.unpack("<Q", struct.pack("<d", number))[0]
    return bits
