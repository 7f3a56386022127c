"""NumPy below the adapters: where an array lies in memory."""

from typing import Any

import numpy as np

from unidrop.library import Library, Memory

__all__ = ["NumPy", "address_of", "aligned_like", "memory_of"]

# What TensorFlow and XLA ask of memory that they are to use: a line of the cache.
_ALIGNMENT = 64


class NumPy(Library):
    """NumPy's own arrays, memory-mapped ones included; what subclasses them takes no short cut."""

    def memory(self, x: Any) -> Memory | str:
        """Return where a plain array lies, if its elements are this machine's numbers."""
        if type(x) is not np.ndarray and type(x) is not np.memmap:
            return f"a {type(x).__name__} is no plain numpy.ndarray"
        return memory_of(x)

    def output_like(self, x: Any) -> tuple[Any, Memory]:
        """Return an empty array, of x's layout as far as that has no gaps."""
        y = np.empty_like(x, subok=False)
        return y, Memory(address_of(y), _steps(y))


def memory_of(x: np.ndarray[Any, Any]) -> Memory | str:
    """Return where a NumPy array lies, or why a kernel can't read it there."""
    if not x.dtype.isnative:
        return "it is not in this machine's byte order"
    if not x.flags.aligned or any(step % x.itemsize for step in x.strides):
        return "its elements are not aligned"
    return Memory(address_of(x), _steps(x))


def aligned_like(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an empty array of x's shape and dtype, in memory that other libraries can share."""
    room = np.empty(x.nbytes + _ALIGNMENT, dtype=np.uint8)
    first = -address_of(room) % _ALIGNMENT
    aligned: np.ndarray[Any, Any]
    aligned = room[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    return aligned


def address_of(x: np.ndarray[Any, Any]) -> int:
    """Return the address of a NumPy array's first element."""
    address: int = x.__array_interface__["data"][0]
    return address


def _steps(x: np.ndarray[Any, Any]) -> tuple[int, ...] | None:
    if x.flags.c_contiguous:
        return None
    return tuple(step // x.itemsize for step in x.strides)
