"""Arguments, files and seeds of Keras attention layers, which no backend changes."""

import keras
import numpy as np
import pytest
from keras_attention import (
    LAYERS,
    QUERY,
    RATE,
    VALUE,
    apply,
    get_own,
    make,
    make_model,
    make_readable,
    read_weights,
    reference,
    to_numpy,
)
from keras_models import SITE

from unidrop import Key, keep_mask
from unidrop.adapters.keras import (
    Attention,
    Dropout,
    GroupQueryAttention,
    MultiHeadAttention,
    assign_seeds,
)


@pytest.fixture(params=LAYERS, ids=lambda layer: layer.__name__)
def kind(request):
    """Return each class of layers in turn."""
    return request.param


@pytest.mark.parametrize(("length", "rate"), [(1, 0.1), (27, 1), (45, 0.1), (128, 0.1)])
@pytest.mark.filterwarnings("ignore:You are using a softmax over axis")
def test_keeps_weights_at_each_length_and_rate(kind, length, rate):
    weights = read_weights(make_readable(kind, rate, length), length)
    np.testing.assert_array_equal(weights != 0, keep_mask(weights.shape, rate, SITE.fold_in(0)))


@pytest.mark.parametrize("dtype", ["mixed_float16", "bfloat16"])
def test_keeps_same_weights_in_each_policy(kind, dtype):
    layer = make_readable(kind, RATE, 6, dtype=dtype)
    weights = read_weights(layer, 6)
    np.testing.assert_array_equal(weights != 0, keep_mask(weights.shape, RATE, SITE.fold_in(0)))


def test_keeps_weights_by_mask_of_more_axes():
    query, value = np.zeros((2, 3, 5, 4), "float32"), np.zeros((2, 3, 6, 4), "float32")
    layer, options = make(Attention), {"return_attention_scores": True}
    _, weights = apply(layer, query, value, **options)
    kept = keep_mask((2, 3, 5, 6), RATE, SITE.fold_in(0))
    np.testing.assert_array_equal(to_numpy(weights) != 0, kept)


def test_attends_by_mask_of_padding():
    padding = np.ones((2, 6), bool)
    padding[1, 4:] = False
    bias = np.where(padding, 0, -np.inf)
    layer = make(Attention)
    y = layer([QUERY, VALUE], mask=[None, padding], training=True)
    expected, *_ = reference(layer, 0, QUERY, bias=bias[:, None])
    np.testing.assert_allclose(to_numpy(y), expected, rtol=1e-6, atol=1e-6)
    layer = make(MultiHeadAttention, use_bias=False)
    y = apply(layer, QUERY, VALUE, attention_mask=padding[:, None])
    expected, *_ = reference(layer, 0, QUERY, bias=bias[:, None, None])
    np.testing.assert_allclose(to_numpy(y), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"training": False}, {"training": None}], ids=str)
def test_equals_keras_own_in_inference_uncounted(kind, options):
    layer = make(kind)
    own = get_own(kind).from_config({**layer.get_config(), "seed": None})
    expected = to_numpy(apply(own, QUERY, VALUE, **options))
    apply(layer, QUERY, VALUE, **options)
    layer.set_weights(own.get_weights())
    np.testing.assert_array_equal(to_numpy(apply(layer, QUERY, VALUE, **options)), expected)
    assert layer.calls == 0


def test_equals_keras_own_at_rate_0(kind):
    layer = make(kind, rate=0)
    own = get_own(kind).from_config({**layer.get_config(), "seed": None})
    apply(layer, QUERY, VALUE), apply(own, QUERY, VALUE)
    layer.set_weights(own.get_weights())
    y, expected = (to_numpy(apply(each, QUERY, VALUE)) for each in (layer, own))
    np.testing.assert_array_equal(y, expected)
    assert (layer.calls, layer.seed) == (0, SITE)


@pytest.mark.parametrize("seed", [None, SITE, Key(2**64 - 1), 7], ids=str)
def test_restores_seed_from_config(kind, seed):
    layer = make(kind, seed=seed)
    config = keras.layers.serialize(layer)
    assert config["config"]["seed"] == (seed if seed is None else int(seed))
    restored = keras.layers.deserialize(config)
    assert type(restored) is kind
    assert (restored.seed, restored.dropout) == (layer.seed, RATE)


FILES = [(kind, suffix, SITE) for kind in LAYERS for suffix in (".weights.h5", ".h5")]
FILES.append((MultiHeadAttention, ".keras", None))
FILES.remove((Attention, ".h5", SITE))  # Keras reads the score mode as a function, and fails


@pytest.mark.parametrize(("kind", "suffix", "seed"), FILES)
def test_resumes_from_each_kind_of_file(kind, suffix, seed, tmp_path):
    model, layer = make_model(kind, seed)
    for _ in range(2):
        model([QUERY, VALUE], training=True)
    path = tmp_path / f"model{suffix}"
    if suffix == ".weights.h5":
        model.save_weights(path)
        resumed, _ = make_model(kind, seed)
        resumed.load_weights(path)
    else:
        model.save(path)
        resumed = keras.saving.load_model(path)
    assert resumed.layers[2].calls == layer.calls == 2
    y, expected = (to_numpy(each([QUERY, VALUE], training=True)) for each in (resumed, model))
    np.testing.assert_array_equal(y, expected)


def test_loads_weights_of_keras_own_layer(kind, tmp_path):
    model, layer = make_model(kind)
    own = get_own(kind).from_config({**layer.get_config(), "seed": 1})
    theirs = keras.models.clone_model(
        model,
        clone_function=lambda each: (
            own if each is layer else type(each).from_config(each.get_config())
        ),
    )
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    layer.calls = 5
    model.load_weights(tmp_path / "theirs.weights.h5")
    for actual, expected in zip(model.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert layer.calls == 5


@pytest.mark.parametrize("wrong", [True, "0.5", None], ids=str)
def test_names_dropout_that_is_not_number(kind, wrong):
    with pytest.raises(TypeError, match="dropout must be"):
        make(kind, rate=wrong)


def test_rejects_arguments_as_keras_does(kind):
    for rate in (-0.1, 1.5):
        with pytest.raises(ValueError, match="Expected a float value between 0 and 1"):
            make(kind, rate=rate)
    for seed in (-1, 2**64, 0.5, True):
        with pytest.raises(ValueError, match="seed"):
            make(kind, seed=seed)
    if kind is not Attention:
        with pytest.raises(ValueError, match="not supported when flash attention"):
            make(kind, flash_attention=True)
    with pytest.raises(ValueError, match="must be divisible"):
        GroupQueryAttention(3, 4, 3)


def test_follows_seed_rate_and_calls_that_are_set(kind):
    layer, other = make(kind, rate=0.5, seed=1), make(kind)
    apply(other, QUERY, VALUE)
    apply(layer, QUERY, VALUE)
    layer.set_weights(other.get_weights())
    layer.seed, layer.dropout, layer.calls = SITE, RATE, 1
    y, expected = (to_numpy(apply(each, QUERY, VALUE)) for each in (layer, other))
    np.testing.assert_array_equal(y, expected)
    assert (layer.get_config()["dropout"], layer.get_config()["seed"]) == (RATE, int(SITE))


def test_rejects_wrong_dropout_that_is_set(kind):
    layer, never = make(kind), make(kind, rate=0.0)
    for wrong, error in ((1.5, ValueError), (float("nan"), ValueError), (True, TypeError)):
        with pytest.raises(error, match=rf"dropout .* between 0 and 1.* got {wrong}"):
            layer.dropout = wrong
    with pytest.raises(ValueError, match=r"dropout must stay 0 .* got 0.5"):
        never.dropout = 0.5
    never.dropout = 0
    assert (layer.dropout, never.dropout) == (RATE, 0)
    apply(never, QUERY, VALUE)


class Block(keras.layers.Layer):
    """Two attention layers and a dropout layer."""

    def __init__(self, kind, seed=None):
        super().__init__()
        self.first, self.second = make(kind, seed=seed), make(kind, seed=seed)
        self.dropout = Dropout(0.5)

    def call(self, query, value, training=False):
        query = apply(self.first, query, value, training=training)
        return self.dropout(apply(self.second, query, value, training=training))


def test_assigns_seeds_by_path_of_attention_layer(kind):
    block = assign_seeds(Block(kind), 42)
    for name in ("first", "second", "dropout"):
        assert getattr(block, name).seed == Key(42).fold_in(name)


def test_warns_of_attention_layers_with_one_seed(kind):
    with pytest.warns(UserWarning, match="'first' and 'second' have one seed"):
        Block(kind, SITE)(QUERY, VALUE, training=True)
