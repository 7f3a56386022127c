"""The embedding layer of Keras: dropped words, saving, resuming, masks and training."""

import keras
import numpy as np
import pytest
from keras_models import SITE, assert_bits

from unidrop import Key
from unidrop.adapters.keras import Embedding
from unidrop.adapters.numpy import embedding_dropout, embedding_dropout_backward

WORDS, FEATURES, RATE = 30, 5, 0.4
INDICES = np.random.default_rng(0).integers(0, WORDS, (4, 9)).astype("int32")
WEIGHT = np.random.default_rng(1).standard_normal((WORDS, FEATURES)).astype("float32")


def make(rate=RATE, seed=SITE, weight=WEIGHT, **options):
    return Embedding(*weight.shape, weights=weight, rate=rate, seed=seed, **options)


def expected(n, indices=INDICES, weight=WEIGHT):
    return embedding_dropout(weight, indices, RATE, key=SITE.fold_in(n))


def test_drops_words_of_each_call():
    layer = make()
    for n in range(3):
        assert_bits(layer(INDICES, training=True), expected(n))
        assert_bits(layer(INDICES), WEIGHT[INDICES])
    assert layer.calls == 3


def test_counts_words_from_the_end_as_keras():
    indices = INDICES - WORDS
    assert_bits(make()(indices, training=True), expected(0))
    assert_bits(make()(indices), WEIGHT[INDICES])
    assert_bits(make()(INDICES.astype("float32"), training=True), expected(0))


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_float16"])
def test_drops_in_the_dtype_of_its_output(dtype):
    layer = make(dtype=dtype)
    weight = keras.ops.convert_to_numpy(keras.ops.cast(layer.embeddings, layer.compute_dtype))
    assert_bits(layer(INDICES, training=True), expected(0, weight=weight))


def test_is_the_layer_of_keras_without_a_rate():
    layer = make(rate=0.0)
    assert_bits(layer(INDICES, training=True), WEIGHT[INDICES])
    assert layer.calls == 0
    with pytest.raises(ValueError, match="rate must stay 0"):
        layer.rate = 0.5


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_resumes_from_a_file(tmp_path, name):
    def build():
        inputs = keras.Input((9,), dtype="int32")
        return keras.Model(inputs, make(mask_zero=True, weight=WEIGHT, name="words")(inputs))

    model = build()
    model(INDICES, training=True)
    path = tmp_path / name
    if name.endswith(".keras"):
        model.save(path)
        copy = keras.saving.load_model(path)
    else:
        model.save_weights(path)
        copy = build()
        copy.layers[-1].set_weights([WEIGHT * 0])
        copy.load_weights(path)
    layer = copy.layers[-1]
    assert (layer.calls, layer.seed, layer.rate, layer.mask_zero) == (1, SITE, RATE, True)
    assert_bits(copy(INDICES, training=True), expected(1))


def test_loads_weights_of_keras_own_layer(tmp_path):
    own = keras.Sequential([keras.Input((9,), dtype="int32"), keras.layers.Embedding(30, 5)])
    own.layers[0].set_weights([WEIGHT])
    own.save_weights(tmp_path / "own.weights.h5")
    model = keras.Sequential([keras.Input((9,), dtype="int32"), make(weight=WEIGHT * 0)])
    model.load_weights(tmp_path / "own.weights.h5")
    assert_bits(model(INDICES, training=True), expected(0))


def test_masks_padding():
    mask = make(mask_zero=True).compute_mask(INDICES)
    assert np.array_equal(keras.ops.convert_to_numpy(mask), INDICES != 0)
    assert make().compute_mask(INDICES) is None


def test_rebuilds_of_its_configuration():
    layer = make(seed=Key(7), mask_zero=True)
    config = layer.get_config()
    copy = Embedding.from_config(config)
    assert copy.get_config() == config
    assert (config["rate"], config["seed"]) == (RATE, 7)


def test_trains_the_words_that_it_keeps():
    model = keras.Sequential([keras.Input((9,), dtype="int32"), make()])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    target = np.zeros((*INDICES.shape, FEATURES), "float32")
    model.fit(INDICES, target, epochs=1, batch_size=4, verbose=0)
    y = expected(0)
    gradient = embedding_dropout_backward(2 * y / y.size, INDICES, WORDS, RATE, key=SITE.fold_in(0))
    trained = keras.ops.convert_to_numpy(model.layers[0].embeddings)
    np.testing.assert_allclose(trained, WEIGHT - gradient, rtol=1e-5, atol=1e-6)
    assert model.layers[0].calls == 1


def test_refuses_to_train_a_quantized_matrix():
    layer = Embedding(8, 8, rate=RATE, dtype="int8_from_float32")
    assert layer(INDICES % 8).shape == (4, 9, 8)
    with pytest.raises(ValueError, match="a quantized layer cannot drop words"):
        layer(INDICES % 8, training=True)


@pytest.mark.parametrize("rate", [1.5, -0.1, float("nan")])
def test_refuses_rates_outside_the_interval(rate):
    with pytest.raises(ValueError, match="rate"):
        make(rate=rate)
