"""Run the JAX function in eager mode, compiled, and under transformations, on one device.

The device is the CPU, or a GPU in the backend "jax-cuda", which a machine without one skips.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

import unidrop
from unidrop import Key
from unidrop.adapters import jax as adapter
from unidrop.adapters.jax import dot_product_attention
from unidrop.adapters.jax.generator import generate_block
from unidrop.adapters.jax.primitive import count_programs
from unidrop.conformance import (
    FUSED,
    GENERAL,
    BackendUnavailableError,
    CoreBackend,
    eager_modes,
    missing_eager_modes,
    use_mode_path,
)

__all__ = ["Jax", "JaxOnCuda", "call", "fold_in", "make_step"]

Function = Callable[..., Any]


def _vjp(f: Function) -> Function:
    """Return f evaluated by `jax.vjp`."""
    return lambda x, key, step: jax.vjp(lambda v: f(v, key, step), x)[0]


def _vmap(f: Function) -> Function:
    """Return f over a batch of two examples, and select the second."""

    def mapped(x: Any, key: Any, step: Any) -> Any:
        batch = jax.tree.map(lambda v: jnp.stack([v ^ np.uint32(1), v]), (key, step))
        y = jax.vmap(f)(_stack_zeros(x), *batch)
        return jax.tree.map(lambda v: v[1], y)

    return mapped


def _vmap_shared(f: Function) -> Function:
    """Return f over a batch of two examples with one key, and select the second."""

    def mapped(x: Any, key: Any, step: Any) -> Any:
        y = jax.vmap(lambda v: f(v, key, step))(_stack_zeros(x))
        return jax.tree.map(lambda v: v[1], y)

    return mapped


def _scan(f: Function) -> Function:
    """Return f in a loop of two iterations, and select the second."""

    def scanned(x: Any, key: Any, step: Any) -> Any:
        keys_and_steps = jax.tree.map(lambda v: jnp.stack([v ^ np.uint32(1), v]), (key, step))
        # Each iteration has its own array. For a shared one, JAX would sum the gradients of the
        # iterations, which turns -0 into +0.
        arrays = _stack_zeros(x)
        _, y = lax.scan(lambda _, args: (None, f(*args)), None, (arrays, *keys_and_steps))
        return jax.tree.map(lambda v: v[1], y)

    return scanned


def _stack_zeros(x: Any) -> Any:
    """Return a batch of two for each array of x: zeros, and the array."""
    return jax.tree.map(lambda v: jnp.stack([jnp.zeros_like(v), v]), x)


#: Maps a compiled mode to its transformation of a function of (x, key, step).
_TRANSFORMED: Mapping[str, Callable[[Function], Function]] = {
    "jit": lambda f: f,
    "jit-x64": lambda f: f,
    "jit-portable": lambda f: f,
    "vjp": _vjp,
    "vmap": _vmap,
    "vmap-portable": _vmap,
    "vmap-shared": _vmap_shared,
    "scan": _scan,
    "remat": jax.checkpoint,
    "donated": lambda f: f,
}


#: In these modes, starts of windows are arrays of this dtype. Larger starts stay integers.
_TRACED_STARTS: Mapping[str, Any] = {"jit-x64": np.uint64, "vmap": np.uint32}


def call(x: Any, p: Any, key: Key, options: Mapping[str, Any]) -> Any:
    """Call the JAX function, with its own names for the core's options."""
    names = {"broadcast_axes": "broadcast_dims", "training": "deterministic"}
    renamed = {names.get(name, name): value for name, value in options.items()}
    if "deterministic" in renamed:
        renamed["deterministic"] = not renamed["deterministic"]
    return getattr(adapter, renamed.pop("member", "dropout"))(x, p, key, **renamed)


class Jax(CoreBackend):
    """JAX with and without ``jax_enable_x64``, and under its transformations."""

    name = "jax"
    xp = jnp
    # Without fused kernels, JAX compiles eager calls for each shape too.
    compiled_modes = ("eager", *_TRANSFORMED)
    capabilities: Mapping[str, str | None] = {
        **CoreBackend.core_capabilities,
        **dict.fromkeys(("gradient", "family_gradient", "traces")),
        **dict.fromkeys(("attention", "attention_gradient", "attention_windows")),
        "layer": "JAX has no layers; the flax backend has",
        "layer_gradient": "JAX has no layers; the flax backend has",
        "layouts": "JAX arrays have no strides",
    }
    derived_modes: Mapping[str, str] = {
        **dict.fromkeys(("vjp", "vmap-shared", "scan", "remat", "donated"), "jit"),
        "vmap-portable": "jit-portable",
    }

    def __init__(self) -> None:
        ones = self.from_numpy(np.ones(1), self.devices[0], "eager")
        eager = eager_modes(ones)
        x64 = [f"{mode}-x64" for mode in eager if mode != "eager"]
        general = (GENERAL,) if FUSED in eager else ()
        self.modes = (*eager, *general, *x64, *self.compiled_modes[1:])
        # In these modes, JAX compiles attention for each shape, as if they were compiled ones.
        same = {"attention": "compiled modes have the same programs"}
        windows = {"attention_windows": "jit has them"}
        self.mode_exclusions = {
            **dict.fromkeys(("eager", *x64), same),
            **dict.fromkeys(("jit-x64", "vmap"), windows),
        }
        self.missing_modes = missing_eager_modes(ones)
        self._traces = 0
        self._compiled: dict[Any, Function] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return JAX's floating-point dtypes, with the 64-bit ones if the mode enables x64."""
        narrow = ("float16", "bfloat16", "float32", "complex64")
        return (*narrow, "float64", "complex128") if mode.endswith("x64") else narrow

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Convert to a JAX array, with a narrower dtype if the mode lacks x's."""
        with _x64(mode):
            # JAX would compile a cast for each shape, so NumPy casts.
            x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
            return jax.device_put(x, jax.devices(device)[0])

    def get_device(self, y: Any) -> str:
        """Return the name of the platform."""
        return str(next(iter(y.devices())).platform)

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the function in a mode."""
        with _x64(mode), _path(mode):
            if mode not in _TRANSFORMED:
                return call(x, p, Key(seed).fold_in(step), options)
            if mode == "donated":
                x = jnp.array(x)
            return self._compile(mode, p, options)(x, *make_step(seed, step))

    def _compile(
        self, mode: str, p: Any, options: Mapping[str, Any], function: Function = call
    ) -> Function:
        static = (mode, p, type(p), tuple(options.items()), function)
        if static not in self._compiled:
            jit_options = {"donate_argnums": 0} if mode == "donated" else {}
            transformed = self._transform(mode, p, options, function)
            self._compiled[static] = jax.jit(transformed, **jit_options)
        return self._compiled[static]

    def _transform(
        self, mode: str, p: Any, options: Mapping[str, Any], function: Function
    ) -> Function:
        def drop(x: Any, key: Key, step: Any) -> Any:
            key = key if step is None else key.fold_in(step)
            return function(x, p, key, _trace_start(options, key, mode))

        transformed = _TRANSFORMED[mode](drop)

        def traced(*args: Any) -> Any:
            self._traces += 1
            return transformed(*args)

        return traced

    def gradient(
        self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str, **options: Any
    ) -> Any:
        """Pull the upstream gradient back through the mode's transformation."""
        with _x64(mode), _path(mode):
            if mode not in _TRANSFORMED:
                key = Key(seed).fold_in(step)
                return jax.vjp(lambda v: call(v, p, key, options), x)[1](upstream)[0]
            return self._compile_gradient(mode, p, options)(x, upstream, *make_step(seed, step))

    def _compile_gradient(
        self, mode: str, p: float, options: Mapping[str, Any], function: Function = call
    ) -> Function:
        static = ("gradient", mode, p, type(p), tuple(options.items()), function)
        if static not in self._compiled:
            f = self._transform(mode, p, options, function)

            def pull_back(x: Any, upstream: Any, key: Any, step: Any) -> Any:
                return jax.vjp(lambda v: f(v, key, step), x)[1](upstream)[0]

            jit_options = {"donate_argnums": 0} if mode == "donated" else {}
            self._compiled[static] = jax.jit(pull_back, **jit_options)
        return self._compiled[static]

    def attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        p: float,
        seed: int,
        step: int,
        *,
        mode: str,
        mask: Any = None,
        **options: Any,
    ) -> Any:
        """Call the function in a mode."""
        inputs, function = (query, key, value), _make_attend(mask)
        with _x64(mode), _path(mode):
            if mode not in _TRANSFORMED:
                return function(inputs, p, Key(seed).fold_in(step), options)
            if mode == "donated":
                inputs = jax.tree.map(jnp.array, inputs)
            return self._compile(mode, p, options, function)(inputs, *make_step(seed, step))

    def attention_gradient(
        self,
        query: Any,
        key: Any,
        value: Any,
        upstream: Any,
        p: float,
        seed: int,
        step: int,
        *,
        mode: str,
        mask: Any = None,
        **options: Any,
    ) -> Any:
        """Pull the upstream gradient back through the mode's transformation."""
        inputs, function = (query, key, value), _make_attend(mask)
        with _x64(mode), _path(mode):
            if mode not in _TRANSFORMED:
                name = Key(seed).fold_in(step)
                return jax.vjp(lambda v: function(v, p, name, options), inputs)[1](upstream)[0]
            pull_back = self._compile_gradient(mode, p, options, function)
            return pull_back(inputs, upstream, *make_step(seed, step))

    def traces(self, mode: str) -> int:
        """Return the number of traces; the adapter counts them in eager mode."""
        return self._traces if mode in _TRANSFORMED else count_programs()

    def words(self, counter: Sequence[int], key: Sequence[int], *, mode: str) -> list[int]:
        """Run the generator with the mode's x64 setting."""
        with _x64(mode):
            words = self._jit(generate_block, "jit")(*map(np.uint32, (*counter, *key)))
            return [int(word) for word in words]

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Fold in an array in a mode."""
        with _x64(mode):
            lo, hi = self._jit(fold_in, mode)(Key(seed), jax.device_put(np.int32(step)))
            return int(hi) << 32 | int(lo)

    def _jit(self, function: Function, mode: str) -> Function:
        """Return a compiled function, or the function itself in eager modes."""
        if mode not in _TRANSFORMED:
            return function
        return self._compiled.setdefault(function, jax.jit(function))


class JaxOnCuda(Jax):
    """JAX on the first GPU of CUDA."""

    name = "jax-cuda"
    devices = ("cuda",)
    # There, no program calls kernels, and so all are portable.
    compiled_modes = tuple(mode for mode in Jax.compiled_modes if not mode.endswith("portable"))
    derived_modes: Mapping[str, str] = {
        mode: base for mode, base in Jax.derived_modes.items() if not mode.endswith("portable")
    }

    def __init__(self) -> None:
        try:
            jax.devices("cuda")
        except RuntimeError as error:  # of a platform that JAX does not know, or cannot start
            reason = str(error).splitlines()[0]
            raise BackendUnavailableError(f"JAX finds no CUDA device ({reason})") from None
        super().__init__()

    def get_device(self, y: Any) -> str:
        """Return "cuda" for the platform that JAX calls "gpu"."""
        platform = super().get_device(y)
        return "cuda" if platform == "gpu" else platform


def fold_in(key: Key, step: Any) -> tuple[Any, Any]:
    """Return the words of a key with a step folded in."""
    return key.fold_in(step).words


def _trace_start(options: Mapping[str, Any], key: Key, mode: str) -> Mapping[str, Any]:
    """Return options with arrays as the start of a window; the last one varies with the key."""
    if not options.get("start") or mode not in _TRACED_STARTS:
        return options
    dtype = _TRACED_STARTS[mode]
    largest = np.iinfo(dtype).max
    start = [n if n > largest else jnp.asarray(n, dtype) for n in options["start"]]
    if not isinstance(start[-1], int):
        start[-1] += (key.words[0] ^ key.words[0]).astype(dtype)
    return {**options, "start": tuple(start)}


def _attend(inputs: Any, p: float, key: Key, options: Mapping[str, Any], mask: Any = None) -> Any:
    """Call attention on arrays with the axes batch, head, position and feature."""
    query, keys, values = (jnp.swapaxes(x, 1, 2) for x in inputs)
    # By default, a GPU rounds the factors of products to 10 bits.
    with jax.default_matmul_precision("highest"):
        y = dot_product_attention(
            query, keys, values, mask=mask, dropout_rate=p, dropout_key=key, **options
        )
    return jnp.swapaxes(y, 1, 2)


def _make_attend(mask: Any) -> Function:
    """Return the call of attention with a mask, which is a constant of compiled programs."""
    return _attend if mask is None else partial(_attend, mask=mask)


def make_step(seed: int, step: int) -> tuple[Key, Any]:
    """Return a key and the step to fold in; a step of more than 32 bits is folded in already."""
    if step < 1 << 32:
        return Key(seed), np.uint32(step)
    return Key(seed).fold_in(step), None


def _path(mode: str) -> AbstractContextManager[None]:
    """Return a context that forces the portable path, if the mode is for it."""
    return unidrop.force_path("portable") if mode.endswith("portable") else use_mode_path(mode)


@contextmanager
def _x64(mode: str) -> Iterator[None]:
    with jax.enable_x64(mode.endswith("x64")):
        yield
