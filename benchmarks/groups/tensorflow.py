"""TensorFlow, eager on the CPU: against a multiply and `tf.nn.dropout`."""

from collections.abc import Iterator, Sequence

import tensorflow as tf

from benchmarks.effort import Effort, Shape
from benchmarks.rows import Row, timed
from benchmarks.timing import Candidate
from benchmarks.work import SCALE, P, key, uniform
from unidrop.adapters.tensorflow import dropout

__all__ = ["rows"]

_OWN = "tf.nn.dropout"


def rows(effort: Effort) -> Iterator[Row]:
    """Yield the sweep over sizes."""
    for shape in effort.shapes:
        yield Row("tensorflow", "forward", shape, timed(_forward, shape), own=_OWN)


def _forward(shape: Shape) -> Sequence[Candidate]:
    x = tf.constant(uniform(shape))
    return (
        Candidate("unidrop", lambda step: dropout(x, P, key=key(step))),
        Candidate("multiply", lambda step: x * SCALE),
        Candidate(_OWN, lambda step: tf.nn.dropout(x, P)),
    )
