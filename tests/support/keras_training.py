"""Trains one small network with Keras, in a process for each backend: 50 steps, or the last 25.

    python keras_training.py run FOLDER       trains, and saves at step 25
    python keras_training.py resume FOLDER    goes on to step 50

Both begin with the files of other processes in the folder, and resume them. They print the losses
as JSON, by the name of the training or of the file. `small_network.py` has the expected losses.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
from small_network import (
    HALF,
    LEARNING_RATE,
    MOMENTUM,
    RATE,
    SEED,
    SHAPES,
    STEPS,
    X,
    Y,
    initial_weights,
)

from unidrop import Key
from unidrop.adapters.keras import Dropout

BACKEND = keras.backend.backend()


def network():
    """Return the network with its initial weights."""
    model = keras.Sequential(
        [
            keras.Input((SHAPES[0][0],)),
            keras.layers.Dense(SHAPES[0][1], activation="relu"),
            Dropout(RATE, seed=Key(SEED).fold_in("hidden")),
            keras.layers.Dense(SHAPES[1][1]),
        ]
    )
    model.set_weights(initial_weights())
    return model


def compiled(model):
    """Return a model, ready to be trained.

    PyTorch's compiler would take a minute. The matrix compiles the layers by it.
    """
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)
    model.compile(optimizer, "mse", jit_compile=BACKEND == "jax")
    optimizer.build(model.trainable_variables)
    return model


def train(model, steps):
    """Train on the same batch again and again, and return the loss of each step."""
    means = [0.0]
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda _, logs: means.append(logs["loss"])
    )
    x, y = np.tile(X, (steps, 1)), np.tile(Y, (steps, 1))
    model.fit(x, y, batch_size=len(X), verbose=0, shuffle=False, callbacks=[keep])
    # Keras reports the mean over the steps so far.
    return np.diff(np.arange(steps + 1) * means).tolist()


def run(folder):
    """Train, and save after half the steps, in both of Keras's formats."""
    losses = resume(folder)
    model = compiled(network())
    first = train(model, HALF)
    model.save(folder / f"{BACKEND}.keras")
    model.save_weights(folder / f"{BACKEND}.weights.h5")
    losses["fit"] = first + train(model, STEPS - HALF)
    if BACKEND == "jax":
        losses["stateless"] = stateless()
    return losses


def stateless():
    """Train with Keras's stateless calls under JAX's own gradient and jit: one trace in all."""
    import jax

    model, traces = compiled(network()), 0

    def loss(trainable, fixed):
        outputs, fixed = model.stateless_call(trainable, fixed, X, training=True)
        return ((outputs - Y) ** 2).mean(), fixed

    @jax.jit
    def step(trainable, fixed, state):
        nonlocal traces
        traces += 1
        (value, fixed), gradients = jax.value_and_grad(loss, has_aux=True)(trainable, fixed)
        return value, fixed, *model.optimizer.stateless_apply(state, gradients, trainable)

    trainable, fixed, state = (
        [variable.value for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
        )
    )
    losses = []
    for _ in range(STEPS):
        value, fixed, trainable, state = step(trainable, fixed, state)
        losses.append(float(value))
    assert traces == 1, traces
    return losses


def resume(folder):
    """Train the second half: of this backend's model, and of the weights of every file.

    A ``.keras`` file holds the optimizer, which on torch is one of torch's own that no other
    backend can run; so of other backends' files the model alone is loaded, and its calls counted.
    """
    losses, path = {}, folder / f"{BACKEND}.keras"
    if path.exists():
        losses[path.name] = train(keras.saving.load_model(path), STEPS - HALF)
    for path in sorted(folder.glob("*.weights.h5")):
        model = compiled(network())
        model.load_weights(path)
        losses[path.name] = train(model, STEPS - HALF)
    for path in sorted(folder.glob("*.keras")):
        assert keras.saving.load_model(path, compile=False).layers[1].calls == HALF, path
    return losses


if __name__ == "__main__":
    command, folder = sys.argv[1:]
    print(json.dumps({"run": run, "resume": resume}[command](Path(folder))))
