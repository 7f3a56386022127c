"""DropHead for NumPy, and its backward pass."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike, NDArray

from unidrop.adapters.numpy.family import _run, _run_backward
from unidrop.adapters.numpy.functional import Rng
from unidrop.drop_head import plan_drop_head
from unidrop.key import Key

__all__ = ["drop_head", "drop_head_backward"]


def drop_head(
    x: ArrayLike,
    p: float | NDArray[Any] = 0.5,
    *,
    axis: int,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Drop whole heads of attention, which are the elements along an axis.

    `unidrop.family.drop_head` has the details. The other parameters, returns and errors are as in
    `dropout`; ValueError if x has no such axis.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import drop_head
    >>> drop_head(np.ones((2, 3, 1, 1)), 0.5, axis=1, key=Key(42))[:, :, 0, 0]
    array([[2., 0., 0.],
           [0., 0., 2.]])
    """
    options: dict[str, Any] = {"axis": axis, "training": training}
    options |= {"global_shape": global_shape, "start": start}
    return _run(plan_drop_head, x, p, key, rng, return_mask, out, **options)


def drop_head_backward(
    grad: ArrayLike,
    p: float | NDArray[Any] = 0.5,
    *,
    axis: int,
    key: Key | None = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `drop_head`; arguments as there and in `dropout_backward`."""
    options: dict[str, Any] = {"axis": axis, "training": training}
    options |= {"global_shape": global_shape, "start": start}
    return _run_backward(plan_drop_head, grad, p, key, out, **options)
