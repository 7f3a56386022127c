"""What the tests of the Keras layers on every backend share: expectations and small models."""

import keras
import numpy as np

import unidrop
from unidrop import Key
from unidrop.adapters.keras import Dropout, SpatialDropout1D, SpatialDropout2D, SpatialDropout3D

__all__ = [
    "BACKEND",
    "LAYERS",
    "SITE",
    "SPATIAL_SHAPES",
    "Record",
    "X",
    "assert_bits",
    "dropped",
    "native",
    "recording",
]

BACKEND = keras.backend.backend()
SITE = Key(42).fold_in("encoder/0")
X = np.random.default_rng(0).standard_normal((4, 10)).astype("float32")


SPATIAL_SHAPES = {
    SpatialDropout1D: (2, 3, 4),
    SpatialDropout2D: (2, 3, 5, 4),
    SpatialDropout3D: (2, 3, 5, 2, 4),
}
LAYERS = [Dropout, *SPATIAL_SHAPES]


def native(layer):
    """Return the Keras layer that one of our layers replaces."""
    return getattr(keras.layers, layer.__name__)


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


@keras.saving.register_keras_serializable(package="tests")
class Record(keras.layers.Layer):
    """Keep the last training batch that passes by."""

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
