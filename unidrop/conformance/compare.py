"""Compare results bit for bit, with the two exceptions of the output rule.

The payload of a NaN is free. If the input or the product is below the smallest normal number of the
compute type, a zero of the same sign conforms too.
"""

from collections.abc import Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ContractError",
    "check_close",
    "check_equal",
    "check_mask",
    "check_output",
    "check_unchanged",
    "components",
    "differing",
    "numpy_dtype",
]

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}

# An error shows this many elements that differ.
_MAX_SHOWN = 4

# An error names at most this many causes. More would not help the reader.
_MAX_CAUSES = 3


class ContractError(AssertionError):
    """A backend violates a contract.

    Attributes
    ----------
    expected, actual : str
    cause : str
        The mutation that explains the actual result, or several; empty if none does.
    diff : str
        The command that shows more; empty if there is none.
    """

    def __init__(self, expected: str, actual: str, *, cause: str = "", diff: str = "") -> None:
        because = f": {cause}" if cause else ""
        super().__init__(f"expected {expected}, got {actual}{because}")
        self.expected = expected
        self.actual = actual
        self.cause = cause
        self.diff = diff

    def with_causes(self, causes: Sequence[str], diff: str = "") -> Self:
        """Return a copy of the error with its possible causes, or with none if there are many."""
        cause = "; or ".join(causes) if len(causes) <= _MAX_CAUSES else ""
        return type(self)(self.expected, self.actual, cause=cause, diff=diff)


def check_equal(actual: object, expected: object, name: str) -> None:
    """Raise ContractError unless two plain values are equal."""
    if actual != expected:
        raise ContractError(f"{name} {expected}", f"{actual}")


def check_mask(actual: NDArray[Any], expected: NDArray[Any], name: str) -> None:
    """Raise ContractError unless two masks are equal in shape and every element."""
    check_equal(actual.shape, expected.shape, f"{name}: shape")
    wrong = np.flatnonzero(actual != expected)
    if wrong.size:
        shown = wrong[:_MAX_SHOWN]
        raise ContractError(
            f"{name}: keep={expected.ravel()[shown].astype(int).tolist()} "
            f"at flat index {shown.tolist()}",
            f"{actual.ravel()[shown].astype(int).tolist()} "
            f"({wrong.size} of {expected.size} differ)",
        )


def check_close(
    actual: NDArray[Any], expected: NDArray[np.float64], tolerance: float, name: str
) -> None:
    """Raise ContractError unless all elements are close, relative to the largest expected one."""
    check_equal(actual.shape, expected.shape, f"{name}: shape")
    largest = float(np.abs(expected).max(initial=0))
    # A NaN is not close.
    is_close = np.abs(actual.astype(np.float64) - expected) <= tolerance * largest
    wrong = np.flatnonzero(~is_close)
    if wrong.size:
        shown = wrong[:_MAX_SHOWN]
        raise ContractError(
            f"{name}: {expected.ravel()[shown].tolist()} at flat index {shown.tolist()}, within "
            f"{tolerance:g} of the largest",
            f"{actual.ravel()[shown].astype(np.float64).tolist()} "
            f"({wrong.size} of {expected.size} differ)",
        )


def check_output(actual: NDArray[Any], expected: NDArray[Any], x: NDArray[Any], name: str) -> None:
    """Raise ContractError unless an output for x equals the expected one under the output rule."""
    check_equal(actual.shape, expected.shape, f"{name}: shape")
    check_equal(actual.dtype, expected.dtype, f"{name}: dtype")
    _check_none_wrong(differing(actual, expected, x), actual, expected, x, name)


def check_unchanged(actual: NDArray[Any], x: NDArray[Any], name: str) -> None:
    """Raise ContractError unless an array equals x bit for bit, including NaN payloads."""
    check_equal(actual.shape, x.shape, f"{name}: shape")
    check_equal(actual.dtype, x.dtype, f"{name}: dtype")
    wrong = np.flatnonzero(_bits(components(actual)) != _bits(components(x)))
    _check_none_wrong(wrong, actual, x, x, name)


def _check_none_wrong(
    wrong: NDArray[np.int64],
    actual: NDArray[Any],
    expected: NDArray[Any],
    x: NDArray[Any],
    name: str,
) -> None:
    """Raise ContractError if the indices of wrong components are not empty."""
    if wrong.size:
        shown = wrong[:_MAX_SHOWN]
        raise ContractError(
            f"{name}: {_format(components(expected)[shown])} "
            f"for x = {_format(components(x)[shown])} at flat component {shown.tolist()}",
            f"{_format(components(actual)[shown])} ({wrong.size} of {expected.size} differ)",
        )


def differing(actual: NDArray[Any], expected: NDArray[Any], x: NDArray[Any]) -> NDArray[np.int64]:
    """Return the indices of the components that differ under the output rule."""
    return np.flatnonzero(~_conforms(components(actual), components(expected), components(x)))


def _conforms(actual: NDArray[Any], expected: NDArray[Any], x: NDArray[Any]) -> NDArray[np.bool]:
    same = _bits(actual) == _bits(expected)
    both_nan = np.isnan(actual) & np.isnan(expected)
    compute = np.float64 if x.dtype == np.float64 else np.float32
    tiny = np.finfo(compute).tiny
    with np.errstate(invalid="ignore"):  # NumPy warns when it casts a signaling NaN
        magnitude = np.abs(x.astype(np.float64))
    flushed = (magnitude < tiny) & (actual == 0) & (np.signbit(actual) == np.signbit(x))
    conforms: NDArray[np.bool] = same | both_nan | (flushed & (expected != 0))
    return conforms


def components(values: NDArray[Any]) -> NDArray[Any]:
    """Return an array flattened in C order, with real and imaginary parts as two elements."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype.kind == "c":
        return flat.view(np.float32 if flat.dtype == np.complex64 else np.float64)
    return flat


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(_UNSIGNED[values.dtype.itemsize])


def _format(values: NDArray[Any]) -> str:
    """Return decimal values with their bit patterns."""
    digits = 2 * values.dtype.itemsize
    pairs = zip(values, _bits(values), strict=True)
    return "[" + ", ".join(f"{float(v)!r} (0x{int(b):0{digits}x})" for v, b in pairs) + "]"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype with a name; bfloat16 is the dtype of ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
