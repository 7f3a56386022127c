"""Run the JAX function on arrays sharded over two devices.

The compiler, `jax.shard_map` or `jax.pmap` shards them. JAX has one set of devices per process, so
`subprocess_backends` runs this backend in its own process.
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
from unidrop.adapters.jax.generator import generate_block
from unidrop.conformance import CoreBackend
from unidrop.conformance.backends.jax import call, fold_in, make_step

__all__ = ["JaxOnTwoDevices"]

_DEVICES = 2
_AXIS = "devices"


class JaxOnTwoDevices(CoreBackend):
    """Each device has one half of x along the first axis of even length, or x if there is none."""

    name = "jax-2-devices"
    xp = jnp
    modes = compiled_modes = ("jit", "shard_map", "pmap")
    derived_modes: Mapping[str, str] = MappingProxyType({"pmap": "shard_map"})
    capabilities: Mapping[str, str | None] = {
        **CoreBackend.core_capabilities,
        **dict.fromkeys(("gradient", "traces")),
        **dict.fromkeys(
            ("attention", "attention_gradient", "attention_windows"),
            "the jax backend tests attention, and this one does not shard it",
        ),
        "family_gradient": "the jax backend tests the gradients of members",
        "layer": "JAX has no layers; the flax backend has",
        "layer_gradient": "JAX has no layers; the flax backend has",
        "layouts": "JAX arrays have no strides",
    }

    members: Mapping[str, str | None] = {
        **CoreBackend.members,
        "drop_block": "its scale depends on the whole array, and each device has a part",
    }

    mode_exclusions: Mapping[str, Mapping[str, str]] = {
        "jit": {"patch_dropout": "XLA gathers from two devices by a sum, which turns -0 into +0"},
    }

    def __init__(self) -> None:
        self._mesh = jax.make_mesh((_DEVICES,), (_AXIS,), (jax.sharding.AxisType.Auto,))
        self._traces = 0
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return the floating-point dtypes of JAX without x64."""
        return ("float16", "bfloat16", "float32", "complex64")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Convert to a sharded array."""
        # JAX would compile a cast for each shape, so NumPy casts.
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
        return jax.device_put(x, NamedSharding(self._mesh, _spec(x.shape)))

    def get_device(self, y: Any) -> str:
        """Return the name of the platform."""
        return str(next(iter(y.devices())).platform)

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the function on each shard."""
        static = (mode, p, type(p), tuple(options.items()), x.shape)
        if static not in self._compiled:
            f = self._shard_function(mode, p, options, x.shape)
            self._compiled[static] = self._compile(f, mode, x.shape, arrays=1)
        return self._compiled[static](x, *make_step(seed, step))

    def gradient(self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str) -> Any:
        """Pull the upstream gradient back on each device."""
        static = ("gradient", mode, p, x.shape)
        if static not in self._compiled:
            f = self._shard_function(mode, p, {}, x.shape)

            def pull_back(x: Any, upstream: Any, *key: Any) -> Any:
                return jax.vjp(lambda v: f(v, *key), x)[1](upstream)[0]

            self._compiled[static] = self._compile(pull_back, mode, x.shape, arrays=2)
        return self._compiled[static](x, upstream, *make_step(seed, step))

    def words(self, counter: Sequence[int], key: Sequence[int], *, mode: str) -> list[int]:
        """Run the generator on each device."""
        words = self._replicate(generate_block, mode)(*map(np.uint32, (*counter, *key)))
        return [int(word) for word in words]

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Fold in an array on each device."""
        lo, hi = self._replicate(fold_in, mode)(Key(seed), np.int32(step))
        return int(hi) << 32 | int(lo)

    def traces(self, mode: str) -> int:
        """Return the number of traces; a trace serves all devices."""
        return self._traces

    def _shard_function(
        self, mode: str, p: Any, options: Mapping[str, Any], shape: tuple[int, ...]
    ) -> Callable[..., Any]:
        """Return the function of one device, with a window unless the compiler shards x."""
        axis = _even_axis(shape)

        def traced(x: Any, key: Any, step: Any) -> Any:
            self._traces += 1
            key = key if step is None else key.fold_in(step)
            window = {} if mode == "jit" or axis is None else _shard_window(options, shape, axis)
            return call(x, p, key, {**options, **window})

        return traced

    def _compile(
        self, f: Callable[..., Any], mode: str, shape: tuple[int, ...], arrays: int
    ) -> Callable[..., Any]:
        """Compile a function of a shard, a key and a step for global arrays."""
        if mode == "pmap":
            return _pmap(f, _even_axis(shape), arrays)
        if mode == "shard_map":
            spec = _spec(shape)
            specs = (*(spec,) * arrays, PartitionSpec(), PartitionSpec())
            f = jax.shard_map(f, mesh=self._mesh, in_specs=specs, out_specs=spec)
        compiled: Callable[..., Any] = jax.jit(f)
        return compiled

    def _replicate(self, f: Callable[..., Any], mode: str) -> Callable[..., list[int]]:
        """Return a function that runs f with the same words on every device."""
        static = (mode, f)
        if static not in self._compiled:
            self._compiled[static] = self._compile_replicated(f, mode)
        return lambda *args: list(map(_unique_word, self._compiled[static](*args)))

    def _compile_replicated(self, f: Callable[..., Any], mode: str) -> Callable[..., Any]:
        if mode == "pmap":
            mapped = jax.pmap(f, _AXIS)
            return lambda *args: mapped(*jax.tree.map(lambda v: np.stack([v] * _DEVICES), args))
        replicated = PartitionSpec()
        if mode == "shard_map":
            f = jax.shard_map(f, mesh=self._mesh, in_specs=replicated, out_specs=replicated)
        compiled: Callable[..., Any] = jax.jit(
            f, in_shardings=NamedSharding(self._mesh, replicated)
        )
        return compiled


def _pmap(f: Callable[..., Any], axis: int | None, arrays: int) -> Callable[..., Any]:
    """Return a function that splits its arrays over the devices, or copies them if axis is None."""
    mapped = jax.pmap(f, _AXIS, in_axes=(*(0,) * arrays, None, None))

    def split(x: Any) -> Any:
        whole = np.asarray(x)
        return np.stack([whole] * _DEVICES if axis is None else np.split(whole, _DEVICES, axis))

    def run(*args: Any) -> Any:
        return jax.tree.map(join, mapped(*map(split, args[:arrays]), *args[arrays:]))

    def join(y: Any) -> Any:
        # JAX would join the shards by a sum, which turns -0 into +0.
        shards = [np.asarray(s.data).reshape(y.shape[1:]) for s in y.addressable_shards]
        return jnp.asarray(shards[0] if axis is None else np.concatenate(shards, axis))

    return run


def _unique_word(word: Any) -> int:
    """Return the word that all devices have; raise ValueError if they differ."""
    (number,) = {int(np.asarray(shard.data).item()) for shard in word.addressable_shards}
    return number


def _even_axis(shape: tuple[int, ...]) -> int | None:
    return next((i for i, n in enumerate(shape) if n and n % _DEVICES == 0), None)


def _spec(shape: tuple[int, ...]) -> PartitionSpec:
    axis = _even_axis(shape)
    return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, _AXIS)


def _shard_window(options: Mapping[str, Any], shape: tuple[int, ...], axis: int) -> dict[str, Any]:
    """Return the window of a device's shard, for an array that may be a window itself."""
    start = list(options.get("start", (0,) * len(shape)))
    device = lax.convert_element_type(lax.axis_index(_AXIS), np.uint32)
    start[axis] = np.uint32(start[axis]) + device * np.uint32(shape[axis] // _DEVICES)
    return {"global_shape": options.get("global_shape", shape), "start": tuple(start)}
