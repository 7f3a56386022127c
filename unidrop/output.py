"""The output rule: kept elements times the scale, and +0 for dropped ones."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy

from unidrop.dtypes import COMPUTE_DTYPES, dtype_name
from unidrop.mask import piece_size
from unidrop.protocols import ArrayLibrary
from unidrop.rate import Rate
from unidrop.schedule import ScheduledRate

__all__ = ["select"]


def select(library: ArrayLibrary, x: Any, mask: Any, rate: Rate) -> Any:
    """Return x times the scale for kept elements, and +0 for the others.

    Beyond the output, eager libraries with item assignment need memory for a piece only.
    """
    xp = library.arrays.namespace(x)
    if rate.keeps_nothing:
        return xp.zeros_like(x)
    if library.arrays.is_traced(x):
        return _scale_kept(library, xp, x, mask, rate)
    size = math.prod(x.shape)
    most = piece_size(library, x, size)
    if size <= most:
        return library.arrays.match_strides(_select_part(library, xp, x, mask, rate), x)
    if not library.arrays.is_mutable(xp.empty((0,))):
        return _select_and_join(library, xp, x, mask, rate, most)
    y = xp.empty_like(x)
    for cut in _cuts(x.shape, most):
        y[cut] = _select_part(library, xp, x[cut], mask[_cut_mask(cut, mask)], rate)
    return y


def _select_and_join(
    library: ArrayLibrary, xp: Any, x: Any, mask: Any, rate: Rate, most: int
) -> Any:
    """Run `select` for a library without item assignment, with the memory of two outputs."""
    if mask.shape == x.shape and x.ndim > 1:
        x_flat, mask_flat = xp.reshape(x, (-1,)), xp.reshape(mask, (-1,))
        y = _select_and_join(library, xp, x_flat, mask_flat, rate, most)
        return xp.reshape(y, x.shape)
    axis = max(range(x.ndim), key=lambda i: x.shape[i])
    length = x.shape[axis]
    step = max(1, most * length // math.prod(x.shape))
    cuts = [
        (*(slice(None),) * axis, slice(first, min(first + step, length)), ...)
        for first in range(0, length, step)
    ]
    whole = mask.shape[axis] == 1
    parts = [_select_part(library, xp, x[cut], mask if whole else mask[cut], rate) for cut in cuts]
    return xp.concat(parts, axis=axis)


def _cuts(shape: tuple[int, ...], most: int) -> Iterator[tuple[slice, ...]]:
    """Yield the parts of an array, of at most ``most`` elements, cut along its longest axes."""
    size = math.prod(shape)
    slices = [[slice(None)] for _ in shape]
    for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
        if size <= most:
            break
        length, inner = shape[axis], size // shape[axis]
        step = max(1, most // inner)
        slices[axis] = [slice(i, min(i + step, length)) for i in range(0, length, step)]
        size = inner * step
    return itertools.product(*slices)


def _cut_mask(cut: tuple[slice, ...], mask: Any) -> tuple[slice, ...]:
    """Return the part of the mask for a part of the array: the whole of every shared axis."""
    pairs = zip(cut, mask.shape, strict=True)
    return tuple(slice(None) if length == 1 else part for part, length in pairs)


def _select_part(library: ArrayLibrary, xp: Any, x: Any, mask: Any, rate: Rate) -> Any:
    # Overflow to infinity is the output rule, and the products of dropped elements are discarded.
    with numpy.errstate(over="ignore", invalid="ignore"):
        return _scale_kept(library, xp, x, mask, rate)


def _scale_kept(library: ArrayLibrary, xp: Any, x: Any, mask: Any, rate: Rate) -> Any:
    kind = dtype_name(x.dtype)
    compute = COMPUTE_DTYPES[kind]
    dtype = getattr(xp, compute)
    scale = rate.scale_in(compute)
    if isinstance(rate, ScheduledRate):
        fill = rate.fill_in(compute)
    else:
        fill = xp.zeros((), dtype=dtype, device=library.arrays.device(x))

    def scaled(component: Any) -> Any:
        return xp.where(mask, component * scale, fill)

    if kind.startswith("complex"):
        y = library.arrays.complex(xp, scaled(xp.real(x)), scaled(xp.imag(x)))
    else:
        y = scaled(xp.astype(x, dtype, copy=False))
    y = xp.astype(y, x.dtype, copy=False)
    if y.dtype != x.dtype:
        raise TypeError(
            f"x has dtype {x.dtype}, which {xp.__name__} does not support with its present settings"
        )
    return xp.where(rate.is_zero(), x, y) if isinstance(rate, ScheduledRate) else y
