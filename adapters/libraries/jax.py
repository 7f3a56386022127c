"""JAX below the adapters: what is traced, how to build complex arrays, where one lies in memory."""

from typing import Any

import jax
import numpy as np

from unidrop.adapters.libraries.numpy import address_of, aligned_like, memory_of
from unidrop.library import Library, Memory

__all__ = ["Jax"]


class Jax(Library):
    """JAX arrays and tracers."""

    def device(self, x: Any) -> None:
        """Leave placement to JAX: what is uncommitted goes where x is, also under a trace."""
        return

    def is_traced(self, x: Any) -> bool:
        """Tell a tracer from an array that has its values."""
        return isinstance(x, jax.core.Tracer)

    def complex(self, xp: Any, real: Any, imag: Any) -> Any:
        """Return ``jax.lax.complex``."""
        return jax.lax.complex(real, imag)

    def memory(self, x: Any) -> Memory | str:
        """Return where an array on the first device of the CPU lies."""
        devices = x.devices()
        if devices != {jax.devices()[0]}:
            return "it is not on JAX's first device alone, where its output would be"
        if jax.devices()[0].platform != "cpu":
            return f"it is on {jax.devices()[0]}, and kernels are for the CPU"
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            return f"{x.dtype} is a dtype that JAX does not have here and now"
        return memory_of(np.asarray(x))

    def output_like(self, x: Any) -> tuple[np.ndarray[Any, Any], Memory]:
        """Return a NumPy array, which becomes JAX's."""
        y = aligned_like(np.asarray(x))
        return y, Memory(address_of(y), None)

    def finished(self, output: np.ndarray[Any, Any], x: Any) -> Any:
        """Return an array in the same memory, or a copy where JAX can't use that."""
        return jax.device_put(output, x.sharding if x.committed else None)

    def from_numpy(self, mask: np.ndarray[Any, Any], device: Any) -> Any:
        """Return an array in the same memory, or a copy where JAX can't use that."""
        return jax.device_put(mask)
