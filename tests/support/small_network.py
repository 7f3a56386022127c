"""One small network that the tests train in every framework, and its expected losses.

NumPy computes the losses in double precision. The network has a hidden layer, and its dropout uses
``Key(SEED).fold_in("hidden")`` with the step as the call number. SGD with momentum follows Keras
and PyTorch.
"""

import numpy as np

import unidrop
from unidrop import Key

__all__ = [
    "HALF",
    "LEARNING_RATE",
    "MOMENTUM",
    "RATE",
    "SEED",
    "SHAPES",
    "STEPS",
    "X",
    "Y",
    "expected_losses",
    "initial_weights",
]

SEED, RATE = 42, 0.25
STEPS, HALF = 50, 25
LEARNING_RATE, MOMENTUM = 0.05, 0.9
SHAPES = ((10, 32), (32, 1))

_RNG = np.random.default_rng(0)
X = _RNG.standard_normal((16, SHAPES[0][0])).astype("float32")
Y = np.sin(X.sum(axis=1, keepdims=True)).astype("float32")


def initial_weights():
    """Return kernel and bias of the hidden and of the last layer."""
    rng = np.random.default_rng(1)
    weights = []
    for rows, columns in SHAPES:
        weights += [rng.standard_normal((rows, columns)) / rows**0.5, np.zeros(columns)]
    return [weight.astype("float32") for weight in weights]


def expected_losses():
    """Return the loss of each step."""
    weights = [weight.astype("float64") for weight in initial_weights()]
    velocities = [np.zeros_like(weight) for weight in weights]
    losses = []
    for step in range(STEPS):
        loss, gradients = _loss_and_gradients(weights, step)
        losses.append(loss)
        for weight, velocity, gradient in zip(weights, velocities, gradients, strict=True):
            velocity[...] = MOMENTUM * velocity - LEARNING_RATE * gradient
            weight += velocity
    return np.asarray(losses)


def _loss_and_gradients(weights, step):
    kernel, bias, last_kernel, last_bias = weights
    hidden = X @ kernel + bias
    with unidrop.force_path("portable"):
        keep = unidrop.keep_mask(hidden.shape, RATE, Key(SEED).fold_in("hidden").fold_in(step))
    active = (hidden > 0) * keep / (1 - RATE)
    dropped = hidden * active
    error = dropped @ last_kernel + last_bias - Y
    upstream = 2 * error / error.size
    to_hidden = (upstream @ last_kernel.T) * active
    gradients = [X.T @ to_hidden, to_hidden.sum(0), dropped.T @ upstream, upstream.sum(0)]
    return (error**2).mean(), gradients
