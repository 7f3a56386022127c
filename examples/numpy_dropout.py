"""Dropout in NumPy: the textbook's function, and a network with hand-written backpropagation.

The first part calls ``(output, mask) = dropout(x, keep_prob=...)`` on a small array. Dropout scales
the kept elements, so the mean does not change. In the second part, a two-layer network learns to
read digits. Its backward pass recomputes the masks from their keys, and nothing is stored.

    python examples/numpy_dropout.py
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from digits import accuracy, batches, initial_parameters, load
from numpy.typing import NDArray

from unidrop import Key
from unidrop.adapters.numpy import dropout, dropout_backward

Array = NDArray[Any]

KEY = Key(42)
INPUT_RATE, HIDDEN_RATE = 0.2, 0.5
HIDDEN = 128
BATCH = 64
LEARNING_RATE = 0.5


def show_the_textbook() -> None:
    x = np.arange(1, 11, dtype=np.float32).reshape(2, 5)
    output, mask = dropout(x, keep_prob=0.5, key=KEY.fold_in("example"), return_mask=True)
    print(f"x =\n{x}\nmask =\n{mask.astype(int)}\noutput = x * mask / keep_prob =\n{output}\n")

    ones = np.ones(1_000_000, np.float32)
    output = dropout(ones, keep_prob=0.5, key=KEY.fold_in("ones"))
    print(f"mean of a million ones: {ones.mean():.3f}, after dropout: {output.mean():.3f}\n")


class Dropout(Protocol):
    """A dropout at one site and step. Both passes drop the same elements."""

    def forward(self, x: Array) -> Array:
        """Drop elements, and scale the others."""

    def backward(self, grad: Array) -> Array:
        """Apply the same mask and scale to the gradient."""


@dataclass
class KeyedDropout:
    """A dropout that computes its mask from a key whenever it needs the mask."""

    p: float
    key: Key

    def forward(self, x: Array) -> Array:
        """Compute the mask, and apply it."""
        return dropout(x, self.p, key=self.key)

    def backward(self, grad: Array) -> Array:
        """Recompute the mask, and apply it."""
        return dropout_backward(grad, self.p, key=self.key)


def keyed_dropouts(key: Key, step: int) -> tuple[KeyedDropout, KeyedDropout]:
    """Fold in the site, then the step, so that every site has a new mask at every step."""
    return (
        KeyedDropout(INPUT_RATE, key.fold_in("input").fold_in(step)),
        KeyedDropout(HIDDEN_RATE, key.fold_in("hidden").fold_in(step)),
    )


def predict(parameters: Sequence[Array], x: Array) -> Array:
    """Return the logits. Outside of training, nothing is dropped."""
    w1, b1, w2, b2 = parameters
    return np.tanh(x @ w1 + b1) @ w2 + b2


def loss_and_gradients(
    parameters: Sequence[Array], x: Array, labels: Array, at_input: Dropout, at_hidden: Dropout
) -> tuple[float, list[Array]]:
    """Return the mean cross-entropy of a batch, and its gradient for each parameter.

    The activation is tanh because it is smooth. Near the kink of a ReLU, a rounding error can
    change a gradient, and the curves of one_curve.py would differ.
    """
    w1, b1, w2, b2 = parameters
    rows = np.arange(len(labels))

    inputs = at_input.forward(x)
    activation = np.tanh(inputs @ w1 + b1)
    hidden = at_hidden.forward(activation)
    logits = hidden @ w2 + b2
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_likelihoods = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -log_likelihoods[rows, labels].mean()

    d_logits = np.exp(log_likelihoods)
    d_logits[rows, labels] -= 1
    d_logits /= len(labels)
    d_sum = at_hidden.backward(d_logits @ w2.T) * (1 - activation**2)
    return float(loss), [
        inputs.T @ d_sum,
        d_sum.sum(axis=0),
        hidden.T @ d_logits,
        d_logits.sum(axis=0),
    ]


def descend(parameters: Sequence[Array], gradients: Sequence[Array], learning_rate: float) -> None:
    """Do one step of plain gradient descent, in place."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter -= learning_rate * gradient


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Dropout in NumPy, forward and backward.")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: 1000)")
    steps = parser.parse_args(argv).steps

    show_the_textbook()

    digits = load()
    parameters = initial_parameters(HIDDEN)
    for step, (x, labels) in enumerate(batches(digits.x_train, digits.y_train, BATCH, steps)):
        loss, gradients = loss_and_gradients(parameters, x, labels, *keyed_dropouts(KEY, step))
        descend(parameters, gradients, LEARNING_RATE)
        if (step + 1) % 200 == 0:
            print(f"step {step + 1:4}: loss {loss:.3f}")
    train = accuracy(predict(parameters, digits.x_train), digits.y_train)
    test = accuracy(predict(parameters, digits.x_test), digits.y_test)
    print(f"train accuracy: {train:.3f}\ntest accuracy: {test:.3f}")


if __name__ == "__main__":
    main()
