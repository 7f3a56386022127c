"""Test the realized rate over 10^8 elements."""

import math

import numpy as np
import pytest
import torch

import unidrop
from unidrop import Key, keep_mask

SIZE = 10**8
KEY = Key(42).fold_in("statistics")


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_drops_within_four_sigma_of_rate(p):
    dropped = SIZE - int(np.count_nonzero(keep_mask((SIZE,), p, KEY)))
    assert abs(dropped - SIZE * p) < 4 * math.sqrt(SIZE * p * (1 - p))
    # bfloat16 cannot represent the rate: the number of dropped elements must not depend on it.
    y = unidrop.dropout(torch.ones(SIZE, dtype=torch.bfloat16), p, KEY)
    assert SIZE - int(torch.count_nonzero(y)) == dropped
