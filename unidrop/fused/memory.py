"""Huge pages for large new arrays: fewer pages fault, which takes longer than dropout itself."""

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

__all__ = ["MADV_HUGEPAGE", "MIN_SIZE", "advise_huge_pages"]

# Smaller arrays come from memory that the allocator keeps, whose pages have faulted before.
MIN_SIZE = 32 << 20
MADV_HUGEPAGE = 14


def advise_huge_pages(address: int, size: int) -> None:
    """Ask Linux for huge pages in the memory of an array that no code has written yet.

    Does nothing for an array below 32 MiB, or where the system decides without being asked.

    Parameters
    ----------
    address, size : int
        The first byte, and the number of bytes.
    """
    advise = _get_advise() if size >= MIN_SIZE else None
    if advise is not None:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - start, MADV_HUGEPAGE)


@cache
def _get_advise() -> Callable[[int, int, int], int] | None:
    """Return the system's `madvise` if huge pages are for those that ask, or None."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        if sys.platform != "linux" or "[madvise]" not in setting.read_text():
            return None
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found: Callable[[int, int, int], int] = advise
    return found
