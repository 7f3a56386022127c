"""Scheduled rates: a drop rate that a program receives as an array, and that may change.

A compiled program contains the arithmetic from the rate to the threshold and the scale. So it
serves every rate. All operations are exact, or rounded once in double precision, and give the bits
of `Rate.from_p`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy

from unidrop.dtypes import dtype_name
from unidrop.library import get_library
from unidrop.protocols import ArrayLibrary
from unidrop.rate import KEEP_NOTHING, Rate

__all__ = ["ScheduledRate", "make_rate"]

_DTYPES = ("float32", "float64")


@dataclass(frozen=True, slots=True)
class ScheduledRate:
    """A rate whose number is in a 0-d array, which a program or a device has.

    It has the interface of `Rate`, as far as it needs no number. A program cannot raise. So an
    array that is not in [0, 1] keeps nothing, and the output is NaN.

    Attributes
    ----------
    array : array or None
        The rate, of shape (); None if it is an operand of a program, and the plan must be hashed.
    scale : float or None
        The scale, if a member of the family has another one than ``1 / (1 - p)``.
    name : str
        The name of the argument in error messages.
    """

    array: Any
    scale: float | None = None
    name: str = "p"

    threshold: ClassVar[None] = None
    is_scheduled: ClassVar[bool] = True
    keeps_nothing: ClassVar[bool] = False  # only the program knows

    @property
    def p(self) -> float:
        """Raise TypeError: a formula needs the number."""
        raise TypeError(
            f"{self.name} must be a Python int or float for this member of the family, because its "
            "formula needs the number now, got an array of a compiled program or of a device"
        )

    def with_array(self, array: Any) -> "ScheduledRate":
        """Return the rate with another array, or with None in place of one."""
        return replace(self, array=array)

    def with_scale(self, scale: float) -> "ScheduledRate":
        """Return the rate of the same decisions with another scale."""
        return replace(self, scale=scale)

    def limits(self, library: ArrayLibrary, device: Any) -> tuple[Any, Any]:
        """Return the threshold in the dtype of a word, and whether any word may be kept.

        A threshold of 2^32 does not fit into a word, and keeps nothing.
        """
        xp, p = self._as_double()
        threshold = xp.round(p * 2.0**32)
        keeps_some = _is_rate(p) & (threshold < float(KEEP_NOTHING))
        threshold = xp.where(keeps_some, threshold, xp.zeros_like(threshold))
        return xp.astype(threshold, library.words.arithmetic(xp, device).dtype), keeps_some

    def keep(self, library: ArrayLibrary, device: Any, decide: Any) -> Any:
        """Return the flags of ``decide`` for the threshold, or False if nothing is kept."""
        threshold, keeps_some = self.limits(library, device)
        return decide(threshold) & keeps_some

    def scale_in(self, dtype: str) -> Any:
        """Return the scale in a compute dtype, as an array unless it is a number."""
        if self.scale is not None:
            return Rate(math.nan, 0, self.scale).scale_in(dtype)
        xp, p = self._as_double()
        return xp.astype(1.0 / (1.0 - p), getattr(xp, dtype), copy=False)

    def fill_in(self, dtype: str) -> Any:
        """Return the value of dropped elements in a compute dtype: 0, or NaN for a bad rate."""
        xp, p = self._as_double()
        zero = xp.zeros_like(p)
        return xp.astype(xp.where(_is_rate(p), zero, zero + math.nan), getattr(xp, dtype))

    def is_zero(self) -> Any:
        """Return whether the rate is 0, and the output the input to the bit."""
        _, p = self._as_double()
        return p == 0

    def _as_double(self) -> tuple[Any, Any]:
        """Return the namespace of the array, and the rate in double precision."""
        xp = get_library(self.array, "p").arrays.namespace(self.array)
        p = xp.astype(self.array, xp.float64, copy=False)
        if dtype_name(p.dtype) != "float64":
            raise TypeError(f"a scheduled rate needs float64, and {xp.__name__} has none here")
        return xp, p


def make_rate(p: Any, x: Any, name: str = "p") -> Rate:
    """Return the rate of a Python number, or of a 0-d array of the library of x.

    Parameters
    ----------
    p : int, float or 0-d array of float32 or float64
        The array stands for its exact value. A value that can be read now is read, as `float` does.
    x : array
        The array to drop elements of, or one like it.
    name : str, default "p"
        The name of the rate in error messages.

    Raises
    ------
    TypeError
        If p is another object.
    ValueError
        If the value is known, and is NaN or outside [0, 1].

    Examples
    --------
    >>> import numpy
    >>> make_rate(numpy.asarray(0.25), numpy.zeros(3)) == Rate.from_p(0.25)
    True
    """
    if type(p) is float or not hasattr(p, "dtype") or isinstance(p, numpy.generic):
        return Rate.from_p(p, name)
    library = get_library(x)
    is_own = hasattr(p, "shape") and get_library(p, name) is library
    if not is_own or dtype_name(p.dtype) not in _DTYPES or tuple(p.shape) != ():
        raise TypeError(
            f"dropout probability {name} must be a Python int or float between 0 and 1, or a 0-d "
            f"array of float32 or float64 of the library of the input, got {p!r} of type "
            f"{type(p).__name__}"
        )
    value = library.arrays.read_rate(p, x, name)
    if isinstance(value, float):
        return Rate.from_p(value, name)
    return ScheduledRate(value, name=name)  # type: ignore[return-value] # it has the interface


def _is_rate(p: Any) -> Any:
    """Return whether an array is in [0, 1], which NaN is not."""
    return (p >= 0.0) & (p <= 1.0)
