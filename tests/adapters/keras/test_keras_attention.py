"""Keras attention layers: on TensorFlow here, on others as `test_keras_backends.py` does."""

import keras
import numpy as np
import pytest
from keras_attention import (
    LAYERS,
    QUERY,
    RATE,
    VALUE,
    apply,
    differentiate,
    make,
    make_model,
    make_readable,
    read_weights,
    reference,
    to_numpy,
)
from keras_models import BACKEND, SITE

from unidrop import keep_mask
from unidrop.adapters.keras import Attention, MultiHeadAttention


@pytest.fixture(params=LAYERS, ids=lambda layer: layer.__name__)
def kind(request):
    """Return each class of layers in turn."""
    return request.param


def assert_close(actual, expected):
    """Compare to a millionth of the largest element."""
    limit = 1e-6 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(to_numpy(actual), expected, rtol=0, atol=limit)


def test_keeps_weights_by_mask_of_scores(kind):
    layer = make_readable(kind, RATE, 6)
    for n in range(3):
        weights = read_weights(layer, 6)
        kept = keep_mask(weights.shape, RATE, SITE.fold_in(n))
        np.testing.assert_array_equal(weights != 0, kept)
    assert layer.calls == 3


def test_counts_no_call_that_raises_after_dropout(kind):
    layer = make(kind)
    apply(layer, QUERY, VALUE)

    def fail(_):
        assert layer.calls == 2
        raise KeyboardInterrupt

    layer.activity_regularizer = fail
    with pytest.raises(KeyboardInterrupt):
        apply(layer, QUERY, VALUE)
    assert layer.calls == 1
    layer.activity_regularizer = None
    apply(layer, QUERY, VALUE)
    assert layer.calls == 2


def test_equals_materialized_attention(kind):
    options = {} if kind is Attention else {"use_bias": False}
    layer = make(kind, **options)
    upstream = np.random.default_rng(1).standard_normal((2, 5, 8)).astype("float32")

    def call(query, value):
        return apply(layer, query, value, use_causal_mask=True)

    y = call(QUERY, VALUE)
    expected, _, _ = reference(layer, 0, upstream, is_causal=True)
    assert_close(y, expected)
    if BACKEND == "numpy":
        return  # which has no gradient
    gradients = differentiate(call, QUERY, VALUE, upstream)
    _, *expected = reference(layer, 1, upstream, is_causal=True)
    for actual, gradient in zip(gradients, expected, strict=True):
        assert_close(actual, gradient)


def test_resumes_saved_calls(kind, tmp_path):
    model, layer = make_model(kind)
    for _ in range(2):
        model([QUERY, VALUE], training=True)
    model.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert resumed.layers[2].calls == layer.calls == 2
    y, expected = (to_numpy(each([QUERY, VALUE], training=True)) for each in (resumed, model))
    np.testing.assert_array_equal(y, expected)


if BACKEND != "numpy":

    def test_fits_by_mask_of_each_step():
        model, layer = make_model(MultiHeadAttention)
        model.compile(keras.optimizers.SGD(0.0), "mse")  # which leaves the weights as they are
        x, zeros = [QUERY, VALUE], np.zeros((2, 5, 1))
        losses = model.fit(x, zeros, epochs=3, shuffle=False, verbose=0).history["loss"]
        model.predict(x, verbose=0)
        assert layer.calls == 3
        layer.calls = 0
        expected = [(to_numpy(model(x, training=True)) ** 2).mean() for _ in range(3)]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert len(set(losses)) == 3

    def test_trains_by_one_mask_in_remat_scope():
        with keras.RematScope("full"):
            layer = make(MultiHeadAttention, use_bias=False)
        apply(layer, QUERY, VALUE, training=False)
        gradients = differentiate(lambda q, v: apply(layer, q, v), QUERY, VALUE, QUERY)
        _, *expected = reference(layer, 0, QUERY)
        for actual, gradient in zip(gradients, expected, strict=True):
            assert_close(actual, gradient)
        assert layer.calls == 1
