"""Windows: the block of a mask that belongs to an array, its broadcast axes and its pieces.

A window is a block of a larger mask. A shard computes its own window without communication, and a
large mask is computed piece by piece in bounded memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from unidrop.arguments import as_tuple, checked_index, is_symbolic
from unidrop.library import get_library

__all__ = ["Axis", "Piece", "Window"]

_MOST_ELEMENTS = 1 << 64

_INTEGER = frozenset((int,))


class Axis(NamedTuple):
    """One axis of a window: ``length`` elements, ``stride`` indices apart."""

    length: Any
    stride: int


class Piece(NamedTuple):
    """A part of a window: the index of its first element and its axes, the last of stride 1."""

    base: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A block of a mask, its axes merged into as few as describe it.

    Attributes
    ----------
    shape : tuple of int
        The shape of the mask: the array's shape, with 1 along broadcast axes.
    broadcast_axes : tuple of int
        The axes along which the mask has length 1, counted from the first.
    global_shape, start : tuple of int, or None
        The shape of the larger array and where in it the block begins: integers or 0-d arrays, and
        0 along broadcast axes. None if the array is not part of a larger one.
    """

    shape: tuple[Any, ...]
    broadcast_axes: tuple[int, ...] = ()
    global_shape: tuple[int, ...] | None = None
    start: tuple[Any, ...] | None = None

    # These properties are computed on demand: a compiler that leaves the numbering to an operator
    # then traces none of it.

    @property
    def strides(self) -> tuple[Any, ...]:
        """The distance between neighbors along each axis in the numbering; 0 if neighbors share."""
        strides = _row_major(self.shape if self.global_shape is None else self.global_shape)
        return _zero_along(strides, self.broadcast_axes) if self.broadcast_axes else strides

    @property
    def whole(self) -> Piece:
        """The window as a single piece."""
        if self.global_shape is None:
            return Piece(0, (Axis(self.size, 1),))
        base = sum(start * stride for start, stride in self._terms() if isinstance(start, int))
        return Piece(base, _merged(self.shape, self.global_shape))

    @property
    def offsets(self) -> tuple[tuple[Any, int], ...]:
        """The traced starts, each with its stride in the numbering."""
        return tuple(term for term in self._terms() if not isinstance(term[0], int))

    def _terms(self) -> Iterable[tuple[Any, int]]:
        if self.global_shape is None or self.start is None:
            return ()
        return zip(self.start, _row_major(self.global_shape), strict=True)

    @staticmethod
    def from_args(
        shape: Sequence[Any],
        broadcast_axes: Sequence[int] = (),
        global_shape: Sequence[int] | None = None,
        start: Sequence[Any] | None = None,
    ) -> "Window":
        """Validate the arguments of a user and return their window.

        Parameters
        ----------
        shape : sequence of int
            The shape of the array; a symbol may stand for a length that is not known yet.
        broadcast_axes : sequence of int, default ()
            Axes along which the mask has length 1; negative ones count from the end.
        global_shape, start : sequence of int, optional
            The shape of the whole array and where in it this one begins; both or neither. Elements
            of start may be 0-d integer arrays. Along broadcast axes start is ignored.

        Raises
        ------
        TypeError
            If an argument is not a sequence of integers.
        ValueError
            If axes repeat or are out of bounds, lengths differ, the window exceeds the
            global shape, or the whole has more than 2^64 elements.
        """
        shape = _lengths(shape, "shape", _checked_index_or_symbol)
        has_axes = type(broadcast_axes) is not tuple or broadcast_axes != ()
        if global_shape is None and start is None and not has_axes:
            _check_size(shape, "shape")
            return Window(shape)
        broadcast = _normalized_axes(broadcast_axes, len(shape))
        mask_shape = tuple(1 if i in broadcast else n for i, n in enumerate(shape))
        if (global_shape is None) != (start is None):
            missing, given = (
                ("global_shape", "start") if global_shape is None else ("start", "global_shape")
            )
            raise ValueError(f"global_shape and start go together, got {given} without {missing}")
        axes = tuple(sorted(broadcast))
        if global_shape is None or start is None:
            _check_size(mask_shape, "shape")
            return Window(mask_shape, axes)
        total = _whole_lengths(global_shape, shape, broadcast)
        return Window(mask_shape, axes, total, _starts(start, shape, total, broadcast))

    @property
    def size(self) -> Any:
        """The number of elements."""
        return math.prod(self.shape)

    def pieces(self, most: int) -> Iterator[Piece]:
        """Yield parts of at most ``most`` elements that follow each other in C order."""
        return _pieces(self.whole, most)


def _pieces(piece: Piece, most: int) -> Iterator[Piece]:
    base, axes = piece
    if math.prod(axis.length for axis in axes) <= most:
        yield piece
        return
    # Cut the outermost axis that can be cut: inner axes stay whole, which keeps C order.
    at = next(i for i, axis in enumerate(axes) if axis.length > 1)
    length, stride = axes[at]
    inner = math.prod(axis.length for axis in axes[at + 1 :])
    # Parts of about equal length, rounded down to whole blocks: no small last part.
    part = math.ceil(length / math.ceil(length / max(1, most // inner)))
    if part > 8:
        part -= part % 8
    for first in range(0, length, part):
        cut = Axis(min(part, length - first), stride)
        yield from _pieces(Piece(base + first * stride, (*axes[:at], cut, *axes[at + 1 :])), most)


def _checked_index_or_symbol(value: Any, name: str) -> Any:
    """Return a Python integer, or the value itself if it is symbolic."""
    return value if is_symbolic(value) else checked_index(value, name)


def _lengths(
    shape: Sequence[Any], name: str, convert: Callable[[Any, str], Any] = checked_index
) -> tuple[Any, ...]:
    lengths = as_tuple(shape, name)
    if not set(map(type, lengths)) <= _INTEGER:
        lengths = tuple(convert(n, name) for n in lengths)
    for length in lengths:
        if isinstance(length, int) and length < 0:
            raise ValueError(f"{name} must hold lengths of 0 or more, got {lengths}")
    return lengths


def _normalized_axes(axes: Sequence[int], ndim: int) -> frozenset[int]:
    if isinstance(axes, int):
        axes = (axes,)
    given = tuple(
        checked_index(axis, "broadcast_axes") for axis in as_tuple(axes, "broadcast_axes")
    )
    for axis in given:
        if not -ndim <= axis < ndim:
            raise ValueError(f"broadcast_axes must name axes of the {ndim}-d array, got {axis}")
    normalized = frozenset(axis % ndim for axis in given)
    if len(normalized) != len(given):
        raise ValueError(f"broadcast_axes must name each axis once, got {given}")
    return normalized


def _whole_lengths(
    global_shape: Sequence[int], shape: tuple[Any, ...], broadcast: frozenset[int]
) -> tuple[int, ...]:
    whole = _lengths(global_shape, "global_shape")
    if len(whole) != len(shape):
        raise ValueError(
            f"global_shape must have one length per axis of shape {shape}, got {whole}"
        )
    mask_whole = tuple(1 if i in broadcast else n for i, n in enumerate(whole))
    _check_size(mask_whole, "global_shape")
    return mask_whole


def _starts(
    start: Sequence[Any],
    shape: tuple[Any, ...],
    total: tuple[int, ...],
    broadcast: frozenset[int],
) -> tuple[Any, ...]:
    given = tuple(_checked_index_or_symbol(s, "start") for s in as_tuple(start, "start"))
    if len(given) != len(shape):
        raise ValueError(f"start must have one element per axis of shape {shape}, got {given}")
    starts = tuple(0 if i in broadcast else s for i, s in enumerate(given))
    for s in starts:
        if hasattr(s, "dtype") and not isinstance(s, int):
            get_library(s, "start").words.width(s, "start")  # raises if it is not a 0-d integer
    for axis, (s, n, whole) in enumerate(zip(starts, shape, total, strict=True)):
        if axis in broadcast or not isinstance(n, int):
            continue
        first = s if isinstance(s, int) else 0
        if first < 0 or first + n > whole:
            raise ValueError(
                f"the window must fit into global_shape, got start {s} and {n} elements along "
                f"axis {axis} of length {whole}"
            )
    return starts


def _check_size(shape: tuple[Any, ...], name: str) -> None:
    size = math.prod(shape)
    if isinstance(size, int) and size > _MOST_ELEMENTS:
        raise ValueError(f"{name} must have at most 2**64 elements, got {shape}")


@lru_cache(maxsize=1024)
def _row_major(total: tuple[Any, ...]) -> tuple[Any, ...]:
    strides: list[Any] = []
    stride: Any = 1
    for length in reversed(total):
        strides.append(stride)
        stride = stride * length
    return tuple(reversed(strides))


def _zero_along(strides: tuple[Any, ...], broadcast: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(0 if i in broadcast else stride for i, stride in enumerate(strides))


def _merged(shape: tuple[Any, ...], total: tuple[int, ...]) -> tuple[Axis, ...]:
    """Merge each axis into the next inner one if that one is covered whole."""
    axes = [Axis(1, 1)]
    covered = True
    for length, whole, stride in reversed(list(zip(shape, total, _row_major(total), strict=True))):
        if covered:
            axes[0] = Axis(axes[0].length * length, axes[0].stride)
        else:
            axes.insert(0, Axis(length, stride))
        covered = isinstance(length, int) and length == whole
    return tuple(axes)
