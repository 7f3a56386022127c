"""What the tests of the Keras layers on every backend share: expectations and small models."""

import keras
import numpy as np

import unidrop
from unidrop import Key

__all__ = ["BACKEND", "SITE", "Record", "X", "assert_bits", "dropped", "recording"]

BACKEND = keras.backend.backend()
SITE = Key(42).fold_in("encoder/0")
X = np.random.default_rng(0).standard_normal((4, 10)).astype("float32")


def dropped(x, n, rate=0.5, site=SITE, axes=()):
    """Return what training call n makes of an array, by the core's portable path on NumPy."""
    with unidrop.force_path("portable"):
        return unidrop.dropout(x, rate, site.fold_in(n), broadcast_axes=axes)


def assert_bits(actual, expected):
    """Compare a backend's array with NumPy's: shape, dtype and bits."""
    assert keras.backend.standardize_dtype(actual.dtype) == expected.dtype.name
    actual = keras.ops.convert_to_numpy(actual)
    assert actual.shape == expected.shape
    assert actual.astype(expected.dtype).tobytes() == expected.tobytes()


class Record(keras.layers.Layer):
    """Keep the last training batch that actual by."""

    def build(self, input_shape):
        self.seen = self.add_weight(shape=(4, *input_shape[1:]), trainable=False)

    def call(self, inputs, training=False):
        if training:
            self.seen.assign(inputs)
        return inputs


def recording(layer, **options):
    """Return a compiled model that keeps what the layer makes of its training batches of 4."""
    model = keras.Sequential([keras.Input((10,)), layer, Record(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **options)
    return model
