"""Uses the NumPy adapter, through the attribute of the package."""

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import unidrop
from unidrop import Key
from unidrop.adapters.numpy import dropout, dropout_backward

key = Key(42)
x = np.ones((2, 3))


def drop(return_mask: bool) -> NDArray[Any] | tuple[NDArray[Any], NDArray[np.bool]]:
    """Return the output, and the mask too if requested."""
    return dropout(x, key=key, return_mask=return_mask)


assert_type(dropout(x, 0.1, key=key), NDArray[Any])
assert_type(dropout([1.0, 2.0], keep_prob=0.9, rng=5), NDArray[Any])
assert_type(dropout(x, key=key, return_mask=True), tuple[NDArray[Any], NDArray[np.bool]])
assert_type(dropout(x, key=key, global_shape=(4, 3), start=(2, 0), out=x), NDArray[Any])
assert_type(dropout_backward(x, 0.1, key=key), NDArray[Any])
assert_type(unidrop.adapters.numpy.dropout(x, key=key, return_mask=False), NDArray[Any])

dropout(x, key=42)  # type: ignore
dropout(x, key=key, out=[0.0])  # type: ignore
print(unidrop.adapters.nothing)  # type: ignore
