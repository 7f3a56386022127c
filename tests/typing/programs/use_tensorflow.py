"""Uses the TensorFlow adapter."""

from typing import assert_type

import tensorflow as tf

import unidrop
from unidrop import Key
from unidrop.adapters.tensorflow import dropout

key = Key(42)
x = tf.ones((2, 3))


def drop(return_mask: bool) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """Return the output, and the mask too if requested."""
    return dropout(x, 0.1, key=key, return_mask=return_mask)


assert_type(dropout(x, 0.1, key=key), tf.Tensor)
assert_type(dropout(x, 0.1, (None, 1), key=key, name="first"), tf.Tensor)
assert_type(dropout(x, 0.1, key=key, global_shape=(4, 3), start=(2, 0)), tf.Tensor)
assert_type(dropout(x, 0.1, key=key, return_mask=True), tuple[tf.Tensor, tf.Tensor])
assert_type(unidrop.adapters.tensorflow.dropout(x, 0.1, key=key), tf.Tensor)

dropout(x, 0.1)  # type: ignore
dropout(x, 0.1, key=42)  # type: ignore
