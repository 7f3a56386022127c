"""JAX in the matrix: the core on JAX arrays, with 64-bit integers and without."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from numpy.typing import NDArray

from unidrop.conformance import CoreBackend, eager_modes

__all__ = ["Jax"]


class Jax(CoreBackend):
    """JAX, in the two worlds that ``jax_enable_x64`` makes."""

    name = "jax"
    xp = jnp
    abilities: Mapping[str, str | None] = {
        **CoreBackend.core_abilities,
        "gradient": "JAX has no adapter yet",
        "layer": "JAX has no adapter yet",
        "layouts": "JAX arrays have no strides",
    }

    def __init__(self) -> None:
        self.modes = tuple(name + x64 for name in eager_modes(jnp.ones(1)) for x64 in ("", "-x64"))

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return JAX's floating-point dtypes; the double ones need x64."""
        narrow = ("float16", "bfloat16", "float32", "complex64")
        return (*narrow, "float64", "complex128") if mode.endswith("x64") else narrow

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Return an array with x's dtype as far as the mode has it."""
        with _x64(mode):
            dtype = jax.dtypes.canonicalize_dtype(x.dtype)
            return jnp.asarray(x, dtype=dtype, device=jax.devices(device)[0])

    def device_of(self, y: Any) -> str:
        """Return the platform's name."""
        return str(next(iter(y.devices())).platform)

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the core in the mode's world."""
        with _x64(mode):
            return super().dropout(x, p, seed, step, mode=mode, **options)

    def words(self, counter: Any, key: Any, *, mode: str) -> list[int]:
        """Run the generator in the mode's world."""
        with _x64(mode):
            return super().words(counter, key, mode=mode)

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Fold an array in, in the mode's world."""
        with _x64(mode):
            return super().traced_key(seed, step, mode=mode)


@contextmanager
def _x64(mode: str) -> Iterator[None]:
    with jax.enable_x64(mode.endswith("x64")):
        yield
