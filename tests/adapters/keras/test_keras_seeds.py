"""Tests of the seeds of Keras layers: a Key or None, in files and configurations an integer."""

import json

import keras
import numpy as np
import pytest

import unidrop
from unidrop import Key
from unidrop.adapters.keras import Dropout, SpatialDropout1D, SpatialDropout2D, SpatialDropout3D

SITE = Key(42).fold_in("encoder/0")
X = np.random.default_rng(0).standard_normal((4, 10)).astype("float32")
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
