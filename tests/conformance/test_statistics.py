"""What the stream promises as a sampler: the realised rate, over enough elements to tell."""

import math

import numpy as np
import pytest
import torch

import unidrop
from unidrop import Key, keep_mask

SIZE = 10**8


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_rate_over_a_hundred_million_elements_is_within_four_sigma(p):
    dropped = SIZE - int(np.count_nonzero(keep_mask((SIZE,), p, Key(42).fold_in("statistics"))))
    assert abs(dropped - SIZE * p) < 4 * math.sqrt(SIZE * p * (1 - p))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_rate_is_the_same_to_the_element_for_bfloat16(p):
    key = Key(42).fold_in("statistics")
    y = unidrop.dropout(torch.ones(SIZE, dtype=torch.bfloat16), p, key)
    dropped = SIZE - int(torch.count_nonzero(y))
    assert abs(dropped - SIZE * p) < 4 * math.sqrt(SIZE * p * (1 - p))
    assert dropped == SIZE - int(np.count_nonzero(keep_mask((SIZE,), p, key)))
