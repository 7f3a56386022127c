"""Shared by all groups: a rate, the key of a call, an input array, and a limit of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

import unidrop
from benchmarks.config import Shape

__all__ = ["KEEP", "SCALE", "P", "key", "one_thread", "uniform"]

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Let unidrop use one thread."""
    before = unidrop.get_num_threads()
    unidrop.set_num_threads(1)
    try:
        yield
    finally:
        unidrop.set_num_threads(before)
