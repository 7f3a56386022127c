"""LayerDrop's decisions for NumPy: the mask of a key, or of a generator."""

import numpy as np

from unidrop import Key, keep_mask
from unidrop.adapters.numpy import layer_drop

KEY = Key(42).fold_in("stack").fold_in(7)


def test_decides_by_the_ordinary_mask():
    assert np.array_equal(layer_drop(24, 0.3, key=KEY), keep_mask((24,), 0.3, KEY))
    assert layer_drop(5, 0.5, training=False).all()


def test_draws_a_key_from_a_generator():
    one, other = (layer_drop(64, 0.5, rng=7) for _ in range(2))
    assert np.array_equal(one, other)
    assert not np.array_equal(layer_drop(64), layer_drop(64))
