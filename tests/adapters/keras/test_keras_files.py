"""Configurations and files of the Keras layers: saved, loaded, and exchanged with Keras's own."""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_models import LAYERS, SITE, SPATIAL_SHAPES, X, assert_bits, dropped, native, recording

from unidrop import Key
from unidrop.adapters.keras import Dropout

# --- Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_has_config_of_keras(layer):
    mine, of_keras = (make(0.2, seed=42, name="drop") for make in (layer, native(layer)))
    assert mine.get_config() == of_keras.get_config()


@pytest.mark.parametrize("seed", [None, 42, SITE, Key(2**64 - 1)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_rebuilds_layer_from_its_config(layer, seed):
    config = layer(0.2, seed=seed, name="drop", dtype="mixed_float16").get_config()
    assert config["seed"] == (int(seed) if isinstance(seed, Key) else seed)
    assert layer.from_config(config).get_config() == config


def test_has_noise_shape_in_config():
    layer = Dropout.from_config(Dropout(0.2, (None, 1), seed=SITE).get_config())
    assert layer.noise_shape == (None, 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_rebuilds_layer_from_config_of_keras(layer):
    config = native(layer)(0.2, seed=42).get_config()
    assert layer.from_config(config).get_config() == config


# --- Files ----------------------------------------------------------------------------------------


def by_model(model, path):
    """Save a model whole and load it."""
    model.save(path / "model.keras")
    return keras.saving.load_model(path / "model.keras")


def by_legacy_model(model, path):
    """Save a model whole in Keras's former format and load it."""
    model.save(path / "model.h5")
    return keras.saving.load_model(path / "model.h5", compile=False)


def by_weights(model, path):
    """Save a model's weights and load them into a new one of the same architecture."""
    model.save_weights(path / "model.weights.h5")
    fresh = keras.Sequential.from_config(model.get_config())
    fresh.load_weights(path / "model.weights.h5")
    return fresh


def by_pickle(model, path):
    """Pickle a model and unpickle it."""
    return pickle.loads(pickle.dumps(model))


WAYS = {".keras": by_model, ".h5": by_legacy_model, ".weights.h5": by_weights, "pickle": by_pickle}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def reload(request, tmp_path):
    """Return each way to save a model and load it, in turn."""
    return lambda model: request.param(model, tmp_path)


@pytest.mark.parametrize("seed", [SITE, 42, 2**64 - 1, None], ids=str)
@pytest.mark.parametrize("calls", [0, 3])
def test_resumes_loaded_run(reload, seed, calls):
    layer = Dropout(0.5, seed=seed)
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])
    for _ in range(calls):
        model(X, training=True)
    loaded = reload(model)
    assert loaded.layers[1].calls == calls
    for _ in range(2):
        assert_bits(loaded(X, training=True), np.asarray(model(X, training=True)))


def test_resumes_calls_of_each_layer(reload):
    layers = [Dropout(0.5, seed=n) for n in range(3)]
    model = keras.Sequential([keras.Input((10,)), *layers])
    for n, layer in enumerate(layers):
        layer.calls = 5 + n
    assert [layer.calls for layer in reload(model).layers] == [5, 6, 7]


@pytest.mark.parametrize("layer", list(SPATIAL_SHAPES))
def test_resumes_calls_of_spatial_layers(reload, layer):
    shape = SPATIAL_SHAPES[layer]
    model = keras.Sequential([keras.Input(shape[1:]), layer(0.5, seed=SITE)])
    model(np.ones(shape), training=True)
    loaded = reload(model)
    assert type(loaded.layers[0]) is layer
    assert loaded.layers[0].calls == 1


def test_saves_and_loads_layer_at_rate_0(reload):
    model = keras.Sequential([keras.Input((10,)), Dropout(0, seed=SITE)])
    assert_bits(reload(model)(X, training=True), X)


def test_resumes_fit_with_masks_of_uninterrupted_one(reload):
    steps = [recording(Dropout(0.5, seed=SITE)) for _ in range(2)]
    for model in steps:
        model.train_on_batch(X, np.zeros((4, 1)))
    resumed = reload(steps[0])
    resumed.compile("sgd", "mse")
    for model in (steps[1], resumed):
        model.train_on_batch(X, np.zeros((4, 1)))
    assert_bits(resumed.layers[1].seen, np.asarray(steps[1].layers[1].seen))
    assert_bits(resumed.layers[1].seen, dropped(X, 1))


def test_keeps_given_seed_over_that_of_file(tmp_path):
    model = keras.Sequential([keras.Input((10,)), Dropout(0.5)])
    model(X, training=True)
    model.save_weights(tmp_path / "model.weights.h5")
    seeded = keras.Sequential([keras.Input((10,)), Dropout(0.5, seed=SITE)])
    seeded.load_weights(tmp_path / "model.weights.h5")
    assert_bits(seeded(X, training=True), dropped(X, 1))


def test_loads_weights_of_keras_and_keeps_calls(tmp_path):
    def network(layer):
        return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])

    of_keras = network(keras.layers.Dropout(0.5, seed=1))
    of_keras(X, training=True)
    of_keras.save_weights(tmp_path / "model.weights.h5")
    mine = network(Dropout(0.5, seed=SITE))
    mine.layers[1].calls = 5
    mine.load_weights(tmp_path / "model.weights.h5")
    assert mine.layers[1].calls == 5
    assert_bits(mine(X), np.asarray(of_keras(X)))


def test_resumes_calls_from_tensorflow_checkpoint(tmp_path):
    def network():
        return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), Dropout(0.5)])

    model, resumed = network(), network()
    for _ in range(3):
        model(X, training=True)
    path = tf.train.Checkpoint(model=model).save(tmp_path / "model")
    tf.train.Checkpoint(model=resumed).restore(path).assert_consumed()
    assert resumed.layers[1].calls == 3
    # The seed that Keras drew is in it, too, and setting the call number keeps it.
    resumed.layers[1].calls = 3
    assert_bits(resumed(X, training=True), np.asarray(model(X, training=True)))


def test_keeps_calls_with_checkpoint_of_keras(tmp_path):
    def network(layer):
        return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])

    of_keras, mine = network(keras.layers.Dropout(0.5)), network(Dropout(0.5, seed=SITE))
    mine.layers[1].calls = 5
    path = tf.train.Checkpoint(model=of_keras).save(tmp_path / "model")
    tf.train.Checkpoint(model=mine).restore(path).expect_partial()
    assert mine.layers[1].calls == 5
    assert_bits(mine(X), np.asarray(of_keras(X)))


def test_restores_our_checkpoint_into_keras_dropout(tmp_path):
    def network(layer):
        return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])

    mine, of_keras = network(Dropout(0.5, seed=SITE)), network(keras.layers.Dropout(0.5))
    path = tf.train.Checkpoint(model=mine).save(tmp_path / "model")
    tf.train.Checkpoint(model=of_keras).restore(path).assert_existing_objects_matched()
    assert_bits(of_keras(X), np.asarray(mine(X)))


def test_loads_our_weights_into_keras_with_skip_mismatch(tmp_path):
    def network(layer):
        return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])

    mine, of_keras = network(Dropout(0.5, seed=SITE)), network(keras.layers.Dropout(0.5))
    mine.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="expected 0 variables"):
        of_keras.load_weights(tmp_path / "model.weights.h5")
    with pytest.warns(UserWarning, match="could not be loaded"):
        of_keras.load_weights(tmp_path / "model.weights.h5", skip_mismatch=True)
    assert_bits(of_keras(X), np.asarray(mine(X)))
    of_keras.set_weights(mine.get_weights())


def test_has_no_state_in_files_at_rate_0(tmp_path):
    layer, store = Dropout(0, seed=SITE), {}
    layer.save_own_variables(store)
    assert store == {}
    path = tf.train.Checkpoint(layer=layer).save(tmp_path / "layer")
    assert not any(name.startswith("layer/") for name, _ in tf.train.list_variables(path))


# --- Keras's former files of whole models ---------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """Holds a layer that is not in the configuration."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drop = Dropout(0.5, seed=SITE, name="hidden")

    def call(self, inputs, training=False):
        return self.drop(inputs, training=training)


def test_resumes_calls_of_wrapped_layers_from_legacy_file(tmp_path):
    wrapper = keras.layers.TimeDistributed(Dropout(0.5, seed=SITE))
    inner = keras.Sequential([keras.Input((2, 5)), Dropout(0.5)])
    inputs = keras.Input((2, 5))
    model = keras.Model(inputs, inner(wrapper(inputs)))
    wrapper.layer.calls, inner.layers[0].calls = 5, 7
    loaded = by_legacy_model(model, tmp_path)
    assert [loaded.layers[1].layer.calls, loaded.layers[2].layers[0].calls] == [5, 7]
    assert inner.get_config()["layers"][1]["config"].keys() == Dropout(0.5).get_config().keys()


def test_warns_of_calls_that_legacy_file_lacks(tmp_path):
    model = keras.Sequential([keras.Input((10,)), Dropout(0.5, seed=1), Block()])
    model.save(tmp_path / "new.h5")
    model.layers[1].drop.calls = 5
    with pytest.warns(UserWarning, match=r"'hidden', .* \.keras, or .* layer\.calls = 5") as caught:
        model.save(tmp_path / "model.h5")
    assert len([w for w in caught if "hidden" in str(w.message)]) == 1
    assert by_legacy_model(model, tmp_path).layers[1].drop.calls == 0
    model.save(tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").layers[1].drop.calls == 5


def test_exchanges_weights_with_keras_in_legacy_files(tmp_path):
    mine, of_keras = (
        keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])
        for layer in (Dropout(0.5, seed=SITE), keras.layers.Dropout(0.5))
    )
    mine.layers[1].calls = 5
    for source, target in ((of_keras, mine), (mine, of_keras)):
        target.layers[0].set_weights([np.ones((10, 10)), np.ones(10)])
        source.save(tmp_path / "model.h5")
        target.load_weights(tmp_path / "model.h5")
        assert_bits(target(X), np.asarray(source(X)))
    assert mine.layers[1].calls == 5
    of_keras.save(tmp_path / "model.h5")
    loaded = keras.saving.load_model(tmp_path / "model.h5", {"Dropout": Dropout}, compile=False)
    assert (type(loaded.layers[1]), loaded.layers[1].calls) == (Dropout, 0)
