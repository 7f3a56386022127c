"""Recurrent layers of Keras for tests, and the loop in NumPy that they agree with."""

import keras
import numpy as np
from keras_models import SITE

from unidrop import keep_mask
from unidrop.adapters.keras import GRU, LSTM, GRUCell, LSTMCell, SimpleRNN, SimpleRNNCell

__all__ = ["CELLS", "UNITS", "X", "assert_near", "loop", "make", "run"]

X = np.random.default_rng(0).standard_normal((4, 5, 4)).astype("float32")
UNITS = 3
CELLS = {LSTM: LSTMCell, GRU: GRUCell, SimpleRNN: SimpleRNNCell}
GATES = {LSTM: 4, GRU: 3, SimpleRNN: 1}


def make(kind, dropout=0.3, recurrent_dropout=0.4, seed=SITE, **options):
    return kind(UNITS, dropout=dropout, recurrent_dropout=recurrent_dropout, seed=seed, **options)


def run(layer, x=X, **options):
    return keras.ops.convert_to_numpy(layer(x, training=True, **options))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make_masks(name, rate, shape, call, gates, site):
    """Return the scaled masks of a call for each gate; one for all if gates is 0."""
    key = site.fold_in(call).fold_in(name)
    keys = [key.fold_in(gate) for gate in range(gates)] if gates else [key]
    scale = 1 / (1 - rate) if rate < 1 else 0
    return [scale * keep_mask(shape, rate, key) for key in keys]


def loop(kind, weights, call=0, dropout=0.3, recurrent_dropout=0.4, separate=True, site=SITE):
    """Return the outputs of training call n at each step, computed step by step.

    If ``separate``, each gate has its own mask.
    """
    kernel, recurrent_kernel, bias = (np.asarray(each, "float64") for each in weights)
    count = GATES[kind]
    gates = count if separate and count > 1 else 0
    masks = make_masks("dropout", dropout, (len(X), X.shape[2]), call, gates, site)
    recurrent = make_masks(
        "recurrent_dropout", recurrent_dropout, (len(X), UNITS), call, gates, site
    )
    masks, recurrent = (each if gates else each * count for each in (masks, recurrent))
    w, u = np.split(kernel, count, 1), np.split(recurrent_kernel, count, 1)
    b = np.split(np.atleast_2d(bias), count, 1)
    h, c = np.zeros((2, len(X), UNITS))
    outputs = []
    for x in np.moveaxis(X.astype("float64"), 1, 0):
        inputs = [(x * masks[g]) @ w[g] + b[g][0] for g in range(count)]
        states = [(h * recurrent[g]) @ u[g] for g in range(count)]
        if kind is SimpleRNN:
            h = np.tanh(inputs[0] + states[0])
        elif kind is LSTM:
            i, f, new, o = (each + state for each, state in zip(inputs, states, strict=True))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
            h = sigmoid(o) * np.tanh(c)
        else:
            z, r, s = (state + b[g][1] for g, state in enumerate(states))
            z, r = sigmoid(inputs[0] + z), sigmoid(inputs[1] + r)
            h = z * h + (1 - z) * np.tanh(inputs[2] + r * s)
        outputs.append(h)
    return np.stack(outputs, 1)


def assert_near(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
