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

from unidrop.dtypes import dtype_name
from unidrop.fused.layout import make_layout
from unidrop.rate import Rate

if TYPE_CHECKING:
    from unidrop.fused.task import PreparedKernel

__all__ = ["make_mask", "prepare", "unavailable"]

_ITEM_SIZES = {
    "bool": 1,
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
    dtype: Any,
    shape: tuple[int, ...],
    steps: tuple[int, ...] | None,
    mask_strides: tuple[int, ...],
) -> "PreparedKernel | None":
    """Return the kernel for an array of at least one element, or None if the array has gaps.

    Parameters
    ----------
    dtype : dtype
        Of any library; bool computes the mask itself.
    shape : tuple of int
    steps : tuple of int or None
        The distance between neighbors along each axis in memory, in elements; None means C order.
    mask_strides : tuple of int
        Their distance in the numbering of the mask; 0 if they share a decision.
    """
    layout = make_layout(shape, steps, mask_strides)
    if layout is None:
        return None
    kind = dtype_name(dtype)
    kernel = _compile(layout.traversal, kind)
    from unidrop.fused.task import prepare_kernel  # imports Numba

    return prepare_kernel(kernel, layout, shape, math.prod(shape) * _ITEM_SIZES[kind])


def make_mask(
    shape: tuple[int, ...], mask_strides: tuple[int, ...], rate: Rate, key: int, base: int
) -> NDArray[np.bool]:
    """Return the mask of at least one element, for a rate that keeps some elements."""
    mask = np.empty(shape, dtype=np.bool)
    kernel = prepare(mask.dtype, shape, None, mask_strides)
    assert kernel is not None  # C order has no gaps
    kernel.run(mask.ctypes.data, mask.ctypes.data, rate, key, base, mask)
    return mask


@cache
def _compile(traversal: str, kind: str) -> Any:
    """Return a compiled kernel; the first call imports Numba."""
    with _compiling:
        from unidrop.fused.kernels import kernel

        return kernel(traversal, kind)
