"""Tests of the Keras layers on the TensorFlow backend: in models, in files, and by themselves."""

import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import unidrop
from unidrop import Key
from unidrop.adapters.keras import Dropout, SpatialDropout1D, SpatialDropout2D, SpatialDropout3D

SITE = Key(42).fold_in("encoder/0")
X = np.random.default_rng(0).standard_normal((4, 10)).astype("float32")
LAYERS = [Dropout, SpatialDropout1D, SpatialDropout2D, SpatialDropout3D]
SPATIAL = {SpatialDropout1D: (2, 3, 4), SpatialDropout2D: (2, 3, 5, 4)} | {
    SpatialDropout3D: (2, 3, 5, 2, 4)
}


def native(layer):
    """Return the layer of Keras that a layer of ours stands for."""
    return getattr(keras.layers, layer.__name__)


def dropped(x, n, rate=0.5, site=SITE, axes=()):
    """Return what training call n makes of an array, by the core on NumPy."""
    return unidrop.dropout(x, rate, site.fold_in(n), broadcast_axes=axes)


def assert_bits(actual, expected):
    """Compare a tensor with an array: shape, dtype and bits."""
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


@keras.saving.register_keras_serializable(package="tests")
class Record(keras.layers.Layer):
    """Keep the last training batch that actual by."""

    def build(self, input_shape):
        self.seen = self.add_weight(shape=(4, *input_shape[1:]), trainable=False)

    def call(self, inputs, training=False):
        if training:
            self.seen.assign(inputs)
        return inputs


def recording(layer):
    """Return a compiled model that keeps what the layer makes of its training batches of 4."""
    model = keras.Sequential([keras.Input((10,)), layer, Record(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


# --- The layer by itself -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", [SITE, int(SITE)], ids=["Key", "int"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 1, 1.0])
def test_training_call_n_has_the_key_with_n_folded_in(seed, rate):
    layer = Dropout(rate, seed=seed)
    for n in range(3):
        assert_bits(layer(X, training=True), dropped(X, n, rate))
    assert layer.calls == 3


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 + 1, 2**63, 2**64 - 1])
def test_all_64_bits_of_a_seed_count(seed):
    assert_bits(Dropout(0.5, seed=seed)(X, training=True), dropped(X, 0, site=Key(seed)))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_one_of_keras(layer):
    assert isinstance(layer(0.5), keras.layers.Dropout)
    assert isinstance(layer(0.5), native(layer))


@pytest.mark.parametrize("arguments", [{}, {"training": False}, {"training": None}], ids=str)
def test_inference_is_the_identity_and_does_not_count(arguments):
    layer = Dropout(0.5, seed=SITE)
    assert_bits(layer(X, **arguments), X)
    assert layer.calls == 0


@pytest.mark.parametrize("rate", [0, 0.0])
def test_a_call_at_rate_0_is_the_identity_and_does_not_count(rate):
    layer = Dropout(rate, seed=SITE)
    assert_bits(layer(X, training=True), X)
    assert layer.calls == 0


def test_a_symbolic_call_does_not_count():
    layer = Dropout(0.5, seed=SITE)
    output = layer(keras.Input((10,), batch_size=4), training=True)
    assert output.shape == (4, 10)
    assert layer.calls == 0


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3, 5)], ids=str)
def test_inputs_of_any_shape_keep_it(shape):
    x = np.ones(shape, "float32")
    assert_bits(Dropout(0.5, seed=SITE)(x, training=True), dropped(x, 0))


def test_dropped_nan_and_infinities_are_positive_zeros():
    y = Dropout(1, seed=SITE)(np.asarray([np.nan, np.inf, -np.inf, -1], "float32"), training=True)
    assert_bits(y, np.zeros(4, "float32"))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_gradient_is_the_same_function_of_the_upstream_gradient(rate):
    layer, x, upstream = Dropout(rate, seed=SITE), tf.constant(X), np.flip(X).copy()
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    gradient = tape.gradient(y, x, output_gradients=tf.constant(upstream))
    assert_bits(gradient, dropped(upstream, 0, rate))
    assert layer.calls == 1


@pytest.mark.parametrize("shape", [(4, 10), (None, 10), (None, None, 3)], ids=str)
def test_the_output_shape_is_the_inputs(shape):
    assert Dropout(0.5).compute_output_shape(shape) == shape


def test_a_layer_has_no_weights():
    layer = Dropout(0.5, seed=SITE)
    layer(X, training=True)
    assert layer.built
    assert (layer.weights, layer.count_params()) == ([], 0)


def test_a_mask_of_timesteps_passes_through():
    x = keras.layers.Masking()(np.asarray([[[1.0], [0.0], [2.0]]], "float32"))
    layer = Dropout(0.5, seed=SITE)
    assert layer.supports_masking
    np.testing.assert_array_equal(layer(x, training=True)._keras_mask, [[True, False, True]])


# --- noise_shape -------------------------------------------------------------------------------


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
def test_noise_shape_shares_decisions(noise_shape, axes, compiled):
    layer = Dropout(0.5, noise_shape, seed=SITE)
    call = tf.function(layer) if compiled else layer
    assert_bits(call(X, training=True), dropped(X, 0, axes=axes))


@pytest.mark.parametrize("noise_shape", [(3, 10), (4, 9), (1, 4, 10)], ids=str)
def test_a_noise_shape_that_does_not_fit_the_input_raises_and_does_not_count(noise_shape):
    layer = Dropout(0.5, noise_shape, seed=SITE)
    with pytest.raises(ValueError, match=rf"noise_shape must .*{re.escape(str(noise_shape))}"):
        layer(X, training=True)
    assert layer.calls == 0


# --- Constructors ------------------------------------------------------------------------------


def get_error(make, *args, **kwargs):
    """Return the type and message of what a call raises."""
    try:
        made = make(*args, **kwargs)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    return pytest.fail(f"raised nothing and returned {made}")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rate", [-0.1, 1.1, 2, float("nan"), float("inf")])
def test_a_rate_outside_0_and_1_raises_what_keras_raises(layer, rate):
    assert get_error(layer, rate) == get_error(native(layer), rate)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rate", [True, "0.5", None, np.float32(0.1), tf.constant(0.1)], ids=repr)
def test_a_rate_that_is_no_python_number_raises_and_is_named(layer, rate):
    with pytest.raises(TypeError, match=rf"probability rate .*got {re.escape(repr(rate))}"):
        layer(rate)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_rate_that_is_a_tensor_raises_and_says_what_to_give(layer):
    with pytest.raises(TypeError, match="compile-time constant, so pass a Python float"):
        layer(tf.constant(0.1))


@pytest.mark.parametrize(
    "noise_shape", ["10", 10, 1.5, (1.5, 10), (0, 10), (-1, 10), ("a",)], ids=repr
)
def test_a_noise_shape_that_is_none_raises_what_keras_raises(noise_shape):
    assert get_error(Dropout, 0.5, noise_shape) == get_error(keras.layers.Dropout, 0.5, noise_shape)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("arguments", [{"units": 3}, {"name": 3}, {"dtype": "float7"}], ids=str)
def test_other_arguments_raise_what_keras_raises(layer, arguments):
    assert get_error(layer, 0.5, **arguments) == get_error(native(layer), 0.5, **arguments)


@pytest.mark.parametrize("layer", [SpatialDropout2D, SpatialDropout3D])
def test_a_data_format_that_is_none_raises_what_keras_raises(layer):
    expected = get_error(native(layer), 0.5, data_format="channels")
    assert get_error(layer, 0.5, data_format="channels") == expected


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("seed", ["42", 1.0, 1.5, (1, 2), np.int64(3), b"1"], ids=repr)
def test_a_seed_that_is_none_raises_as_in_keras_and_is_named(layer, seed):
    with pytest.raises(ValueError, match="seed") as of_keras:
        native(layer)(0.5, seed=seed)
    start, end = str(of_keras.value).split(". ")
    with pytest.raises(ValueError, match=rf"^{re.escape(start)}.*\. {re.escape(end)}$"):
        layer(0.5, seed=seed)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("seed", [True, -1, 2**64], ids=repr)
@pytest.mark.parametrize("rate", [0, 0.5])
def test_a_seed_outside_64_bits_raises_and_is_named(layer, seed, rate):
    with pytest.raises(ValueError, match=rf"seed.*{seed}"):
        layer(rate, seed=seed)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_integers_raise_name_the_inputs_and_do_not_count(dtype):
    layer = Dropout(0.5, seed=SITE)
    with pytest.raises(TypeError, match=rf"inputs must be of a floating.*{dtype}"):
        layer(np.ones(3, dtype), training=True)
    assert layer.calls == 0


# --- Seeds that Keras draws --------------------------------------------------------------------


def test_set_random_seed_reproduces_an_unseeded_layer():
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        layer = Dropout(0.5)
        runs.append(np.stack([layer(X, training=True) for _ in range(3)]))
    np.testing.assert_array_equal(*runs)


def test_unseeded_layers_have_masks_of_their_own():
    ones = np.ones(370, "float32")
    first, second = (np.asarray(Dropout(0.5)(ones, training=True)) for _ in range(2))
    assert not np.array_equal(first, second)


def test_the_calls_of_an_unseeded_layer_have_masks_of_their_own():
    layer, ones = Dropout(0.5), np.ones(370, "float32")
    first, second = (np.asarray(layer(ones, training=True)) for _ in range(2))
    assert not np.array_equal(first, second)


def test_a_seeded_layer_leaves_pythons_generator_alone():
    keras.utils.set_random_seed(5)
    expected = Dropout(0.5)(X, training=True)
    keras.utils.set_random_seed(5)
    Dropout(0.5, seed=SITE)(X, training=True)
    assert_bits(Dropout(0.5)(X, training=True), np.asarray(expected))


# --- The call number ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 5, 2**31 - 2])
@pytest.mark.parametrize("kind", [int, np.int64])
def test_the_call_number_can_be_set(value, kind):
    layer = Dropout(0.5, seed=SITE)
    layer.calls = kind(value)
    assert_bits(layer(X, training=True), dropped(X, value))
    assert layer.calls == value + 1


def test_setting_the_call_number_of_an_unseeded_layer_leaves_its_seed():
    layer = Dropout(0.5)
    first = np.asarray(layer(X, training=True))
    layer.calls = 0
    assert_bits(layer(X, training=True), first)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (2**31, ValueError),
        (True, TypeError),
        (1.0, TypeError),
        ("5", TypeError),
        (None, TypeError),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rate", [0, 0.5])
def test_a_call_number_that_is_none_raises_is_named_and_changes_nothing(rate, value, error):
    layer = Dropout(rate, seed=SITE)
    with pytest.raises(error, match=rf"^calls must be .*{value}"):
        layer.calls = value
    assert layer.calls == 0


# --- Functions and models ----------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "XLA"])
def test_a_function_with_an_unknown_batch_advances_without_retracing(compiled):
    layer = Dropout(0.5, seed=SITE)

    @tf.function(input_signature=[tf.TensorSpec((None, 10))], jit_compile=compiled)
    def drop(x):
        return layer(x, training=True)

    for n, rows in enumerate((4, 2, 1, 4)):
        assert_bits(drop(X[:rows]), dropped(X[:rows], n))
    assert drop.experimental_get_tracing_count() == 1
    assert layer.calls == 4


def test_a_function_in_inference_does_not_advance():
    layer = Dropout(0.5, seed=SITE)
    assert_bits(tf.function(layer)(X, training=False), X)
    assert layer.calls == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"run_eagerly": True}, {"jit_compile": True}, {"jit_compile": False}],
    ids=["default", "eager", "XLA", "graph"],
)
def test_fit_drops_and_advances_once_a_step(options):
    layer = Dropout(0.5, seed=SITE)
    model = recording(layer)
    model.compile("sgd", "mse", **options)
    model.fit(
        np.tile(X, (3, 1)), np.zeros((12, 1)), batch_size=4, epochs=2, shuffle=False, verbose=0
    )
    assert layer.calls == 6
    assert_bits(model.layers[1].seen, dropped(X, 5))


def test_fit_counts_a_smaller_last_batch():
    layer = Dropout(0.5, seed=SITE)
    model = keras.Sequential([keras.Input((10,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(X, np.zeros((4, 1)), batch_size=3, epochs=2, verbose=0)
    assert layer.calls == 4


def test_train_on_batch_advances_by_1():
    layer = Dropout(0.5, seed=SITE)
    model = recording(layer)
    for n in range(2):
        model.train_on_batch(X, np.zeros((4, 1)))
        assert_bits(model.layers[1].seen, dropped(X, n))


def test_predict_and_evaluate_neither_drop_nor_advance():
    layer = Dropout(0.5, seed=SITE)
    model = keras.Sequential([keras.Input((10,)), layer])
    model.compile("sgd", "mse")
    assert_bits(model.predict(X, verbose=0), X)
    assert model.evaluate(X, X, verbose=0) == 0
    assert layer.calls == 0


def test_validation_during_fit_does_not_advance():
    layer = Dropout(0.5, seed=SITE)
    model = recording(layer)
    targets = np.zeros((4, 1))
    model.fit(X, targets, validation_data=(X, targets), batch_size=4, epochs=2, verbose=0)
    assert layer.calls == 2


def test_a_functional_model_trains_with_the_layers_masks():
    layer, record = Dropout(0.5, seed=SITE), Record()
    inputs = keras.Input((10,))
    model = keras.Model(inputs, keras.layers.Dense(1)(record(layer(inputs))))
    model.compile("sgd", "mse")
    model.fit(X, np.zeros((4, 1)), batch_size=4, epochs=3, shuffle=False, verbose=0)
    assert_bits(record.seen, dropped(X, 2))


def test_a_layer_that_a_model_uses_twice_has_a_mask_for_each_use():
    layer = Dropout(0.5, seed=SITE)
    inputs = keras.Input((10,))
    model = keras.Model(inputs, layer(layer(inputs)))
    assert_bits(model(X, training=True), dropped(dropped(X, 0), 1))


# --- Precision ---------------------------------------------------------------------------------


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
def test_each_policy_has_the_same_mask_and_its_own_bits(policy, dtype, rate):
    layer = Dropout(rate, seed=SITE, dtype=policy)
    x = np.random.default_rng(0).standard_normal(3000).astype("float32")
    assert_bits(layer(x, training=True), dropped(x.astype(dtype), 0, rate))


def test_a_model_trains_in_mixed_precision():
    layer = Dropout(0.5, seed=SITE, dtype="mixed_float16")
    model = recording(layer)
    model.fit(X, np.zeros((4, 1)), batch_size=4, verbose=0)
    assert layer.calls == 1


# --- Configurations ----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_the_config_is_that_of_keras(layer):
    mine, of_keras = (make(0.2, seed=42, name="drop") for make in (layer, native(layer)))
    assert mine.get_config() == of_keras.get_config()


@pytest.mark.parametrize("seed", [None, 42, SITE, Key(2**64 - 1)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_rebuilt_from_its_config(layer, seed):
    config = layer(0.2, seed=seed, name="drop", dtype="mixed_float16").get_config()
    assert config["seed"] == (int(seed) if isinstance(seed, Key) else seed)
    assert layer.from_config(config).get_config() == config


def test_noise_shape_is_in_the_config():
    layer = Dropout.from_config(Dropout(0.2, (None, 1), seed=SITE).get_config())
    assert layer.noise_shape == (None, 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_rebuilt_from_the_config_of_keras_own(layer):
    config = native(layer)(0.2, seed=42).get_config()
    assert layer.from_config(config).get_config() == config


@pytest.mark.parametrize("layer", LAYERS)
def test_a_serialized_layer_is_ours_again(layer):
    config = keras.saving.serialize_keras_object(layer(0.2, seed=SITE))
    assert type(keras.saving.deserialize_keras_object(config)) is layer


def test_a_cloned_model_has_the_same_seed_and_calls_of_its_own():
    layer = Dropout(0.5, seed=SITE)
    model = keras.Sequential([keras.Input((10,)), layer])
    model(X, training=True)
    clone = keras.models.clone_model(model)
    assert_bits(clone(X, training=True), dropped(X, 0))
    assert (layer.calls, clone.layers[0].calls) == (1, 1)


# --- Files -------------------------------------------------------------------------------------


def by_model(model, path):
    """Save a model whole and load it."""
    model.save(path / "model.keras")
    return keras.saving.load_model(path / "model.keras")


def by_weights(model, path):
    """Save a model's weights and load them into a new one of the same architecture."""
    model.save_weights(path / "model.weights.h5")
    fresh = keras.Sequential.from_config(model.get_config())
    fresh.load_weights(path / "model.weights.h5")
    return fresh


def by_pickle(model, path):
    """Pickle a model and unpickle it."""
    return pickle.loads(pickle.dumps(model))


@pytest.fixture(params=[by_model, by_weights, by_pickle], ids=[".keras", ".weights.h5", "pickle"])
def reload(request, tmp_path):
    """Return each way to save a model and load it, in turn."""
    return lambda model: request.param(model, tmp_path)


@pytest.mark.parametrize("seed", [SITE, 42, 2**64 - 1, None], ids=str)
@pytest.mark.parametrize("calls", [0, 3])
def test_a_loaded_run_goes_on_as_if_never_stopped(reload, seed, calls):
    layer = Dropout(0.5, seed=seed)
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])
    for _ in range(calls):
        model(X, training=True)
    loaded = reload(model)
    assert loaded.layers[1].calls == calls
    for _ in range(2):
        assert_bits(loaded(X, training=True), np.asarray(model(X, training=True)))


def test_each_layer_resumes_its_own_calls(reload):
    layers = [Dropout(0.5, seed=n) for n in range(3)]
    model = keras.Sequential([keras.Input((10,)), *layers])
    for n, layer in enumerate(layers):
        layer.calls = 5 + n
    assert [layer.calls for layer in reload(model).layers] == [5, 6, 7]


@pytest.mark.parametrize("layer", list(SPATIAL))
def test_spatial_layers_resume_their_calls(reload, layer):
    shape = SPATIAL[layer]
    model = keras.Sequential([keras.Input(shape[1:]), layer(0.5, seed=SITE)])
    model(np.ones(shape), training=True)
    loaded = reload(model)
    assert type(loaded.layers[0]) is layer
    assert loaded.layers[0].calls == 1


def test_a_layer_at_rate_0_is_saved_and_loaded(reload):
    model = keras.Sequential([keras.Input((10,)), Dropout(0, seed=SITE)])
    assert_bits(reload(model)(X, training=True), X)


def test_a_fit_that_is_resumed_has_the_masks_of_one_that_was_not(reload):
    steps = [recording(Dropout(0.5, seed=SITE)) for _ in range(2)]
    for model in steps:
        model.train_on_batch(X, np.zeros((4, 1)))
    resumed = reload(steps[0])
    resumed.compile("sgd", "mse")
    for model in (steps[1], resumed):
        model.train_on_batch(X, np.zeros((4, 1)))
    assert_bits(resumed.layers[1].seen, np.asarray(steps[1].layers[1].seen))
    assert_bits(resumed.layers[1].seen, dropped(X, 1))


def test_loading_keeps_a_given_seed_over_the_files(tmp_path):
    model = keras.Sequential([keras.Input((10,)), Dropout(0.5)])
    model(X, training=True)
    model.save_weights(tmp_path / "model.weights.h5")
    seeded = keras.Sequential([keras.Input((10,)), Dropout(0.5, seed=SITE)])
    seeded.load_weights(tmp_path / "model.weights.h5")
    assert_bits(seeded(X, training=True), dropped(X, 1))


def test_weights_that_were_saved_with_keras_own_dropout_load_and_leave_the_calls(tmp_path):
    def network(layer):
        return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])

    of_keras = network(keras.layers.Dropout(0.5, seed=1))
    of_keras(X, training=True)
    of_keras.save_weights(tmp_path / "model.weights.h5")
    mine = network(Dropout(0.5, seed=SITE))
    mine.layers[1].calls = 5
    mine.load_weights(tmp_path / "model.weights.h5")
    assert mine.layers[1].calls == 5
    assert_bits(mine(X), np.asarray(of_keras(X)))


def test_a_checkpoint_of_tensorflow_resumes_the_calls(tmp_path):
    def network():
        return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), Dropout(0.5)])

    model, resumed = network(), network()
    for _ in range(3):
        model(X, training=True)
    path = tf.train.Checkpoint(model=model).save(tmp_path / "model")
    tf.train.Checkpoint(model=resumed).restore(path).assert_consumed()
    assert resumed.layers[1].calls == 3
    # The seed that Keras drew is in it, too.
    assert_bits(resumed(X, training=True), np.asarray(model(X, training=True)))


def test_a_checkpoint_of_keras_own_dropout_leaves_the_calls(tmp_path):
    def network(layer):
        return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])

    of_keras, mine = network(keras.layers.Dropout(0.5)), network(Dropout(0.5, seed=SITE))
    mine.layers[1].calls = 5
    path = tf.train.Checkpoint(model=of_keras).save(tmp_path / "model")
    tf.train.Checkpoint(model=mine).restore(path).expect_partial()
    assert mine.layers[1].calls == 5
    assert_bits(mine(X), np.asarray(of_keras(X)))


def test_our_checkpoints_restore_into_keras_own_dropout(tmp_path):
    def network(layer):
        return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])

    mine, of_keras = network(Dropout(0.5, seed=SITE)), network(keras.layers.Dropout(0.5))
    path = tf.train.Checkpoint(model=mine).save(tmp_path / "model")
    tf.train.Checkpoint(model=of_keras).restore(path).assert_existing_objects_matched()
    assert_bits(of_keras(X), np.asarray(mine(X)))


def test_keras_own_dropout_refuses_our_weights_and_takes_them_without_the_call_number(tmp_path):
    def network(layer):
        return keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), layer])

    mine, of_keras = network(Dropout(0.5, seed=SITE)), network(keras.layers.Dropout(0.5))
    mine.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="expected 0 variables"):
        of_keras.load_weights(tmp_path / "model.weights.h5")
    with pytest.warns(UserWarning, match="could not be loaded"):
        of_keras.load_weights(tmp_path / "model.weights.h5", skip_mismatch=True)
    assert_bits(of_keras(X), np.asarray(mine(X)))
    of_keras.set_weights(mine.get_weights())


# --- Whole feature maps ------------------------------------------------------------------------


def spatial_axes(layer, data_format):
    """Return the axes along which a spatial layer shares decisions."""
    dimensions = len(SPATIAL[layer])
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
@pytest.mark.parametrize("batch", [1, 2])
def test_whole_feature_maps_are_dropped(layer, data_format, mode, batch):
    shape = (batch, *SPATIAL[layer][1:])
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    options = {} if data_format is None else {"data_format": data_format}
    made = layer(0.5, seed=SITE, **options)

    def call(x):
        return made(x, training=True)

    if mode != "eager":
        signature = [tf.TensorSpec((None, *shape[1:]))]
        call = tf.function(call, input_signature=signature, jit_compile=mode == "XLA")
    for n in range(2):
        assert_bits(call(x), dropped(x, n, axes=spatial_axes(layer, data_format)))
    assert made.calls == 2


@pytest.mark.parametrize("layer", list(SPATIAL))
def test_inference_keeps_all_feature_maps_and_does_not_count(layer):
    x, made = np.ones(SPATIAL[layer], "float32"), layer(0.5, seed=SITE)
    assert_bits(made(x), x)
    assert made.calls == 0


@pytest.mark.parametrize("layer", list(SPATIAL))
def test_an_input_of_another_rank_raises_what_keras_raises_and_does_not_count(layer):
    made = layer(0.5, seed=SITE, name="drop")
    expected = get_error(native(layer)(0.5, name="drop"), X, training=True)
    assert get_error(made, X, training=True) == expected
    assert made.calls == 0


def test_a_variable_is_taken_as_by_keras():
    layer = Dropout(0.5, seed=1)
    actual = layer(tf.Variable(tf.ones((4, 4))), training=True).numpy()
    expected = unidrop.dropout(np.ones((4, 4), np.float32), 0.5, Key(1).fold_in(0))
    np.testing.assert_array_equal(actual, expected)


def test_a_call_that_fails_while_it_drops_is_not_counted(monkeypatch):
    layer = Dropout(0.5, seed=1)

    def out_of_memory(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(unidrop.adapters.keras.DropoutPlan, "apply", out_of_memory)
        with pytest.raises(MemoryError):
            layer(np.ones((4, 4), np.float32), training=True)
    assert layer.calls == 0


def test_threads_that_share_a_layer_never_share_a_call_number():
    layer, ones = Dropout(0.5, seed=1), np.ones((16, 16), np.float32)
    with ThreadPoolExecutor(8) as pool:
        masks = pool.map(lambda _: layer(ones, training=True).numpy().tobytes(), range(100))
        actual = sorted(masks)
    expected = [unidrop.dropout(ones, 0.5, Key(1).fold_in(n)).tobytes() for n in range(100)]
    assert actual == sorted(expected)
    assert layer.calls == 100
