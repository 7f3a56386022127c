"""Validation of arguments: integers, sequences of them, and symbols that stand for them."""

import operator
from typing import Any

import numpy

from unidrop.dtypes import integer_bits

__all__ = [
    "NUMPY_TYPES",
    "as_tuple",
    "checked_axis",
    "checked_index",
    "checked_integer",
    "is_symbolic",
    "register_symbolic_integer",
]

#: Types whose integers can be read now; a tuple, because compilers cannot trace a union of types.
NUMPY_TYPES = (numpy.ndarray, numpy.generic)

_symbolic_integers: list[type] = []


def checked_integer(value: Any, name: str, *, bits: int = 64) -> int:
    """Return the integer in [0, 2^bits) that `operator.index` makes of a value; never wraps.

    Raises
    ------
    TypeError
        If value is not an integer, or is a bool; names the argument.
    ValueError
        If value is negative, or 2^bits or more.

    Examples
    --------
    >>> checked_integer(7, "step")
    7
    """
    try:
        # Arrays of some libraries have an index whatever their dtype is.
        if type(value) is not int and (
            isinstance(value, bool) or integer_bits(getattr(value, "dtype", "int64")) is None
        ):
            raise TypeError
        # A compiler stops treating an integer as variable after operator.index.
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, 0 <= {name} < 2**{bits}, "
            f"got {value!r} of type {type(value).__name__}"
        ) from None
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{name} must be 0 <= {name} < 2**{bits}, got {number}")
    return number


def is_symbolic(value: Any) -> bool:
    """Return whether a value stands for an integer without being one: an array, or a symbol."""
    if isinstance(value, int):
        return False
    if hasattr(value, "dtype"):
        return not isinstance(value, NUMPY_TYPES)
    return isinstance(value, tuple(_symbolic_integers))


def register_symbolic_integer(kind: type) -> None:
    """Let instances of a type stand for integers that are not known yet, such as a batch size."""
    _symbolic_integers.append(kind)


def as_tuple(value: Any, name: str) -> tuple[Any, ...]:
    """Return a sequence as a tuple; raises TypeError that names the argument."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}")
    try:
        return tuple(value)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}") from None


def checked_axis(axis: Any, shape: Any) -> int:
    """Return an axis of an array of a shape, counted from the first.

    Raises
    ------
    TypeError
        If axis is not an integer.
    ValueError
        If the array has no such axis.

    Examples
    --------
    >>> checked_axis(-1, (2, 3))
    1
    """
    ndim = len(shape)
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"axis must be an integer, got {axis!r}")
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis must be an axis of an array of shape {tuple(shape)}, got {axis}")
    return axis % ndim


def checked_index(value: Any, name: str) -> int:
    """Return an element of an argument as an integer; raises TypeError that names the argument."""
    try:
        if isinstance(value, bool) or is_symbolic(value):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must hold integers, got {value!r}") from None
