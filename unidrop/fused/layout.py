"""Layouts: the axes of an array in memory order, with their numbering in the mask."""

from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

__all__ = ["Axis", "Layout", "make_layout", "same_strides"]


class Axis(NamedTuple):
    """An axis: its length, and the distance of its elements in the mask's numbering and in memory."""

    length: int
    stride: int
    step: int


class Layout(NamedTuple):
    """The axes of an array without gaps, outermost in memory first, and their traversal.

    ``traversal`` is "rows" if the numbering advances by one along the last axis. It is "tiles" if
    the numbering advances by one along the axis before the last.
    """

    traversal: str
    axes: tuple[Axis, ...]


@lru_cache(maxsize=4096)
def make_layout(
    shape: tuple[int, ...], steps: tuple[int, ...] | None, strides: tuple[int, ...]
) -> Layout | None:
    """Return the layout of an array, or None if it has gaps, overlaps or negative steps.

    Parameters
    ----------
    shape : tuple of int
        At least one element.
    steps : tuple of int or None
        The distance between neighbors along each axis in memory; None means C order.
    strides : tuple of int
        Their distance in the mask's numbering; 0 if they share a decision.

    Examples
    --------
    >>> make_layout((2, 3), (3, 1), (3, 1))
    Layout(traversal='rows', axes=(Axis(length=6, stride=1, step=1),))
    >>> make_layout((2, 3), (1, 2), (3, 1)).traversal
    'tiles'
    """
    if steps is None:
        steps = _c_order(shape)
    axes = [Axis(*axis) for axis in zip(shape, strides, steps, strict=True) if axis[0] != 1]
    axes.sort(key=attrgetter("step"), reverse=True)
    merged: list[Axis] = []
    filled = 1
    for axis in reversed(axes):
        if axis.step != filled:
            return None
        filled *= axis.length
        inner = merged[-1] if merged else None
        if inner is not None and axis.stride == inner.length * inner.stride:
            merged[-1] = Axis(axis.length * inner.length, inner.stride, inner.step)
        else:
            merged.append(axis)
    return _along(merged[::-1])


@lru_cache(maxsize=4096)
def same_strides(
    shape: tuple[int, ...], a: tuple[int, ...] | None, b: tuple[int, ...] | None
) -> bool:
    """Return whether two arrays of one shape have the same strides along every axis above 1.

    Equal layouts are not enough: axes that share a decision may differ in their strides.
    """
    if a == b:
        return True
    a, b = (_c_order(shape) if steps is None else steps for steps in (a, b))
    return all(n == 1 or i == j for n, i, j in zip(shape, a, b, strict=True))


def _c_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps = [1]
    for length in shape[:0:-1]:
        steps.append(steps[-1] * length)
    return tuple(steps[::-1])[: len(shape)]


def _along(axes: list[Axis]) -> Layout:
    if axes and axes[-1].stride == 1:
        return Layout("rows", tuple(axes))
    counted = next((axis for axis in axes if axis.stride == 1), None)
    if counted is not None:
        axes.remove(counted)
        return Layout("tiles", (*axes[:-1], counted, axes[-1]))
    if axes and axes[-1].stride == 0:
        return Layout("tiles", (*axes[:-1], Axis(1, 1, 0), axes[-1]))
    return Layout("rows", (*axes, Axis(1, 1, 1)))
