"""Keras in the matrix: the layer on the TensorFlow backend, eagerly and in a `tf.function`."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import get_ident
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from unidrop.adapters.keras import Dropout
from unidrop.conformance import eager_modes, on_path_of

__all__ = ["Keras"]

_FUNCTION = "tf.function"


class Keras:
    """The Keras layer, whose call number is the step."""

    name = "keras"
    compiled_modes = (_FUNCTION,)
    devices = ("cpu",)
    step_limit = 1 << 31
    missing_modes: Mapping[str, str] = {
        "RematScope": "Keras' rematerialisation calls a layer again, which draws a new seed: the "
        "gradient is by another mask, or there is an error, as with keras.layers.Dropout"
    }
    mode_limits: Mapping[str, Mapping[str, str]] = MappingProxyType({})
    abilities: Mapping[str, str | None] = {
        **dict.fromkeys(("broadcast_axes", "gradient", "layer", "layer_gradient", "traces")),
        "windows": "a Keras layer has no windows",
        "mask": "a Keras layer returns its output alone",
        "words": "the layer's words are those of its backend",
        "key": "the layer takes a key that the core has folded",
        "traced_key": "the layer's call number is the only step it takes",
        "layouts": "TensorFlow's tensors have no strides",
    }

    def __init__(self) -> None:
        if keras.backend.backend() != "tensorflow":
            raise ImportError(
                "the matrix runs Keras on TensorFlow, but its backend is "
                f"{keras.backend.backend()}: set KERAS_BACKEND=tensorflow"
            )
        # Each contract compiles anew, of which TensorFlow would warn in the middle of the table.
        tf.get_logger().setLevel("ERROR")
        self.modes = (*eager_modes(tf.ones(1)), _FUNCTION)
        self._traces = 0
        self._layers: dict[Any, tuple[Dropout, Callable[..., Any]]] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return the dtypes of Keras' policies."""
        return ("float16", "bfloat16", "float32", "float64")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Return a tensor."""
        return tf.constant(x)

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Return a NumPy array."""
        return np.array(y.numpy(), dtype=y.dtype.as_numpy_dtype)

    def device_of(self, y: Any) -> str:
        """Return the device's type."""
        return str(tf.DeviceSpec.from_string(y.device).device_type).lower()

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
        shared = {axis % x.shape.rank for axis in broadcast_axes}
        noise_shape = tuple(1 if axis in shared else None for axis in range(x.shape.rank))
        layer, function = self._layer(p, seed, noise_shape if shared else None, x.dtype.name)
        layer.calls = step
        with on_path_of(mode):
            return (function if mode == _FUNCTION else layer)(x, training=training)

    def _layer(
        self, p: Any, seed: int, noise_shape: Any, dtype: str
    ) -> tuple[Dropout, Callable[..., Any]]:
        # A layer's call number is its state, so each thread has layers of its own.
        key = (p, type(p), seed, noise_shape, dtype, get_ident())
        if key not in self._layers:
            policy = dtype if dtype in self.dtypes("eager") else "float32"
            layer = Dropout(p, noise_shape, seed=seed, dtype=policy, autocast=False)
            self._layers[key] = layer, tf.function(self._counted(layer))
        return self._layers[key]

    def _counted(self, layer: Dropout) -> Callable[..., Any]:
        def call(x: Any, training: bool) -> Any:
            self._traces += 1
            return layer(x, training=training)

        return call

    def traces(self, mode: str) -> int:
        """Return how often a `tf.function` around a layer was traced."""
        return self._traces

    def gradient(self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str) -> Any:
        """Differentiate through a tape."""
        layer, function = self._layer(p, seed, None, x.dtype.name)
        layer.calls = step
        with on_path_of(mode):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = (function if mode == _FUNCTION else layer)(x, training=True)
            return tape.gradient(y, x, upstream)

    def layer(self, p: float, seed: int, *, dtype: str, device: str, mode: str) -> "_Model":
        """Return a layer, in a model that saves its weights."""
        return _Model(p, seed, dtype, mode, self._counted)


class _Model:
    def __init__(
        self,
        p: float,
        seed: int,
        dtype: str,
        mode: str,
        counted: Callable[[Dropout], Callable[..., Any]],
    ) -> None:
        self._layer = Dropout(p, seed=seed, dtype=dtype, autocast=False)
        self._model = keras.Sequential([keras.Input((None,)), self._layer])
        self._call = tf.function(counted(self._layer)) if mode == _FUNCTION else self._layer
        self._mode = mode

    @property
    def calls(self) -> int:
        return self._layer.calls

    @calls.setter
    def calls(self, value: int) -> None:
        self._layer.calls = value

    def __call__(self, x: Any, *, training: bool) -> Any:
        with on_path_of(self._mode):
            return self._call(x, training=training)

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        with on_path_of(self._mode), tf.GradientTape() as tape:
            tape.watch(x)
            y = self._call(x, training=True)

        def pullback(upstream: Any) -> Any:
            with on_path_of(self._mode):
                return tape.gradient(y, x, upstream)

        return y, pullback

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
