"""Dropout in Keras: a Sequential and a functional model, ``fit``, ``evaluate``, save and resume.

``Dropout`` replaces ``keras.layers.Dropout``. Keras saves its call number with the model. So the
loaded model continues with the next mask of the saved model, and after one more epoch both models
have the same weights.

    python examples/keras_sequential.py
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from digits import CLASSES, PIXELS, Digits, load

from unidrop import Key
from unidrop.adapters.keras import Dropout

SITE = Key(42).fold_in("hidden")


def sequential_model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((PIXELS,)),
            keras.layers.Dense(128, activation="relu"),
            Dropout(0.2, seed=SITE, name="dropout"),
            keras.layers.Dense(CLASSES),
        ]
    )


def functional_model() -> keras.Model:
    inputs = keras.Input((PIXELS,))
    hidden = keras.layers.Dense(128, activation="relu")(inputs)
    hidden = Dropout(0.2, seed=SITE, name="dropout")(hidden)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden))


def fit(model: keras.Model, digits: Digits, epochs: int) -> None:
    """Fit on the same batches every time, so that only dropout could cause a difference."""
    model.fit(
        digits.x_train, digits.y_train, batch_size=64, epochs=epochs, shuffle=False, verbose=0
    )


def train_and_evaluate(model: keras.Model, digits: Digits, epochs: int) -> None:
    model.compile(
        optimizer=keras.optimizers.Adam(0.003),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    fit(model, digits, epochs)
    for name, x, labels in (
        ("train", digits.x_train, digits.y_train),
        ("test", digits.x_test, digits.y_test),
    ):
        _, accuracy = model.evaluate(x, labels, verbose=0)
        print(f"  {name} accuracy: {accuracy:.3f}")


def save_and_load(model: keras.Model) -> keras.Model:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        return keras.saving.load_model(path)


def show_resuming(model: keras.Model, digits: Digits) -> None:
    loaded = save_and_load(model)
    print(f"  training calls when saved: {model.get_layer('dropout').calls}")
    print(f"  training calls when loaded: {loaded.get_layer('dropout').calls}")

    fit(model, digits, epochs=1)
    fit(loaded, digits, epochs=1)
    pairs = zip(model.get_weights(), loaded.get_weights(), strict=True)
    difference = max(np.abs(a - b).max() for a, b in pairs)
    print(f"  greatest difference of weights, one epoch later: {difference:.1e}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Classifiers with dropout in Keras.")
    parser.add_argument(
        "--epochs", type=int, default=10, help="passes through the data (default: 10)"
    )
    epochs = parser.parse_args(argv).epochs

    digits = load()
    for name, build in (("Sequential", sequential_model), ("functional", functional_model)):
        print(f"{name} model")
        keras.utils.set_random_seed(0)
        model = build()
        train_and_evaluate(model, digits, epochs)
        show_resuming(model, digits)


if __name__ == "__main__":
    main()
