"""Dask below the adapters: each chunk is a window of the whole, computed when it is asked for.

A chunk is an array of some library of its own, and takes whatever path that has.
"""

from collections.abc import Callable, Sequence
from typing import Any

import dask.array
import numpy as np
from numpy.typing import NDArray

from unidrop.dropout import dropout
from unidrop.key import Key
from unidrop.library import Library
from unidrop.mask import keep_mask
from unidrop.window import Window

__all__ = ["Dask"]


class Dask(Library):
    """Dask arrays, of NumPy's chunks or another library's."""

    def recorded(self, x: Any, p: float, key: Key, window: Window) -> Any:
        """Return the output, chunk by chunk; None for a key or a start that is an array."""
        options = _options(key, window, x.shape)
        if options is None:
            return None
        return dask.array.map_blocks(_dropped, x, dtype=x.dtype, meta=x._meta, p=p, **options)

    def recorded_mask(self, like: Any, p: float, key: Key, window: Window) -> Any:
        """Return the mask, in chunks as ``like`` has them, or of Dask's own choice."""
        options = _options(key, window, window.shape)
        if options is None:
            return None
        chunks: Any = "auto"
        pairs = list(zip(window.shape, like.shape, strict=False))
        if len(like.shape) == len(window.shape) and all(n in (1, m) for n, m in pairs):
            # Where the mask is as long as the array, or shared.
            lengths = zip(like.chunks, pairs, strict=True)
            chunks = tuple(c if n == m else (n,) for c, (n, m) in lengths)
        chunks = dask.array.core.normalize_chunks(chunks, window.shape, dtype=bool)
        return dask.array.map_blocks(
            _kept,
            chunks=chunks,
            dtype=bool,
            meta=np.empty((0,) * len(window.shape), bool),
            p=p,
            **options,
        )

    def complex(self, xp: Any, real: Any, imag: Any) -> Any:
        """Return the complex array of two real ones of the same chunks."""
        dtype = np.result_type(real.dtype, np.complex64)
        return dask.array.map_blocks(_joined, real, imag, dtype=dtype)


def _options(key: Key, window: Window, shape: Sequence[int]) -> dict[str, Any] | None:
    """Return what each chunk is told of the whole, if that is known."""
    start = window.start or (0,) * len(shape)
    if key.is_traced or not all(isinstance(s, int) for s in start):
        return None
    return {
        "key": key,
        "broadcast_axes": window.broadcast_axes,
        "whole": window.global_shape or tuple(shape),
        "origin": start,
    }


def _dropped(chunk: Any, *, block_info: Any, **options: Any) -> Any:
    return _in_window(dropout, chunk, block_info[0], **options)


def _kept(*, block_info: Any, **options: Any) -> Any:
    location = block_info[None]["array-location"]
    shape = tuple(stop - begin for begin, stop in location)
    return _in_window(keep_mask, shape, block_info[None], **options)


def _in_window(
    function: Callable[..., Any],
    chunk: Any,
    info: Any,
    *,
    p: float,
    key: Key,
    broadcast_axes: Sequence[int],
    whole: Sequence[int],
    origin: Sequence[int],
) -> Any:
    location = info["array-location"]
    start = tuple(o + begin for o, (begin, _) in zip(origin, location, strict=True))
    options = {"broadcast_axes": broadcast_axes, "global_shape": whole, "start": start}
    return function(chunk, p, key, **options)


def _joined(real: NDArray[Any], imag: NDArray[Any]) -> NDArray[Any]:
    z = np.empty(real.shape, dtype=np.result_type(real.dtype, np.complex64))
    z.real, z.imag = real, imag
    return z
