"""Shared by all groups: a rate, the key of a call, and an input array."""

import numpy as np
from numpy.typing import NDArray

import unidrop
from benchmarks.config import Shape

__all__ = ["KEEP", "SCALE", "P", "key", "uniform"]

P = 0.1
KEEP = 1 - P
SCALE = 1 / KEEP

_KEY = unidrop.Key(42)


def key(step: int) -> unidrop.Key:
    """Return the key of a call, with the step folded in, as in training."""
    return _KEY.fold_in(step)


def uniform(shape: Shape) -> NDArray[np.float32]:
    """Return uniform float32 numbers in [0, 1)."""
    return np.random.default_rng(0).random(shape, dtype=np.float32)
