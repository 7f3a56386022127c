"""Bad arguments of the Keras layers: what Keras raises, or an error that names the argument."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras_models import LAYERS, SITE, SPATIAL_SHAPES, X, assert_bits, dropped, native

from unidrop.adapters import keras_backend
from unidrop.adapters.keras import Dropout, SpatialDropout2D, SpatialDropout3D


def get_error(make, *args, **kwargs):
    """Return the type and message of a call's exception."""
    try:
        made = make(*args, **kwargs)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    return pytest.fail(f"raised nothing and returned {made}")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rate", [-0.1, 1.1, 2, float("nan"), float("inf")])
def test_rejects_rate_outside_0_and_1_as_keras_does(layer, rate):
    assert get_error(layer, rate) == get_error(native(layer), rate)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rate", [True, "0.5", None, np.float32(0.1), tf.constant(0.1)], ids=repr)
def test_rejects_non_python_rate(layer, rate):
    with pytest.raises(TypeError, match=rf"probability rate .*got {re.escape(repr(rate))}"):
        layer(rate)


@pytest.mark.parametrize("layer", LAYERS)
def test_explains_what_to_pass_instead_of_tensor_rate(layer):
    with pytest.raises(TypeError, match=r"pass a Python float"):
        layer(tf.constant(0.1))


@pytest.mark.parametrize(
    "noise_shape", ["10", 10, 1.5, (1.5, 10), (0, 10), (-1, 10), ("a",)], ids=repr
)
def test_rejects_bad_noise_shape_as_keras_does(noise_shape):
    assert get_error(Dropout, 0.5, noise_shape) == get_error(keras.layers.Dropout, 0.5, noise_shape)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("arguments", [{"units": 3}, {"name": 3}, {"dtype": "float7"}], ids=str)
def test_rejects_other_arguments_as_keras_does(layer, arguments):
    assert get_error(layer, 0.5, **arguments) == get_error(native(layer), 0.5, **arguments)


@pytest.mark.parametrize("layer", [SpatialDropout2D, SpatialDropout3D])
def test_rejects_bad_data_format_as_keras_does(layer):
    expected = get_error(native(layer), 0.5, data_format="channels")
    assert get_error(layer, 0.5, data_format="channels") == expected


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("seed", ["42", 1.0, 1.5, (1, 2), np.int64(3), b"1"], ids=repr)
def test_rejects_non_seed_as_keras_does(layer, seed):
    with pytest.raises(ValueError, match="seed") as of_keras:
        native(layer)(0.5, seed=seed)
    start, end = str(of_keras.value).split(". ")
    with pytest.raises(ValueError, match=rf"^{re.escape(start)}.*\. {re.escape(end)}$"):
        layer(0.5, seed=seed)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("seed", [True, -1, 2**64], ids=repr)
@pytest.mark.parametrize("rate", [0, 0.5])
def test_rejects_seed_outside_64_bits(layer, seed, rate):
    with pytest.raises(ValueError, match=rf"seed.*{seed}"):
        layer(rate, seed=seed)


@pytest.mark.parametrize("noise_shape", [(3, 10), (4, 9), (1, 4, 10)], ids=str)
def test_rejects_noise_shape_that_does_not_fit_uncounted(noise_shape):
    layer = Dropout(0.5, noise_shape, seed=SITE)
    with pytest.raises(ValueError, match=rf"noise_shape must .*{re.escape(str(noise_shape))}"):
        layer(X, training=True)
    assert layer.calls == 0


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (2**31, ValueError),
        (True, TypeError),
        (1.0, TypeError),
        ("5", TypeError),
        (None, TypeError),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rate", [0, 0.5])
def test_rejects_bad_call_number_and_keeps_old(rate, value, error):
    layer = Dropout(rate, seed=SITE)
    with pytest.raises(error, match=rf"^calls must be .*{value}"):
        layer.calls = value
    assert layer.calls == 0


@pytest.mark.parametrize("layer", LAYERS)
def test_rejects_wrong_rate_that_is_set(layer):
    made, never = layer(0.5, seed=SITE), layer(0)
    for wrong, error in ((1.5, ValueError), (float("nan"), ValueError), (True, TypeError)):
        with pytest.raises(error, match=rf"rate .* between 0 and 1.* got {wrong}"):
            made.rate = wrong
    with pytest.raises(ValueError, match=r"rate must stay 0 .* got 0.5"):
        never.rate = 0.5
    assert (made.rate, never.rate) == (0.5, 0)


def test_keeps_calls_while_rate_is_0():
    layer = Dropout(0.5, seed=SITE)
    layer(X, training=True)
    layer.rate, layer.calls = 0, 5
    assert_bits(layer(X, training=True), X)
    assert layer.calls == 5
    layer.rate = 0.5
    assert_bits(layer(X, training=True), dropped(X, 5))


@pytest.mark.parametrize("layer", list(SPATIAL_SHAPES))
def test_rejects_input_of_another_rank_as_keras_does(layer):
    made = layer(0.5, seed=SITE, name="drop")
    expected = get_error(native(layer)(0.5, name="drop"), X, training=True)
    assert get_error(made, X, training=True) == expected
    assert made.calls == 0


def test_makes_increment_on_device_of_state(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    monkeypatch.setattr(keras_backend, "torch", torch, raising=False)
    state = torch.zeros(2, dtype=torch.int64, device="meta")
    assert keras_backend.make_increment(state).device == state.device
