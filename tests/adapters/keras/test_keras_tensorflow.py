"""The Keras layers in TensorFlow: shapes, gradients, functions, XLA, threads."""

from concurrent.futures import ThreadPoolExecutor

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from keras_models import LAYERS, SITE, SPATIAL_SHAPES, X, assert_bits, dropped, native

import unidrop
from unidrop import Key
from unidrop.adapters.keras import Dropout, SpatialDropout1D, SpatialDropout2D, SpatialDropout3D
from unidrop.plan import DropoutPlan

# --- The layer by itself --------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_is_a_layer_of_keras(layer):
    assert isinstance(layer(0.5), keras.layers.Dropout)
    assert isinstance(layer(0.5), native(layer))


@pytest.mark.parametrize("rate", [0, 0.0])
def test_returns_input_uncounted_at_rate_0(rate):
    layer = Dropout(rate, seed=SITE)
    assert_bits(layer(X, training=True), X)
    assert layer.calls == 0


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3, 5)], ids=str)
def test_keeps_any_shape(shape):
    x = np.ones(shape, "float32")
    assert_bits(Dropout(0.5, seed=SITE)(x, training=True), dropped(x, 0))


def test_replaces_dropped_nan_and_infinities_by_zeros():
    y = Dropout(1, seed=SITE)(np.asarray([np.nan, np.inf, -np.inf, -1], "float32"), training=True)
    assert_bits(y, np.zeros(4, "float32"))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_gives_gradient_as_output_of_upstream_gradient(rate):
    layer, x, upstream = Dropout(rate, seed=SITE), tf.constant(X), np.flip(X).copy()
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    gradient = tape.gradient(y, x, output_gradients=tf.constant(upstream))
    assert_bits(gradient, dropped(upstream, 0, rate))
    assert layer.calls == 1


@pytest.mark.parametrize("shape", [(4, 10), (None, 10), (None, None, 3)], ids=str)
def test_computes_output_shape_of_input(shape):
    assert Dropout(0.5).compute_output_shape(shape) == shape


def test_has_no_weights():
    layer = Dropout(0.5, seed=SITE)
    layer(X, training=True)
    assert layer.built
    assert (layer.weights, layer.count_params()) == ([], 0)


def test_passes_mask_of_timesteps_through():
    x = keras.layers.Masking()(np.asarray([[[1.0], [0.0], [2.0]]], "float32"))
    layer = Dropout(0.5, seed=SITE)
    assert layer.supports_masking
    np.testing.assert_array_equal(layer(x, training=True)._keras_mask, [[True, False, True]])


# --- noise_shape ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise_shape", "axes"),
    [
        (None, ()),
        ((4, 10), ()),
        ((None, None), ()),
        ((None, 1), (1,)),
        ([1, 10], (0,)),
        ((1, None), (0,)),
        ((1, 1), (0, 1)),
        ((10,), (0,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, True])
def test_shares_decisions_by_noise_shape(noise_shape, axes, compiled):
    layer = Dropout(0.5, noise_shape, seed=SITE)
    call = tf.function(layer) if compiled else layer
    assert_bits(call(X, training=True), dropped(X, 0, axes=axes))


# --- Seeds that Keras draws -----------------------------------------------------------------------


def test_gives_unseeded_layers_their_own_masks():
    ones = np.ones(370, "float32")
    first, second = (np.asarray(Dropout(0.5)(ones, training=True)) for _ in range(2))
    assert not np.array_equal(first, second)


def test_gives_calls_of_unseeded_layer_their_own_masks():
    layer, ones = Dropout(0.5), np.ones(370, "float32")
    first, second = (np.asarray(layer(ones, training=True)) for _ in range(2))
    assert not np.array_equal(first, second)


def test_leaves_python_generator_alone_with_seed():
    keras.utils.set_random_seed(5)
    expected = Dropout(0.5)(X, training=True)
    keras.utils.set_random_seed(5)
    Dropout(0.5, seed=SITE)(X, training=True)
    assert_bits(Dropout(0.5)(X, training=True), np.asarray(expected))


# --- The call number ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 5, 2**31 - 2])
@pytest.mark.parametrize("kind", [int, np.int64])
def test_accepts_call_number_of_each_kind(value, kind):
    layer = Dropout(0.5, seed=SITE)
    layer.calls = kind(value)
    assert_bits(layer(X, training=True), dropped(X, value))
    assert layer.calls == value + 1


def test_keeps_drawn_seed_when_calls_are_set():
    layer = Dropout(0.5)
    first = np.asarray(layer(X, training=True))
    layer.calls = 0
    assert_bits(layer(X, training=True), first)


# --- Functions and models -------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "XLA"])
def test_advances_without_retracing_at_unknown_batch(compiled):
    layer = Dropout(0.5, seed=SITE)

    @tf.function(input_signature=[tf.TensorSpec((None, 10))], jit_compile=compiled)
    def drop(x):
        return layer(x, training=True)

    for n, rows in enumerate((4, 2, 1, 4)):
        assert_bits(drop(X[:rows]), dropped(X[:rows], n))
    assert drop.experimental_get_tracing_count() == 1
    assert layer.calls == 4


def test_counts_no_function_call_in_inference():
    layer = Dropout(0.5, seed=SITE)
    assert_bits(tf.function(layer)(X, training=False), X)
    assert layer.calls == 0


def test_counts_smaller_last_batch_of_fit():
    layer = Dropout(0.5, seed=SITE)
    model = keras.Sequential([keras.Input((10,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(X, np.zeros((4, 1)), batch_size=3, epochs=2, verbose=0)
    assert layer.calls == 4


def test_gives_each_use_in_model_its_mask():
    layer = Dropout(0.5, seed=SITE)
    inputs = keras.Input((10,))
    model = keras.Model(inputs, layer(layer(inputs)))
    assert_bits(model(X, training=True), dropped(dropped(X, 0), 1))


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [
        ("mixed_float16", np.float16),
        ("mixed_bfloat16", ml_dtypes.bfloat16),
        ("float16", np.float16),
        ("bfloat16", ml_dtypes.bfloat16),
        ("float32", np.float32),
        ("float64", np.float64),
    ],
)
@pytest.mark.parametrize("rate", [0.001, 0.1])
def test_gives_each_policy_its_own_bits(policy, dtype, rate):
    layer = Dropout(rate, seed=SITE, dtype=policy)
    x = np.random.default_rng(0).standard_normal(3000).astype("float32")
    assert_bits(layer(x, training=True), dropped(x.astype(dtype), 0, rate))


# --- Whole feature maps ---------------------------------------------------------------------------


def spatial_axes(layer, data_format):
    """Return the axes along which a spatial layer shares decisions."""
    dimensions = len(SPATIAL_SHAPES[layer])
    return tuple(
        range(2, dimensions) if data_format == "channels_first" else range(1, dimensions - 1)
    )


FORMATS = [(SpatialDropout1D, None)] + [
    (layer, data_format)
    for layer in (SpatialDropout2D, SpatialDropout3D)
    for data_format in (None, "channels_first", "channels_last")
]


@pytest.mark.parametrize(("layer", "data_format"), FORMATS)
@pytest.mark.parametrize("mode", ["eager", "graph", "XLA"])
def test_drops_whole_feature_maps_in_each_mode(layer, data_format, mode):
    shape = SPATIAL_SHAPES[layer]
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    options = {} if data_format is None else {"data_format": data_format}
    made = layer(0.5, seed=SITE, **options)

    def call(x):
        return made(x, training=True)

    if mode != "eager":
        signature = [tf.TensorSpec((None, *shape[1:]))]
        call = tf.function(call, input_signature=signature, jit_compile=mode == "XLA")
    for n, batch in enumerate((x, x[:1])):
        assert_bits(call(batch), dropped(batch, n, axes=spatial_axes(layer, data_format)))
    assert made.calls == 2


@pytest.mark.parametrize("layer", list(SPATIAL_SHAPES))
def test_keeps_all_feature_maps_uncounted_in_inference(layer):
    x, made = np.ones(SPATIAL_SHAPES[layer], "float32"), layer(0.5, seed=SITE)
    assert_bits(made(x), x)
    assert made.calls == 0


# --- Variables, errors, threads -------------------------------------------------------------------


def test_accepts_variable_as_keras_does():
    layer = Dropout(0.5, seed=1)
    actual = layer(tf.Variable(tf.ones((4, 4))), training=True).numpy()
    expected = unidrop.dropout(np.ones((4, 4), np.float32), 0.5, Key(1).fold_in(0))
    np.testing.assert_array_equal(actual, expected)


def test_rolls_back_call_that_fails(monkeypatch):
    layer = Dropout(0.5, seed=1)

    def out_of_memory(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(DropoutPlan, "apply", out_of_memory)
        with pytest.raises(MemoryError):
            layer(np.ones((4, 4), np.float32), training=True)
    assert layer.calls == 0


def test_assigns_call_number_in_stateless_scope():
    layer = Dropout(0.5, seed=SITE)
    state = layer.seed_generator.state
    with keras.StatelessScope() as scope:
        for n in range(2):
            assert_bits(layer(X, training=True), dropped(X, n))
    assert int(scope.get_current_value(state)[1]) == 2
    assert layer.calls == 0


def test_counts_eager_calls_of_replicas():
    with tf.distribute.OneDeviceStrategy("CPU").scope():
        layer = Dropout(0.5, seed=SITE)
        for n in range(2):
            assert_bits(layer(X, training=True), dropped(X, n))
    assert layer.calls == 2


@pytest.mark.parametrize("calls", [0, 2**31 - 1])
def test_counts_eager_calls_by_one_operation(calls, monkeypatch):
    layer, state = Dropout(0.5, seed=SITE), type(Dropout(0.5).seed_generator.state)
    layer.calls = calls
    monkeypatch.setattr(state, "assign", None)
    assert_bits(layer(X, training=True), dropped(X, calls))
    assert layer.calls == calls + 1


def test_gives_threads_call_numbers_of_their_own():
    layer, ones = Dropout(0.5, seed=1), np.ones((16, 16), np.float32)
    with ThreadPoolExecutor(8) as pool:
        masks = pool.map(lambda _: layer(ones, training=True).numpy().tobytes(), range(100))
        actual = sorted(masks)
    expected = [unidrop.dropout(ones, 0.5, Key(1).fold_in(n)).tobytes() for n in range(100)]
    assert actual == sorted(expected)
    assert layer.calls == 100
