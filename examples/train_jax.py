"""JAX runs of every_mode.py: pure functions, a list of parameters, and the step."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from digits import initial_parameters
from jax import Array
from training import HIDDEN, LEARNING_RATE, SITES, batches_from, run_modes

from unidrop.adapters.jax import dropout

Parameters = list[Array]


def get_loss(parameters: Parameters, step: Array, x: Array, labels: Array) -> Array:
    """Return the mean cross-entropy of a batch, with the masks of a step."""
    w1, b1, w2, b2 = parameters
    (input_rate, input_key), (hidden_rate, hidden_key) = SITES
    inputs = dropout(x, input_rate, input_key.fold_in(step))
    activation = jnp.tanh(inputs @ w1 + b1)
    hidden = dropout(activation, hidden_rate, hidden_key.fold_in(step))
    log_likelihoods = jax.nn.log_softmax(hidden @ w2 + b2)
    return -jnp.take_along_axis(log_likelihoods, labels[:, None], axis=1).mean()


@jax.jit
def descend(
    parameters: Parameters, step: Array, x: Array, labels: Array
) -> tuple[Parameters, Array]:
    """Do one step of gradient descent. Return the new parameters, and the loss before the step."""
    loss, gradients = jax.value_and_grad(get_loss)(parameters, step, x, labels)
    return [p - LEARNING_RATE * g for p, g in zip(parameters, gradients, strict=True)], loss


class JaxRun:
    """The parameters of the network. The step is the only other state."""

    def __init__(self) -> None:
        self.parameters = [jnp.asarray(value) for value in initial_parameters(HIDDEN)]

    def train(self, start: int, stop: int) -> list[float]:
        """Train. The step is an argument of the compiled function."""
        losses = []
        for step, (x, labels) in zip(range(start, stop), batches_from(start), strict=False):
            self.parameters, loss = descend(self.parameters, jnp.uint32(step), x, labels)
            losses.append(float(loss))
        return losses

    def save(self, path: Path) -> None:
        """Save the parameters."""
        np.savez(path.with_suffix(".npz"), *self.parameters)

    def load(self, path: Path) -> None:
        """Load the parameters."""
        with np.load(path.with_suffix(".npz")) as arrays:
            self.parameters = [jnp.asarray(arrays[name]) for name in arrays.files]


if __name__ == "__main__":
    run_modes({"JAX jit": JaxRun})
