"""Keras on TensorFlow on the CPU, compared with a multiply and with `keras.layers.Dropout`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from benchmarks.config import LARGE, MIDDLE, Config, Shape
from benchmarks.fixtures import SCALE, P, uniform
from benchmarks.groups.tensorflow import with_gradient
from benchmarks.rows import Row, UnavailableError, timed
from benchmarks.thresholds import not_slower
from benchmarks.timing import Candidate
from unidrop.adapters.keras import Dropout

__all__ = ["rows"]

_OWN = "keras.layers.Dropout"

# With XLA, Keras's own layer takes seconds for a large array.
_COMPILED: dict[str, tuple[tuple[Shape, ...], dict[str, bool]]] = {
    "tf.function": ((MIDDLE, LARGE), {}),
    "XLA": ((MIDDLE,), {"jit_compile": True}),
}


def rows(config: Config) -> Iterator[Row]:
    """Yield the sweep over sizes, and the compiled modes for two shapes."""
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise UnavailableError(f"Keras uses {backend}: set KERAS_BACKEND=tensorflow")
    goal = not_slower(_OWN, "unidrop")
    for name, wrap in (("forward", _as_it_is), ("forward + backward", with_gradient)):
        for shape in config.shapes:
            measure = timed(_candidates, shape, wrap)
            yield Row("keras", name, shape, measure, own=_OWN, targets=goal)
    for mode, (shapes, options) in _COMPILED.items():
        for shape in (shape for shape in shapes if shape in config.shapes):

            def compile_both(function: Any, options: dict[str, bool] = options) -> Any:
                return tf.function(with_gradient(function), **options)

            measure = timed(_candidates, shape, compile_both)
            name = f"{mode} forward + backward"
            yield Row("keras", name, shape, measure, own=_OWN, targets=goal)


def _as_it_is(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return function


def _candidates(
    shape: Shape, wrap: Callable[[Callable[[Any], Any]], Callable[[Any], Any]]
) -> Sequence[Candidate]:
    """Return candidates that keep the step in a layer's state, so that no mask is constant."""
    x = tf.constant(uniform(shape))
    ours, own = Dropout(P, seed=42), keras.layers.Dropout(P, seed=42)

    def candidate(name: str, function: Callable[[Any], Any]) -> Candidate:
        run = wrap(function)
        return Candidate(name, lambda step: run(x))

    return (
        candidate("unidrop", lambda x: ours(x, training=True)),
        candidate("multiply", lambda x: x * SCALE),
        candidate(_OWN, lambda x: own(x, training=True)),
    )
