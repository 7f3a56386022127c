"""The same dropout as single-pass kernels on the CPU: nothing but faster.

This package can be deleted without changing a result: `unidrop.dispatch` then finds it missing, and
every array takes the portable operations. A kernel knows addresses, and no array library; a
library says where its elements lie (`Library.memory`).
"""

import logging
import math
import os
import sys
from functools import cache
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidrop.dtypes import dtype_name
from unidrop.fused.layout import Layout, make_layout, same_strides
from unidrop.library import Library, Memory
from unidrop.rate import Rate
from unidrop.threads import run
from unidrop.window import Window

__all__ = ["drop", "keep", "unavailable"]

_ITEM_SIZES = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

# A process that forks while Numba compiles would leave its child with Numba's lock held. Numba
# logs while it compiles: logging has to have registered its own lock before, as it is imported, so
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
    """Return why there are no kernels here, or None; the first call imports Numba."""
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


def drop(
    library: Library,
    x: Any,
    source: Memory,
    window: Window,
    rate: Rate,
    key: int,
    base: int,
    out: Any = None,
) -> Any:
    """Return dropout of an array whose memory can be reached.

    Parameters
    ----------
    library : Library
        Its library.
    x : array
        At least one element.
    source : Memory
        Where they lie.
    window : Window
        Its mask's numbering.
    rate : Rate
        Which keeps something.
    key : int
        In [0, 2^64).
    base : int
        The number of the first element, in [0, 2^64).
    out : array, optional
        Of x's shape and dtype; where to write, and what is returned.
    """
    shape, kind = tuple(x.shape), dtype_name(x.dtype)
    target: Memory | str
    y, target = library.allocate_like(x) if out is None else (out, library.memory(out))
    layout = None
    if not isinstance(target, str):
        layout = make_layout(shape, target.strides, window.strides)
    if isinstance(target, str) or layout is None:
        library.assign(out, drop(library, x, source, window, rate, key, base))
        return out
    is_alike = same_strides(shape, source.strides, target.strides)
    if not is_alike or (out is not None and _overlap(source, target, shape, kind)):
        library.assign(y, x)
        source = target
    _run(layout, kind, (source.address, target.address), rate, key, base, (x, y))
    return library.finished(y, x) if out is None else out


def keep(window: Window, rate: Rate, key: int, base: int) -> NDArray[np.bool]:
    """Return a window's mask, under a rate that keeps something, of at least one element."""
    mask = np.empty(window.shape, dtype=np.bool)
    layout = make_layout(window.shape, None, window.strides)
    assert layout is not None  # C order has no gaps
    address = mask.ctypes.data
    _run(layout, "bool", (address, address), rate, key, base, mask)
    return mask


def _overlap(source: Memory, target: Memory, shape: tuple[int, ...], kind: str) -> bool:
    """Tell whether two blocks of memory, each without gaps, share a part but are not the same."""
    distance = abs(source.address - target.address)
    return 0 < distance < math.prod(shape) * _ITEM_SIZES[kind]


def _run(
    layout: Layout,
    kind: str,
    addresses: tuple[int, int],
    rate: Rate,
    key: int,
    base: int,
    owners: Any,
) -> None:
    kernel, make_task = _compiled(layout.way, kind)
    numbers, units = make_task(kernel, layout, *addresses, rate, key, base)
    run(kernel.run, numbers, units, owners)


@cache
def _compiled(way: str, kind: str) -> tuple[Any, Any]:
    """Return a kernel and what makes its jobs, both of which need Numba."""
    with _compiling:
        from unidrop.fused.kernels import kernel
        from unidrop.fused.task import make_task

        return kernel(way, kind), make_task
