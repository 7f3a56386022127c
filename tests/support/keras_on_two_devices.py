"""Tests of the Keras layers under tf.distribute; `test_keras_backends.py` runs them.

TensorFlow fixes its devices at first use, so these tests run in their own process.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_models import SITE, dropped

from unidrop import Key, keep_mask
from unidrop.adapters.keras import LSTM, Attention, Dropout, SpatialDropout1D

CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(CPU, [tf.config.LogicalDeviceConfiguration()] * 2)
TWO = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
ONE = tf.distribute.get_strategy()

RNG = np.random.default_rng(0)
X = RNG.standard_normal((12, 10)).astype("float32")
Y = RNG.standard_normal((12, 1)).astype("float32")


def made(strategy, make=Dropout, *arguments):
    """Return a layer whose state is every replica's."""
    with strategy.scope():
        return make(0.5, *arguments, seed=SITE)


def run(drop, parts, compiled):
    """Give each replica its part, and return what it makes of them, in training."""

    def call(parts):
        return TWO.run(drop, args=(parts,), kwargs={"training": True})

    values = TWO.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )
    actual = (tf.function(call) if compiled else call)(values)
    return [part.numpy() for part in TWO.experimental_local_results(actual)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("shape", [(4, 3), (5, 8), (6, 2, 3), (3,)], ids=str)
@pytest.mark.parametrize("cut", [0, 2])
def test_gives_each_replica_its_window_of_batch(shape, cut, compiled):
    layer = made(TWO)
    for n in range(2):
        x = RNG.standard_normal(shape).astype("float32")
        actual = np.concatenate(run(layer, (x[:cut], x[cut:]), compiled))
        assert actual.tobytes() == dropped(x, n).tobytes()
    assert layer.calls == 2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
def test_shares_decisions_as_one_device_does(compiled):
    x = RNG.standard_normal((5, 4, 3)).astype("float32")
    for layer, axes in ((made(TWO, SpatialDropout1D), (1,)), (made(TWO, Dropout, (1, 4, 3)), (0,))):
        actual = np.concatenate(run(layer, (x[:2], x[2:]), compiled))
        assert actual.tobytes() == dropped(x, 0, axes=axes).tobytes()


def test_gives_replicas_their_masks_at_unknown_lengths():
    layer, ones = made(TWO), np.ones((4, 100), "float32")

    def of_unknown_lengths(part, training):
        return layer(tf.compat.v1.placeholder_with_default(part, (None, None)), training=training)

    actual = run(of_unknown_lengths, (ones, ones), compiled=True)
    for rank, part in enumerate(actual):
        assert part.tobytes() == dropped(ones, 0, site=SITE.fold_in(rank)).tobytes()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
def test_gives_gradient_by_mask_of_replica_window(compiled):
    layer = made(TWO)

    def gradient(part):
        with tf.GradientTape() as tape:
            tape.watch(part)
            y = layer(part, training=True)
        return tape.gradient(y, part)

    values = TWO.experimental_distribute_values_from_function(
        lambda context: tf.ones((2 + context.replica_id_in_sync_group, 7))
    )
    step = tf.function(lambda v: TWO.run(gradient, args=(v,)))
    actual = step(values) if compiled else TWO.run(gradient, args=(values,))
    parts = [part.numpy() for part in TWO.experimental_local_results(actual)]
    assert np.concatenate(parts).tobytes() == dropped(np.ones((5, 7), "float32"), 0).tobytes()


def network(strategy, **options):
    """Return a small network, the same for each strategy."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layers = [keras.layers.Dense(16), Dropout(0.5, seed=SITE), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((10,)), *layers])
        model.compile("sgd", "mse", **options)
    return model


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_trains_two_replicas_as_one_device(options):
    losses, weights = [], []
    for strategy in (ONE, TWO):
        model = network(strategy, **options)
        for seed in (SITE, Key(7)):  # Keras compiled the first one into the step
            model.layers[1].seed = seed
            history = model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
            losses.append(history.history["loss"])
        assert model.layers[1].calls == 12
        weights.append(np.concatenate([weight.ravel() for weight in model.get_weights()]))
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-5)
    np.testing.assert_allclose(*weights, rtol=1e-4, atol=1e-6)


def test_saves_call_number_once_for_all_replicas(tmp_path):
    model = network(TWO)
    model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    for strategy in (ONE, TWO):
        resumed = network(strategy)
        resumed.load_weights(tmp_path / "model.weights.h5")
        assert resumed.layers[1].calls == 3
    parts = (np.ones((2, 10), "float32"), np.ones((3, 10), "float32"))
    actual = np.concatenate(run(resumed.layers[1], parts, compiled=True))
    assert actual.tobytes() == dropped(np.ones((5, 10), "float32"), 3).tobytes()


def test_sets_call_number_in_all_replicas():
    layer = made(TWO)
    layer.calls = 5
    actual = np.concatenate(run(layer, (X[:4], X[4:]), compiled=False))
    assert actual.tobytes() == dropped(X, 5).tobytes()


def test_gives_each_replica_its_window_of_attention_weights():
    with TWO.scope():
        layer = Attention(dropout=0.5, seed=SITE)
    x = np.stack([np.eye(6, dtype="float32")] * 5)

    def attend(x, training):
        return layer([0 * x, x], training=training)

    actual = np.concatenate(run(attend, (x[:3], x[3:]), compiled=True))
    assert np.array_equal(actual != 0, keep_mask((5, 6, 6), 0.5, SITE.fold_in(0)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
def test_gives_sequences_their_windows(compiled):
    x = RNG.standard_normal((4, 3, 5)).astype("float32")
    with TWO.scope():
        two = LSTM(2, dropout=0.3, recurrent_dropout=0.4, seed=SITE)
        two.build(x.shape)
    one = LSTM.from_config(two.get_config())
    one.build(x.shape)
    one.set_weights(two.get_weights())
    for _ in range(2):
        expected = one(x, training=True)
        actual = np.concatenate(run(two, (x[:1], x[1:]), compiled))
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert (one.calls, two.calls) == (2, 2)
