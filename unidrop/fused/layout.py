"""How an array lies in memory, and how its mask is numbered there: the axes a kernel goes along."""

from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

__all__ = ["Axis", "Layout", "make_layout", "same_strides"]


class Axis(NamedTuple):
    """An axis: how many elements, how far apart in the mask's numbering and in memory."""

    length: int
    stride: int
    step: int


class Layout(NamedTuple):
    """The axes of an array without gaps, outermost in memory first, and the way along them.

    ``way`` is "rows" where the last axis is numbered one by one. It is "tiles" where that is the
    axis before it, and the last one follows memory.
    """

    way: str
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
        How many elements apart neighbours along each axis are in memory; None means C order.
    strides : tuple of int
        How far apart they are in the mask's numbering; 0 where they share a decision.

    Examples
    --------
    >>> make_layout((2, 3), (3, 1), (3, 1))
    Layout(way='rows', axes=(Axis(length=6, stride=1, step=1),))
    >>> make_layout((2, 3), (1, 2), (3, 1)).way
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
    """Tell whether the steps of two arrays of one shape are the same wherever there is a step.

    Two layouts may be equal where their steps are not: along axes that share a decision.
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
