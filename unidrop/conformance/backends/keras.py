"""Keras in the matrix: the layer, in each way that the backend of this process runs one.

Keras has one backend a process, so the others' columns run `elsewhere`.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from threading import get_ident
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from unidrop.adapters.keras import Dropout
from unidrop.conformance import eager_modes, missing_eager_modes, use_mode_path
from unidrop.conformance.backends.keras_modes import (
    DERIVED,
    FITS,
    LIMITS,
    MISSING,
    REMATERIALISED,
    UNFIT,
    compiled_modes,
    get_scope,
    graphs,
    made_in_mode,
    make_tensor,
)

__all__ = ["Keras"]

_NO_GRADIENT = "Keras' NumPy backend has no gradient"


class Keras:
    """The Keras layer, whose call number is the step."""

    name = "keras"
    devices = ("cpu",)
    step_limit = 1 << 31
    capabilities: Mapping[str, str | None] = {
        **dict.fromkeys(("broadcast_axes", "gradient", "layer", "layer_gradient", "traces")),
        "windows": "a Keras layer has no windows",
        "mask": "a Keras layer returns its output alone",
        "words": "the layer's words are those of its backend",
        "key": "the layer takes a key that the core has folded",
        "traced_key": "the layer's call number is the only step it takes",
        "layouts": "Keras has no layouts: its backends' own columns have theirs",
    }

    def __init__(self) -> None:
        self._backend = keras.backend.backend()
        self.compiled_modes = compiled_modes()
        self.derived_modes = DERIVED.get(self._backend, {})
        fits = () if self._backend == "numpy" else FITS[self._backend]
        eager = eager_modes(keras.ops.ones(1))
        self.modes = tuple(dict.fromkeys((*eager, *self.compiled_modes, *fits)))
        self.mode_exclusions = {**dict.fromkeys(fits, UNFIT), **LIMITS.get(self._backend, {})}
        ones = keras.ops.ones(1)
        self.missing_modes = {**MISSING[self._backend], **missing_eager_modes(ones)}
        if self._backend == "numpy":
            lacking = dict.fromkeys(("gradient", "layer_gradient"), _NO_GRADIENT)
            self.capabilities = {**self.capabilities, **lacking}
        else:
            self.modes = (*self.modes, REMATERIALISED)
        if not self.compiled_modes:
            self.capabilities = {**self.capabilities, "traces": "it only runs eagerly"}
        self._traces = 0
        self._layers: dict[Any, Any] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return the dtypes of Keras' policies."""
        if self._backend == "torch" and mode == "fit":
            # Keras' trainer there makes float32 of bfloat16 and back, which changes NaN's bits.
            return ("float16", "float32", "float64")
        narrow = ("float16", "bfloat16", "float32")
        # JAX has float64 only where it is told to.
        return narrow if self._backend == "jax" else (*narrow, "float64")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Return a tensor."""
        return make_tensor(x)

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Return a NumPy array."""
        name = keras.backend.standardize_dtype(y.dtype)
        # Keras can't convert TensorFlow's bfloat16 scalars.
        plain = y.numpy() if self._backend == "tensorflow" else keras.ops.convert_to_numpy(y)
        return np.array(plain, dtype=_numpy_dtype(name))

    def get_device(self, y: Any) -> str:
        """Return the device: no backend is given another here."""
        return "cpu"

    def dropout(
        self,
        x: Any,
        p: Any,
        seed: int,
        step: int,
        *,
        mode: str,
        training: bool = True,
        broadcast_axes: tuple[int, ...] = (),
    ) -> Any:
        """Call a layer whose call number is set to the step."""
        rank = len(x.shape)
        shared = {axis % rank for axis in broadcast_axes}
        noise_shape = tuple(1 if axis in shared else None for axis in range(rank))
        layer = self._layer(p, seed, noise_shape if shared else None, x, mode)
        layer.calls = step
        try:
            with use_mode_path(mode):
                return layer(x, training=training)
        except BaseException:
            # Keras on JAX may have left it without its state.
            self._layers = {key: kept for key, kept in self._layers.items() if kept is not layer}
            raise

    def _layer(self, p: Any, seed: int, noise_shape: Any, x: Any, mode: str) -> Any:
        # A layer's call number is its state, so each thread has layers of its own.
        dtype = keras.backend.standardize_dtype(x.dtype)
        key = (p, type(p), seed, noise_shape, dtype, mode, get_ident())
        if key not in self._layers:
            policy = dtype if dtype in self.dtypes("eager") else "float32"
            with self.scope(mode):
                layer = Dropout(p, noise_shape, seed=seed, dtype=policy, autocast=False)
            self._layers[key] = self.made(layer, mode)
        return self._layers[key]

    def scope(self, mode: str) -> AbstractContextManager[Any]:
        """Return the context in which a mode's layers are made."""
        return get_scope(mode)

    def made(self, layer: Dropout, mode: str) -> Any:
        """Return what runs a layer in a mode."""
        return made_in_mode(layer, mode, self.count)

    def count(self) -> None:
        """Count a trace."""
        self._traces += 1

    def traces(self, mode: str) -> int:
        """Return how often a function around a layer was traced."""
        return graphs() if self._backend == "torch" else self._traces

    def gradient(self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str) -> Any:
        """Differentiate a call of the layer."""
        layer = self._layer(p, seed, None, x, mode)
        layer.calls = step
        with use_mode_path(mode):
            _, pullback = layer.vjp(x)
            return pullback(upstream)

    def layer(self, p: float, seed: int, *, dtype: str, device: str, mode: str) -> "_Model":
        """Return a layer, in a model that saves its weights."""
        with self.scope(mode):
            layer = Dropout(p, seed=seed, dtype=dtype, autocast=False)
        return _Model(layer, self.made(layer, mode), mode)


class _Model:
    def __init__(self, layer: Dropout, run: Any, mode: str) -> None:
        self._model = keras.Sequential([keras.Input((None,)), layer])
        self._run = run
        self._mode = mode

    @property
    def calls(self) -> int:
        calls: int = self._run.calls
        return calls

    @calls.setter
    def calls(self, value: int) -> None:
        self._run.calls = value

    def __call__(self, x: Any, *, training: bool) -> Any:
        with use_mode_path(self._mode):
            return self._run(x, training=training)

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        with use_mode_path(self._mode):
            y, pullback = self._run.vjp(x)
        return y, lambda upstream: self._pulled_back(pullback, upstream)

    def _pulled_back(self, pullback: Callable[[Any], Any], upstream: Any) -> Any:
        with use_mode_path(self._mode):
            return pullback(upstream)

    def save(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.weights.h5")
            self._model.save_weights(path)
            return path.read_bytes()

    def load(self, state: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.weights.h5")
            path.write_bytes(state)
            self._model.load_weights(path)


def _numpy_dtype(name: str) -> Any:
    if name != "bfloat16":
        return name
    import ml_dtypes

    return ml_dtypes.bfloat16
