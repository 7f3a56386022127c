"""JAX on two devices in the matrix: cut by the compiler, by `jax.shard_map` and by `jax.pmap`.

A process has one set of devices, so these live `elsewhere`, in one of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from unidrop import Key
from unidrop.adapters.jax.arrays import generated
from unidrop.conformance import CoreBackend
from unidrop.conformance.backends.jax import call, folded, make_step

__all__ = ["JaxOnTwoDevices"]

_DEVICES = 2
_AXIS = "devices"


class JaxOnTwoDevices(CoreBackend):
    """Each device has its half of x, along the first axis of even length, if there is one."""

    name = "jax-2-devices"
    xp = jnp
    modes = compiled_modes = ("jit", "shard_map", "pmap")
    derived_modes: Mapping[str, str] = MappingProxyType({"pmap": "shard_map"})
    capabilities: Mapping[str, str | None] = {
        **CoreBackend.core_capabilities,
        **dict.fromkeys(("gradient", "traces")),
        "layer": "JAX has no layers of its own: Flax' are in the matrix",
        "layer_gradient": "JAX has no layers of its own: Flax' are in the matrix",
        "layouts": "JAX arrays have no strides",
    }

    def __init__(self) -> None:
        self._mesh = jax.make_mesh((_DEVICES,), (_AXIS,), (jax.sharding.AxisType.Auto,))
        self._traces = 0
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return the dtypes that JAX has without 64-bit numbers."""
        return ("float16", "bfloat16", "float32", "complex64")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Return an array of which each device has its half."""
        # Cast by NumPy: JAX would compile it for each shape.
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
        return jax.device_put(x, NamedSharding(self._mesh, _spec(x.shape)))

    def get_device(self, y: Any) -> str:
        """Return the platform's name."""
        return str(next(iter(y.devices())).platform)

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the functional form on each device's half."""
        static = (mode, p, type(p), tuple(options.items()), x.shape)
        if static not in self._compiled:
            f = self._on_one(mode, p, options, x.shape)
            self._compiled[static] = self._on_all(f, mode, x.shape, arrays=1)
        return self._compiled[static](x, *make_step(seed, step))

    def gradient(self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str) -> Any:
        """Pull the upstream gradient back on each device."""
        static = ("gradient", mode, p, x.shape)
        if static not in self._compiled:
            f = self._on_one(mode, p, {}, x.shape)

            def pulled(x: Any, upstream: Any, *key: Any) -> Any:
                return jax.vjp(lambda v: f(v, *key), x)[1](upstream)[0]

            self._compiled[static] = self._on_all(pulled, mode, x.shape, arrays=2)
        return self._compiled[static](x, upstream, *make_step(seed, step))

    def words(self, counter: Sequence[int], key: Sequence[int], *, mode: str) -> list[int]:
        """Run the generator on each device."""
        four = self._on_each(generated, mode)(*map(np.uint32, (*counter, *key)))
        return [int(word) for word in four]

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Fold an array in, on each device."""
        lo, hi = self._on_each(folded, mode)(Key(seed), np.int32(step))
        return int(hi) << 32 | int(lo)

    def traces(self, mode: str) -> int:
        """Return how often a function was traced, all devices together being one."""
        return self._traces

    def _on_one(
        self, mode: str, p: Any, options: Mapping[str, Any], shape: tuple[int, ...]
    ) -> Callable[..., Any]:
        """Return what a device does, whose half knows where it lies unless the compiler cuts."""
        axis = _even_axis(shape)

        def traced(x: Any, key: Any, step: Any) -> Any:
            self._traces += 1
            key = key if step is None else key.fold_in(step)
            window = {} if mode == "jit" or axis is None else _half(options, shape, axis)
            return call(x, p, key, {**options, **window})

        return traced

    def _on_all(
        self, f: Callable[..., Any], mode: str, shape: tuple[int, ...], arrays: int
    ) -> Callable[..., Any]:
        """Return the function of whole arrays, and of a key and a step."""
        if mode == "pmap":
            return _by_pmap(f, _even_axis(shape), arrays)
        if mode == "shard_map":
            spec = _spec(shape)
            specs = (*(spec,) * arrays, PartitionSpec(), PartitionSpec())
            f = jax.shard_map(f, mesh=self._mesh, in_specs=specs, out_specs=spec)
        compiled: Callable[..., Any] = jax.jit(f)
        return compiled

    def _on_each(self, f: Callable[..., Any], mode: str) -> Callable[..., list[int]]:
        """Return a function of words as every device computes it from the same."""
        static = (mode, f)
        if static not in self._compiled:
            self._compiled[static] = self._compiled_on_each(f, mode)
        return lambda *args: list(map(_agreed, self._compiled[static](*args)))

    def _compiled_on_each(self, f: Callable[..., Any], mode: str) -> Callable[..., Any]:
        if mode == "pmap":
            mapped = jax.pmap(f, _AXIS)
            return lambda *args: mapped(*jax.tree.map(lambda v: np.stack([v] * _DEVICES), args))
        everywhere = PartitionSpec()
        if mode == "shard_map":
            f = jax.shard_map(f, mesh=self._mesh, in_specs=everywhere, out_specs=everywhere)
        compiled: Callable[..., Any] = jax.jit(
            f, in_shardings=NamedSharding(self._mesh, everywhere)
        )
        return compiled


def _by_pmap(f: Callable[..., Any], axis: int | None, arrays: int) -> Callable[..., Any]:
    """Return the function that gives each device its half of the arrays, or all of them."""
    mapped = jax.pmap(f, _AXIS, in_axes=(*(0,) * arrays, None, None))

    def parts(x: Any) -> Any:
        whole = np.asarray(x)
        return np.stack([whole] * _DEVICES if axis is None else np.split(whole, _DEVICES, axis))

    def run(*args: Any) -> Any:
        return jax.tree.map(whole, mapped(*map(parts, args[:arrays]), *args[arrays:]))

    def whole(y: Any) -> Any:
        # From each device: JAX would join them by a sum, in which -0 becomes +0.
        halves = [np.asarray(s.data).reshape(y.shape[1:]) for s in y.addressable_shards]
        return jnp.asarray(halves[0] if axis is None else np.concatenate(halves, axis))

    return run


def _agreed(word: Any) -> int:
    """Return the word that all devices have."""
    (number,) = {int(np.asarray(shard.data).item()) for shard in word.addressable_shards}
    return number


def _even_axis(shape: tuple[int, ...]) -> int | None:
    return next((i for i, n in enumerate(shape) if n and n % _DEVICES == 0), None)


def _spec(shape: tuple[int, ...]) -> PartitionSpec:
    axis = _even_axis(shape)
    return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, _AXIS)


def _half(options: Mapping[str, Any], shape: tuple[int, ...], axis: int) -> dict[str, Any]:
    """Return the window of a device's half, of an array that may be a window itself."""
    start = list(options.get("start", (0,) * len(shape)))
    device = lax.convert_element_type(lax.axis_index(_AXIS), np.uint32)
    start[axis] = np.uint32(start[axis]) + device * np.uint32(shape[axis] // _DEVICES)
    return {"global_shape": options.get("global_shape", shape), "start": tuple(start)}
