"""Dropout: a mask, a product and a selection.

N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, "Dropout: a simple way
to prevent neural networks from overfitting", JMLR 15 (2014). This is the inverted form, which
scales in training so that evaluation is the identity.
"""

from collections.abc import Sequence
from typing import Any, Literal, SupportsFloat, TypeVar, overload

from unidrop.key import Key, check_key
from unidrop.plan import DropoutPlan
from unidrop.schedule import make_rate

__all__ = ["dropout"]

Array = TypeVar("Array")


@overload
def dropout(
    x: Array,
    p: SupportsFloat,
    key: Key,
    *,
    training: bool = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[False] = ...,
) -> Array: ...
@overload
def dropout(
    x: Array,
    p: SupportsFloat,
    key: Key,
    *,
    training: bool = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[True],
) -> tuple[Array, Any]: ...
@overload
def dropout(
    x: Array,
    p: SupportsFloat,
    key: Key,
    *,
    training: bool = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: bool,
) -> Array | tuple[Array, Any]: ...
def dropout(
    x: Any,
    p: SupportsFloat,
    key: Key,
    *,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop elements of an array with probability p and scale the rest by 1 / (1 - p).

    Parameters
    ----------
    x : array
        Any shape; float16, bfloat16, float32, float64, complex64 or complex128. An array of any
        library that follows the array API standard or has an adapter.
    p : int, float or 0-d array
        The probability of dropping an element, in [0, 1]. A scheduled rate is an array of float32
        or float64 of the library of x, and stands for its exact value. If a compiled program
        receives it, a value outside [0, 1] makes the output NaN and the mask False.
    key : Key
        The name of the mask: the same key drops the same elements in every library. Use each key
        once: fold the site and the step into it.
    training : bool, default True
        If False, x is returned unchanged.
    broadcast_axes : sequence of int, default ()
        Axes along which elements share one decision, and the mask has length 1.
    global_shape, start : sequence of int, optional
        x is the block that begins at ``start`` of an array of shape ``global_shape``, and gets
        exactly that block of the whole mask. Elements of start may be 0-d integer arrays; their
        values are not checked.
    return_mask : bool, default False
        If True, the mask is returned too.

    Returns
    -------
    y : array
        Of x's shape, dtype and device. Kept elements are x times the scale, computed in float32
        (float64 for float64 and complex128) and then rounded to x's dtype. Dropped elements are +0,
        even if x is NaN or infinite there. x itself if p is 0 or training is False.
    mask : array of bool
        Only with ``return_mask``: True for kept elements, with length 1 along ``broadcast_axes``.

    Raises
    ------
    TypeError
        If x is not an array or has an integer or bool dtype, p is neither a number nor such an
        array, or key is not a Key.
    ValueError
        If p is outside [0, 1], an axis does not exist, the window does not fit, or key is a batch
        of keys.
    RuntimeError
        If `force_path` demands fused kernels, and they cannot run.

    Notes
    -----
    The gradient is dropout of the upstream gradient with the same arguments. If the adapter of the
    library defines it, as ours do, the backward pass recomputes the mask from the key and keeps
    nothing of the size of x.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key, dropout
    >>> dropout(numpy.ones(6, dtype="float32"), 0.5, Key(42))
    array([2., 0., 0., 0., 0., 2.], dtype=float32)
    """
    check_key(key)
    plan = DropoutPlan.from_args(
        x,
        make_rate(p, x),
        training=training,
        broadcast_axes=broadcast_axes,
        global_shape=global_shape,
        start=start,
    )
    return plan.call(x, key, return_mask)
