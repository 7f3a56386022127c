"""Keras on TensorFlow, eager on the CPU: against a multiply and `keras.layers.Dropout`."""

from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from benchmarks.effort import LARGE, MIDDLE, Effort, Shape
from benchmarks.rows import Row, UnavailableError, timed
from benchmarks.targets import faster
from benchmarks.timing import Candidate
from benchmarks.work import SCALE, P, uniform
from unidrop.adapters.keras import Dropout

__all__ = ["rows"]

_OWN = "keras.layers.Dropout"


def rows(effort: Effort) -> Iterator[Row]:
    """Yield the sweep over sizes."""
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise UnavailableError(f"Keras runs on {backend}: set KERAS_BACKEND=tensorflow")
    for shape in effort.shapes:
        targets = (faster(3, "unidrop", _OWN),) if shape in (MIDDLE, LARGE) else ()
        yield Row("keras", "forward", shape, timed(_forward, shape), own=_OWN, targets=targets)


def _forward(shape: Shape) -> Sequence[Candidate]:
    x = tf.constant(uniform(shape))
    ours, own = Dropout(P, seed=42), keras.layers.Dropout(P, seed=42)
    return (
        Candidate("unidrop", lambda step: ours(x, training=True)),
        Candidate("multiply", lambda step: x * SCALE),
        Candidate(_OWN, lambda step: own(x, training=True)),
    )
