"""Dropout for TensorFlow: what `tf.nn.dropout` is, under a key.

TensorFlow documentation: tf.nn.dropout, tf.nn.experimental.stateless_dropout.
"""

from collections.abc import Sequence

import tensorflow as tf

from unidrop.dropout import Call
from unidrop.key import Key, check_key
from unidrop.library import library_of
from unidrop.rate import Rate
from unidrop.window import noise_shape_axes

__all__ = ["dropout"]


def dropout(
    x: tf.Tensor,
    rate: float,
    noise_shape: Sequence[int | None] | None = None,
    *,
    key: Key,
) -> tf.Tensor:
    """Drop elements with probability rate and scale the rest by 1 / (1 - rate).

    Parameters
    ----------
    x : tf.Tensor
        Of any shape of known rank (lengths may be unknown), of a floating-point or complex dtype;
        or what `tf.convert_to_tensor` takes.
    rate : int or float
        The probability of dropping an element, in [0, 1].
    noise_shape : sequence of int or None, optional
        For each axis 1, where one decision is shared, or None or x's own length; the latter is
        not compared with a length that is unknown while a function is traced.
    key : unidrop.Key
        The name of the mask. Inside a `tf.function` fold the step in as a tensor:
        ``Key(42).fold_in(step)``.

    Returns
    -------
    tf.Tensor
        Of x's shape and dtype; x itself if rate is 0. The gradient makes the mask again from the
        key, and keeps nothing for it.

    Raises
    ------
    TypeError
        If x has an integer or bool dtype, rate is no Python number, or key no Key.
    ValueError
        If rate is outside [0, 1], or noise_shape does not fit x.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import dropout
    >>> dropout(tf.ones(6), 0.5, key=Key(42)).numpy()
    array([2., 0., 0., 0., 0., 2.], dtype=float32)
    """
    x = tf.convert_to_tensor(x)
    check_key(key)
    axes = noise_shape_axes(noise_shape, library_of(x).shape(x))
    call = Call.of(x, Rate.of(rate, "rate"), broadcast_axes=axes)
    return call.drop(x, key) if call.drops else x
