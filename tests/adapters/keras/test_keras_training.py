"""Training with the Keras layers: on TensorFlow here, on others as `test_keras_backends.py` does.

Keras's NumPy backend has no gradient, so it trains nothing.
"""

import gc
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest
from keras_models import BACKEND, SITE, Record, X, assert_bits, dropped, recording

from unidrop import Key
from unidrop.adapters.keras import Dropout, assign_seeds

FITS = [{}, {"run_eagerly": True}, {"jit_compile": True}, {"jit_compile": False}]
if BACKEND != "torch":  # where Keras refuses it
    FITS.append({"steps_per_execution": 3})


@pytest.mark.parametrize("options", FITS, ids=str)
def test_drops_and_advances_once_a_step_of_fit(options, quick_torch_compile):
    layer = Dropout(0.5, seed=SITE)
    model = recording(layer, **options)
    x, y = np.tile(X, (3, 1)), np.zeros((12, 1))
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, validation_data=(X, y[:4]))
    assert layer.calls == 6
    assert_bits(model.layers[1].seen, dropped(X, 5))
    model.evaluate(X, y[:4], verbose=0)
    model.predict(X, verbose=0)
    assert layer.calls == 6


class Traced(Dropout):
    """A layer that counts the traces of its training calls."""

    traces = 0

    def call(self, inputs, training=False):
        self.traces += bool(training)
        return super().call(inputs, training=training)


def assert_traced_once(jit_compile):
    layer = Traced(0.5, seed=SITE)
    model = recording(layer, jit_compile=jit_compile)
    for steps in (50, 100):
        model.fit(np.tile(X, (50, 1)), np.zeros((200, 1)), batch_size=4, shuffle=False, verbose=0)
        model.predict(X, verbose=0)
        assert_bits(model.layers[1].seen, dropped(X, steps - 1))
    assert layer.calls == 100
    assert layer.traces == 1


if BACKEND != "torch":  # Keras compiles on torch only on request

    def test_traces_fit_and_predictions_once():
        assert_traced_once(jit_compile=True)


if BACKEND == "tensorflow":  # JAX runs eagerly where it may not compile

    def test_traces_fit_in_graph_once():
        assert_traced_once(jit_compile=False)


def test_advances_by_1_in_train_on_batch():
    layer = Dropout(0.5, seed=SITE)
    model = recording(layer)
    for n in range(2):
        model.train_on_batch(X, np.zeros((4, 1)))
        assert_bits(model.layers[1].seen, dropped(X, n))
    assert layer.calls == 2


def test_trains_by_seed_that_is_assigned_between_steps():
    model = recording(Dropout(0.5, seed=SITE))
    model.train_on_batch(X, np.zeros((4, 1)))
    assert_bits(model.layers[1].seen, dropped(X, 0))
    assert assign_seeds(model, 42) is model
    model.train_on_batch(X, np.zeros((4, 1)))
    assert_bits(model.layers[1].seen, dropped(X, 1, site=Key(42).fold_in("layers.0")))


def test_trains_by_mask_of_one_call_in_remat_scope():
    with keras.RematScope("full"):
        layer = Dropout(0.5, seed=SITE)
    scale = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((1,)), scale, layer])
    model.compile(keras.optimizers.SGD(0.5), "mean_absolute_error")
    ones = np.ones((64, 1), "float32")
    model.fit(ones, -ones, batch_size=64, epochs=1, shuffle=False, verbose=0)
    assert layer.calls == 1
    # Each kept element is 2, so the gradient is twice the kept share, for any mask.
    kept = (dropped(ones, 0) != 0).mean()
    np.testing.assert_allclose(scale.get_weights()[0], [[1 - 0.5 * 2 * kept]], rtol=1e-6)


def test_gives_layers_of_functional_model_their_masks():
    sites = [Key(42).fold_in(f"block/{n}") for n in range(2)]
    layers, records = [Dropout(0.5, seed=site) for site in sites], [Record(), Record()]
    inputs = keras.Input((10,))
    first, second = (record(layer(inputs)) for layer, record in zip(layers, records, strict=True))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.add([first, second])))
    model.compile("sgd", "mse")
    model.fit(X, np.zeros((4, 1)), batch_size=4, epochs=2, shuffle=False, verbose=0)
    for site, record in zip(sites, records, strict=True):
        assert_bits(record.seen, dropped(X, 1, site=site))


def test_trains_in_mixed_precision():
    layer = Dropout(0.5, seed=SITE, dtype="mixed_bfloat16")
    model = recording(layer)
    model.fit(X, np.zeros((4, 1)), batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert layer.calls == 2
    expected = dropped(X.astype(ml_dtypes.bfloat16), 1).astype("float32")
    assert_bits(model.layers[1].seen, expected)


class Follower(keras.callbacks.Callback):
    """Sets the call number of a layer to a global step, without the attribute ``model``."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.seen = layer, []

    def on_train_batch_begin(self, batch, logs=None):
        self.layer.calls = 100 + batch

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.layer.calls)


def test_is_read_and_set_by_callbacks():
    layer = Dropout(0.5, seed=SITE)
    model, follower = recording(layer), Follower(layer)
    x, y = np.tile(X, (2, 1)), np.zeros((8, 1))
    model.fit(x, y, batch_size=4, verbose=0, shuffle=False, callbacks=[follower])
    assert follower.seen == [101, 102]
    assert layer.calls == 102


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_warns_once_of_layers_with_one_seed_in_fit(options):
    layers = [Dropout(0.5, seed=SITE) for _ in range(2)]
    model = keras.Sequential([keras.Input((10,)), *layers, keras.layers.Dense(1)])
    model.compile("sgd", "mse", **options)
    with pytest.warns(UserWarning, match=r"'layers.0' and 'layers.1' have one seed.*assign_seeds"):
        model.fit(X, np.zeros((4, 1)), verbose=0)
    model.fit(X, np.zeros((4, 1)), verbose=0)
    assert [layer.calls for layer in layers] == [2, 2]


class Big:
    """An object that its owner wants to free."""


def test_keeps_no_variables_of_callers_alive():
    big, layer = Big(), Dropout(0.5, seed=SITE)
    reference, model = weakref.ref(big), recording(layer)
    layer(X, training=True)
    reader = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: layer.calls)
    model.fit(X, np.zeros((4, 1)), verbose=0, callbacks=[reader])
    del big
    gc.collect()
    assert reference() is None


if BACKEND == "jax":

    def test_is_repaired_after_leaked_trace():
        import jax

        layer = Dropout(0.5, seed=SITE)
        jax.jit(layer.seed_generator.next)()  # leaks into the state
        with pytest.raises(TypeError):
            layer.calls  # noqa: B018 # reading it is what raises
        layer.calls = 0
        assert_bits(layer(X, training=True), dropped(X, 0))
