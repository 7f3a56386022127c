"""A variable as the rate: on TensorFlow here, on others as `test_keras_backends.py` does."""

import keras
import numpy as np
import pytest
from keras_models import BACKEND, SITE, X, assert_bits, dropped, recording

from unidrop.adapters.keras import AlphaDropout, Dropout, DropPath, GaussianNoise, SpatialDropout1D

# JAX has no float64 by default.
KINDS = ["float32"] if BACKEND == "jax" else ["float32", "float64"]


def variable(value=0.25, **options):
    return keras.Variable(value, **{"trainable": False, **options})


class Schedule(keras.callbacks.Callback):
    """Sets the rate before each batch, and compares the batch with the one of an eager call."""

    def __init__(self, layer, rates, seen, assigns):
        super().__init__()
        self.layer, self.rates, self.seen, self.assigns = layer, rates, seen, assigns
        self.steps = self.calls = 0
        self.graphs = []

    def on_train_batch_begin(self, batch, logs=None):
        rate = float(self.rates[self.steps])
        if self.assigns:
            self.layer.rate.assign(rate)
        else:
            self.layer.rate = rate

    def on_train_batch_end(self, batch, logs=None):
        rate = float(self.rates[self.steps])
        _ = self.layer.calls  # restores the variables of a model that JAX trains
        assert_bits(self.seen.value, dropped(X, self.calls, rate))
        self.steps += 1
        self.calls += rate > 0
        assert self.layer.calls == self.calls
        self.graphs.append(count_torch_graphs())


def count_torch_graphs():
    """Return how many graphs torch.compile has made; it would recompile for `Count`."""
    if BACKEND != "torch":
        return 0
    import torch

    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Count(keras.layers.Layer):
    """Counts how often its code runs in training."""

    count = 0

    def call(self, inputs, training=False):
        self.count += bool(training)
        return inputs


@pytest.mark.slow
@pytest.mark.parametrize("assigns", [False, True], ids=["attribute", "assign"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_traces_once_in_fit(jit_compile, assigns, quick_torch_compile):
    rates = np.linspace(0, 1, 50).astype("float32")
    layer, count = Dropout(variable(), seed=SITE), Count()
    first = layer if BACKEND == "torch" else keras.Sequential([count, layer])
    model = recording(first, jit_compile=jit_compile)
    schedule = Schedule(layer, rates, model.layers[1].seen, assigns)
    x, y = np.tile(X, (25, 1)), np.zeros((100, 1))
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[schedule])
    assert schedule.steps == 50
    if BACKEND == "torch":
        assert len(set(schedule.graphs)) == 1
        assert jit_compile == (schedule.graphs[0] > 0)
    else:
        assert count.count == (50 if BACKEND == "jax" and not jit_compile else 1)
    assert float(keras.ops.convert_to_numpy(layer.rate)) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_drops_at_exact_value_of_variable(policy, kind):
    rate = variable(0.3, dtype=kind)
    value = float(np.dtype(kind).type(0.3))
    layers = (Dropout, {}), (DropPath, {}), (SpatialDropout1D, {})
    for kind_of_layer, options in layers:
        layer = kind_of_layer(rate, seed=SITE, dtype=policy, **options)
        plain = kind_of_layer(value, seed=SITE, dtype=policy, **options)
        x = np.ones((64, 3, 5), "float32")
        for _ in range(2):
            wanted = keras.ops.convert_to_numpy(plain(x, training=True))
            assert_bits(layer(x, training=True), wanted)
        assert layer.calls == 2


def test_sets_value_of_variable():
    rate = variable()
    layer = Dropout(rate, seed=SITE)
    layer.rate = 0.5
    assert float(keras.ops.convert_to_numpy(rate)) == 0.5
    assert layer.rate is rate
    assert_bits(layer(X, training=True), dropped(X, 0, 0.5))
    layer.rate = 0
    assert_bits(layer(X, training=True), X)
    assert layer.calls == 1  # a call at rate 0 does not count
    for value, error in ((1.5, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="probability rate"):
            layer.rate = value
    assert float(keras.ops.convert_to_numpy(rate)) == 0


def test_rejects_value_outside_0_and_1():
    rate = variable()
    layer = Dropout(rate, seed=SITE)
    rate.assign(1.5)
    with pytest.raises(ValueError, match=r"rate .*between 0 and 1"):
        layer(X, training=True)
    assert layer.calls == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trainable": True}, ValueError, r"not trained, .*trainable=False"),
        ({"dtype": "float16"}, TypeError, "got one of shape .* and dtype float16"),
        ({"value": 1, "dtype": "int32"}, TypeError, "and dtype int32"),
        ({"value": [0.5]}, TypeError, r"of shape \(1,\)"),
        ({"value": 1.5}, ValueError, "rate .*between 0 and 1, .*1.5"),
        ({"value": float("nan")}, ValueError, "between 0 and 1, .*nan"),
    ],
    ids=["trained", "float16", "integer", "vector", "outside", "nan"],
)
def test_rejects_other_variable(options, error, message):
    with pytest.raises(error, match=message):
        Dropout(variable(**options))


@pytest.mark.parametrize("layer", [AlphaDropout, GaussianNoise])
def test_rejects_variable_for_formula_that_needs_a_number(layer):
    with pytest.raises(TypeError, match="must be a Python int or float"):
        layer(variable())


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_saves_variable(tmp_path, suffix):
    layer = Dropout(variable(0.25), seed=SITE, name="drop")
    assert layer.get_config()["rate"] == 0.25
    model = keras.Sequential([keras.Input((10,)), layer])
    model(X, training=True)
    model.save(tmp_path / f"model.{suffix}")
    loaded = keras.models.load_model(tmp_path / f"model.{suffix}").layers[0]
    loaded.rate = 0.5
    assert float(keras.ops.convert_to_numpy(loaded.rate)) == 0.5
    assert loaded.rate is not layer.rate
    assert_bits(loaded(X, training=True), dropped(X, 1, 0.5))


def test_loads_rate_of_weights(tmp_path):
    def make(rate):
        return keras.Sequential([keras.Input((10,)), Dropout(rate, seed=SITE, name="drop")])

    scheduled, other, plain = make(variable(0.25)), make(variable(0.5)), make(0.75)
    scheduled.save_weights(tmp_path / "scheduled.weights.h5")
    plain.save_weights(tmp_path / "plain.weights.h5")
    for model in (other, plain):
        model.load_weights(tmp_path / "scheduled.weights.h5")
    assert float(keras.ops.convert_to_numpy(other.layers[0].rate)) == 0.25
    assert plain.layers[0].rate == 0.75
    other.load_weights(tmp_path / "plain.weights.h5")
    assert float(keras.ops.convert_to_numpy(other.layers[0].rate)) == 0.25
