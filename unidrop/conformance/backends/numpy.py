"""Run the NumPy functions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import unidrop.adapters.numpy as adapter
from unidrop import Key
from unidrop.conformance import (
    FUSED,
    GENERAL,
    CoreBackend,
    eager_modes,
    missing_eager_modes,
    use_mode_path,
)

__all__ = ["Numpy"]


class Numpy(CoreBackend):
    """NumPy on the portable path and with fused kernels."""

    name = "numpy"
    xp = np
    capabilities: Mapping[str, str | None] = {
        **CoreBackend.core_capabilities,
        **dict.fromkeys(("gradient", "family_gradient", "layouts")),
        "layer": "NumPy has no layers",
        "traced_key": "NumPy has no traced arrays",
    }

    def __init__(self) -> None:
        modes = eager_modes(np.ones(1))
        self.modes = (*modes, GENERAL) if FUSED in modes else modes
        self.missing_modes = missing_eager_modes(np.ones(1))

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return NumPy's floating-point dtypes, and bfloat16 of ml_dtypes."""
        return ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> NDArray[Any]:
        """Return a copy for plain calls, or a read-only view, so that writing to it raises."""
        if mode == FUSED:
            return x.copy()
        x = x.view()
        x.flags.writeable = False
        return x

    def to_numpy(self, y: NDArray[Any]) -> NDArray[Any]:
        """Convert to native byte order."""
        return np.asarray(y, dtype=y.dtype.newbyteorder("="))

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the adapter."""
        with use_mode_path(mode):
            function = getattr(adapter, options.pop("member", "dropout"))
            return function(x, p, key=Key(seed).fold_in(step), **options)

    def gradient(
        self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str, **options: Any
    ) -> Any:
        """Call the backward function."""
        with use_mode_path(mode):
            member = options.pop("member", "dropout")
            if member == "gaussian_noise":  # NumPy users need no function for it
                return upstream
            if member == "patch_dropout":
                options["length"] = x.shape[1]
            function = getattr(adapter, f"{member}_backward")
            return function(upstream, p, key=Key(seed).fold_in(step), **options)

    def layouts(self, x: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Return the layouts that NumPy users meet."""
        padded = np.zeros([2 * n for n in x.shape], dtype=x.dtype)
        padded[(slice(None, None, 2),) * x.ndim] = x
        return {
            "Fortran": np.asfortranarray(x),
            "every second element": padded[(slice(None, None, 2),) * x.ndim],
            "reversed": np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1],
            "swapped bytes": x.astype(x.dtype.newbyteorder()),
        }
