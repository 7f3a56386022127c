"""Arrays of the core's tests: NumPy, and array-api-strict at its strictest, on the portable path.

Nothing here imports a framework; the tests in tests/adapters run the frameworks' arrays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import array_api_strict
import ml_dtypes
import numpy as np
import reference

import unidrop
from unidrop import Key

__all__ = [
    "BFLOAT16",
    "DTYPES",
    "KEY",
    "SITE",
    "SPACES",
    "Space",
    "assert_mask",
    "assert_output",
    "expected_mask",
    "patterns",
    "special_values",
]

SITE = Key(42).fold_in("encoder/0")
KEY = SITE.fold_in(7)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "complex128")
} | {"bfloat16": BFLOAT16}
STRICTEST = {"boolean_indexing": False, "data_dependent_shapes": False, "enabled_extensions": ()}
CPU = array_api_strict.Device("CPU_DEVICE")


@dataclass(frozen=True)
class Space:
    """A namespace under test, on one of its devices."""

    xp: Any
    dtypes: tuple[str, ...] = tuple(DTYPES)
    device: Any = None
    integer: str = "int64"  # the widest that it has

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Forbid what is not in the standard, and the kernels."""
        flags = array_api_strict.ArrayAPIStrictFlags(**STRICTEST)
        with flags, unidrop.force_path("portable"):
            yield

    def array(self, array: Any) -> Any:
        """Return a NumPy array as one of the namespace."""
        return self.xp.asarray(np.asarray(array), device=self.device)

    def scalar(self, value: int) -> Any:
        """Return a 0-d integer array."""
        return self.array(np.asarray(value, self.integer))

    def numpy(self, array: Any) -> np.ndarray:
        """Return the values and dtype of an array."""
        return np.asarray(array if self.xp is np else array.to_device(CPU))


SPACES = {
    "numpy": Space(np),
    # array-api-strict has no 16-bit floats.
    "strict": Space(array_api_strict, ("float32", "float64", "complex64", "complex128")),
    "strict-32": Space(
        array_api_strict,
        ("float32", "complex64"),
        array_api_strict.Device("no_x64"),
        integer="int32",
    ),
}


def expected_mask(shape: Any, p: float, key: Any = KEY, **options: Any) -> np.ndarray:
    """Return the mask of the specification as a NumPy array."""
    keep = reference.keep_mask(shape, p, int(key), **options)
    axes = options.get("broadcast_axes", ())
    return np.reshape(np.asarray(keep, bool), reference.mask_shape(shape, axes))


def patterns(array: Any) -> np.ndarray:
    """Return the bit patterns of an array's real components, flat and in logical order."""
    array = np.ascontiguousarray(array).reshape(-1)
    if array.dtype.kind == "c":
        array = array.view(f"f{array.dtype.itemsize // 2}")
    return array.view(f"u{array.dtype.itemsize}")


def special_values(name: str) -> np.ndarray:
    """Return the zeros, least, greatest, infinite and NaN of a dtype, and ordinary values."""
    form = reference.component_format(name)
    ends = [0, 1, form.normal - 1, form.normal, form.infinity - 1, form.infinity, form.nan]
    signed = [pattern | sign for sign in (0, form.sign) for pattern in ends]
    component = np.dtype(reference.COMPONENTS.get(name, "float32")).itemsize
    width = component if name in reference.COMPONENTS else DTYPES[name].itemsize
    ordinary = np.random.default_rng(0).standard_normal(39).astype(DTYPES[name])
    return np.concatenate([np.asarray(signed * 6, f"u{width}").view(DTYPES[name]), ordinary])


def assert_mask(actual: np.ndarray, expected: np.ndarray, about: str = "") -> None:
    """Compare NumPy's masks: shape, dtype and decisions."""
    assert actual.dtype == bool
    np.testing.assert_array_equal(actual, expected, strict=True, err_msg=about)


def assert_output(
    y: np.ndarray, x: np.ndarray, keep: np.ndarray, p: float, *, flushes: bool = False
) -> None:
    """Compare an output with the specification: bit for bit, but for NaN's payload.

    If subnormals may be flushed, a zero of the same sign passes for a value that depends on one.
    """
    name = x.dtype.name
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    bits, actual = patterns(x).tolist(), patterns(y).tolist()
    keep = np.broadcast_to(keep, x.shape).reshape(-1).tolist()
    expected = reference.dropout_bits(bits, name, keep, p)
    form = reference.component_format(name)
    for before, got, wanted in zip(bits, actual, expected, strict=True):
        magnitudes = [pattern & ~form.sign for pattern in (got, wanted)]
        if min(magnitudes) > form.infinity:
            continue
        small = min(before & ~form.sign, magnitudes[1]) < form.normal
        if flushes and name != "float16" and small and got == wanted & form.sign:
            continue
        assert f"{got:#x}" == f"{wanted:#x}", f"for x = {before:#x}"
