"""The calls of kernels on a GPU, without waiting for the GPU.

A number that the GPU computes stays there: a kernel reads it from the GPU's memory.
"""

from collections.abc import Sequence
from typing import Any

from unidrop.dtypes import dtype_name
from unidrop.key import Key
from unidrop.library import get_library
from unidrop.protocols import ArrayLibrary, DeviceBuffer
from unidrop.rate import Rate
from unidrop.window import Window
from unidrop.words import MASK32

__all__ = ["get_base", "get_words", "make_mask_on_device", "read_base", "run_on_device"]

_SIGN = 1 << 63


def run_on_device(
    package: Any,
    library: ArrayLibrary,
    x: Any,
    source: DeviceBuffer,
    key: Key,
    window: Window,
    rate: Rate,
    out: Any,
) -> Any:
    """Return dropout of an array on a GPU; the arguments are as in `dispatch.fused_dropout`.

    ``package`` is the package of kernels, and ``source`` the buffer of x.
    """
    is_in_place = out is x and _are_apart(x.shape, source.strides)
    if out is not None and not is_in_place:
        # The arrays may overlap, and a kernel would read what it has written.
        y = run_on_device(package, library, x, source, key, window, rate, None)
        library.buffers.copy_into(out, y)
        return out
    y = x if is_in_place else library.arrays.namespace(x).empty_like(x)
    _launch(package, library, source, y, key, window, rate)
    return y


def make_mask_on_device(
    package: Any,
    library: ArrayLibrary,
    like: Any,
    key: Key,
    window: Window,
    rate: Rate,
    device: Any,
) -> Any:
    """Return the mask of a window on a GPU; the arguments are as in `dispatch.fused_mask`."""
    xp = library.arrays.namespace(like)
    mask = xp.empty(window.shape, dtype=xp.bool, device=device)
    _launch(package, library, None, mask, key, window, rate)
    return mask


def read_base(window: Window) -> int:
    """Return the number of the first element of a window with a start, below 2^64."""
    offsets = sum(_read(start) * stride for start, stride in window.offsets)
    base: int = (window.whole.base + offsets) % (1 << 64)
    return base


def _read(start: Any) -> int:
    """Return the value of a start that is an array."""
    hi, lo = get_library(start).split(start, "start")
    return int(hi) << 32 | int(lo)


def _are_apart(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether no two elements of an array share memory; False if that is hard to tell."""
    extent = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1:
            if stride < extent:
                return False
            extent += stride * (length - 1)
    return True


def _launch(
    package: Any,
    library: ArrayLibrary,
    source: DeviceBuffer | None,
    y: Any,
    key: Key,
    window: Window,
    rate: Rate,
) -> None:
    """Launch the kernel that writes y; without a source it writes the mask."""
    target = library.buffers.locate_on_device(y)
    with library.buffers.use_device(y):
        words, base = get_words(library, y, key), get_base(library, y, window)
        kind, shape = dtype_name(y.dtype), tuple(y.shape)
        read = target if source is None else source
        package.dropout(read, target, kind, shape, window.strides, rate, words, base)


def get_words(library: ArrayLibrary, y: Any, key: Key) -> Any:
    """Return the words of a key, as kernels receive them.

    They are integers, or an array on the GPU of y if reading them would wait for the GPU.
    """
    words = library.buffers.gather(key._words, y)
    if words is None:
        lo, hi = key._words
        words = int(lo) & MASK32, int(hi) & MASK32
    return words


def get_base(library: ArrayLibrary, y: Any, window: Window) -> Any:
    """Return the number of a window's first element, an integer or an array as in `get_words`."""
    if window.start is None:
        return 0
    starts = library.buffers.gather([start for start, _ in window.offsets], y)
    if starts is None:
        return read_base(window)
    base: Any = _as_signed(window.whole.base)
    for start, (_, stride) in zip(starts, window.offsets, strict=True):
        base = start * _as_signed(stride) + base
    return base


def _as_signed(number: int) -> int:
    """Return the integer in [-2^63, 2^63) that equals a number modulo 2^64."""
    return (number + _SIGN) % (2 * _SIGN) - _SIGN
