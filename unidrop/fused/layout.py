"""Layouts: the axes of an array in memory order, with their strides in the mask's numbering."""

from functools import lru_cache
from operator import attrgetter
from typing import Literal, NamedTuple

__all__ = ["Axis", "Layout", "make_layout", "same_strides"]


class Axis(NamedTuple):
    """An axis: its length, its stride in the mask's numbering, and its stride in memory."""

    length: int
    mask_stride: int
    stride: int


class Layout(NamedTuple):
    """The axes of an array without gaps, outermost in memory first, and their traversal.

    The traversal is "rows" if the mask stride of the last axis is 1. It is "tiles" if the mask
    stride of the axis before the last is 1.
    """

    traversal: Literal["rows", "tiles"]
    axes: tuple[Axis, ...]


@lru_cache(maxsize=4096)
def make_layout(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, mask_strides: tuple[int, ...]
) -> Layout | None:
    """Return the layout of an array, or None if it has gaps, overlaps or negative strides.

    Parameters
    ----------
    shape : tuple of int
        The lengths of the axes, all above 0.
    strides : tuple of int or None
        The distance between neighbors along each axis in memory, in elements; None means C order.
    mask_strides : tuple of int
        The same distance in the mask's numbering; 0 along a broadcast axis.

    Examples
    --------
    >>> make_layout((2, 3), (3, 1), (3, 1))
    Layout(traversal='rows', axes=(Axis(length=6, mask_stride=1, stride=1),))
    >>> make_layout((2, 3), (1, 2), (3, 1)).traversal
    'tiles'
    """
    if strides is None:
        strides = _get_c_strides(shape)
    axes = [Axis(*axis) for axis in zip(shape, mask_strides, strides, strict=True) if axis[0] != 1]
    axes.sort(key=attrgetter("stride"), reverse=True)
    merged: list[Axis] = []
    filled = 1
    for axis in reversed(axes):
        if axis.stride != filled:
            return None
        filled *= axis.length
        inner = merged[-1] if merged else None
        if inner is not None and axis.mask_stride == inner.length * inner.mask_stride:
            merged[-1] = Axis(axis.length * inner.length, inner.mask_stride, inner.stride)
        else:
            merged.append(axis)
    return _choose_traversal(merged[::-1])


@lru_cache(maxsize=4096)
def same_strides(
    shape: tuple[int, ...], a: tuple[int, ...] | None, b: tuple[int, ...] | None
) -> bool:
    """Return whether two arrays of one shape have the same strides along every axis above 1.

    Equal layouts do not suffice: they ignore the order of neighboring broadcast axes.
    """
    if a == b:
        return True
    a, b = (_get_c_strides(shape) if strides is None else strides for strides in (a, b))
    return all(n == 1 or i == j for n, i, j in zip(shape, a, b, strict=True))


def _get_c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for length in shape[:0:-1]:
        strides.append(strides[-1] * length)
    return tuple(strides[::-1])[: len(shape)]


def _choose_traversal(axes: list[Axis]) -> Layout:
    """Return the layout of merged axes: move the axis of mask stride 1, or add one of length 1."""
    if axes and axes[-1].mask_stride == 1:
        return Layout("rows", tuple(axes))
    counted = next((axis for axis in axes if axis.mask_stride == 1), None)
    if counted is not None:
        axes.remove(counted)
        return Layout("tiles", (*axes[:-1], counted, axes[-1]))
    if axes and axes[-1].mask_stride == 0:
        return Layout("tiles", (*axes[:-1], Axis(1, 1, 0), axes[-1]))
    return Layout("rows", (*axes, Axis(1, 1, 1)))
