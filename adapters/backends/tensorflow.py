"""TensorFlow in the matrix: the functional form, eagerly and in a `tf.function`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from unidrop import Key
from unidrop import dropout as core_dropout
from unidrop.adapters.tensorflow import dropout
from unidrop.conformance import CoreBackend, eager_modes, on_path_of

__all__ = ["TensorFlow"]

_FUNCTION = "tf.function"


class TensorFlow(CoreBackend):
    """TensorFlow on its default device."""

    name = "tensorflow"
    xp = tf
    compiled_modes = (_FUNCTION,)
    abilities: Mapping[str, str | None] = {
        **CoreBackend.core_abilities,
        **dict.fromkeys(("gradient", "traces")),
        "layer": "TensorFlow's layers are Keras'",
        "layouts": "TensorFlow's tensors have no strides",
    }

    def __init__(self) -> None:
        # Each contract compiles anew, of which TensorFlow would warn in the middle of the table.
        tf.get_logger().setLevel("ERROR")
        self.modes = (*eager_modes(tf.ones(1)), _FUNCTION)
        self._traces = 0
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return TensorFlow's floating-point and complex dtypes."""
        return ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Return a tensor."""
        with tf.device(device):
            return tf.constant(x)

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Return a NumPy array."""
        return np.array(y.numpy(), dtype=y.dtype.as_numpy_dtype)

    def device_of(self, y: Any) -> str:
        """Return the device's type."""
        return str(tf.DeviceSpec.from_string(y.device).device_type).lower()

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the functional form; what it does not take is the core's."""
        if mode != _FUNCTION:
            with on_path_of(mode):
                return _call(x, p, Key(seed).fold_in(step), options)
        static = (p, type(p), seed, tuple(options.items()), x.dtype, x.shape.rank)
        if static not in self._compiled:
            self._compiled[static] = tf.function(
                lambda x, step: self._traced(x, p, seed, step, options)
            )
        return self._compiled[static](x, tf.constant(step, tf.uint64))

    def _traced(self, x: Any, p: Any, seed: int, step: Any, options: dict[str, Any]) -> Any:
        self._traces += 1
        return _call(x, p, Key(seed).fold_in(step), options)

    def words(self, counter: Sequence[int], key: Sequence[int], *, mode: str) -> list[int]:
        """Run the generator in its mode."""
        run = tf.function(self._words) if mode == _FUNCTION else self._words
        return [int(word[0]) for word in run(counter, key)]

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Fold a step in, in its mode."""
        run = tf.function(self._folded) if mode == _FUNCTION else self._folded
        lo, hi = run(seed, tf.constant(step, tf.int32))
        return int(hi) << 32 | int(lo)

    def traces(self, mode: str) -> int:
        """Return how often a `tf.function` was traced."""
        return self._traces

    def gradient(self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str) -> Any:
        """Differentiate through a tape, inside the function in its mode."""

        def run(x: Any, upstream: Any, step: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = dropout(x, p, key=Key(seed).fold_in(step))
            return tape.gradient(y, x, upstream)

        with on_path_of(mode):
            return (tf.function(run) if mode == _FUNCTION else run)(x, upstream, tf.constant(step))


def _call(x: Any, p: Any, key: Key, options: dict[str, Any]) -> Any:
    if options:
        return core_dropout(x, p, key, **options)
    return dropout(x, p, key=key)
