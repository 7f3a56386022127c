"""DropBlock: drop contiguous blocks of feature maps, and scale by the exact count of the rest.

The member is a plan. An ordinary mask keeps or drops the first corner of each block, and a block is
the corner and its neighbors. Counts are integers, so outputs are equal in every library.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from unidrop.arguments import as_tuple, checked_index, is_symbolic
from unidrop.dtypes import compute_dtype
from unidrop.key import Key, check_key
from unidrop.mask import constant_mask, portable_mask
from unidrop.output import select
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.window import Window

__all__ = ["DropBlockPlan", "check_block_size", "drop_block", "plan_drop_block"]


class _CountedRate(Rate):
    """A rate whose scale is an array of the compute dtype."""

    @property
    def keeps_nothing(self) -> bool:
        return False

    def scale_in(self, dtype: str) -> Any:
        return self.scale


@dataclass(frozen=True, slots=True)
class DropBlockPlan(DropoutPlan):
    """A plan whose window and rate are the ones of the corners of blocks.

    Along ``axes``, the window is shorter than the array by ``block_size - 1``.
    """

    axes: tuple[int, ...]
    block_size: int

    has_kernels: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = False

    def mask(self, x: Any, key: Key) -> Any:
        """Return the mask of a key for x, of x's shape."""
        # Not `super`, which a class with slots loses.
        return self._spread(x, DropoutPlan.mask(self, x, key))

    def ones(self, x: Any) -> Any:
        """Return the mask of a call that drops nothing."""
        arrays = self.library.arrays
        window = Window(arrays.shape(x))
        return constant_mask(arrays.namespace(x), window, True, arrays.device(x))

    def run(self, x: Any, key: Key, mask: Any = None, out: Any = None) -> Any:
        """Compute the output under a key; ``out`` is an array to write and return."""
        y = self.select(x, self.mask(x, key) if mask is None else mask)
        if out is None:
            return y
        self.library.buffers.copy_into(out, y)
        return out

    def run_portable(self, x: Any, key: Key) -> Any:
        """Compute the output of an array that is not empty by the operations of its library."""
        device = self.library.arrays.device(x)
        corners = self.mask_of_corners(x, key, device)
        return self.select(x, self._spread(x, corners))

    def mask_of_corners(self, x: Any, key: Key, device: Any) -> Any:
        """Return the mask of the corners by portable operations."""
        if self.rate.threshold == 0:
            return constant_mask(self.library.arrays.namespace(x), self.window, True, device)
        if self.rate.keeps_nothing:
            return constant_mask(self.library.arrays.namespace(x), self.window, False, device)
        return portable_mask(self.library, x, key, self.window, self.rate, device)

    def select(self, x: Any, mask: Any) -> Any:
        """Return x times the number of elements over the number of kept ones, or +0."""
        arrays = self.library.arrays
        xp, device = arrays.namespace(x), arrays.device(x)
        dtype = getattr(xp, compute_dtype(x.dtype))
        counts = self.library.words.arithmetic(xp, device).dtype
        size = math.prod(arrays.shape(x))
        kept = xp.sum(xp.astype(mask, counts))
        kept = kept + xp.astype(kept == 0, counts)  # nothing is kept, and nothing is scaled
        if isinstance(size, int):
            total = xp.full((), float(size), dtype=dtype, device=device)
        elif hasattr(size, "dtype"):
            total = xp.astype(size, dtype)
        else:  # a symbol
            total = xp.zeros((), dtype=dtype, device=device) + size
        ratio = total / xp.astype(kept, dtype)
        return select(self.library, x, mask, _CountedRate(math.nan, 0, ratio))

    def _spread(self, x: Any, corners: Any) -> Any:
        """Return the mask of x's shape from the mask of the corners."""
        xp = self.library.arrays.namespace(x)
        device = self.library.arrays.device(x)
        for axis in self.axes:
            shape = list(self.library.arrays.shape(corners))
            shape[axis] = self.block_size - 1
            border = xp.ones(tuple(shape), dtype=xp.bool, device=device)
            corners = xp.concat([border, corners, border], axis=axis)
            # An element is dropped if one of the block_size corners before it is. Each step doubles
            # the number of corners.
            width = 1
            while width < self.block_size:
                step = min(width, self.block_size - width)
                corners = _cut(corners, axis, step, None) & _cut(corners, axis, 0, -step)
                width += step
        return corners


def _cut(array: Any, axis: int, start: int, stop: int | None) -> Any:
    """Return a part of an array along one axis."""
    return array[(*(slice(None),) * axis, slice(start, stop), ...)]


def check_block_size(block_size: Any) -> int:
    """Return a block size as an integer; raises TypeError and ValueError."""
    size = checked_index(block_size, "block_size")
    if size < 1:
        raise ValueError(f"block_size must be at least 1, got {size}")
    return size


def plan_drop_block(
    x: Any,
    rate: Rate,
    *,
    block_size: int,
    axes: Sequence[int],
    clip: bool = False,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    name: str = "x",
) -> DropoutPlan:
    """Return the plan of `drop_block`.

    If ``clip``, a block that does not fit is as large as fits. Windows are refused, because the
    scale depends on the whole array.
    """
    if global_shape is not None or start is not None:
        raise ValueError(
            "drop_block has no windows, because its scale depends on the mask of the whole array: "
            "pass the whole array, without global_shape and start"
        )
    size = check_block_size(block_size)
    plan = DropoutPlan.from_args(x, rate, training=training, name=name)
    shape = plan.library.arrays.shape(x)
    spatial = _normalize_axes(axes, len(shape))
    lengths = [shape[axis] for axis in spatial]
    if any(not isinstance(n, int) or is_symbolic(n) for n in lengths):
        raise ValueError(f"{name} must have known lengths along axes {spatial}, got {x.shape}")
    if clip:
        size = min(size, *lengths)
    elif size > min(lengths):
        raise ValueError(
            f"block_size must be at most the lengths along axes {spatial}, {tuple(lengths)}, got "
            f"{size}"
        )
    corners = list(shape)
    for axis in spatial:
        corners[axis] = max(0, shape[axis] - size + 1)
    if not plan.drops or 0 in lengths or rate.p == 1:  # corners at 1 would leave some elements
        return plan
    places = math.prod([corners[axis] for axis in spatial])
    gamma = rate.p * math.prod(lengths) / (size ** len(spatial) * places)
    window = Window.from_args(tuple(corners))
    return DropBlockPlan(plan.library, window, Rate.from_p(gamma), True, spatial, size)


def _normalize_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    given = tuple(checked_index(axis, "axes") for axis in as_tuple(axes, "axes"))
    if not given:
        raise ValueError("axes must name at least one axis, got ()")
    for axis in given:
        if not -ndim <= axis < ndim:
            raise ValueError(f"axes must name axes of the {ndim}-d array, got {axis}")
    normalized = tuple(sorted({axis % ndim for axis in given}))
    if len(normalized) != len(given):
        raise ValueError(f"axes must name each axis once, got {given}")
    return normalized


def drop_block(
    x: Any,
    p: float,
    key: Key,
    *,
    block_size: int,
    axes: Sequence[int],
    training: bool = True,
    return_mask: bool = False,
) -> Any:
    """Drop blocks of neighboring elements, such that a share of about p is dropped.

    Parameters
    ----------
    x : array
        Feature maps, such as images of shape ``(N, C, H, W)``; dtypes and libraries as in
        `dropout`.
    p : int or float
        The share of elements to drop, in [0, 1]. Blocks overlap, so the share is a little smaller.
    key : Key
        The name of the mask. Use each key once.
    block_size : int
        The length of a block along each of the axes.
    axes : sequence of int
        The axes of a block, such as ``(2, 3)`` for ``(N, C, H, W)``. Along the other axes, blocks
        are independent.
    training, return_mask
        As in `dropout`.

    Returns
    -------
    y : array
        Of x's shape and dtype. Kept elements are scaled by the number of all elements over the
        number of kept ones.
    mask : array of bool
        Only with ``return_mask``: True for kept elements, of x's shape.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if a block does not fit, or an axis does not exist.

    Notes
    -----
    G. Ghiasi et al., "DropBlock: a regularization method for convolutional networks", NeurIPS 2018.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import drop_block
    >>> x = numpy.ones((1, 1, 4, 5))
    >>> y, mask = drop_block(x, 0.3, Key(42), block_size=2, axes=(2, 3), return_mask=True)
    >>> mask[0, 0].astype(int)
    array([[1, 1, 1, 1, 1],
           [0, 0, 1, 1, 1],
           [0, 0, 1, 1, 1],
           [1, 1, 1, 1, 1]])
    """
    check_key(key)
    options: dict[str, Any] = {"block_size": block_size, "axes": axes, "training": training}
    return plan_drop_block(x, Rate.from_p(p), **options).call(x, key, return_mask)
