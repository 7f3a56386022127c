"""Dropout as single-pass kernels on the CPU: the same bits, only faster.

This package can be deleted without changing a result: `unidrop.dispatch` then finds it missing, and
every array uses the portable operations. Kernels read and write buffers, and know no library.
"""

import logging
import math
import os
import sys
from functools import cache, lru_cache
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unidrop.fused.layout import make_layout, same_strides
from unidrop.protocols import Buffer
from unidrop.rate import Rate
from unidrop.threads import run

if TYPE_CHECKING:
    from unidrop.fused.task import PreparedKernel

__all__ = ["can_read", "make_mask", "prepare", "run_kernel", "unavailable"]

_ITEM_SIZES = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

# A process that forks while Numba compiles would leave its child with Numba's lock held. Numba
# logs while it compiles: logging must have registered its own lock before, as it is imported, so
# that a fork takes this one first.
logging.getLogger(__name__)
_compiling = RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_compiling.acquire,
        after_in_parent=_compiling.release,
        after_in_child=_compiling.release,
    )


@cache
def unavailable() -> str | None:
    """Return the reason why kernels cannot be compiled, or None; the first call imports Numba."""
    if sys.byteorder != "little":
        return "this machine is big-endian"
    try:
        with _compiling:
            import numba
    except ImportError as error:
        if error.name == "numba":
            return "Numba is not installed: install unidrop with its extra 'fast'"
        return f"Numba can't be imported: {error}"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    return None


@lru_cache(maxsize=4096)
def prepare(
    kind: str,
    shape: tuple[int, ...],
    steps: tuple[int, ...] | None,
    mask_strides: tuple[int, ...],
) -> "PreparedKernel | None":
    """Return the kernel for an array of at least one element, or None if the array has gaps.

    Parameters
    ----------
    kind : str
        The name of the dtype; "bool" computes the mask itself.
    shape : tuple of int
    steps : tuple of int or None
        The distance between neighbors along each axis in memory, in elements; None means C order.
    mask_strides : tuple of int
        Their distance in the numbering of the mask.
    """
    layout = make_layout(shape, steps, mask_strides)
    if layout is None:
        return None
    kernel = _compile(layout.traversal, kind)
    from unidrop.fused.task import prepare_kernel  # imports Numba

    return prepare_kernel(kernel, layout)


def can_read(kind: str, shape: tuple[int, ...], source: Buffer, target: Buffer) -> bool:
    """Return whether a kernel that writes to target can read from source at the same time.

    Both must have the same strides, and must not share a part of their memory only.
    """
    if not same_strides(shape, source.strides, target.strides):
        return False
    distance = abs(source.address - target.address)
    return not 0 < distance < math.prod(shape) * _ITEM_SIZES[kind]


def run_kernel(
    prepared: "PreparedKernel",
    source: Buffer,
    target: Buffer,
    rate: Rate,
    key: int,
    base: int,
    keep_alive: object,
) -> None:
    """Write dropout of the elements of source to target.

    Parameters
    ----------
    prepared : PreparedKernel
    source, target : Buffer
        Of the same strides; may be the same.
    rate : Rate
        A rate that keeps some elements.
    key, base : int
        The key and the number of the first element, in [0, 2^64).
    keep_alive : object
        The owners of the memory. Threads hold a reference until they have finished.
    """
    task = prepared.make_task(source.address, target.address, rate, key, base)
    run(prepared.run, task, prepared.work_items, keep_alive)


def make_mask(
    shape: tuple[int, ...], mask_strides: tuple[int, ...], rate: Rate, key: int, base: int
) -> NDArray[np.bool]:
    """Return the mask of at least one element, for a rate that keeps some elements."""
    mask = np.empty(shape, dtype=np.bool)
    prepared = prepare("bool", shape, None, mask_strides)
    assert prepared is not None  # C order has no gaps
    buffer = Buffer(mask.ctypes.data, None)
    run_kernel(prepared, buffer, buffer, rate, key, base, mask)
    return mask


@cache
def _compile(traversal: str, kind: str) -> Any:
    """Return a compiled kernel; the first call imports Numba."""
    with _compiling:
        from unidrop.fused.kernels import kernel

        return kernel(traversal, kind)
