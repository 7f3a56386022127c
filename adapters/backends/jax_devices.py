"""JAX on two devices in the matrix: cut by the compiler, by `jax.shard_map` and by `jax.pmap`.

A process has one set of devices, so these live in one of their own.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from unidrop.adapters.backends.jax import call, step_of
from unidrop.conformance import CoreBackend, RemoteBackend

__all__ = ["JaxOnTwoDevices"]

_DEVICES = 2
_AXIS = "devices"

_IN_JIT = dict.fromkeys(
    ("mask", "threshold", "broadcast-axes", "windows", "large-mask", "rate", "independence"),
    "XLA compiles each shape and rate anew: all of them are checked under jit",
)


class JaxOnTwoDevices(RemoteBackend):
    """The backend, in a process whose CPU is two devices to JAX."""

    name = "jax-2-devices"
    target = "unidrop.adapters.backends.jax_devices:_TwoDevices"
    environment = MappingProxyType(
        {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={_DEVICES}",
            "JAX_PLATFORMS": "cpu",
        }
    )


class _TwoDevices(CoreBackend):
    """Each device has its half of x, along the first axis of even length, if there is one."""

    name = "jax-2-devices"
    xp = jnp
    modes = compiled_modes = ("jit", "shard_map", "pmap")
    mode_limits: Mapping[str, Mapping[str, str]] = dict.fromkeys(modes, _IN_JIT)
    abilities: Mapping[str, str | None] = {
        **CoreBackend.core_abilities,
        **dict.fromkeys(("gradient", "traces")),
        "mask": "devices would return the mask once each",
        **dict.fromkeys(
            ("words", "key", "traced_key"), "the same as on one device, where it is checked"
        ),
        "layer": "JAX has no layers of its own: Flax' are in the matrix",
        "layer_gradient": "JAX has no layers of its own: Flax' are in the matrix",
        "layouts": "JAX arrays have no strides",
    }

    def __init__(self) -> None:
        self._mesh = jax.make_mesh((_DEVICES,), (_AXIS,), (jax.sharding.AxisType.Auto,))
        self._traces = 0
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return the dtypes of most models; all are compiled on one device."""
        return ("bfloat16", "float32")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Return an array of which each device has its half."""
        return self._placed(jnp.asarray(x, dtype=jax.dtypes.canonicalize_dtype(x.dtype)))

    def _placed(self, x: Any) -> Any:
        return jax.device_put(x, NamedSharding(self._mesh, _spec(x.shape)))

    def device_of(self, y: Any) -> str:
        """Return the platform's name."""
        return str(next(iter(y.devices())).platform)

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the functional form on each device's half."""
        static = (mode, p, type(p), tuple(options.items()), x.shape)
        if static not in self._compiled:
            f = self._on_one(mode, p, options, x.shape)
            self._compiled[static] = self._on_all(f, mode, x.shape, arrays=1)
        return self._compiled[static](x, *step_of(seed, step))

    def gradient(self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str) -> Any:
        """Pull the upstream gradient back on each device."""
        f = self._on_one(mode, p, {}, x.shape)

        def pulled(x: Any, upstream: Any, *key: Any) -> Any:
            return jax.vjp(lambda v: f(v, *key), x)[1](upstream)[0]

        return self._on_all(pulled, mode, x.shape, arrays=2)(x, upstream, *step_of(seed, step))

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


def _by_pmap(f: Callable[..., Any], axis: int | None, arrays: int) -> Callable[..., Any]:
    """Return the function that gives each device its half of the arrays, or all of them."""
    mapped = jax.pmap(f, _AXIS, in_axes=(*(0,) * arrays, None, None))

    def parts(x: Any) -> Any:
        whole = np.asarray(x)
        return np.stack([whole] * _DEVICES if axis is None else np.split(whole, _DEVICES, axis))

    def run(*args: Any) -> Any:
        y = mapped(*map(parts, args[:arrays]), *args[arrays:])
        # From each device: JAX would join them by a sum, in which -0 becomes +0.
        halves = [np.asarray(s.data).reshape(y.shape[1:]) for s in y.addressable_shards]
        return jnp.asarray(halves[0] if axis is None else np.concatenate(halves, axis))

    return run


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
