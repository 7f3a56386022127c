"""The ``noise_shape`` of TensorFlow and Keras, as broadcast axes."""

import operator
from collections.abc import Sequence
from typing import Any

from unidrop.arguments import as_tuple, checked_index, is_symbolic

__all__ = ["noise_shape_axes"]


def noise_shape_axes(
    noise_shape: Sequence[int | None] | None, shape: Sequence[Any]
) -> tuple[int, ...]:
    """Return the broadcast axes of a ``noise_shape``, as TensorFlow and Keras define it.

    Parameters
    ----------
    noise_shape : sequence of int or None
        For each axis 1, along which elements share one decision, or the length of the array, or
        None for that length. A tensor of unknown value also means the length. Elements share
        decisions along missing leading axes, as in broadcasting. None shares nothing.
    shape : sequence of int
        The shape of the array. Symbolic lengths are not compared.

    Raises
    ------
    TypeError
        If noise_shape is not a sequence of integers and None.
    ValueError
        If noise_shape is longer than shape, or a length is neither 1 nor the array's.

    Examples
    --------
    >>> noise_shape_axes((None, 1, 64), (32, 10, 64))
    (1,)
    """
    if noise_shape is None:
        return ()
    shape = tuple(shape)
    given = as_tuple(noise_shape, "noise_shape")
    missing = len(shape) - len(given)
    if missing < 0:
        raise ValueError(f"noise_shape must have at most {len(shape)} axes, got {given}")
    shared = list(range(missing))
    for axis, (noise, length) in enumerate(zip(given, shape[missing:], strict=True), start=missing):
        if noise is None:
            continue
        if is_symbolic(noise) and not hasattr(noise, "__index__"):
            continue
        noise = operator.index(noise) if is_symbolic(noise) else checked_index(noise, "noise_shape")
        if noise == 1:
            shared.append(axis)
        elif isinstance(length, int) and noise != length:
            raise ValueError(
                f"noise_shape must be 1, None or the length of the array along each axis, "
                f"got {given} for shape {shape}"
            )
    return tuple(shared)
