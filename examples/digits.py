"""Shared by the examples: scikit-learn's digits, initial weights and batches, with fixed seeds."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

__all__ = ["CLASSES", "PIXELS", "Digits", "accuracy", "batches", "initial_parameters", "load"]

PIXELS = 64
CLASSES = 10

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


class Digits(NamedTuple):
    """Images of 8 by 8 pixels as rows of 64 numbers in [0, 1], and the digits they show."""

    x_train: Floats
    y_train: Labels
    x_test: Floats
    y_test: Labels


def load() -> Digits:
    """Return the bundled digits: three quarters for training, and one quarter for testing."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=0.25, stratify=y, random_state=0
    )
    return Digits(x_train, y_train, x_test, y_test)


def initial_parameters(hidden: int, seed: int = 0) -> list[Floats]:
    """Return ``[w1, b1, w2, b2]`` of a two-layer network. Weights have shape (inputs, outputs)."""
    rng = np.random.default_rng(seed)
    parameters = []
    for inputs, outputs in ((PIXELS, hidden), (hidden, CLASSES)):
        weights = rng.normal(scale=inputs**-0.5, size=(inputs, outputs))
        parameters += [weights.astype(np.float32), np.zeros(outputs, np.float32)]
    return parameters


def batches(
    x: Floats, labels: Labels, size: int, steps: int, seed: int = 0
) -> Iterator[tuple[Floats, Labels]]:
    """Yield one random batch per step, with the same batches for the same seed."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.choice(len(x), size, replace=False)
        yield x[rows], labels[rows]


def accuracy(logits: Floats, labels: Labels) -> float:
    """Return the share of rows with the greatest logit at the label."""
    return float((logits.argmax(axis=1) == labels).mean())
