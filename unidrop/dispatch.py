"""The choice between fused kernels and portable operations, and the calls of the kernels.

The path changes the time, but never a bit. Fused kernels serve arrays whose elements are in this
process's memory, if llvmlite is installed to compile them, and arrays on a GPU that their library
locates, if Triton is. All other arrays, traced ones included, use the operations of their own
library. A library may record dropout as one operator; that operator chooses a path when it runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

from unidrop.device import make_mask_on_device, read_base, run_on_device
from unidrop.dtypes import compute_dtype, dtype_name
from unidrop.key import Key
from unidrop.library import get_library
from unidrop.protocols import ArrayLibrary, Buffer, Buffers, DeviceBuffer
from unidrop.rate import Rate
from unidrop.threads import fork_guard, get_num_threads
from unidrop.window import Window
from unidrop.words import MASK32

__all__ = [
    "PathChoice",
    "PathName",
    "check_fused",
    "explain_path",
    "forbid_plain_calls",
    "force_path",
    "fused_dropout",
    "fused_mask",
    "get_device_kernels",
    "get_kernels",
    "is_forced",
]

PathName = Literal["fused", "portable"]

_PATHS = ("fused", "portable")

# The kernels for this process's memory, and those for a GPU.
_PACKAGE, _DEVICE_PACKAGE = "unidrop.fused", "unidrop.fused.triton"

# A path that `force_path` forces, or "general" under `forbid_plain_calls`.
_forced: ContextVar[str | None] = ContextVar("unidrop_force_path", default=None)


@dataclass(frozen=True, slots=True)
class PathChoice:
    """The path of an array, and the reason for it."""

    name: PathName
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def explain_path(x: Any) -> PathChoice:
    """Return the path that `dropout` would choose now for an array, and the reason.

    A library may call kernels in a compiled program too. It chooses when it compiles the program.

    Parameters
    ----------
    x : array
        An array of any library.

    Returns
    -------
    PathChoice
        ``name`` is "fused" for single-pass kernels and "portable" for the operations of x's own
        library; ``reason`` is a phrase. Both paths return the same bits.

    Raises
    ------
    TypeError
        If x is not an array, or dropout does not support its dtype.

    Examples
    --------
    >>> import numpy
    >>> import unidrop
    >>> print(unidrop.explain_path(numpy.ones(6, dtype=">f4")))
    portable: it is not in this machine's byte order
    """
    library = get_library(x)
    compute_dtype(x.dtype)
    if _forced.get() == "portable":
        return PathChoice("portable", "unidrop.force_path forces it")
    if 0 in x.shape:
        return PathChoice("portable", "it is empty")
    kernels = _find_kernels(library, x)
    if isinstance(kernels, str):
        return PathChoice("portable", kernels)
    if isinstance(kernels[1], DeviceBuffer):
        place = f"{dtype_name(x.dtype)} on {library.arrays.device(x)}"
        return PathChoice("fused", f"{place}, by one kernel of Triton")
    threads = get_num_threads()
    some = f"{threads} threads" if threads > 1 else "1 thread"
    return PathChoice("fused", f"{dtype_name(x.dtype)} in this process's memory, up to {some}")


@contextmanager
def force_path(path: PathName) -> Iterator[None]:
    """Force one path in this thread or task, for tests and measurements.

    Parameters
    ----------
    path : {"fused", "portable"}
        With "fused", dropout of an array that kernels cannot reach raises RuntimeError. A compiled
        function keeps the path of its trace.

    Raises
    ------
    ValueError
        If path is neither.

    Examples
    --------
    >>> import numpy
    >>> import unidrop
    >>> with unidrop.force_path("portable"):
    ...     print(unidrop.explain_path(numpy.ones(6)))
    portable: unidrop.force_path forces it
    """
    if path not in _PATHS:
        raise ValueError(f"path must be one of {', '.join(_PATHS)}, got {path!r}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def is_forced(path: PathName) -> bool:
    """Return whether `force_path` forces a path now."""
    return _forced.get() == path


@contextmanager
def forbid_plain_calls() -> Iterator[None]:
    """Send every call through the functions of this file, for the matrix."""
    token = _forced.set("general")
    try:
        yield
    finally:
        _forced.reset(token)


def get_kernels() -> Any | None:
    """Return the package of kernels for a plain call, or None if it must not or cannot run.

    An adapter that has located an array calls its kernel without the rest of this file. It does not
    where a path is forced.
    """
    if _forced.get() is not None:
        return None
    package = _get_package()
    return None if isinstance(package, str) or package.unavailable() else package


def get_device_kernels(buffers: Buffers, x: Any) -> Any | None:
    """Return the package of kernels for an array on a GPU, or None if they cannot run."""
    if is_forced("portable") or buffers.locate_on_device(x) is None:
        return None
    package = _get_package(_DEVICE_PACKAGE)
    return None if isinstance(package, str) or package.unavailable() else package


def fused_dropout(
    library: ArrayLibrary, x: Any, key: Key, window: Window, rate: Rate, out: Any = None
) -> Any | None:
    """Return dropout of an array that is not empty by fused kernels, or None if they cannot run.

    Parameters
    ----------
    library : ArrayLibrary
        The library of x.
    x : array
    key : Key
    window : Window
    rate : Rate
        A rate that keeps some elements.
    out : array, optional
        The array to write and return, of the shape and dtype of x; may be x.

    Raises
    ------
    RuntimeError
        If `force_path` demands kernels that cannot run.
    """
    kernels = _choose_kernels(library, x, key, window, rate)
    if kernels is None:
        return None
    package, source = kernels
    if isinstance(source, DeviceBuffer):
        return run_on_device(package, library, x, source, key, window, rate, out)
    buffers = library.buffers
    y, target = buffers.allocate_like(x) if out is None else (out, buffers.locate(out))
    kernel = None
    if not isinstance(target, str):
        kernel = package.prepare(x.dtype, tuple(x.shape), target.strides, window.strides)
    if isinstance(target, str) or kernel is None:  # out has gaps, or is not in memory
        buffers.copy_into(out, fused_dropout(library, x, key, window, rate))
        return out
    may_overlap = out is not None or source.strides != target.strides
    if may_overlap and not kernel.can_read(source, target):
        buffers.copy_into(y, x)
        source = target
    if out is None and kernel.is_shared:
        package.advise_huge_pages(target.address, kernel.size)
    key_number, base = _get_numbers(key, window)
    kernel.run(source.address, target.address, rate, key_number, base, (x, y))
    return buffers.wrap(y, x) if out is None else out


def fused_mask(
    library: ArrayLibrary, like: Any, key: Key, window: Window, rate: Rate, device: Any
) -> Any | None:
    """Return the mask of a window that is not empty by fused kernels, or None if they cannot run.

    ``like`` is an array of the library on the device; the rest is as in `fused_dropout`.
    """
    kernels = _choose_kernels(library, like, key, window, rate)
    if kernels is None:
        return None
    package, source = kernels
    if isinstance(source, DeviceBuffer):
        return make_mask_on_device(package, library, like, key, window, rate, device)
    numbers = _get_numbers(key, window)
    mask = package.make_mask(window.shape, window.strides, rate, *numbers)
    return library.buffers.from_numpy(mask, device)


def check_fused(library: ArrayLibrary, like: Any, key: Key, window: Window) -> None:
    """Raise RuntimeError if `force_path` demands kernels that cannot run."""
    _choose_kernels(library, like, key, window)


def _choose_kernels(
    library: ArrayLibrary, x: Any, key: Key, window: Window, rate: Rate | None = None
) -> tuple[Any, Buffer | DeviceBuffer] | None:
    """Return the package of kernels and the buffer of x, or None for the portable path."""
    forced = _forced.get()
    if forced == "portable":
        return None
    kernels = _find_kernels(library, x, key, window, rate)
    if isinstance(kernels, str):
        if forced == "fused":
            raise RuntimeError(f"unidrop.force_path demands fused kernels, but {kernels}")
        return None
    return kernels


def _find_kernels(
    library: ArrayLibrary,
    x: Any,
    key: Key | None = None,
    window: Window | None = None,
    rate: Rate | None = None,
) -> tuple[Any, Buffer | DeviceBuffer] | str:
    """Return the package of kernels and the buffer of x, or the reason why kernels cannot run."""
    if rate is not None and rate.is_scheduled:
        return "its rate is an array, and kernels need a number"
    if library.arrays.is_traced(x) or (key is not None and _has_traced(key, window)):
        return "it is traced, and its library chooses when it runs the trace"
    buffer: Buffer | DeviceBuffer | str | None = library.buffers.locate_on_device(x)
    name = _PACKAGE if buffer is None else _DEVICE_PACKAGE
    if buffer is None:
        buffer = library.buffers.locate(x)
    if isinstance(buffer, str):
        return buffer
    package = _get_package(name)
    if isinstance(package, str):
        return package
    reason: str | None = package.unavailable()
    return (package, buffer) if reason is None else reason


def _has_traced(key: Key, window: Window | None) -> bool:
    """Return whether a word of a key or a start of a window is traced."""
    words = key._words
    numbers = words if isinstance(words, tuple) else (words,)
    if window is not None and window.start is not None:
        numbers = (*numbers, *window.start)
    for number in numbers:
        if not isinstance(number, int) and get_library(number).arrays.is_traced(number):
            return True
    return False


def _get_numbers(key: Key, window: Window) -> tuple[int, int]:
    """Return the key and the number of the window's first element as integers below 2^64."""
    lo, hi = key._words  # without the call of a property: every call comes here
    number = (int(hi) & MASK32) << 32 | (int(lo) & MASK32)
    return number, 0 if window.start is None else read_base(window)


@cache
def _get_package(name: str = _PACKAGE) -> Any:
    try:
        with fork_guard:
            return import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (_PACKAGE, _DEVICE_PACKAGE):
            raise
        return f"the package {error.name} is missing"
