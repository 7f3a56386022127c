"""Uses the PyTorch adapter: its functions and its modules."""

from typing import assert_type

import torch
from torch import Tensor

import unidrop
from unidrop import Key
from unidrop.adapters.torch import Dropout, Dropout2d, assign_seeds, dropout

key = Key(42)
x = torch.ones(2, 3)


def drop(return_mask: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Return the output, and the mask too if requested."""
    return dropout(x, key=key, return_mask=return_mask)


assert_type(dropout(x, 0.1, key=key), Tensor)
assert_type(dropout(x, 0.1, True, False, key=key, return_mask=False), Tensor)
assert_type(dropout(x, key=key, return_mask=True), tuple[Tensor, Tensor])
assert_type(dropout(x, key=key, global_shape=(4, 3), start=(2, 0)), Tensor)
assert_type(unidrop.adapters.torch.dropout(x, key=key), Tensor)

m = Dropout(0.1, seed=42)
assert_type(m, Dropout)
assert_type(m(x), Tensor)
assert_type(m.calls, Tensor)
assert_type(m.seed, Key | None)
m.calls = 7
m.calls = torch.tensor(7)
assert_type(Dropout2d(0.1, seed=key).train().seed, Key | None)
assert_type(assign_seeds(m, 42), Dropout)

dropout(x, key=42)  # type: ignore
m.calls = "7"  # type: ignore
Dropout(0.1, seed="42")  # type: ignore
assign_seeds(m, "42")  # type: ignore
