"""Keras on TensorFlow on the CPU, compared with a multiply and with `keras.layers.Dropout`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from benchmarks.config import LARGE, MIDDLE, Config, Shape
from benchmarks.fixtures import SCALE, P, uniform
from benchmarks.rows import Row, UnavailableError, timed
from benchmarks.thresholds import faster
from benchmarks.timing import Candidate
from unidrop.adapters.keras import Dropout

__all__ = ["rows"]

_OWN = "keras.layers.Dropout"

# For each mode: its shapes, its options, and the target for the speed-up over Keras's own layer.
# With XLA, Keras's own layer takes seconds for a large array.
_COMPILED: dict[str, tuple[tuple[Shape, ...], dict[str, bool], float]] = {
    "tf.function": ((MIDDLE, LARGE), {}, 1.2),
    "XLA": ((MIDDLE,), {"jit_compile": True}, 4),
}


def rows(config: Config) -> Iterator[Row]:
    """Yield the sweep over sizes, and the compiled modes for the shapes with targets."""
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise UnavailableError(f"Keras uses {backend}: set KERAS_BACKEND=tensorflow")
    for shape in config.shapes:
        targets = (faster(3, "unidrop", _OWN),) if shape in (MIDDLE, LARGE) else ()
        yield Row("keras", "forward", shape, timed(_forward, shape), own=_OWN, targets=targets)
    for shape in config.shapes:
        for mode, (shapes, _, factor) in _COMPILED.items():
            if shape not in shapes:
                continue
            goal = (faster(factor, "unidrop", _OWN),)
            forward, both = timed(_compiled, shape, mode), timed(_compiled_both, shape, mode)
            yield Row("keras", f"forward, {mode}", shape, forward, targets=goal)
            yield Row("keras", f"forward + backward, {mode}", shape, both, targets=goal)


def _forward(shape: Shape) -> Sequence[Candidate]:
    x = tf.constant(uniform(shape))
    ours, own = Dropout(P, seed=42), keras.layers.Dropout(P, seed=42)
    return (
        Candidate("unidrop", lambda step: ours(x, training=True)),
        Candidate("multiply", lambda step: x * SCALE),
        Candidate(_OWN, lambda step: own(x, training=True)),
    )


def _compiled(shape: Shape, mode: str) -> Sequence[Candidate]:
    return _candidates(shape, mode, lambda function: function)


def _compiled_both(shape: Shape, mode: str) -> Sequence[Candidate]:
    return _candidates(shape, mode, _with_gradient)


def _candidates(
    shape: Shape, mode: str, wrap: Callable[[Callable[[Any], Any]], Callable[[Any], Any]]
) -> Sequence[Candidate]:
    """Return candidates that keep the step in a layer's state, so that no mask is constant."""
    _, options, _ = _COMPILED[mode]
    x = tf.constant(uniform(shape))
    ours, own = Dropout(P, seed=42), keras.layers.Dropout(P, seed=42)

    def candidate(name: str, function: Callable[[Any], Any]) -> Candidate:
        run = tf.function(wrap(function), **options)
        return Candidate(name, lambda step: run(x))

    return (
        candidate("unidrop", lambda x: ours(x, training=True)),
        candidate("multiply", lambda x: x * SCALE),
        candidate(_OWN, lambda x: own(x, training=True)),
    )


def _with_gradient(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def both(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return y, tape.gradient(y, x)

    return both
