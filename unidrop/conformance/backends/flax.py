"""Run the `flax.nnx` module, with the call number as the step."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization
from numpy.typing import NDArray

from unidrop import Key
from unidrop.adapters import flax as adapter
from unidrop.adapters.flax import Dropout, dot_product_attention
from unidrop.conformance import eager_modes, missing_eager_modes, use_mode_path
from unidrop.conformance.family import MEMBERS

__all__ = ["Flax"]

_MODES = ("nnx.jit", "nnx.remat")


class Flax:
    """The module in eager mode, in `nnx.jit`, and in `nnx.jit` with `nnx.remat`."""

    name = "flax"
    compiled_modes = _MODES
    devices = ("cpu",)
    step_limit = 1 << 32
    derived_modes: Mapping[str, str] = MappingProxyType({"nnx.remat": "nnx.jit"})
    capabilities: Mapping[str, str | None] = {
        **dict.fromkeys(("broadcast_axes", "gradient", "layer", "layer_gradient", "traces")),
        **dict.fromkeys(("family", "family_gradient")),
        **dict.fromkeys(("attention", "attention_gradient")),
        "attention_windows": "Flax attention has no windows",
        "windows": "a Flax module has no windows",
        "mask": "a Flax module returns only its output",
        "words": "the jax backend tests the words",
        "key": "the core folds the module's key",
        "traced_key": "the module has no step but its call number",
        "layouts": "JAX arrays have no strides",
    }
    members: Mapping[str, str | None] = MappingProxyType(dict.fromkeys(MEMBERS))

    def __init__(self) -> None:
        fused = [mode for mode in eager_modes(jnp.ones(1)) if mode != "eager"]
        self.modes = (*(fused or ["eager"]), *_MODES)
        # In these modes, JAX compiles attention for each shape as nnx.jit does.
        eager = [mode for mode in self.modes if mode not in _MODES]
        same = {"attention": "nnx.jit has the same programs"}
        self.mode_exclusions = dict.fromkeys(eager, same)
        self.missing_modes = missing_eager_modes(jnp.ones(1))
        self._traces = 0
        self._functions = {
            "nnx.jit": nnx.jit(self._count_traces(_call)),
            "nnx.remat": nnx.jit(self._count_traces(nnx.remat(_call))),
        }
        jit = nnx.jit(self._count_traces(_attend), static_argnums=(3, 7))
        self._attend = dict.fromkeys(_MODES, jit)

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return the floating-point dtypes of JAX without x64."""
        return ("float16", "bfloat16", "float32", "complex64")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Convert to a JAX array."""
        # JAX would compile a cast for each shape, so NumPy casts.
        return jax.device_put(x.astype(jax.dtypes.canonicalize_dtype(x.dtype)))

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Convert to a NumPy array."""
        return np.asarray(y)

    def get_device(self, y: Any) -> str:
        """Return the name of the platform."""
        return str(next(iter(y.devices())).platform)

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call a new module with its call number set to the step."""
        return self.run(_make_module(p, seed, step, **options), x, mode)

    def run(self, module: Dropout, x: Any, mode: str) -> Any:
        """Call a module in a mode."""
        with use_mode_path(mode):
            return self._functions.get(mode, _call)(module, x)

    def vjp(self, module: Dropout, x: Any, mode: str) -> tuple[Any, Callable[[Any], Any]]:
        """Call a module in a mode; return the output and the pullback."""
        graph, before = nnx.split(module)

        def pure(v: Any) -> tuple[Any, Any]:
            merged = nnx.merge(graph, before, copy=True)
            return self._functions.get(mode, _call)(merged, v), nnx.state(merged)

        with use_mode_path(mode):
            y, pullback, after = jax.vjp(pure, x, has_aux=True)
        nnx.update(module, after)
        return y, lambda upstream: pullback(upstream)[0]

    def gradient(
        self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str, **options: Any
    ) -> Any:
        """Pull the upstream gradient back through a new module with its call number set."""
        _, pullback = self.vjp(_make_module(p, seed, step, **options), x, mode)
        return pullback(upstream)

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
        is_causal: bool = False,
    ) -> Any:
        """Call the function that attention modules of Flax accept."""
        attend = self._attend.get(mode, _attend)
        with use_mode_path(mode):
            return attend(query, key, value, p, Key(seed), np.uint32(step), mask, is_causal)

    def attention_gradient(
        self, query: Any, key: Any, value: Any, upstream: Any, *arguments: Any, **options: Any
    ) -> Any:
        """Pull the upstream gradient back through the mode's transformation."""

        def attend(*inputs: Any) -> Any:
            return self.attention(*inputs, *arguments, **options)

        with use_mode_path(options["mode"]):
            return jax.vjp(attend, query, key, value)[1](upstream)

    def traces(self, mode: str) -> int:
        """Return the number of traces in all modes."""
        return self._traces

    def layer(self, p: float, seed: int, *, dtype: str, device: str, mode: str) -> "_Layer":
        """Return a module and the mode that runs it."""
        return _Layer(self, Dropout(p, seed=seed), mode)

    def _count_traces(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*args: Any) -> Any:
            self._traces += 1
            return function(*args)

        return traced


class _Layer:
    def __init__(self, backend: Flax, module: Dropout, mode: str) -> None:
        self._backend = backend
        self._module = module
        self._mode = mode

    @property
    def calls(self) -> int:
        return int(self._module.calls)

    @calls.setter
    def calls(self, value: int) -> None:
        self._module.calls = value

    def __call__(self, x: Any, *, training: bool) -> Any:
        self._module.set_attributes(deterministic=not training)
        return self._backend.run(self._module, x, self._mode)

    def save(self) -> bytes:
        saved: bytes = serialization.to_bytes(nnx.to_pure_dict(nnx.state(self._module)))
        return saved

    def load(self, state: bytes) -> None:
        own = nnx.state(self._module)
        pure = serialization.from_bytes(nnx.to_pure_dict(own), state)
        nnx.replace_by_pure_dict(own, pure)
        nnx.update(self._module, own)

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        self._module.train()
        return self._backend.vjp(self._module, x, self._mode)


def _make_module(
    p: Any,
    seed: int,
    step: int,
    *,
    member: str = "dropout",
    training: bool = True,
    broadcast_axes: tuple[int, ...] = (),
    **options: Any,
) -> Dropout:
    """Return a new module of a member with its call number set to the step."""
    if member == "feature_alpha_dropout":
        member, broadcast_axes = "alpha_dropout", (2,)  # of three
    if member == "locked_dropout":
        member, broadcast_axes = "dropout", (options.pop("axis"),)
    if broadcast_axes:
        options["broadcast_dims"] = broadcast_axes
    kind = member.title().replace("_", "")
    module: Dropout = getattr(adapter, kind)(p, deterministic=not training, seed=seed, **options)
    module.calls = step
    return module


def _call(module: Dropout, x: Any) -> Any:
    return module(x)


def _attend(
    query: Any, key: Any, value: Any, p: float, seed: Key, step: Any, mask: Any, is_causal: bool
) -> Any:
    """Call the function on arrays with the axes batch, head, position and feature."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    y = dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=is_causal,
        broadcast_dropout=False,
        dropout_rate=p,
        dropout_rng=seed.fold_in(step),
    )
    return jnp.swapaxes(y, 1, 2)
