"""The mask: the elements of an array that a key keeps.

Elements are numbered by their logical C-order index i in the mask's shape, whatever the strides.
Block ``i // 8`` of Philox consists of four words, and elements 2j and 2j + 1 share word ``j % 4``.
The number u of the even element is the word; the number u of the odd one is the word times
`ODD_MULTIPLIER`, modulo 2^32. An element is kept if u is at least the threshold of the rate
(`unidrop.philox.keep_flags`). docs/spec.md defines the rest.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, SupportsFloat, overload

import numpy

from unidrop.dispatch import fused_mask
from unidrop.key import Key, check_key
from unidrop.library import get_namespace_library
from unidrop.protocols import ArrayLibrary
from unidrop.rate import KEEP_NOTHING, Rate
from unidrop.schedule import ScheduledRate, make_rate
from unidrop.window import Axis, Piece, Window
from unidrop.words import (
    MASK32,
    SplitInteger,
    WordArithmetic,
    add_split,
    arange64,
    mul_split,
    shift_split,
    split64,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "STREAM_VERSION",
    "compute_window",
    "constant_mask",
    "keep_mask",
    "make_mask",
    "piece_size",
    "portable_mask",
]

STREAM_VERSION: Final = 1

# Elements decided at a time by eager libraries on the CPU: few enough for their words to stay in
# cache, and enough to hide the overhead of a call and of a thread pool.
_CACHE_PIECE: Final = 1 << 18

# On other devices: most of the 150 operations read and write 1 to 4 bytes for each element. At the
# bandwidth of a GPU, they then take longer than their launches.
_DEVICE_PIECE: Final = 1 << 24


@overload
def keep_mask(
    shape: Sequence[int],
    p: SupportsFloat,
    key: Key,
    *,
    xp: None = ...,
    device: Any = ...,
    training: bool = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
) -> "NDArray[numpy.bool]": ...
@overload
def keep_mask(
    shape: Sequence[int],
    p: SupportsFloat,
    key: Key,
    *,
    xp: Any,
    device: Any = ...,
    training: bool = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
) -> Any: ...
def keep_mask(
    shape: Sequence[int],
    p: SupportsFloat,
    key: Key,
    *,
    xp: Any = None,
    device: Any = None,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Return the mask that `dropout` applies: True where an element is kept.

    Parameters
    ----------
    shape : sequence of int
        The shape of the array to be masked.
    p : int, float or 0-d array
        The probability of dropping an element, in [0, 1]. A scheduled rate is an array of float32
        or float64 of the library xp, and stands for its exact value. If a compiled program
        receives it, a value outside [0, 1] keeps nothing.
    key : Key
        The name of the mask. Use each key once.
    xp : namespace, default numpy
        The library of the mask: the module that its users import, such as ``numpy``.
    device : device, optional
        The device of the mask; None is the library's default device.
    training : bool, default True
        If False, every element is kept.
    broadcast_axes : sequence of int, default ()
        Axes along which elements share one decision, and the mask has length 1.
    global_shape, start : sequence of int, optional
        The array is the block that begins at ``start`` of an array of shape ``global_shape``, and
        gets exactly that block of the whole mask. Elements of start may be 0-d integer arrays,
        whose values are not checked.

    Returns
    -------
    array of bool
        Of the given shape, with 1 along ``broadcast_axes``.

    Raises
    ------
    TypeError
        If p is neither a number nor such an array, key not a Key, xp not a namespace, or a length
        not an integer.
    ValueError
        If p is outside [0, 1], an axis does not exist, the window does not fit, or key is a batch
        of keys.

    Examples
    --------
    >>> from unidrop import Key, keep_mask
    >>> keep_mask((2, 3), 0.5, Key(42)).astype(int)
    array([[1, 0, 0],
           [0, 0, 1]])
    >>> keep_mask((1, 3), 0.5, Key(42), global_shape=(2, 3), start=(1, 0)).astype(int)
    array([[0, 0, 1]])
    """
    library, xp = get_namespace_library(numpy if xp is None else xp)
    like = xp.zeros((0,), device=device)
    rate = make_rate(p, like)
    check_key(key)
    window = Window.from_args(shape, broadcast_axes, global_shape, start)
    if not training:
        return constant_mask(xp, window, True, device)
    return make_mask(library, like, key, window, rate, device)


def make_mask(
    library: ArrayLibrary, like: Any, key: Key, window: Window, rate: Rate, device: Any
) -> Any:
    """Return the mask of a window on a device, by the path that the array ``like`` would have.

    Beyond the mask, eager libraries need at most 40 bytes for each element of a piece if items can
    be assigned (10 MiB on the CPU, 640 MiB on other devices), and once or twice the mask if not.
    """
    if rate.threshold in (0, KEEP_NOTHING) or _is_zero(window.size):
        xp = library.arrays.namespace(like)
        return constant_mask(xp, window, rate.threshold == 0, device)
    mask = None
    if rate.is_scheduled or library.arrays.is_traced(like):
        mask = library.operator.traced_mask(like, key, window, rate)
    if mask is None:
        mask = fused_mask(library, like, key, window, rate, device)
    return portable_mask(library, like, key, window, rate, device) if mask is None else mask


def portable_mask(
    library: ArrayLibrary, like: Any, key: Key, window: Window, rate: Rate, device: Any
) -> Any:
    """Return the mask of a window that is not empty, by the operations of the library alone.

    The rate keeps some elements and drops some.
    """
    xp = library.arrays.namespace(like)

    def decide(first: SplitInteger, count: Any) -> Any:
        words: tuple[Any, Any] = tuple(key._words)
        flags = partial(library.words.keep_flags, xp, device, first, count, words)
        if isinstance(rate, ScheduledRate):
            return rate.keep(library, device, flags)
        return flags(rate.threshold)

    return compute_window(library, like, key, window, device, 8, decide, xp.bool)


def compute_window(
    library: ArrayLibrary,
    like: Any,
    key: Key,
    window: Window,
    device: Any,
    per_block: int,
    compute: Callable[[SplitInteger, Any], Any],
    dtype: Any,
) -> Any:
    """Return an array of a window that is not empty, from values of blocks of the generator.

    Parameters
    ----------
    library, like, key, window, device
        As in `portable_mask`.
    per_block : int
        The number of elements of a block, a power of two.
    compute : callable
        Returns the values of ``count`` blocks from ``first`` on, flat; the arguments are as in
        `unidrop.protocols.Words.generate`.
    dtype : dtype
        The dtype of the values.
    """
    xp = library.arrays.namespace(like)
    words = library.words.arithmetic(xp, device)
    offsets = () if window.start is None else window.offsets

    def fill(piece: Piece) -> Any:
        return _piece_values(library, xp, words, piece, offsets, per_block, compute, device)

    is_traced = library.arrays.is_traced
    lo, hi = key._words
    arrays = (lo, hi, *(start for start, _ in offsets))
    if is_traced(like) or any(is_traced(a) for a in arrays if not isinstance(a, int)):
        return xp.reshape(fill(window.whole), window.shape)
    most = piece_size(library, like, window.size)
    pieces = list(window.pieces(_row_piece_size(window, most)))
    if len(pieces) == 1:
        return xp.reshape(fill(pieces[0]), window.shape)
    if not library.arrays.is_mutable(xp.empty((0,))):
        return xp.reshape(xp.concat([fill(piece) for piece in pieces]), window.shape)
    flat = xp.empty((window.size,), dtype=dtype, device=device)
    done = 0
    for piece in pieces:
        values = fill(piece)
        flat[done : done + values.shape[0]] = values
        done += values.shape[0]
    return xp.reshape(flat, window.shape)


def piece_size(library: ArrayLibrary, like: Any, size: int) -> int:
    """Return how many of ``size`` elements an eager library processes at a time, for ``like``."""
    if size <= _CACHE_PIECE or library.arrays.is_on_cpu(like):
        return _CACHE_PIECE
    return _DEVICE_PIECE


def _row_piece_size(window: Window, most: int) -> int:
    """Return how many elements to decide at a time, such that about ``most`` flags are computed.

    A row that begins or ends inside a block needs the flags of the whole block.
    """
    *rows, (length, _) = window.whole.axes
    return max(1, most * length // (length + 14)) if rows else most


def constant_mask(xp: Any, window: Window, value: bool, device: Any) -> Any:
    """Return the mask of a window that keeps all elements, or none."""
    if _is_zero(window.size):  # a library of chunks cannot cut every empty shape
        return xp.reshape(xp.zeros((0,), dtype=xp.bool, device=device), window.shape)
    fill = xp.ones if value else xp.zeros
    return fill(window.shape, dtype=xp.bool, device=device)


def _is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0


def _piece_values(
    library: ArrayLibrary,
    xp: Any,
    words: WordArithmetic,
    piece: Piece,
    offsets: tuple[tuple[Any, int], ...],
    per_block: int,
    compute: Callable[[SplitInteger, Any], Any],
    device: Any,
) -> Any:
    """Return the values of the elements of a piece, flat."""
    *rows, (length, _) = piece.axes
    strides = (*(row.stride for row in rows), *(stride for _, stride in offsets))
    aligned = all(stride % per_block == 0 for stride in strides)
    skip, last = piece.base % per_block, per_block - 1
    count = (skip + length + last) // per_block if aligned else (length + 2 * last) // per_block
    index: SplitInteger = (piece.base >> 32, piece.base & MASK32)
    block: SplitInteger = split64(piece.base // per_block)
    if rows or offsets:
        index = _row_indices(library, xp, words, piece.base, rows, offsets, device)
        block = shift_split(words, index, last.bit_length())
    values = compute(block, count)
    if aligned and not rows:
        return values[skip : skip + length]
    if aligned:
        table = xp.reshape(values, (-1, count * per_block))
        return xp.reshape(table[:, skip : skip + length], (-1,))
    # Rows begin anywhere in a block: each row takes its own part of the values of its blocks.
    _, column = arange64(words, length, device)
    taken = (index[1] & last) + column
    if rows:
        _, number = arange64(words, math.prod(row.length for row in rows), device)
        taken = xp.reshape(number, (-1, 1)) * (count * per_block) + taken
    return xp.take(values, xp.reshape(taken, (-1,)), axis=0)


def _row_indices(
    library: ArrayLibrary,
    xp: Any,
    words: WordArithmetic,
    base: int,
    rows: list[Axis],
    offsets: tuple[tuple[Any, int], ...],
    device: Any,
) -> SplitInteger:
    """Return the index of the first element of each row, as words of shape (rows, 1).

    A single row has shape (), because a native generator accepts one run of consecutive blocks.
    """
    # Even a base of 0 becomes an array: the mask belongs on this device, not on a start's.
    # And it is filled there, because a copy from the host may wait for the device.
    hi, lo = (xp.full((), word, dtype=words.dtype, device=device) for word in split64(base))
    index: SplitInteger = (hi, lo)
    for start, stride in offsets:
        index = add_split(
            words, index, mul_split(words, library.words.split(xp, device, start, "start"), stride)
        )
    if not rows:
        return index
    for row in rows:
        steps = mul_split(words, arange64(words, row.length, device), row.stride)
        hi, lo = index
        index = add_split(words, (xp.expand_dims(hi, axis=-1), xp.expand_dims(lo, axis=-1)), steps)
    return xp.reshape(index[0], (-1, 1)), xp.reshape(index[1], (-1, 1))
