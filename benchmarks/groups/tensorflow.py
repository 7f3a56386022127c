"""TensorFlow on the CPU, in each mode, compared with a multiply and with `tf.nn.dropout`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from benchmarks.config import LARGE, MIDDLE, Config, Shape
from benchmarks.fixtures import SCALE, P, key, uniform
from benchmarks.rows import Row, timed
from benchmarks.thresholds import faster, not_slower
from benchmarks.timing import Candidate
from unidrop.adapters.tensorflow import dropout

__all__ = ["rows", "with_gradient"]

_OWN = "tf.nn.dropout"


def rows(config: Config) -> Iterator[Row]:
    """Yield the sweep over sizes, and the compiled modes for two shapes."""
    goal = not_slower(_OWN, "unidrop")
    for name, wrap in (("forward", _as_it_is), ("forward + backward", with_gradient)):
        for shape in config.shapes:
            measure = timed(_eager, shape, wrap)
            yield Row("tensorflow", name, shape, measure, own=_OWN, targets=goal)
    for shape in (shape for shape in (MIDDLE, LARGE) if shape in config.shapes):
        measure = timed(_compiled, shape, _as_it_is, {})
        yield Row("tensorflow", "tf.function forward", shape, measure, own=_OWN)
        measure = timed(_compiled, shape, with_gradient, {})
        fast = (faster(2.5, "unidrop", _OWN),)
        name = "tf.function forward + backward"
        yield Row("tensorflow", name, shape, measure, own=_OWN, targets=fast)
    if MIDDLE in config.shapes:
        measure = timed(_compiled, MIDDLE, with_gradient, {"jit_compile": True})
        name = "XLA forward + backward"
        yield Row("tensorflow", name, MIDDLE, measure, own=_OWN, targets=goal)


def with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of x and further arguments that returns the output and the gradient."""

    def both(x: Any, *others: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x, *others)
        return y, tape.gradient(y, x)

    return both


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "unidrop": lambda x, step: dropout(x, P, key=key(step)),
    "multiply": lambda x, step: x * SCALE,
    _OWN: lambda x, step: tf.nn.dropout(x, P),
}


def _eager(shape: Shape, wrap: Callable[..., Any]) -> Sequence[Candidate]:
    x = tf.constant(uniform(shape))

    def candidate(name: str) -> Candidate:
        run = wrap(_FUNCTIONS[name])
        return Candidate(name, lambda step: run(x, step))

    return [candidate(name) for name in _FUNCTIONS]


def _compiled(
    shape: Shape, wrap: Callable[..., Any], options: dict[str, bool]
) -> Sequence[Candidate]:
    """Return candidates that take the step as an argument, so that no mask is constant."""
    x = tf.constant(uniform(shape))

    def candidate(name: str) -> Candidate:
        run = tf.function(wrap(_FUNCTIONS[name]), **options)
        return Candidate(name, lambda step: run(x, tf.constant(step, tf.int64)))

    return [candidate(name) for name in _FUNCTIONS]
