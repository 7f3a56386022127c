"""Recurrent cells and layers of Keras with masks of keys, on each backend."""

import threading

import keras
import numpy as np
import pytest
from keras_models import SITE, native
from keras_rnn import CELLS, UNITS, X, assert_near, loop, make, run

from unidrop import Key, keep_mask
from unidrop.adapters.keras import (
    GRU,
    LSTM,
    LSTMCell,
    SimpleRNN,
    SimpleRNNCell,
    assign_seeds,
)

RATES = [(0.3, 0.0), (0.0, 0.4), (0.3, 0.4), (1.0, 0.0), (0.0, 1.0)]
kinds = pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)


@kinds
@pytest.mark.parametrize(("dropout", "recurrent_dropout"), RATES)
def test_agrees_with_loop_in_numpy(kind, dropout, recurrent_dropout):
    layer = make(kind, dropout, recurrent_dropout, return_sequences=True)
    for call in range(2):
        y = run(layer)
        rates = {"dropout": dropout, "recurrent_dropout": recurrent_dropout}
        separate = recurrent_dropout > 0
        assert_near(y, loop(kind, layer.get_weights(), call, **rates, separate=separate))


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_has_a_mask_for_each_gate_in_implementation_1(kind):
    layer = make(kind, recurrent_dropout=0, return_sequences=True, implementation=1)
    y = run(layer)
    assert_near(y, loop(kind, layer.get_weights(), recurrent_dropout=0))


def test_fixes_masks_over_time():
    layer = SimpleRNN(
        4,
        activation=None,
        kernel_initializer="identity",
        recurrent_initializer="zeros",
        dropout=0.5,
        seed=SITE,
        return_sequences=True,
    )
    for call in range(3):
        y = run(layer, np.ones_like(X))
        kept = keep_mask((4, 4), 0.5, SITE.fold_in(call).fold_in("dropout"))
        assert np.array_equal(y, np.broadcast_to(2 * kept[:, None], y.shape))


@kinds
def test_counts_no_call_in_evaluation(kind):
    layer = make(kind)
    own = native(kind).from_config({**layer.get_config(), "seed": 1})
    expected = keras.ops.convert_to_numpy(own(X))
    layer(X)
    layer.set_weights(own.get_weights())
    for options in ({}, {"training": False}):
        y = keras.ops.convert_to_numpy(layer(X, **options))
        assert_near(y, expected)
    assert layer.calls == layer.cell.calls == 0
    run(layer)
    assert layer.calls == 1


@kinds
def test_equals_keras_own_at_rate_0(kind):
    layer = make(kind, 0, 0)
    own = native(kind).from_config({**layer.get_config(), "seed": 1})
    expected = run(own)
    run(layer)
    layer.set_weights(own.get_weights())
    assert_near(run(layer), expected)
    assert layer.calls == 0


@kinds
def test_has_masks_inside_layer_of_keras(kind):
    cell = make(CELLS[kind])
    layer = keras.layers.RNN(cell, return_sequences=True)
    for call in range(2):
        y = run(layer)
        assert_near(y, loop(kind, layer.get_weights(), call))
    layer(X)
    assert cell.calls == 2


def test_has_masks_inside_stacked_cells():
    cells = [make(LSTMCell, seed=SITE), make(SimpleRNNCell, seed=Key(1))]
    layer = keras.layers.RNN(cells, return_sequences=True)
    run(layer), layer(X)
    assert [cell.calls for cell in cells] == [1, 1]
    first = keras.layers.RNN(make(LSTMCell), return_sequences=True)
    second = keras.layers.RNN(make(SimpleRNNCell, seed=Key(1)), return_sequences=True)
    run(second, run(first))
    first.set_weights(cells[0].get_weights())
    second.set_weights(cells[1].get_weights())
    for each in (*cells, first.cell, second.cell):
        each.calls = 7
    assert_near(run(layer), run(second, run(first)))


@kinds
def test_keeps_masks_of_a_cell_until_they_are_reset(kind):
    cell = make(CELLS[kind])
    x, states = X[:, 0], cell.get_initial_state(4)
    first = run(lambda x, training: cell(x, states, training=training)[0], x)
    for _ in range(2):
        again = run(lambda x, training: cell(x, states, training=training)[0], x)
        assert np.array_equal(again, first)
    assert cell.calls == 1
    cell.reset_dropout_mask()
    cell.reset_recurrent_dropout_mask()
    other = run(lambda x, training: cell(x, states, training=training)[0], x)
    assert cell.calls == 2
    assert not np.array_equal(other, first)


def test_does_not_count_calls_that_raise():
    layer = make(LSTM, return_sequences=True)
    run(layer)
    wrong = [np.zeros((4, UNITS + 1), "float32")] * 2
    with pytest.raises(Exception, match=r"(?s).+"):
        run(layer, initial_state=wrong)
    assert layer.calls == 1
    assert_near(run(layer), loop(LSTM, layer.get_weights(), 1))


@kinds
def test_has_the_same_masks_in_narrow_dtypes(kind):
    layer = make(kind, dtype="mixed_float16", return_sequences=True)
    y = run(layer).astype("float32")
    np.testing.assert_allclose(y, loop(kind, layer.get_weights()), atol=0.01)


@kinds
@pytest.mark.parametrize("seed", [None, SITE, 7], ids=str)
def test_restores_configuration(kind, seed):
    for layer in (make(kind, seed=seed), keras.layers.RNN(make(CELLS[kind], seed=seed))):
        restored = keras.layers.deserialize(keras.layers.serialize(layer))
        assert type(restored) is type(layer)
        assert type(restored.cell) is CELLS[kind]
        assert restored.cell.seed == layer.cell.seed
        assert (restored.cell.dropout, restored.cell.recurrent_dropout) == (0.3, 0.4)
        assert restored.get_config() == layer.get_config()


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_resumes_from_each_kind_of_file(suffix, tmp_path):
    model = keras.Sequential([keras.Input(X.shape[1:]), make(LSTM)])
    for _ in range(3):
        run(model)
    path = tmp_path / f"model{suffix}"
    if suffix == ".weights.h5":
        model.save_weights(path)
        resumed = keras.Sequential([keras.Input(X.shape[1:]), make(LSTM)])
        resumed.load_weights(path)
    else:
        model.save(path)
        resumed = keras.saving.load_model(path)
    assert resumed.layers[0].calls == 3
    assert np.array_equal(run(resumed), run(model))


def test_loads_weights_of_keras_own_layer(tmp_path):
    model, theirs = (
        keras.Sequential([keras.Input(X.shape[1:]), layer])
        for layer in (make(LSTM), keras.layers.LSTM(UNITS, dropout=0.3, recurrent_dropout=0.4))
    )
    model.layers[0].calls = 5
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    model.load_weights(tmp_path / "theirs.weights.h5")
    for actual, expected in zip(model.get_weights(), theirs.get_weights(), strict=True):
        assert np.array_equal(actual, expected)
    assert model.layers[0].calls == 5


@pytest.mark.parametrize("kind", [*CELLS, *CELLS.values()], ids=lambda kind: kind.__name__)
def test_refuses_rates_that_keras_clips(kind):
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"probability dropout .* got {rate}"):
            make(kind, dropout=rate)
        with pytest.raises(ValueError, match=rf"probability recurrent_dropout .* got {rate}"):
            make(kind, recurrent_dropout=rate)
    for rate in (True, "0.5", None):
        with pytest.raises(TypeError, match="dropout must be a Python int or float"):
            make(kind, dropout=rate)
    for seed in (-1, 2**64, 0.5, True):
        with pytest.raises(ValueError, match="seed"):
            make(kind, seed=seed)


def test_checks_rates_that_are_set():
    cell = make(LSTMCell, recurrent_dropout=0)
    cell.dropout = 0.5
    assert cell.dropout == 0.5
    with pytest.raises(ValueError, match=r"dropout .* got 1.5"):
        cell.dropout = 1.5
    with pytest.raises(ValueError, match=r"recurrent_dropout must stay 0 .* got 0.5"):
        cell.recurrent_dropout = 0.5
    assert repr(make(LSTMCell, 1, 1).dropout) == "1.0"


def test_follows_seed_and_calls_that_are_set():
    layer = make(LSTM, seed=1, return_sequences=True)
    run(layer)
    layer.seed, layer.calls = SITE, 3
    assert layer.seed == SITE
    assert_near(run(layer), loop(LSTM, layer.get_weights(), 3))
    assert layer.calls == 4


def test_assigns_seeds_by_path_of_layer():
    model = keras.Sequential(
        [make(LSTM, return_sequences=True), keras.layers.RNN(make(SimpleRNNCell))]
    )
    assign_seeds(model, 42)
    assert model.layers[0].seed == Key(42).fold_in("layers.0")
    assert model.layers[1].cell.seed == Key(42).fold_in("layers.1.cell")


def test_warns_of_directions_with_one_seed():
    layer = keras.layers.Bidirectional(make(LSTM))
    with pytest.warns(UserWarning, match="'backward_layer' and 'forward_layer' have one seed"):
        run(layer)
    assign_seeds(layer, 42)
    run(layer)
    assert layer.forward_layer.calls == layer.backward_layer.calls == 2


def test_has_the_same_masks_unrolled_and_backwards():
    y = make(LSTM, unroll=True, return_sequences=True)
    z = make(LSTM, go_backwards=True, return_sequences=True)
    run(y), run(z)
    z.set_weights(y.get_weights())
    y.calls = z.calls = 0
    assert_near(run(y), run(z, X[:, ::-1]))


@kinds
def test_does_not_count_calls_that_raise_inside_layer_of_keras(kind):
    if keras.backend.backend() == "jax":
        pytest.skip("JAX raises before the cell runs, and the number is skipped")
    layer = keras.layers.RNN(CELLS[kind](UNITS, dropout=0.5, recurrent_dropout=0.5, seed=1))
    run(layer)
    wrong = [np.zeros((4, UNITS + 1), "float32")] * (2 if kind is LSTM else 1)
    with pytest.raises(Exception, match=r"(?s).+"):
        run(layer, initial_state=wrong)
    assert layer.cell.calls == 1
    run(layer)
    assert layer.cell.calls == 2


def test_has_masks_of_a_call_number_in_each_thread():
    layer = make(LSTM)
    layer(X)  # Keras builds no layer in two threads
    outputs = [[], []]

    def call(own):
        own.extend(run(layer) for _ in range(10))

    threads = [threading.Thread(target=call, args=(own,)) for own in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert layer.calls == 20
    expected = set()
    for number in range(20):
        layer.calls = number
        expected.add(run(layer).tobytes())
    assert {y.tobytes() for own in outputs for y in own} == expected
