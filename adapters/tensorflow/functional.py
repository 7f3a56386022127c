"""`tf.nn.dropout` under a key.

TensorFlow documentation: tf.nn.dropout, tf.nn.experimental.stateless_dropout.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload

import tensorflow as tf

from unidrop.adapters.noise_shape import noise_shape_axes
from unidrop.adapters.numpy.arrays import check_plain
from unidrop.adapters.tensorflow.arrays import LIBRARY, EagerTensor, check_dense
from unidrop.key import Key, check_key
from unidrop.plan import DropoutPlan
from unidrop.schedule import make_rate

__all__ = ["as_tensor", "dropout", "get_axes"]


@overload
def dropout(
    x: Any,
    rate: float | tf.Tensor | tf.Variable,
    noise_shape: Sequence[int | None] | None = ...,
    *,
    key: Key,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[False] = ...,
    name: str | None = ...,
) -> tf.Tensor: ...
@overload
def dropout(
    x: Any,
    rate: float | tf.Tensor | tf.Variable,
    noise_shape: Sequence[int | None] | None = ...,
    *,
    key: Key,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[True],
    name: str | None = ...,
) -> tuple[tf.Tensor, tf.Tensor]: ...
@overload
def dropout(
    x: Any,
    rate: float | tf.Tensor | tf.Variable,
    noise_shape: Sequence[int | None] | None = ...,
    *,
    key: Key,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: bool,
    name: str | None = ...,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]: ...
def dropout(
    x: Any,
    rate: float | tf.Tensor | tf.Variable,
    noise_shape: Sequence[int | None] | None = None,
    *,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    name: str | None = None,
) -> Any:
    """Drop elements with probability rate and scale the rest by 1 / (1 - rate).

    Parameters
    ----------
    x : tf.Tensor
        Any shape of known rank (lengths may be unknown), of a floating-point or complex dtype. Also
        accepts any argument of `tf.convert_to_tensor`.
    rate : int, float, or scalar tf.Tensor or tf.Variable
        The probability of dropping an element, in [0, 1]. A tensor of float32 or float64 stands for
        its exact value. In a graph, a value outside [0, 1] makes the output NaN and the mask False.
        It has no gradient.
    noise_shape : sequence of int or None, optional
        The shape of the mask: for each axis 1, along which elements share one decision, or None or
        x's own length. A length that is unknown during tracing is not compared.
    key : unidrop.Key
        The name of the mask. Inside a `tf.function`, fold the step in as a tensor:
        ``Key(42).fold_in(step)``.
    global_shape, start : sequence of int, optional
        x is the block that begins at ``start`` of an array of shape ``global_shape``, and gets
        exactly that block of the whole mask. Elements of start may be scalar integer tensors; their
        values are not checked.
    return_mask : bool, default False
        If True, the mask is returned too.
    name : str, optional
        The name scope of the operations, in a graph.

    Returns
    -------
    y : tf.Tensor
        Of x's shape and dtype; x itself if rate is 0. The gradient recomputes the mask from the
        key, so nothing is kept for it.
    mask : tf.Tensor of bool
        Only with ``return_mask``: True for kept elements, with length 1 along shared axes.

    Raises
    ------
    TypeError
        If x has an integer or bool dtype, rate is neither a number nor such a tensor, or key is not
        a Key.
    ValueError
        If rate is outside [0, 1], noise_shape does not fit x, or the window does not fit.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import dropout
    >>> dropout(tf.ones(6), 0.5, key=Key(42)).numpy()
    array([2., 0., 0., 0., 0., 2.], dtype=float32)
    """
    with nullcontext() if name is None else tf.name_scope(name):
        x = as_tensor(x)
        check_key(key)
        plan = DropoutPlan.from_args(
            x,
            make_rate(rate, x, "rate"),
            broadcast_axes=get_axes(noise_shape, x),
            global_shape=global_shape,
            start=start,
        )
        return plan.call(x, key, return_mask)


def as_tensor(x: Any) -> Any:
    """Return an argument as a tensor; raises TypeError for arrays that dropout would break."""
    if type(x) is EagerTensor:
        return x
    check_dense(type(x), "x")
    check_plain(type(getattr(x, "_meta", x)), "x")  # the _meta of a Dask array is like its chunks
    return tf.convert_to_tensor(x)


def get_axes(noise_shape: Sequence[int | None] | None, x: Any) -> tuple[int, ...]:
    """Return the axes along which elements share one decision."""
    if noise_shape is None:
        return ()
    return noise_shape_axes(noise_shape, LIBRARY.arrays.shape(x))
