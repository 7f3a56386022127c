"""JAX in the matrix: the functional form, eagerly, compiled and transformed, on one device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from unidrop import Key
from unidrop.adapters.jax import dropout
from unidrop.adapters.jax.arrays import generated
from unidrop.adapters.jax.primitive import programs
from unidrop.conformance import (
    CoreBackend,
    eager_modes,
    missing_eager_modes,
    use_mode_path,
)

__all__ = ["Jax", "call", "folded", "make_step"]

Function = Callable[..., Any]


def _vjp(f: Function) -> Function:
    """Return f as `jax.vjp` computes it."""
    return lambda x, key, step: jax.vjp(lambda v: f(v, key, step), x)[0]


def _vmap(f: Function) -> Function:
    """Return f over a batch of arrays and of steps, the second of which is the one asked for."""

    def mapped(x: Any, key: Any, step: Any) -> Any:
        batch = jax.tree.map(lambda v: jnp.stack([v ^ np.uint32(1), v]), (key, step))
        y = jax.vmap(f)(jnp.stack([jnp.zeros_like(x), x]), *batch)
        return jax.tree.map(lambda v: v[1], y)

    return mapped


def _scan(f: Function) -> Function:
    """Return f in a loop over keys and steps, the second of which is the one asked for."""

    def scanned(x: Any, key: Any, step: Any) -> Any:
        turns = jax.tree.map(lambda v: jnp.stack([v ^ np.uint32(1), v]), (key, step))
        # One array a turn: of one for all turns JAX would sum the gradients, and -0 becomes +0.
        arrays = jnp.stack([jnp.zeros_like(x), x])
        _, y = lax.scan(lambda _, turn: (None, f(*turn)), None, (arrays, *turns))
        return jax.tree.map(lambda v: v[1], y)

    return scanned


#: What becomes of a function of (x, key, step) in a compiled mode, before it is compiled.
_TRANSFORMED: Mapping[str, Callable[[Function], Function]] = {
    "jit": lambda f: f,
    "jit-x64": lambda f: f,
    "vjp": _vjp,
    "vmap": _vmap,
    "scan": _scan,
    "remat": jax.checkpoint,
    "donated": lambda f: f,
}


class Jax(CoreBackend):
    """JAX, in the two worlds that ``jax_enable_x64`` makes, and under its transformations."""

    name = "jax"
    xp = jnp
    # Eager calls too are compiled for each shape, where kernels are not used.
    compiled_modes = ("eager", *_TRANSFORMED)
    capabilities: Mapping[str, str | None] = {
        **CoreBackend.core_capabilities,
        **dict.fromkeys(("gradient", "traces")),
        "layer": "JAX has no layers of its own: Flax' are in the matrix",
        "layer_gradient": "JAX has no layers of its own: Flax' are in the matrix",
        "layouts": "JAX arrays have no strides",
    }
    derived_modes: Mapping[str, str] = dict.fromkeys(("vjp", "scan", "remat", "donated"), "jit")

    def __init__(self) -> None:
        eager = eager_modes(jnp.ones(1))
        x64 = [f"{mode}-x64" for mode in eager if mode != "eager"]
        self.modes = (*eager, *x64, *_TRANSFORMED)
        self.missing_modes = missing_eager_modes(jnp.ones(1))
        self._traces = 0
        self._compiled: dict[Any, Function] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return JAX's floating-point dtypes, the double ones with x64."""
        narrow = ("float16", "bfloat16", "float32", "complex64")
        return (*narrow, "float64", "complex128") if mode.endswith("x64") else narrow

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Return an array with x's dtype as far as the mode has it."""
        with _x64(mode):
            # Cast by NumPy: JAX would compile it for each shape.
            x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
            return jax.device_put(x, jax.devices(device)[0])

    def get_device(self, y: Any) -> str:
        """Return the platform's name."""
        return str(next(iter(y.devices())).platform)

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the functional form in the mode's world."""
        with _x64(mode), use_mode_path(mode):
            if mode not in _TRANSFORMED:
                return call(x, p, Key(seed).fold_in(step), options)
            if mode == "donated":
                x = jnp.array(x)
            return self._in(mode, p, options)(x, *make_step(seed, step))

    def _in(self, mode: str, p: Any, options: Mapping[str, Any]) -> Function:
        static = (mode, p, type(p), tuple(options.items()))
        if static not in self._compiled:
            given = {"donate_argnums": 0} if mode == "donated" else {}
            self._compiled[static] = jax.jit(self._transformed(mode, p, options), **given)
        return self._compiled[static]

    def _transformed(self, mode: str, p: Any, options: Mapping[str, Any]) -> Function:
        def traced(x: Any, key: Key, step: Any) -> Any:
            return call(x, p, key if step is None else key.fold_in(step), options)

        transformed = _TRANSFORMED[mode](traced)

        def counted(*args: Any) -> Any:
            self._traces += 1
            return transformed(*args)

        return counted

    def gradient(self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str) -> Any:
        """Pull the upstream gradient back, through the mode's transformation."""
        with _x64(mode), use_mode_path(mode):
            if mode not in _TRANSFORMED:
                key = Key(seed).fold_in(step)
                return jax.vjp(lambda v: dropout(v, p, key), x)[1](upstream)[0]
            return self._gradient_in(mode, p)(x, upstream, *make_step(seed, step))

    def _gradient_in(self, mode: str, p: float) -> Function:
        static = ("gradient", mode, p, type(p))
        if static not in self._compiled:
            f = self._transformed(mode, p, {})

            def pulled(x: Any, upstream: Any, key: Any, step: Any) -> Any:
                return jax.vjp(lambda v: f(v, key, step), x)[1](upstream)[0]

            given = {"donate_argnums": 0} if mode == "donated" else {}
            self._compiled[static] = jax.jit(pulled, **given)
        return self._compiled[static]

    def traces(self, mode: str) -> int:
        """Return how often a function was traced; an eager one is by `unidrop` itself."""
        return self._traces if mode in _TRANSFORMED else programs()

    def words(self, counter: Sequence[int], key: Sequence[int], *, mode: str) -> list[int]:
        """Run the generator in the mode's world."""
        with _x64(mode):
            four = self._run(generated, "jit")(*map(np.uint32, (*counter, *key)))
            return [int(word) for word in four]

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Fold an array in, in the mode's world."""
        with _x64(mode):
            lo, hi = self._run(folded, mode)(Key(seed), jax.device_put(np.int32(step)))
            return int(hi) << 32 | int(lo)

    def _run(self, function: Function, mode: str) -> Function:
        """Return a function of words as the mode runs it."""
        if mode not in _TRANSFORMED:
            return function
        return self._compiled.setdefault(function, jax.jit(function))


def folded(key: Key, step: Any) -> tuple[Any, Any]:
    """Return the words of a key with a step folded in."""
    return key.fold_in(step).words


def call(x: Any, p: Any, key: Key, options: Mapping[str, Any]) -> Any:
    """Call the functional form, by its own names for the core's options."""
    names = {"broadcast_axes": "broadcast_dims", "training": "deterministic"}
    named = {names.get(name, name): value for name, value in options.items()}
    if "deterministic" in named:
        named["deterministic"] = not named["deterministic"]
    return dropout(x, p, key, **named)


def make_step(seed: int, step: int) -> tuple[Key, Any]:
    """Return the key and the step to be folded into it; one of more than 32 bits has been."""
    if step < 1 << 32:
        return Key(seed), np.uint32(step)
    return Key(seed).fold_in(step), None


@contextmanager
def _x64(mode: str) -> Iterator[None]:
    with jax.enable_x64(mode.endswith("x64")):
        yield
