"""Seeds of Keras layers: given, saved, assigned to a model, compiled, and shared by mistake."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import unidrop
from unidrop import Key
from unidrop.adapters.keras import (
    Dropout,
    SpatialDropout1D,
    SpatialDropout2D,
    SpatialDropout3D,
    assign_seeds,
)

SITE = Key(42).fold_in("encoder/0")
X = np.random.default_rng(0).standard_normal((4, 10)).astype("float32")

# Some models here are nothing but dropout.
pytestmark = pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")

LAYERS = [Dropout, SpatialDropout1D, SpatialDropout2D, SpatialDropout3D]


@pytest.fixture(params=LAYERS, ids=lambda layer: layer.__name__)
def layer(request):
    """Return each class of layers in turn."""
    return request.param


@pytest.mark.parametrize("rate", [0, 0.5])
def test_keeps_seed_as_key_or_none(layer, rate):
    assert layer(rate, seed=SITE).seed is SITE
    assert layer(rate, seed=int(SITE)).seed == SITE
    assert layer(rate).seed is None


@pytest.mark.parametrize("seed", [None, 42, SITE, Key(2**64 - 1)], ids=str)
def test_restores_seed_from_json_config(layer, seed):
    made = layer(0.5, seed=seed)
    config = json.loads(json.dumps(made.get_config()))
    assert config["seed"] == (seed if seed is None else int(seed))
    assert layer.from_config(made.get_config()).seed == made.seed


def test_saves_seed_with_model(tmp_path):
    model = keras.Sequential([keras.Input((10,)), Dropout(0.5, seed=SITE), Dropout(0.5)])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [layer.seed for layer in loaded.layers] == [SITE, None]


def test_uses_key_assigned_to_seed():
    made = Dropout(0.5, seed=1)
    made.seed = SITE
    expected = unidrop.dropout(X, 0.5, SITE.fold_in(0))
    np.testing.assert_array_equal(made(X, training=True), expected)
    assert made.get_config()["seed"] == int(SITE)


def test_accepts_positional_arguments_of_keras():
    one = SpatialDropout1D(0.5, SITE, "one", "float64")
    assert (one.seed, one.name, one.dtype) == (SITE, "one", "float64")
    for kind in (SpatialDropout2D, SpatialDropout3D):
        more = kind(0.5, "channels_first", SITE, "more", "float64")
        assert (more.data_format, more.seed) == ("channels_first", SITE)
        assert (more.name, more.dtype) == ("more", "float64")


# --- Seeds of a whole model -----------------------------------------------------------------------


def make_functional():
    """Return a functional model of two branches and an inner model."""
    inputs = keras.Input((10,))
    inner = keras.Sequential([keras.layers.Dense(10), Dropout(0.5)])
    branches = [Dropout(0.5)(keras.layers.Dense(10)(inputs)) for _ in range(2)]
    grid = keras.layers.Reshape((2, 5))(inner(keras.layers.add(branches)))
    return keras.Model(inputs, keras.layers.TimeDistributed(Dropout(0.5))(grid))


def make_sequential():
    """Return a sequential model that has no input yet."""
    return keras.Sequential([keras.layers.Dense(10), Dropout(0.5), Dropout(0.5)])


def get_seeds(model):
    """Return the seeds of all layers that have one, in order."""
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, tuple(LAYERS))]
    return {layer.seed for layer in layers}


@pytest.mark.parametrize("make", [make_functional, make_sequential])
def test_assigns_same_seeds_to_model_made_again(make, tmp_path):
    expected = get_seeds(assign_seeds(make(), 42))
    assert len(expected) == 4 if make is make_functional else 2
    model = make()
    model(X)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for again in (model, loaded, keras.models.clone_model(model)):
        assert get_seeds(assign_seeds(again, 42)) == expected


def test_assigns_seeds_of_index_in_layers():
    model = assign_seeds(make_functional(), SITE)
    found = [n for n, layer in enumerate(model.layers) if isinstance(layer, Dropout)]
    assert [model.layers[n].seed for n in found] == [SITE.fold_in(f"layers.{n}") for n in found]
    sequential = assign_seeds(make_sequential(), SITE)
    seeds = [SITE.fold_in("layers.1"), SITE.fold_in("layers.2")]
    assert [layer.seed for layer in sequential.layers[1:]] == seeds


def test_assigns_seeds_and_keeps_calls():
    made = Dropout(0.5)
    made.calls = 7
    assign_seeds(keras.Sequential([made]), 42)
    assert made.calls == 7
    assert_drops(made, Key(42).fold_in("layers.0"), 7)


@pytest.mark.parametrize(
    ("model", "seed", "error", "message"),
    [
        (keras.layers.Dense(1), 42, ValueError, "model must have a layer of unidrop"),
        (keras.layers.Dropout(0.5), 42, ValueError, "model must have a layer of unidrop"),
        (Dropout(0.5, seed=SITE), "42", TypeError, "seed must be"),
        (Dropout(0.5, seed=SITE), -1, ValueError, "seed must be"),
        ([Dropout(0.5)], 42, TypeError, "model must be a keras.layers.Layer, got list"),
    ],
)
def test_refuses_to_assign_seeds(model, seed, error, message):
    with pytest.raises(error, match=message):
        assign_seeds(model, seed)
    assert getattr(model, "seed", SITE) in (SITE, None)


# --- Compiled functions that contain a seed -------------------------------------------------------


def assert_drops(layer, seed, call):
    """Compare the next training call with the core's function."""
    expected = unidrop.dropout(X, 0.5, seed.fold_in(call))
    np.testing.assert_array_equal(layer(X, training=True), expected)


def compiled(model, **options):
    model.compile("sgd", keras.losses.MeanSquaredError(), **options)
    return model


class Always(keras.Model):
    """Drops in evaluation, too."""

    def __init__(self):
        super().__init__()
        self.drop = Dropout(0.5, seed=1)

    def call(self, inputs):
        return self.drop(inputs, training=True)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_fits_and_predicts_by_new_seed(jit_compile):
    model = compiled(Always(), jit_compile=jit_compile)
    for step in (model.train_on_batch, model.test_on_batch):
        step(X, 0 * X)
    model.predict_on_batch(X)
    model.drop.seed, model.drop.calls = SITE, 0
    expected = [unidrop.dropout(X, 0.5, SITE.fold_in(n)) for n in range(3)]
    losses = [np.mean(output**2) for output in expected]
    np.testing.assert_array_equal(model.predict_on_batch(X), expected[0])
    np.testing.assert_allclose(model.train_on_batch(X, 0 * X), losses[1], rtol=1e-6)
    model.reset_metrics()
    np.testing.assert_allclose(model.test_on_batch(X, 0 * X), losses[2], rtol=1e-6)


def test_sets_seed_in_callback_of_fit():
    made = Dropout(0.5, seed=1)
    model = compiled(keras.Sequential([keras.Input((10,)), made]))
    change = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(made, "seed", SITE.fold_in(epoch))
    )
    history = model.fit(X, 0 * X, epochs=2, shuffle=False, verbose=0, callbacks=[change])
    for n in range(2):
        expected = unidrop.dropout(X, 0.5, SITE.fold_in(n).fold_in(n))
        np.testing.assert_allclose(history.history["loss"][n], np.mean(expected**2), rtol=1e-6)


def test_fits_by_new_seed_in_step_of_another_model():
    inner, outer = compiled(Always()), compiled(Always())
    inner.train_on_batch(X, 0 * X)
    outer.train_step = inner.train_step
    outer.train_on_batch(X, 0 * X)
    inner.drop.seed, inner.drop.calls = SITE, 0
    inner.reset_metrics()
    outer.train_on_batch(X, 0 * X)
    expected = np.mean(unidrop.dropout(X, 0.5, SITE.fold_in(0)) ** 2)
    np.testing.assert_allclose(inner.get_metrics_result()["loss"], expected, rtol=1e-6)


def test_assigns_all_seeds_if_warning_is_an_error():
    model = keras.Sequential([Dropout(0.5, seed=n) for n in (1, 2)])
    tf.function(lambda: model(X, training=True))()
    with pytest.raises(UserWarning, match="has a new seed"):  # pytest makes warnings errors
        assign_seeds(model, 42)
    assert [layer.seed for layer in model.layers] == [
        Key(42).fold_in(f"layers.{n}") for n in (0, 1)
    ]


class Functions(keras.Model):
    """Compiles one method by itself."""

    def __init__(self, compiles):
        super().__init__()
        self.drop = Dropout(0.5, seed=1)
        setattr(self, compiles, tf.function(getattr(self, compiles)))

    def call(self, inputs, training=False):
        return self.drop(inputs, training=training)


@pytest.mark.parametrize("compiles", ["call", "train_step"])
def test_warns_of_seed_in_function_inside_step(compiles):
    model = compiled(Functions(compiles))
    model.train_on_batch(X, 0 * X)
    with pytest.warns(UserWarning, match="a compiled function, .* contains an earlier one"):
        model.drop.seed = SITE
    if compiles == "train_step":  # Keras keeps the step until it recompiles
        return
    model.call = tf.function(Functions.call.__get__(model))
    expected = np.mean(unidrop.dropout(X, 0.5, SITE.fold_in(1)) ** 2)
    model.reset_metrics()
    np.testing.assert_allclose(model.train_on_batch(X, 0 * X), expected, rtol=1e-6)


def test_warns_of_seed_in_function_of_user():
    made = Dropout(0.5, seed=SITE, name="drop")
    drop = tf.function(lambda: made(X, training=True))
    drop()
    made.seed = int(SITE)
    with pytest.warns(UserWarning, match="the layer 'drop' has a new seed, .* define that"):
        made.seed = 7
    with pytest.warns(UserWarning, match="the layer 'drop' has a new seed"):
        made.seed = 8


def test_sets_seed_silently_after_shapes_are_computed():
    always = Always()
    always(keras.Input((10,)))
    always.drop.seed = SITE
    assert_drops(always.drop, SITE, 0)


# --- Layers with one seed -------------------------------------------------------------------------


def twins(**changes):
    layers = [Dropout(0.5, seed=SITE) for _ in range(2)]
    for name, value in changes.items():
        setattr(layers[1], name, value)
    return keras.Sequential([keras.Input((10,)), *layers])


def test_warns_of_cloned_model_inside_another():
    half = keras.Sequential([keras.Input((10,)), Dropout(0.5, seed=SITE)])
    other = keras.models.clone_model(half)
    other.name = "other"
    model = keras.Sequential([half, other])
    with pytest.warns(UserWarning, match=r"'layers.0.layers.0' and 'layers.1.layers.0' have one"):
        model(X, training=True)


@pytest.mark.parametrize("changes", [{"seed": 7}, {"calls": 5}, {"rate": 0}], ids=str)
def test_warns_only_of_equal_masks(changes):
    twins(**changes)(X, training=True)


def test_compares_no_call_numbers_in_compiled_step():
    model = compiled(twins(calls=1000))
    with pytest.warns(UserWarning, match="one seed, and perhaps one call number, so they may drop"):
        model.train_on_batch(X, X)


def test_warns_of_neither_inference_nor_other_models():
    twins()(X)
    half = keras.Sequential([Dropout(0.5, seed=SITE)])
    for model in (half, keras.models.clone_model(half), half):
        model(X, training=True)
    assign_seeds(twins(), 42)(X, training=True)


def test_warns_of_layer_with_changed_seed():
    model = twins(seed=7)
    model(X, training=True)
    model.layers[1].seed = SITE
    with pytest.warns(UserWarning, match="have one seed"):
        model(X, training=True)


def test_counts_nothing_if_warning_is_an_error():
    model = twins()
    with pytest.raises(UserWarning, match="one seed"):  # pytest makes warnings errors
        model(X, training=True)
    assert [layer.calls for layer in model.layers] == [0, 0]
