"""How results are compared: to the bit, but for the two freedoms of the output rule.

NaN's payload is free, and where the input or the product is below the compute type's smallest
normal number, a zero of the same sign conforms too. Nothing else may differ.
"""

from collections.abc import Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ContractError",
    "check_equal",
    "check_mask",
    "check_output",
    "check_unchanged",
    "components",
    "differing",
    "numpy_dtype",
]

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_SHOWN = 4

# How many mistakes that what actual does not tell apart are still worth a look.
_CAUSES = 3


class ContractError(AssertionError):
    """A contract that does not hold.

    Attributes
    ----------
    expected, actual : str
    cause : str
        The mistake that explains what actual, or several that do; empty where none is known.
    diff : str
        The command that says more of it; empty where there is none.
    """

    def __init__(self, expected: str, actual: str, *, cause: str = "", diff: str = "") -> None:
        because = f": {cause}" if cause else ""
        super().__init__(f"expected {expected}, but {actual} actual{because}")
        self.expected = expected
        self.actual = actual
        self.cause = cause
        self.diff = diff

    def explained(self, causes: Sequence[str], diff: str = "") -> Self:
        """Return the error with the mistakes that explain it; many together explain nothing."""
        cause = "; or ".join(causes) if len(causes) <= _CAUSES else ""
        return type(self)(self.expected, self.actual, cause=cause, diff=diff)


def check_equal(actual: object, expected: object, what: str) -> None:
    """Raise ContractError unless two plain values are equal."""
    if actual != expected:
        raise ContractError(f"{what} {expected}", f"{actual}")


def check_mask(actual: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Raise ContractError unless two masks are equal in shape and every element."""
    check_equal(actual.shape, expected.shape, f"{what}: shape")
    differing = np.flatnonzero(actual != expected)
    if differing.size:
        shown = differing[:_SHOWN]
        raise ContractError(
            f"{what}: keep={expected.ravel()[shown].astype(int).tolist()} "
            f"at flat index {shown.tolist()}",
            f"{actual.ravel()[shown].astype(int).tolist()} "
            f"({differing.size} of {expected.size} differ)",
        )


def check_output(actual: NDArray[Any], expected: NDArray[Any], x: NDArray[Any], what: str) -> None:
    """Raise ContractError unless an output is, under the output rule, the one expected for x."""
    check_equal(actual.shape, expected.shape, f"{what}: shape")
    check_equal(actual.dtype, expected.dtype, f"{what}: dtype")
    _check_none(differing(actual, expected, x), actual, expected, x, what)


def check_unchanged(actual: NDArray[Any], x: NDArray[Any], what: str) -> None:
    """Raise ContractError unless an array is x to the bit, NaN's payload too."""
    check_equal(actual.shape, x.shape, f"{what}: shape")
    check_equal(actual.dtype, x.dtype, f"{what}: dtype")
    wrong = np.flatnonzero(_bits(components(actual)) != _bits(components(x)))
    _check_none(wrong, actual, x, x, what)


def _check_none(
    wrong: NDArray[np.int64],
    actual: NDArray[Any],
    expected: NDArray[Any],
    x: NDArray[Any],
    what: str,
) -> None:
    """Raise ContractError where a component is wrong."""
    if wrong.size:
        shown = wrong[:_SHOWN]
        raise ContractError(
            f"{what}: {_shown(components(expected)[shown])} "
            f"for x = {_shown(components(x)[shown])} at flat component {shown.tolist()}",
            f"{_shown(components(actual)[shown])} ({wrong.size} of {expected.size} differ)",
        )


def differing(actual: NDArray[Any], expected: NDArray[Any], x: NDArray[Any]) -> NDArray[np.int64]:
    """Return which components of an output are not, under the output rule, those expected."""
    return np.flatnonzero(~_conforms(components(actual), components(expected), components(x)))


def _conforms(actual: NDArray[Any], expected: NDArray[Any], x: NDArray[Any]) -> NDArray[np.bool]:
    same = _bits(actual) == _bits(expected)
    both_nan = np.isnan(actual) & np.isnan(expected)
    compute = np.float64 if x.dtype == np.float64 else np.float32
    tiny = np.finfo(compute).tiny
    with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN all the same
        magnitude = np.abs(x.astype(np.float64))
    flushed = (magnitude < tiny) & (actual == 0) & (np.signbit(actual) == np.signbit(x))
    conforms: NDArray[np.bool] = same | both_nan | (flushed & (expected != 0))
    return conforms


def components(values: NDArray[Any]) -> NDArray[Any]:
    """Return the elements of an array, in C order, complex ones as two."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype.kind == "c":
        return flat.view(np.float32 if flat.dtype == np.complex64 else np.float64)
    return flat


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(_UNSIGNED[values.dtype.itemsize])


def _shown(values: NDArray[Any]) -> str:
    digits = 2 * values.dtype.itemsize
    pairs = zip(values, _bits(values), strict=True)
    return "[" + ", ".join(f"{float(v)!r} (0x{int(b):0{digits}x})" for v, b in pairs) + "]"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name, ml_dtypes' for bfloat16."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
