"""Dask's part of the core: each chunk is a window of the whole array, computed on demand.

A chunk is an array of another library, such as NumPy, and uses that library's path.
"""

from collections.abc import Sequence
from typing import Any

import dask.array
import numpy as np
from numpy.typing import NDArray

from unidrop.adapters.numpy.arrays import check_plain
from unidrop.gaussian import NormalPlan
from unidrop.key import Key
from unidrop.mask import keep_mask
from unidrop.plan import DropoutPlan
from unidrop.protocols import ArrayLibrary, Arrays, Operator
from unidrop.rate import Rate
from unidrop.window import Window
from unidrop.zoneout import ComplementPlan

__all__ = ["LIBRARY"]


class DaskOperator(Operator):
    """Dropout of Dask arrays, chunk by chunk."""

    def dropout(self, x: Any, key: Key, plan: Any, mask: Any = None) -> Any:
        """Return the output, chunk by chunk; or by Dask's operations if key or start is an array.

        Ignores ``mask``, because each chunk computes its own. A plan that needs the whole mask runs
        by Dask's operations too.
        """
        options = _options(key, plan.window, x.shape)
        if options is None or not plan.is_elementwise:
            return plan.run(x, key, mask)
        normal = (plan.mean, plan.stddev) if isinstance(plan, NormalPlan) else None
        options |= {"rate": plan.rate, "normal": normal}
        options["complement"] = isinstance(plan, ComplementPlan)
        return dask.array.map_blocks(_drop_chunk, x, dtype=x.dtype, meta=x._meta, **options)

    def traced_mask(self, like: Any, key: Key, window: Window, rate: Rate) -> Any:
        """Return the mask, in the chunks of ``like`` or in chunks of Dask's choice."""
        options = _options(key, window, window.shape)
        if options is None:
            return None
        chunks: Any = "auto"
        pairs = list(zip(window.shape, like.shape, strict=False))
        if len(like.shape) == len(window.shape) and all(n in (1, m) for n, m in pairs):
            lengths = zip(like.chunks, pairs, strict=True)
            chunks = tuple(c if n == m else (n,) for c, (n, m) in lengths)
        chunks = dask.array.core.normalize_chunks(chunks, window.shape, dtype=bool)
        return dask.array.map_blocks(
            _mask_chunk,
            chunks=chunks,
            dtype=bool,
            meta=np.empty((0,) * len(window.shape), bool),
            rate=rate,
            **options,
        )


class DaskArrays(Arrays):
    """Dask arrays, with chunks of NumPy or another library."""

    def check(self, x: Any, name: str) -> None:
        """Raise TypeError for chunks of unknown lengths, or of an array type that is refused."""
        check_plain(type(x._meta), name)
        if any(n != n for n in x.shape):  # NaN
            raise TypeError(
                f"{name} must have chunks of known lengths, got shape {x.shape}: call "
                f"{name}.compute_chunk_sizes()"
            )

    def complex(self, xp: Any, real: Any, imag: Any) -> Any:
        """Return the complex array of two real ones of the same chunks."""
        dtype = np.result_type(real.dtype, np.complex64)
        return dask.array.map_blocks(_join_complex, real, imag, dtype=dtype)


LIBRARY = ArrayLibrary(arrays=DaskArrays(), operator=DaskOperator())


def _options(key: Key, window: Window, shape: Sequence[int]) -> dict[str, Any] | None:
    """Return the options that every chunk gets, or None if one of them is a traced array."""
    start = window.start or (0,) * len(shape)
    if key.is_traced or not all(isinstance(s, int) for s in start):
        return None
    return {
        "key": key,
        "broadcast_axes": window.broadcast_axes,
        "whole": window.global_shape or tuple(shape),
        "origin": start,
    }


def _drop_chunk(
    chunk: Any,
    *,
    block_info: Any,
    rate: Rate,
    normal: Any,
    complement: bool,
    key: Key,
    **options: Any,
) -> Any:
    plan = DropoutPlan.from_args(chunk, rate, **_find_window(block_info[0], **options))
    if normal is not None:
        plan = NormalPlan.from_plan(plan, *normal)
    if complement:
        plan = ComplementPlan.from_plan(plan)
    return plan.apply(chunk, key)


def _mask_chunk(*, block_info: Any, rate: Rate, key: Key, **options: Any) -> Any:
    location = block_info[None]["array-location"]
    shape = tuple(stop - begin for begin, stop in location)
    if rate.is_scheduled:
        raise TypeError(
            "p must be a Python int or float for a mask of Dask, got an array: pass float(p)"
        )
    return keep_mask(shape, rate.p, key, **_find_window(block_info[None], **options))


def _find_window(
    info: Any, *, broadcast_axes: Sequence[int], whole: Sequence[int], origin: Sequence[int]
) -> dict[str, Any]:
    """Return the arguments that describe a chunk as a window of the whole array."""
    location = info["array-location"]
    start = tuple(o + begin for o, (begin, _) in zip(origin, location, strict=True))
    return {"broadcast_axes": broadcast_axes, "global_shape": whole, "start": start}


def _join_complex(real: NDArray[Any], imag: NDArray[Any]) -> NDArray[Any]:
    z = np.empty(real.shape, dtype=np.result_type(real.dtype, np.complex64))
    z.real, z.imag = real, imag
    return z
