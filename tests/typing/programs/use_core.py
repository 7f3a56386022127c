"""Uses the core on NumPy arrays and PyTorch tensors."""

from typing import Any, assert_type

import numpy as np
import torch
from numpy.typing import NDArray

import unidrop
from unidrop import Key

key = unidrop.Key(42).fold_in("encoder/0").fold_in(7)
assert_type(key, Key)
assert_type(Key.from_words(1, 2), Key)

x: NDArray[np.float32] = np.ones(3, np.float32)
assert_type(unidrop.dropout(x, 0.1, key), NDArray[np.float32])
assert_type(unidrop.dropout(x, 0.1, key, return_mask=False), NDArray[np.float32])
assert_type(unidrop.dropout(x, 0.1, key, return_mask=True), tuple[NDArray[np.float32], Any])
assert_type(unidrop.dropout(torch.ones(3), 0.1, key), torch.Tensor)
assert_type(unidrop.dropout(torch.ones(3), 0.1, key, start=(0,), global_shape=(3,)), torch.Tensor)
assert_type(unidrop.dropout(torch.ones(3), 0.1, key, return_mask=True), tuple[torch.Tensor, Any])
assert_type(unidrop.keep_mask((3,), 0.1, key), NDArray[np.bool])
assert_type(unidrop.keep_mask((3,), 0.1, key, xp=torch), Any)
assert_type(unidrop.explain_path(x).reason, str)

with unidrop.force_path("portable"):
    assert_type(unidrop.get_num_threads(), int)

unidrop.dropout(x, "0.1", key)  # type: ignore
unidrop.dropout(x, 0.1, 5)  # type: ignore
unidrop.force_path("bad")  # type: ignore
unidrop.only("fused")  # type: ignore
