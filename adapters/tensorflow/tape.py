"""An operation with its own gradient, for TensorFlow's eager tapes and forward accumulators.

`tf.custom_gradient` does the same, but takes longer than dropout of a small tensor, even if nothing
records the operation. This module uses the function that `tf.custom_gradient` is made of. It is not
public, so a TensorFlow without it keeps to `tf.custom_gradient`.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

try:
    from tensorflow.python.eager.record import (
        could_possibly_record,
        record_operation,
        stop_recording,
    )
except ImportError:
    could_possibly_record = None

__all__ = ["run_with_gradient"]

_EagerTensor = tf.__internal__.EagerTensor


# AutoGraph would convert the core's integers to tensors; tf.map_fn applies it eagerly too.
@tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator] # it has no types
def run_with_gradient(run: Callable[[Any], tuple[Any, Callable[[Any], Any]]], x: Any) -> Any:
    """Return the output of a function of a tensor, recorded with its own gradient.

    Parameters
    ----------
    run : callable
        As `tf.custom_gradient` accepts it: returns a new tensor, and a function from the gradient
        of that tensor to the gradient of x. No tape needs to record its operations.
    x : tensor
    """
    if could_possibly_record is None or type(x) is not _EagerTensor or not tf.executing_eagerly():
        return tf.custom_gradient(run)(x)
    if not could_possibly_record():
        return run(x)[0]
    with stop_recording():
        y, backward = run(x)
    record_operation("UnidropDropout", [y], [x], lambda upstream: [backward(upstream)])
    return y
