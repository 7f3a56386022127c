"""Keras runs of every_mode.py, with `fit`, on the backend in KERAS_BACKEND."""

from functools import partial
from pathlib import Path

import keras
from digits import CLASSES, PIXELS, initial_parameters
from training import HIDDEN, LEARNING_RATE, SITES, batches_from, run_modes

from unidrop.adapters.keras import Dropout

BACKEND = keras.backend.backend()


class KerasRun:
    """The network as a usual Keras model."""

    def __init__(self, *, run_eagerly: bool = False, jit_compile: bool = False) -> None:
        at_input, at_hidden = (Dropout(rate, seed=seed) for rate, seed in SITES)
        self.model = keras.Sequential(
            [
                keras.Input((PIXELS,)),
                at_input,
                keras.layers.Dense(HIDDEN, activation="tanh"),
                at_hidden,
                keras.layers.Dense(CLASSES),
            ]
        )
        self.model.set_weights(initial_parameters(HIDDEN))
        self.model.compile(
            optimizer=keras.optimizers.SGD(LEARNING_RATE),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            run_eagerly=run_eagerly,
            jit_compile=jit_compile,
        )

    def train(self, start: int, stop: int) -> list[float]:
        """Fit with one step per epoch, because Keras reports only the mean loss of an epoch."""
        history = self.model.fit(
            batches_from(start),
            initial_epoch=start,
            epochs=stop,
            steps_per_epoch=1,
            shuffle=False,
            verbose=0,
        )
        losses: list[float] = history.history["loss"]
        return losses

    def save(self, path: Path) -> None:
        """Save the whole model, including the call numbers of its layers."""
        self.model.save(path.with_suffix(".keras"))

    def load(self, path: Path) -> None:
        """Load the model, including its compile options."""
        self.model = keras.saving.load_model(path.with_suffix(".keras"))


MODES = {
    "tensorflow": {
        "eager": {"run_eagerly": True},
        "fit": {},
        "fit with XLA": {"jit_compile": True},
    },
    "jax": {"fit": {"jit_compile": True}},
    "torch": {"fit": {}},
}[BACKEND]

if __name__ == "__main__":
    run_modes(
        {
            f"Keras on {BACKEND}, {name}": partial(KerasRun, **options)
            for name, options in MODES.items()
        }
    )
