"""JAX below the adapters: what is traced, and how to build complex arrays."""

from typing import Any

import jax

from unidrop.library import Library

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
