"""Uses the Keras adapter."""

from typing import assert_type

import keras
import numpy as np

import unidrop
from unidrop import Key
from unidrop.adapters.keras import Dropout, SpatialDropout1D, SpatialDropout2D, assign_seeds

layer = Dropout(0.1, noise_shape=(None, 1), seed=42, name="first")
assert_type(layer, Dropout)
assert_type(layer.calls, int)
assert_type(layer.seed, Key | None)
layer.calls = 7
layer.calls = np.int64(7)
assert_type(SpatialDropout1D(0.1, Key(42)).calls, int)
assert_type(SpatialDropout2D(0.1, "channels_last", 42).seed, Key | None)
assert_type(unidrop.adapters.keras.Dropout(0.1).calls, int)
assert_type(assign_seeds(layer, 42), Dropout)
assign_seeds(keras.Sequential([layer]), Key(42))

layer.calls = "7"  # type: ignore
Dropout(0.1, seed="42")  # type: ignore
assign_seeds(layer, "42")  # type: ignore
