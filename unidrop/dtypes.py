"""Dtypes by name: every library has its own dtype objects, and some lack bfloat16."""

from functools import lru_cache
from typing import Any

import numpy

__all__ = ["COMPUTE_DTYPES", "DTYPES", "ITEM_SIZES", "compute_dtype", "dtype_name", "integer_bits"]

#: The real dtype for the product of an array's components with the scale, by the array's dtype.
COMPUTE_DTYPES = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex64": "float32",
    "complex128": "float64",
}

#: The bytes of an element of an array or a mask, by its dtype.
ITEM_SIZES = {
    "bool": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

#: The dtypes that dropout supports.
DTYPES = tuple(COMPUTE_DTYPES)

_INTEGERS = {f"{sign}int{bits}": bits for sign in ("", "u") for bits in (8, 16, 32, 64)}


def dtype_name(dtype: Any) -> str:
    """Return the standard's name of a dtype.

    Examples
    --------
    >>> import numpy
    >>> dtype_name(numpy.dtype(">f4"))
    'float32'
    """
    if isinstance(dtype, numpy.dtype):
        return _get_numpy_name(dtype)
    name = getattr(dtype, "name", None)
    return name if isinstance(name, str) else str(dtype).rpartition(".")[2]


@lru_cache(maxsize=64)
def _get_numpy_name(dtype: Any) -> str:
    """Return the name of a NumPy dtype, cached, because NumPy builds it at every access."""
    name: str = dtype.name
    return name


def compute_dtype(dtype: Any, name: str = "x") -> str:
    """Return the name of the real dtype for the product of an array's components with the scale.

    Raises
    ------
    TypeError
        If dropout does not support the dtype; names the argument.

    Examples
    --------
    >>> import numpy
    >>> compute_dtype(numpy.dtype("float16"))
    'float32'
    """
    try:
        return COMPUTE_DTYPES[dtype_name(dtype)]
    except KeyError:
        raise TypeError(
            f"{name} must be of a floating-point dtype ({', '.join(COMPUTE_DTYPES)}), got {dtype}"
        ) from None


def integer_bits(dtype: Any) -> int | None:
    """Return the width of an integer dtype; None for any other.

    Examples
    --------
    >>> import numpy
    >>> integer_bits(numpy.dtype("uint8")), integer_bits(numpy.dtype("bool"))
    (8, None)
    """
    return _INTEGERS.get(dtype_name(dtype))
