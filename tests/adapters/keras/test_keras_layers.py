"""The Keras layers on TensorFlow; `test_keras_backends.py` runs these tests on other backends.

Keras chooses a backend at import, so each other backend needs its own process.
"""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras_models import BACKEND, SITE, X, assert_bits, dropped

from unidrop import Key
from unidrop.adapters.keras import (
    Dropout,
    SpatialDropout1D,
    SpatialDropout2D,
    SpatialDropout3D,
    assign_seeds,
)

SPATIAL = {
    SpatialDropout1D: ((2, 3, 4), (1,)),
    SpatialDropout2D: ((2, 3, 5, 4), (1, 2)),
    SpatialDropout3D: ((2, 3, 5, 2, 4), (1, 2, 3)),
}


# --- The layer by itself -----------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 1])
def test_folds_call_number_into_key(rate):
    for seed in (SITE, int(SITE), 0, 2**31, 2**32 + 1, 2**63, 2**64 - 1):
        layer, site = Dropout(rate, seed=seed), Key(int(seed))
        for n in range(3):
            assert_bits(layer(X, training=True), dropped(X, n, rate, site))
        assert layer.calls == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gives_each_policy_same_mask_and_its_own_bits(dtype):
    layer = Dropout(0.001, seed=SITE, dtype=dtype)
    x = np.random.default_rng(0).standard_normal(30000).astype("float32")
    expected = dropped(x.astype(getattr(ml_dtypes, dtype, dtype)), 0, 0.001)
    assert keras.backend.standardize_dtype(layer(x, training=True).dtype) == dtype
    layer.calls = 0
    assert_bits(keras.ops.cast(layer(x, training=True), "float32"), expected.astype("float32"))


@pytest.mark.parametrize("layer", SPATIAL, ids=lambda layer: layer.__name__)
def test_drops_whole_feature_maps(layer):
    shape, axes = SPATIAL[layer]
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    made = layer(0.5, seed=SITE, **({} if len(axes) == 1 else {"data_format": "channels_last"}))
    for n in range(2):
        assert_bits(made(x, training=True), dropped(x, n, axes=axes))


@pytest.mark.parametrize("arguments", [{}, {"training": False}, {"training": None}], ids=str)
def test_returns_input_uncounted_in_inference(arguments):
    layer = Dropout(0.5, seed=SITE)
    assert_bits(layer(X, **arguments), X)
    assert layer.calls == 0


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_rejects_integers_uncounted(dtype):
    layer = Dropout(0.5, seed=SITE)
    with pytest.raises(TypeError, match=rf"inputs .*floating.*{dtype}"):
        layer(np.ones(3, dtype), training=True)
    assert layer.calls == 0


def test_keeps_shape_and_dtype_of_symbolic_call_uncounted():
    layer = Dropout(0.5, seed=SITE, dtype="float16")
    output = layer(keras.Input((None, 10), dtype="float16"), training=True)
    assert (output.shape, output.dtype) == ((None, None, 10), "float16")
    assert layer.calls == 0


def test_reproduces_unseeded_layer_by_set_random_seed():
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        layer = Dropout(0.5)
        runs.append([keras.ops.convert_to_numpy(layer(X, training=True)) for _ in range(2)])
    np.testing.assert_array_equal(*runs)
    assert not np.array_equal(*runs[0])


def test_accepts_call_number():
    layer = Dropout(0.5, seed=SITE)
    layer.calls = 2**31 - 2
    assert_bits(layer(X, training=True), dropped(X, 2**31 - 2))
    assert layer.calls == 2**31 - 1


def test_rejects_calls_beyond_what_keras_counts():
    layer = Dropout(0.5, seed=SITE)
    layer.calls = 2**31 - 1
    assert_bits(layer(X, training=True), dropped(X, 2**31 - 1))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"calls must be below 2\*\*31"):
            layer(X, training=True)
    layer.calls = 0
    assert_bits(layer(X, training=True), dropped(X, 0))


def test_has_one_mask_for_all_steps_in_time_distributed():
    x = np.ones((2, 3, 10), "float32")
    model = keras.Sequential([keras.layers.TimeDistributed(Dropout(0.5, seed=SITE))])
    y = keras.ops.convert_to_numpy(model(x, training=True))
    assert set(np.unique(y)) == {0.0, 2.0}


def test_predicts_and_evaluates_inputs_uncounted():
    layer = Dropout(0.5, seed=SITE)
    model = keras.Sequential([keras.Input((10,)), layer])
    model.compile(loss="mse")
    assert np.array_equal(model.predict(X, verbose=0), X)
    assert model.evaluate(X, X, verbose=0) == 0
    assert layer.calls == 0


# --- Machinery ---------------------------------------------------------------------------------


def test_keeps_seed_and_restarts_calls_in_cloned_model():
    layer = Dropout(0.5, seed=SITE)
    model = keras.Sequential([keras.Input((10,)), layer])
    model(X, training=True)
    clone = keras.models.clone_model(model)
    assert_bits(clone(X, training=True), dropped(X, 0))
    assert (layer.calls, clone.layers[0].calls) == (1, 1)


@pytest.mark.parametrize("layer", [Dropout, *SPATIAL], ids=lambda layer: layer.__name__)
def test_deserializes_to_same_class(layer):
    config = keras.layers.serialize(layer(0.2, seed=SITE))
    assert type(keras.layers.deserialize(config)) is layer
    assert keras.layers.deserialize(config).seed == SITE


@keras.saving.register_keras_serializable(package="tests")
class Cell(keras.layers.Layer):
    """A recurrent cell that drops its inputs and adds them up."""

    state_size = output_size = 10

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dropout = Dropout(0.5, seed=SITE)

    def call(self, inputs, states, training=False):
        state = states[0] + self.dropout(inputs, training=training)
        return state, [state]


# TensorFlow and torch run a cell once before the loop over time, to learn its outputs. JAX's loop
# discards the state of layers in it. Keras's own dropout counts the same calls.
CALLS = {True: (0, 1, 2), False: (0, 1, 2) if BACKEND == "numpy" else (1, 2, 3)}


@pytest.mark.parametrize("unroll", [True, False])
def test_counts_each_time_step_of_recurrent_cell(unroll):
    cell = Cell()
    x = np.ones((4, 3, 10), "float32")
    layer = keras.layers.RNN(cell, unroll=unroll)
    if BACKEND == "jax" and not unroll:
        with pytest.raises(RuntimeError, match="use the function with a key"):
            layer(x, training=True)
        return
    y = layer(x, training=True)
    assert_bits(y, sum(dropped(x[:, time], n) for time, n in enumerate(CALLS[unroll])))


def test_has_an_output_shape_in_a_layer_that_always_drops():
    class Always(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dropout = Dropout(0.5, seed=SITE)

        def call(self, inputs):
            return self.dropout(inputs, training=True)

    layer = Always()
    assert layer(keras.Input((10,))).shape == (None, 10)
    assert layer.dropout.calls == 0
    assert_bits(layer(X), dropped(X, 0))


def test_counts_both_directions_apart():
    model = keras.layers.Bidirectional(keras.layers.RNN(Cell(), unroll=True), merge_mode="sum")
    x = np.ones((4, 1, 10), "float32")
    with pytest.warns(UserWarning, match="'backward_layer.cell.dropout' and 'forward_layer.cell"):
        y = keras.ops.convert_to_numpy(model(x, training=True))
    assert y.shape == (4, 10)
    assert set(np.unique(y)) <= {0.0, 2.0, 4.0}


class Block(keras.layers.Layer):
    """Holds layers in every kind of attribute."""

    def __init__(self):
        super().__init__()
        self._last = self.shared = Dropout(0.5)
        self._private = Dropout(0.5)
        self.items = [Dropout(0.5), {"a": SpatialDropout1D(0.5)}, (Dropout(0.5), 1)]
        self.inner = keras.Sequential([keras.layers.Dense(2), Dropout(0.5)])
        self.cell = keras.layers.Bidirectional(keras.layers.RNN(Cell()))


def test_assigns_seeds_by_path_of_attributes():
    block = assign_seeds(Block(), 42)
    layers = {
        "shared": block._last,
        "_private": block._private,
        "items.0": block.items[0],
        "items.1.a": block.items[1]["a"],
        "items.2.0": block.items[2][0],
        "inner.layers.1": block.inner.layers[1],
        "cell.forward_layer.cell.dropout": block.cell.forward_layer.cell.dropout,
        "cell.backward_layer.cell.dropout": block.cell.backward_layer.cell.dropout,
    }
    assert [layer.seed for layer in layers.values()] == [Key(42).fold_in(name) for name in layers]


if BACKEND == "torch":

    def test_makes_one_graph_of_all_calls_in_torch_compile():
        import torch

        layer = Dropout(0.5, seed=SITE)
        layer(keras.Input((10,)))
        compiled = torch.compile(
            lambda x: layer(x, training=True), fullgraph=True, backend="aot_eager"
        )
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for n in range(100):
            assert_bits(compiled(torch.from_numpy(X)), dropped(X, n))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
        assert layer.calls == 100
