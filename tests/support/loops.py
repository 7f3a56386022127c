"""What layers must return whose calls run in a loop, by the portable path of NumPy arrays."""

import numpy as np

import unidrop
from unidrop import Key

__all__ = ["KEY", "X", "chained", "expected"]

KEY = Key(42).fold_in("encoder/0")
X = np.arange(1, 25, dtype="float32")


def expected(numbers, x=X):
    """Return dropout of an array under the key of each call number, stacked."""
    with unidrop.force_path("portable"):
        return np.stack([unidrop.dropout(x, 0.5, KEY.fold_in(n)) for n in numbers])


def chained(numbers, x=X):
    """Return an array after dropout under the key of each call number, one after the other."""
    for n in numbers:
        (x,) = expected([n], x)
    return x
