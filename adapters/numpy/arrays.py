"""NumPy's part of the core: its arrays, and where their elements are in memory."""

import sys
from ctypes import addressof, c_char
from typing import Any

import numpy as np

from unidrop.protocols import ArrayLibrary, Arrays, Buffer, Buffers

__all__ = [
    "FLAGS",
    "LIBRARY",
    "PLAIN_FLAGS",
    "allocate_aligned_like",
    "check_plain",
    "from_buffer",
    "get_address",
    "locate_array",
]

#: Returns an object at the address of an array's first element.
from_buffer = c_char.from_buffer

#: Bits of `numpy.ndarray.flags.num`: C order, aligned, writeable.
PLAIN_FLAGS = 0x1 | 0x100 | 0x400
#: The bits to compare: those, and the bit of arrays that warn of a write.
FLAGS = PLAIN_FLAGS | -1 << 31

# TensorFlow and XLA share memory that begins at a cache line, and copy other memory.
_ALIGNMENT = 64


def check_plain(kind: type, name: str) -> None:
    """Raise TypeError for arrays that would lose a mask, labels, a unit or other behavior."""
    # NumPy imports numpy.ma at its first use, and a fork during an import would leave a child with
    # a held lock. Masked arrays exist only after that import.
    if issubclass(kind, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())):
        raise TypeError(
            f"{name} must not be a masked array: apply dropout to {name}.filled(0) or {name}.data, "
            "and mask the output"
        )
    if hasattr(kind, "to_numpy"):  # pandas, xarray and other libraries of tables have it
        raise TypeError(
            f"{name} must be a plain array, got {kind.__name__}: pass {name}.to_numpy()"
        )
    if issubclass(kind, np.ndarray) and kind is not np.ndarray and kind is not np.memmap:
        raise TypeError(
            f"{name} must be a plain array, got {kind.__name__}: pass numpy.asarray({name})"
        )


class NumPyArrays(Arrays):
    """Plain NumPy arrays, memory-mapped ones included."""

    def check_type(self, kind: type, name: str) -> None:
        """Raise TypeError for other subclasses, such as masked arrays."""
        check_plain(kind, name)

    def is_traced(self, x: Any) -> bool:
        """Return False: NumPy runs every operation at once."""
        return False


class NumPyBuffers(Buffers):
    """Plain NumPy arrays, memory-mapped ones included; other subclasses may be outputs."""

    def locate(self, x: Any) -> Buffer | str:
        """Return the buffer of a plain array of native, aligned elements."""
        if type(x) is np.ndarray or type(x) is np.memmap:
            return locate_array(x)
        return f"a {type(x).__name__} is not a plain numpy.ndarray"

    def allocate_like(self, x: Any) -> tuple[Any, Buffer]:
        """Return an empty array, in the memory order of x."""
        y = np.empty_like(x, subok=False)
        strides = None if y.flags.c_contiguous else _element_strides(y)
        return y, Buffer(get_address(y), strides)


LIBRARY = ArrayLibrary(arrays=NumPyArrays(), buffers=NumPyBuffers())


def locate_array(x: np.ndarray[Any, Any]) -> Buffer | str:
    """Return the buffer of a NumPy array, or the reason why kernels cannot read it."""
    if not x.dtype.isnative:
        return "it is not in this machine's byte order"
    flags = x.flags
    if not flags.aligned:
        return "its elements are not aligned"
    if flags.c_contiguous:
        return Buffer(get_address(x), None)
    if any(stride % x.itemsize for stride in x.strides):
        return "its elements are not aligned"
    return Buffer(get_address(x), _element_strides(x))


def allocate_aligned_like(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an empty array of x's shape and dtype, in memory that other libraries can share."""
    memory = np.empty(x.nbytes + _ALIGNMENT, dtype=np.uint8)
    first = -get_address(memory) % _ALIGNMENT
    aligned: np.ndarray[Any, Any]
    aligned = memory[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    return aligned


def get_address(x: np.ndarray[Any, Any]) -> int:
    """Return the address of a NumPy array's first element."""
    # The array interface makes a dictionary, which takes four times as long as the buffer protocol.
    if x.flags.num & FLAGS == PLAIN_FLAGS:
        try:
            return addressof(from_buffer(x))  # type: ignore[arg-type] # the stubs lack __buffer__
        except ValueError:  # x is empty, or the buffer protocol has no name for its dtype
            pass
    address: int = x.__array_interface__["data"][0]
    return address


def _element_strides(x: np.ndarray[Any, Any]) -> tuple[int, ...]:
    """Return the strides in elements."""
    return tuple(stride // x.itemsize for stride in x.strides)
