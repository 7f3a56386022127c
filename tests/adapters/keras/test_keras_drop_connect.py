"""DropConnect of Keras: dropped weights of layers, saving, resuming and training."""

import json

import keras
import numpy as np
import pytest
from keras_models import SITE, X, assert_bits

import unidrop
from unidrop import Key
from unidrop.adapters.keras import DropConnect, Dropout

RATE = 0.4


def make(layer=None, names="kernel", seed=SITE, rate=RATE):
    layer = keras.layers.Dense(3) if layer is None else layer
    return DropConnect(layer, rate, names, seed=seed)


def drop(weight, n, name="kernel"):
    weight = keras.ops.convert_to_numpy(weight)
    return unidrop.dropout(weight, RATE, SITE.fold_in(n).fold_in(name))


def run_with(layer, x, **weights):
    """Return the output of a layer with other values of some weights."""
    variables = {v.name: v for v in layer.weights}
    former = {name: keras.ops.convert_to_numpy(variables[name]) for name in weights}
    for name, value in weights.items():
        variables[name].assign(value)
    y = keras.ops.convert_to_numpy(layer(x))
    for name, value in former.items():
        variables[name].assign(value)
    return y


def test_drops_the_kernel_of_each_call():
    layer = make()
    layer.build(X.shape)
    for n in range(3):
        expected = run_with(layer.layer, X, kernel=drop(layer.layer.kernel, n))
        assert_bits(layer(X, training=True), expected)
        assert_bits(layer(X), run_with(layer.layer, X))
    assert layer.calls == 3


@pytest.mark.parametrize("kind", [keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN])
def test_drops_recurrent_weights(kind):
    x = np.stack([X, X + 1, X - 1], 1)
    names = ["kernel", "recurrent_kernel"]
    layer = make(kind(3), names)
    layer.build(x.shape)
    weights = {w.name: w for w in layer.layer.weights}
    dropped = {name: drop(weights[name], 0, name) for name in names}
    expected = run_with(layer.layer, x, **dropped)
    y = keras.ops.convert_to_numpy(layer(x, training=True))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(y, run_with(layer.layer, x))


def test_trains_the_weights_that_it_keeps():
    model = keras.Sequential([keras.Input(X.shape[1:]), make()])
    dense = model.layers[0].layer
    kernel, bias = (keras.ops.convert_to_numpy(w) for w in (dense.kernel, dense.bias))
    expected = run_with(dense, X, kernel=drop(kernel, 0))
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(X, np.zeros_like(expected), batch_size=len(X), verbose=0)
    slope = 2 * expected / expected.size
    kept = drop(np.ones_like(kernel), 0)
    trained = [keras.ops.convert_to_numpy(w) for w in (dense.kernel, dense.bias)]
    np.testing.assert_allclose(trained[0], kernel - kept * (X.T @ slope), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trained[1], bias - slope.sum(0), rtol=1e-4, atol=1e-5)
    assert model.layers[0].calls == 1


@pytest.mark.parametrize("training", ["call", "fit"])
def test_keeps_the_other_updates_and_losses_of_a_layer(training):
    inner = keras.Sequential(
        [
            keras.Input(X.shape[1:]),
            keras.layers.Dense(3, activity_regularizer="l2"),
            keras.layers.BatchNormalization(),
            Dropout(0.5, seed=Key(3)),
        ]
    )
    outer = keras.Sequential([keras.Input(X.shape[1:]), make(inner)])
    if training == "fit":
        outer.compile("sgd", "mse")
        outer.fit(X, np.ones((len(X), 3)), batch_size=len(X), verbose=0)
    else:
        outer(X, training=True)
        assert len(outer.losses) == 1
    assert inner.layers[-1].calls == 1
    assert outer.layers[0].calls == 1
    assert not np.allclose(keras.ops.convert_to_numpy(inner.layers[1].moving_mean), 0)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5"])
def test_resumes_from_a_file(tmp_path, name):
    def build():
        return keras.Sequential([keras.Input(X.shape[1:]), make()])

    model = build()
    model(X, training=True)
    path = tmp_path / name
    if "weights" not in name:
        model.save(path)
        copy = keras.saving.load_model(path)
    else:
        model.save_weights(path)
        copy = build()
        copy.load_weights(path)
    layer = copy.layers[0]
    assert (layer.calls, layer.seed, layer.rate, layer.names) == (1, SITE, RATE, ["kernel"])
    assert_bits(copy(X, training=True), keras.ops.convert_to_numpy(model(X, training=True)))


def test_rebuilds_of_its_configuration():
    config = make().get_config()
    assert json.loads(json.dumps(config)) == config
    copy = DropConnect.from_config(config)
    assert copy.get_config() == config


def test_counts_no_call_that_raises():
    layer = make()
    layer.build(X.shape)
    with pytest.raises(Exception, match=r".+"):
        layer.call(X[:, 1:], training=True)
    assert layer.calls == 0


@pytest.mark.parametrize("names", ["gamma", ["kernel", "weight"], []])
def test_raises_for_names_that_do_not_exist(names):
    with pytest.raises(ValueError, match="names must be names of one weight each"):
        make(names=names)(X)


def test_raises_for_a_name_of_several_weights():
    layer = make(keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match="names must be names of one weight each"):
        layer(X)


def test_masks_padding_as_its_layer():
    layer = make(keras.layers.LSTM(3, return_sequences=True), "recurrent_kernel")
    assert layer.supports_masking
    assert layer.compute_mask(X, "a mask") == "a mask"


@pytest.mark.parametrize("rate", [1.5, -0.1])
def test_refuses_rates_outside_the_interval(rate):
    with pytest.raises(ValueError, match="rate"):
        make(rate=rate)


def test_drops_weights_before_a_mixed_policy_narrows_them():
    dense = keras.layers.Dense(4, use_bias=False, dtype="float32")
    layer = DropConnect(dense, RATE, seed=SITE, dtype="mixed_float16")
    x = np.eye(3, dtype="float32")
    y = keras.ops.convert_to_numpy(layer(x, training=True))
    assert_bits(y, drop(dense.kernel, 0))
