"""Expected results of JAX's dropout, from the core's portable path on NumPy arrays."""

import numpy as np

import unidrop
from unidrop import Key
from unidrop.adapters.jax import dropout

KEY = Key(42).fold_in("encoder/0")
RATE = 0.3


def values(shape, dtype="float32"):
    return np.linspace(-2, 2, int(np.prod(shape)), dtype=dtype).reshape(shape)


def wanted(x, key=KEY, rate=RATE, **options):
    with unidrop.force_path("portable"):
        return unidrop.dropout(np.asarray(x), rate, key, **options)


def assert_bits(actual, expected):
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def step_function(x, step):
    return dropout(x, RATE, KEY.fold_in(step))
