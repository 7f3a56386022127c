"""TensorFlow on the CPU, in each mode, compared with a multiply and with `tf.nn.dropout`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from benchmarks.config import LARGE, MIDDLE, Config, Shape
from benchmarks.fixtures import SCALE, P, key, uniform
from benchmarks.rows import Row, timed
from benchmarks.timing import Candidate
from unidrop.adapters.tensorflow import dropout

__all__ = ["rows"]

_OWN = "tf.nn.dropout"
_COMPILED: dict[str, dict[str, bool]] = {"tf.function": {}, "XLA": {"jit_compile": True}}


def rows(config: Config) -> Iterator[Row]:
    """Yield the sweep over sizes, and the compiled modes for two shapes."""
    for shape in config.shapes:
        yield Row("tensorflow", "forward", shape, timed(_forward, shape), own=_OWN)
    for shape in config.shapes:
        if shape not in (MIDDLE, LARGE):
            continue
        for mode in _COMPILED:
            yield Row("tensorflow", f"forward, {mode}", shape, timed(_compiled, shape, mode))


def _forward(shape: Shape) -> Sequence[Candidate]:
    x = tf.constant(uniform(shape))
    return (
        Candidate("unidrop", lambda step: dropout(x, P, key=key(step))),
        Candidate("multiply", lambda step: x * SCALE),
        Candidate(_OWN, lambda step: tf.nn.dropout(x, P)),
    )


def _compiled(shape: Shape, mode: str) -> Sequence[Candidate]:
    """Return candidates that take the step as an argument, so that no mask is constant."""
    x = tf.constant(uniform(shape))

    def candidate(name: str, function: Callable[[Any, Any], Any]) -> Candidate:
        run = tf.function(function, **_COMPILED[mode])
        return Candidate(name, lambda step: run(x, tf.constant(step, tf.int64)))

    return (
        candidate("unidrop", lambda x, step: dropout(x, P, key=key(step))),
        candidate("multiply", lambda x, step: x * SCALE),
        candidate(_OWN, lambda x, step: tf.nn.dropout(x, P)),
    )
