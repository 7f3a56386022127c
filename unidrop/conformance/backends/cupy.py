"""Run CuPy arrays on each GPU; a machine without one skips the backend."""

from collections.abc import Mapping
from typing import Any

import cupy
from numpy.typing import NDArray

from unidrop.conformance import BackendUnavailableError, CoreBackend

__all__ = ["CuPy"]


class CuPy(CoreBackend):
    """CuPy, which computes on the current device; each method sets the device of its input."""

    name = "cupy"
    xp = cupy
    capabilities: Mapping[str, str | None] = {
        **CoreBackend.core_capabilities,
        "layouts": None,
        "gradient": "CuPy has no gradients",
        "layer": "CuPy has no layers",
    }

    def __init__(self) -> None:
        self.devices = tuple(f"cuda:{number}" for number in range(_device_count()))

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return CuPy's floating-point and complex dtypes."""
        return ("float16", "float32", "float64", "complex64", "complex128")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Copy to a GPU."""
        with cupy.cuda.Device(int(device.removeprefix("cuda:"))):
            return cupy.asarray(x)

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Copy to the host explicitly, since CuPy refuses an implicit copy."""
        copied: NDArray[Any] = cupy.asnumpy(y)
        return copied

    def get_device(self, y: Any) -> str:
        """Return the device's name in CUDA."""
        return f"cuda:{y.device.id}"

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the core on the device of x."""
        with x.device:
            return super().dropout(x, p, seed, step, mode=mode, **options)

    def layouts(self, x: Any) -> Mapping[str, Any]:
        """Return the layouts that CuPy users meet."""
        every_second = (slice(None, None, 2),) * x.ndim
        with x.device:
            padded = cupy.zeros([2 * length for length in x.shape], dtype=x.dtype)
            padded[every_second] = x
            return {
                "Fortran": cupy.asfortranarray(x),
                "every second element": padded[every_second],
                "reversed": cupy.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1],
            }


def _device_count() -> int:
    """Return the number of GPUs; raise `BackendUnavailableError` if there is none."""
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailableError(f"CuPy finds no CUDA device ({error})") from None
    if not count:
        raise BackendUnavailableError("CuPy finds no CUDA device")
    return count
