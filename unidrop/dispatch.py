"""The one place where an array's path is chosen: fused kernels, or portable operations.

The path changes the time and never a bit. Fused kernels take an array whose elements lie in this
process's memory, if Numba is there to compile them; everything else takes the operations of its own
library. So does what is traced, unless its library records dropout as one operator
(`Library.recorded`), which chooses when it runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from unidrop.dtypes import compute_dtype, dtype_name
from unidrop.key import Key
from unidrop.library import Library, Memory, get_library
from unidrop.threads import get_num_threads
from unidrop.window import Window
from unidrop.words import MASK32

__all__ = ["PathChoice", "explain_path", "find_kernels", "force_path"]

_PATHS = ("fused", "portable")

_forced: ContextVar[str | None] = ContextVar("unidrop_force_path", default=None)


@dataclass(frozen=True, slots=True)
class PathChoice:
    """Which path an array takes, "fused" or "portable", and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def explain_path(x: Any) -> PathChoice:
    """Tell which path `dropout` takes for an array here and now, and why.

    Parameters
    ----------
    x : array
        Of any library.

    Returns
    -------
    PathChoice
        Its ``name`` is "fused" where single-pass kernels are used and "portable" where the
        operations of x's own library are; ``reason`` says why. Every result is the same.

    Raises
    ------
    TypeError
        If x is no array, or of a dtype that has no dropout.

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
        return PathChoice("portable", "unidrop.force_path says so")
    if 0 in x.shape:
        return PathChoice("portable", "it is empty")
    found = _kernels_or_why(library, x)
    if isinstance(found, str):
        return PathChoice("portable", found)
    threads = get_num_threads()
    some = f"{threads} threads" if threads > 1 else "1 thread"
    return PathChoice("fused", f"{dtype_name(x.dtype)} in this process's memory, up to {some}")


@contextmanager
def force_path(path: str) -> Iterator[None]:
    """Allow one path only, in this thread or task, for tests and measurements.

    Parameters
    ----------
    path : str
        "portable"; or "fused", and an array that kernels can't take then raises.

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
    portable: unidrop.force_path says so
    """
    if path not in _PATHS:
        raise ValueError(f"path has to be one of {', '.join(_PATHS)}, but got {path!r}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def find_kernels(
    library: Library, x: Any, key: Key, window: Window
) -> tuple[Any, Memory, int, int] | None:
    """Return what kernels need to take an array, or None if it takes the portable path.

    Returns
    -------
    package, memory, key, base
        The package of kernels, where x lies, and as integers the key and the number of the
        window's first element.

    Raises
    ------
    RuntimeError
        If `force_path` demands kernels, and they can't take x.
    """
    allowed = _forced.get()
    if allowed == "portable":
        return None
    found = _kernels_or_why(library, x, key, window)
    if isinstance(found, str):
        if allowed == "fused":
            raise RuntimeError(f"only fused kernels are allowed, but they can't take this: {found}")
        return None
    package, memory = found
    lo, hi = key.words
    base = window.whole.base
    if window.offsets:
        base += sum(_start(start) * stride for start, stride in window.offsets)
    return package, memory, _word(hi) << 32 | _word(lo), base % (1 << 64)


def _word(word: Any) -> int:
    """Return a key's word, whether it is an integer or an array of one."""
    return int(word) & MASK32


def _start(start: Any) -> int:
    """Return the value of a window's start that is an array."""
    hi, lo = get_library(start).split(start, "start")
    return int(hi) << 32 | int(lo)


def _kernels_or_why(
    library: Library, x: Any, key: Key | None = None, window: Window | None = None
) -> tuple[Any, Memory] | str:
    if library.is_traced(x) or _has_traced(key, window):
        return "it is traced, and what traces it compiles it"
    memory = library.memory(x)
    if isinstance(memory, str):
        return memory
    package = _package()
    if isinstance(package, str):
        return package
    return package.unavailable() or (package, memory)


def _has_traced(key: Key | None, window: Window | None) -> bool:
    numbers: list[Any] = []
    if key is not None and key.is_traced:
        numbers.extend(key.words)
    if window is not None and window.offsets:
        numbers.extend(start for start, _ in window.offsets)
    return any(get_library(number).is_traced(number) for number in numbers)


@cache
def _package() -> Any:
    try:
        return import_module("unidrop.fused")
    except ModuleNotFoundError as error:
        if error.name != "unidrop.fused":
            raise
        return "the package unidrop.fused is missing"
