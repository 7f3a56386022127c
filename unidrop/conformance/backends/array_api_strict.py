"""Run array-api-strict, which has no function beyond the standard, on two of its devices."""

from collections.abc import Mapping
from typing import Any

import array_api_strict
import numpy as np
from numpy.typing import NDArray

from unidrop.conformance import CoreBackend

__all__ = ["ArrayApiStrict"]


class ArrayApiStrict(CoreBackend):
    """array-api-strict with every optional part of the standard disabled."""

    name = "array-api-strict"
    xp = array_api_strict
    devices = ("CPU_DEVICE", "device1")
    capabilities: Mapping[str, str | None] = {
        **CoreBackend.core_capabilities,
        **dict.fromkeys(("gradient", "family_gradient"), "the standard has no gradients"),
        "layer": "the standard has no layers",
        "layouts": "the standard has no memory layouts",
    }

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return the floating-point dtypes of the standard."""
        return ("float32", "float64", "complex64", "complex128")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Convert to an array on a device."""
        return array_api_strict.asarray(x, device=array_api_strict.Device(device))

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Convert through the CPU, the only device that NumPy can read."""
        return np.asarray(y.to_device(array_api_strict.Device("CPU_DEVICE")))

    def get_device(self, y: Any) -> str:
        """Return the device's name, which only its repr contains."""
        return next(name for name in self.devices if f"'{name}'" in repr(y.device))

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the core with the strictest flags."""
        with array_api_strict.ArrayAPIStrictFlags(
            boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
        ):
            return super().dropout(x, p, seed, step, mode=mode, **options)
