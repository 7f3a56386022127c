"""Training of recurrent layers of Keras, on each backend that trains."""

import keras
import numpy as np
import pytest
from keras_models import Record
from keras_rnn import X, assert_near, loop, make

from unidrop.adapters.keras import GRU, LSTM, SimpleRNN


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "jit_compile"), [(LSTM, True), (GRU, False), (SimpleRNN, False)])
def test_has_masks_of_loop_in_each_step_of_fit(kind, jit_compile, quick_torch_compile):
    layer, record = make(kind, return_sequences=True), Record()
    model = keras.Sequential([keras.Input(X.shape[1:]), layer, record, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    for call in range(2):
        model.fit(X, np.zeros((4, 5, 1)), validation_data=(X, X[..., :1]), **options)
        seen = keras.ops.convert_to_numpy(record.seen)
        assert_near(seen, loop(kind, layer.get_weights(), call))
    assert layer.calls == 2


@pytest.mark.slow
def test_learns_the_same_after_a_restart(tmp_path):
    def make_model():
        model = keras.Sequential([keras.Input(X.shape[1:]), make(GRU), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    def fit(model, epochs):
        return model.fit(X, X[:, 0, :1], epochs=epochs, shuffle=False, verbose=0).history["loss"]

    model = make_model()
    model.save(tmp_path / "start.keras")
    whole = fit(model, 4)
    first = keras.saving.load_model(tmp_path / "start.keras")
    losses = fit(first, 2)
    first.save(tmp_path / "half.keras")
    losses += fit(keras.saving.load_model(tmp_path / "half.keras"), 2)
    np.testing.assert_allclose(losses, whole, rtol=1e-5)
