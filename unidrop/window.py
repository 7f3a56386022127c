"""Which elements of which mask: broadcast axes, windows, and how they are cut into pieces.

A window is a block of a larger array. A piece of a window is a window again, which is how a large
mask is made in bounded memory, and how a shard gets its own part without communication.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Axis", "Piece", "Window", "noise_shape_axes"]

_MOST_ELEMENTS = 1 << 64

_INTEGER = frozenset((int,))


class Axis(NamedTuple):
    """One axis of a window: ``length`` elements, ``stride`` indices apart."""

    length: Any
    stride: int


class Piece(NamedTuple):
    """A part of a window: the index of its first element, and its axes (the last of stride 1)."""

    base: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A block of a mask, its axes merged into as few as describe it.

    Attributes
    ----------
    shape : tuple of int
        The mask's shape: that of the array, with 1 along broadcast axes.
    broadcast_axes : tuple of int
        The axes along which the mask has length 1, counted from the first.
    global_shape, start : tuple of int, or None
        The larger array that this is a block of, and where the block begins: integers or 0-d
        arrays, and 0 along broadcast axes. None where there is no larger one.
    """

    shape: tuple[Any, ...]
    broadcast_axes: tuple[int, ...] = ()
    global_shape: tuple[int, ...] | None = None
    start: tuple[Any, ...] | None = None

    # What follows is worked out where it is asked for: a compiler that records a window, and leaves
    # the numbering to an operator, has nothing of it to trace.

    @property
    def strides(self) -> tuple[Any, ...]:
        """How far apart neighbours along each axis of the array are in the numbering.

        0 along broadcast axes.
        """
        strides = _strides(self.shape if self.global_shape is None else self.global_shape)
        return _shared(strides, self.broadcast_axes) if self.broadcast_axes else strides

    @property
    def whole(self) -> Piece:
        """The window itself, as its own only piece."""
        if self.global_shape is None:
            return Piece(0, (Axis(self.size, 1),))
        base = sum(start * stride for start, stride in self._terms() if isinstance(start, int))
        return Piece(base, _merged(self.shape, self.global_shape))

    @property
    def offsets(self) -> tuple[tuple[Any, int], ...]:
        """What traced starts add to every index: the start, and the stride to multiply it by."""
        return tuple(term for term in self._terms() if not isinstance(term[0], int))

    def _terms(self) -> Iterable[tuple[Any, int]]:
        if self.global_shape is None or self.start is None:
            return ()
        return zip(self.start, _strides(self.global_shape), strict=True)

    @staticmethod
    def from_args(
        shape: Sequence[Any],
        broadcast_axes: Sequence[int] = (),
        global_shape: Sequence[int] | None = None,
        start: Sequence[Any] | None = None,
    ) -> "Window":
        """Validate the arguments that users give and return the window they mean.

        Parameters
        ----------
        shape : sequence of int
            The array's shape; a length that is not known yet may be whatever stands for it.
        broadcast_axes : sequence of int, default ()
            The axes along which the mask has length 1; negative ones count from the end.
        global_shape, start : sequence of int, optional
            The shape of the whole array and where in it this one begins; both or neither. An
            element of start may be a 0-d integer array. Along broadcast axes start is ignored.

        Raises
        ------
        TypeError
            If an argument is not a sequence, or an element of it not an integer.
        ValueError
            If axes repeat or are out of bounds, lengths differ, the window lies outside the
            global shape, or the whole has more than 2^64 elements.
        """
        shape = _lengths(shape, "shape", _index_or_symbol)
        if global_shape is None and start is None and broadcast_axes == ():
            _check_size(shape, "shape")
            return Window(shape)
        broadcast = _normalised_axes(broadcast_axes, len(shape))
        mask_shape = tuple(1 if i in broadcast else n for i, n in enumerate(shape))
        if (global_shape is None) != (start is None):
            missing, given = (
                ("global_shape", "start") if global_shape is None else ("start", "global_shape")
            )
            raise ValueError(f"global_shape and start go together: got {given} without {missing}")
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
    # The outermost axis that can be cut: what is inside stays whole, so C order is kept.
    at = next(i for i, axis in enumerate(axes) if axis.length > 1)
    length, stride = axes[at]
    inner = math.prod(axis.length for axis in axes[at + 1 :])
    # Parts of about equal length rather than a small remainder; whole blocks where it has some.
    part = math.ceil(length / math.ceil(length / max(1, most // inner)))
    if part > 8:
        part -= part % 8
    for first in range(0, length, part):
        cut = Axis(min(part, length - first), stride)
        yield from _pieces(Piece(base + first * stride, (*axes[:at], cut, *axes[at + 1 :])), most)


def _sequence(value: Any, name: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} has to be a sequence of integers, but got {value!r}")
    try:
        return tuple(value)
    except TypeError:
        raise TypeError(f"{name} has to be a sequence of integers, but got {value!r}") from None


def _index(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool) or _is_symbol(value):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} has to hold integers, but got {value!r}") from None


def _index_or_symbol(value: Any, name: str) -> Any:
    """Return a Python integer, or the value itself if it stands for one that is not known yet."""
    return value if _is_symbol(value) else _index(value, name)


def _is_symbol(value: Any) -> bool:
    """Tell whether a value stands for an integer: an array, or the node of a traced expression."""
    if isinstance(value, int):
        return False
    if hasattr(value, "dtype"):
        return type(value).__module__.partition(".")[0] != "numpy"
    return hasattr(value, "node")


def _lengths(
    shape: Sequence[Any], name: str, convert: Callable[[Any, str], Any] = _index
) -> tuple[Any, ...]:
    lengths = _sequence(shape, name)
    if not set(map(type, lengths)) <= _INTEGER:
        lengths = tuple(convert(n, name) for n in lengths)
    for length in lengths:
        if isinstance(length, int) and length < 0:
            raise ValueError(f"{name} has to hold lengths of 0 or more, but got {lengths}")
    return lengths


def _normalised_axes(axes: Sequence[int], ndim: int) -> frozenset[int]:
    if isinstance(axes, int):
        axes = (axes,)
    given = tuple(_index(axis, "broadcast_axes") for axis in _sequence(axes, "broadcast_axes"))
    for axis in given:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"broadcast_axes has to name axes of the {ndim}-d array, but got {axis}"
            )
    normalised = frozenset(axis % ndim for axis in given)
    if len(normalised) != len(given):
        raise ValueError(f"broadcast_axes has to name each axis once, but got {given}")
    return normalised


def _whole_lengths(
    global_shape: Sequence[int], shape: tuple[Any, ...], broadcast: frozenset[int]
) -> tuple[int, ...]:
    whole = _lengths(global_shape, "global_shape")
    if len(whole) != len(shape):
        raise ValueError(
            f"global_shape has to have one length per axis of shape {shape}, but got {whole}"
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
    given = tuple(_index_or_symbol(s, "start") for s in _sequence(start, "start"))
    if len(given) != len(shape):
        raise ValueError(
            f"start has to have one element per axis of shape {shape}, but got {given}"
        )
    starts = tuple(0 if i in broadcast else s for i, s in enumerate(given))
    for axis, (s, n, whole) in enumerate(zip(starts, shape, total, strict=True)):
        if axis in broadcast or not isinstance(n, int):
            continue
        first = s if isinstance(s, int) else 0
        if first < 0 or first + n > whole:
            raise ValueError(
                f"the window has to lie inside global_shape, but along axis {axis} it runs from "
                f"start {first} over {n} elements, where global_shape has {whole}"
            )
    return starts


def _check_size(shape: tuple[Any, ...], name: str) -> None:
    size = math.prod(shape)
    if isinstance(size, int) and size > _MOST_ELEMENTS:
        raise ValueError(f"{name} has to have at most 2**64 elements, but got {shape}")


def _strides(total: tuple[Any, ...]) -> tuple[Any, ...]:
    strides: list[Any] = []
    stride: Any = 1
    for length in reversed(total):
        strides.append(stride)
        stride = stride * length
    return tuple(reversed(strides))


def _shared(strides: tuple[Any, ...], broadcast: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(0 if i in broadcast else stride for i, stride in enumerate(strides))


def _merged(shape: tuple[Any, ...], total: tuple[int, ...]) -> tuple[Axis, ...]:
    """Merge each axis into the one inside it wherever that one is covered whole."""
    axes = [Axis(1, 1)]
    covered = True
    for length, whole, stride in reversed(list(zip(shape, total, _strides(total), strict=True))):
        if covered:
            axes[0] = Axis(axes[0].length * length, axes[0].stride)
        else:
            axes.insert(0, Axis(length, stride))
        covered = isinstance(length, int) and length == whole
    return tuple(axes)


def noise_shape_axes(
    noise_shape: Sequence[int | None] | None, shape: Sequence[Any]
) -> tuple[int, ...]:
    """Return the broadcast axes that TensorFlow's and Keras' ``noise_shape`` means.

    Parameters
    ----------
    noise_shape : sequence of int or None
        For each axis 1, where one decision is shared, or the array's own length, or None for
        that; a tensor whose value is not known yet stands for it too. Axes that it lacks in front
        are shared, as in broadcasting. None: nothing is shared.
    shape : sequence of int
        The array's shape; a length that is not known yet is not compared.

    Raises
    ------
    TypeError
        If noise_shape is not a sequence of integers and None.
    ValueError
        If it is longer than shape, or a length is neither 1 nor the array's.

    Examples
    --------
    >>> noise_shape_axes((None, 1, 64), (32, 10, 64))
    (1,)
    """
    if noise_shape is None:
        return ()
    shape = tuple(shape)
    given = _sequence(noise_shape, "noise_shape")
    missing = len(shape) - len(given)
    if missing < 0:
        raise ValueError(f"noise_shape has to have at most {len(shape)} axes, but got {given}")
    shared = list(range(missing))
    for axis, (noise, length) in enumerate(zip(given, shape[missing:], strict=True), start=missing):
        if noise is None:
            continue
        if _is_symbol(noise) and not hasattr(noise, "__index__"):
            continue
        noise = operator.index(noise) if _is_symbol(noise) else _index(noise, "noise_shape")
        if noise == 1:
            shared.append(axis)
        elif isinstance(length, int) and noise != length:
            raise ValueError(
                f"noise_shape has to be 1, None or the length of the array along each axis, "
                f"but got {given} for shape {shape}"
            )
    return tuple(shared)
