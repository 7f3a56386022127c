"""LayerDrop: an ordinary mask, with one element for each layer."""

import numpy as np
import pytest

from unidrop import Key, keep_mask
from unidrop.family import layer_drop

KEY = Key(42).fold_in("stack").fold_in(7)


def test_decides_by_the_ordinary_mask():
    assert np.array_equal(layer_drop(24, 0.3, KEY), keep_mask((24,), 0.3, KEY))


def test_decides_alike_for_a_longer_stack():
    assert np.array_equal(layer_drop(24, 0.3, KEY)[:9], layer_drop(9, 0.3, KEY))


def test_runs_all_layers_or_none():
    assert layer_drop(5, 0, KEY).all()
    assert layer_drop(5, 0.5, KEY, training=False).all()
    assert not layer_drop(5, 1, KEY).any()
    assert layer_drop(0, 0.5, KEY).shape == (0,)


@pytest.mark.slow
def test_skips_layers_at_the_rate():
    assert abs(layer_drop(10**6, 0.2, KEY).mean() - 0.8) < 4 * np.sqrt(0.2 * 0.8 / 10**6)


@pytest.mark.parametrize("number", [1.5, True, "3", None])
def test_raises_unless_the_number_of_layers_is_an_integer(number):
    with pytest.raises(TypeError, match="num_layers must be an integer"):
        layer_drop(number, 0.5, KEY)


def test_raises_for_other_bad_arguments():
    with pytest.raises(ValueError, match="num_layers must be 0 <= num_layers"):
        layer_drop(-1, 0.5, KEY)
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
        layer_drop(5, 1.5, KEY)
    with pytest.raises(TypeError, match=r"key must be a unidrop\.Key"):
        layer_drop(5, 0.5, 42)
