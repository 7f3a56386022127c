"""Dask below the adapters: how to build complex arrays, chunk by chunk."""

from typing import Any

import dask.array
import numpy as np
from numpy.typing import NDArray

from unidrop.library import Library

__all__ = ["Dask"]


class Dask(Library):
    """Dask arrays of NumPy chunks."""

    def complex(self, xp: Any, real: Any, imag: Any) -> Any:
        """Return the complex array of two real ones of the same chunks."""
        dtype = np.result_type(real.dtype, np.complex64)
        return dask.array.map_blocks(_joined, real, imag, dtype=dtype)


def _joined(real: NDArray[Any], imag: NDArray[Any]) -> NDArray[Any]:
    z = np.empty(real.shape, dtype=np.result_type(real.dtype, np.complex64))
    z.real, z.imag = real, imag
    return z
