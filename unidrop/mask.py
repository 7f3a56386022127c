"""The mask: which elements of an array a key keeps.

Elements are numbered by their logical C-order index i in the mask's shape, whatever the strides.
Block ``i // 8`` of Philox gives four words, word ``(i // 2) % 4`` decides elements i and i + 1: as
itself for even i, times `ODD_MULTIPLIER` modulo 2^32 for odd i. An element is kept where that
number is at least the threshold. docs/spec.md is the whole story.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy

from unidrop.dispatch import find_kernels
from unidrop.key import Key, check_key
from unidrop.library import Library, get_namespace_library
from unidrop.rate import Rate
from unidrop.window import Axis, Piece, Window
from unidrop.words import Pair, Words, add_pairs, arange64, mul_pair, shift_pair, split64

__all__ = ["STREAM_VERSION", "keep_mask", "portable_mask", "window_mask"]

STREAM_VERSION: Final = 1

# Elements that are decided at a time where the library runs eagerly: few enough for the words of a
# piece to stay in cache, and enough for the overhead of a call, and of a thread pool, not to show.
PIECE: Final = 1 << 18


def keep_mask(
    shape: Sequence[int],
    p: float,
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
    p : int or float
        The probability of dropping an element, in [0, 1].
    key : Key
        The mask's name. One key, one use.
    xp : namespace, default numpy
        The library to make the mask in, as its users name it: numpy, torch, jax.numpy, tensorflow.
    device : device, optional
        Where to make it; the library's default device if None.
    training : bool, default True
        If False everything is kept.
    broadcast_axes : sequence of int, default ()
        Axes along which the mask has length 1, and one decision is shared.
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
        If p is no Python number, key no Key, xp no namespace, or a length no integer.
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
    rate = Rate.from_p(p)
    check_key(key)
    window = Window.from_args(shape, broadcast_axes, global_shape, start)
    library, xp = get_namespace_library(numpy if xp is None else xp)
    if not training:
        return xp.ones(window.shape, dtype=xp.bool, device=device)
    return window_mask(library, xp, window, rate, key, device, xp.zeros((0,), device=device))


def window_mask(
    library: Library, xp: Any, window: Window, rate: Rate, key: Key, device: Any, like: Any
) -> Any:
    """Return the mask of a window, made like the array ``like``: traced, or piece by piece.

    Beyond the mask it needs about 10 MiB where items can be assigned (40 bytes for each of `PIECE`
    elements), and once or twice the mask more where they can't.
    """
    if rate.keeps_all or rate.keeps_nothing or _is_zero(window.size):
        fill = xp.ones if rate.keeps_all else xp.zeros
        return fill(window.shape, dtype=xp.bool, device=device)
    if library.is_traced(like):
        recorded = library.recorded_mask(like, rate.p, key, window)
        if recorded is not None:
            return recorded
    kernels = find_kernels(library, like, key, window)
    if kernels is not None:
        package, _, number, base = kernels
        return library.from_numpy(package.keep(window, rate, number, base), device)
    return portable_mask(library, xp, window, rate, key, device, like)


def portable_mask(
    library: Library, xp: Any, window: Window, rate: Rate, key: Key, device: Any, like: Any
) -> Any:
    """Return the mask of a window that is not empty, by the library's operations alone.

    The rate keeps something, and not everything.
    """
    words = library.arithmetic(xp, device)

    def keep_flags(piece: Piece) -> Any:
        return _piece_mask(library, xp, words, piece, window.offsets, rate.threshold, key, device)

    values = (like, *key.words, *(value for value, _ in window.offsets))
    if any(library.is_traced(value) for value in values if not isinstance(value, int)):
        return xp.reshape(keep_flags(window.whole), window.shape)
    pieces = list(window.pieces(_piece_size(window)))
    if len(pieces) == 1:
        return xp.reshape(keep_flags(pieces[0]), window.shape)
    if not library.is_mutable(xp.empty((0,))):
        return xp.reshape(xp.concat([keep_flags(piece) for piece in pieces]), window.shape)
    flat = xp.empty((window.size,), dtype=xp.bool, device=device)
    done = 0
    for piece in pieces:
        keep = keep_flags(piece)
        flat[done : done + keep.shape[0]] = keep
        done += keep.shape[0]
    return xp.reshape(flat, window.shape)


def _piece_size(window: Window) -> int:
    """Return how many elements to decide at a time, so that as many as `PIECE` are made for them.

    The row of a window that begins inside a block needs the whole block, and so does its end.
    """
    *rows, (length, _) = window.whole.axes
    return max(1, PIECE * length // (length + 14)) if rows else PIECE


def _is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0


def _piece_mask(
    library: Library,
    xp: Any,
    words: Words,
    piece: Piece,
    offsets: tuple[tuple[Any, int], ...],
    threshold: int,
    key: Key,
    device: Any,
) -> Any:
    """Return the decisions of a piece, flat."""
    *rows, (length, _) = piece.axes
    strides = (*(row.stride for row in rows), *(stride for _, stride in offsets))
    aligned = all(stride % 8 == 0 for stride in strides)
    skip = piece.base % 8
    count = (skip + length + 7) // 8 if aligned else (length + 14) // 8
    block: Pair = split64(piece.base // 8)
    index: Pair = split64(piece.base)
    if rows or offsets:
        index = _row_indices(library, xp, words, piece.base, rows, offsets, device)
        block = shift_pair(words, index, 3)
    keep = library.keep_flags(xp, block, count, key.words, threshold, device)
    if aligned and not rows:
        return keep[skip : skip + length]
    if aligned:
        return xp.reshape(xp.reshape(keep, (-1, count * 8))[:, skip : skip + length], (-1,))
    # Rows begin anywhere in their blocks: each takes its own part of what was decided for it.
    _, column = arange64(words, length, device)
    taken = (index[1] & 7) + column
    if rows:
        _, number = arange64(words, math.prod(row.length for row in rows), device)
        taken = xp.reshape(number, (-1, 1)) * (count * 8) + taken
    return xp.take(keep, xp.reshape(taken, (-1,)), axis=0)


def _row_indices(
    library: Library,
    xp: Any,
    words: Words,
    base: int,
    rows: list[Axis],
    offsets: tuple[tuple[Any, int], ...],
    device: Any,
) -> Pair:
    """Return the index of the first element of each row, as a pair of shape (rows, 1).

    Of shape () where there is one row alone: libraries have a generator for one run of blocks.
    """
    # Also where it is 0: the mask's device is this one, and not a start's.
    hi, lo = (xp.asarray(word, dtype=words.dtype, device=device) for word in split64(base))
    index: Pair = (hi, lo)
    for start, stride in offsets:
        index = add_pairs(words, index, mul_pair(words, library.split(start, "start"), stride))
    if not rows:
        return index
    for row in rows:
        steps = mul_pair(words, arange64(words, row.length, device), row.stride)
        hi, lo = index
        index = add_pairs(words, (xp.expand_dims(hi, axis=-1), xp.expand_dims(lo, axis=-1)), steps)
    return xp.reshape(index[0], (-1, 1)), xp.reshape(index[1], (-1, 1))
