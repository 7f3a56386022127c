"""One network, trained in every way that frameworks run one: the same losses, also when resumed.

Each run begins with the same weights, sees the same batches and has the same keys. It is compared
with NumPy's, whose backward pass is written by hand (numpy_dropout.py). After 25 of 50 steps it is
saved, and a new process goes on from there. The exit status is 1 if a loss differs by more than
rounding explains.

    python examples/every_mode.py
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from digits import initial_parameters
from numpy.typing import NDArray
from numpy_dropout import KeyedDropout, descend, loss_and_gradients
from training import HALF, HIDDEN, LEARNING_RATE, SITES, STEPS, batches_from

# For losses of about 2, in float32: some hundred times the spacing of its numbers.
LIMIT = 1e-4

# A process for each: Keras has one backend in a process.
PROCESSES: Sequence[tuple[str, Mapping[str, str]]] = (
    ("train_torch.py", {}),
    ("train_keras.py", {"KERAS_BACKEND": "tensorflow"}),
    ("train_keras.py", {"KERAS_BACKEND": "jax"}),
    ("train_keras.py", {"KERAS_BACKEND": "torch"}),
    ("train_jax.py", {}),
)

Curve = NDArray[np.float64]


def numpy_curve() -> Curve:
    """Return the losses of hand-written backpropagation."""
    parameters = initial_parameters(HIDDEN)
    losses = []
    for step, (x, labels) in enumerate(batches_from(0)):
        at_input, at_hidden = (KeyedDropout(p, key.fold_in(step)) for p, key in SITES)
        loss, gradients = loss_and_gradients(parameters, x, labels, at_input, at_hidden)
        descend(parameters, gradients, LEARNING_RATE)
        losses.append(loss)
    return np.array(losses)


def get_curves(script: str, environment: Mapping[str, str], part: str, folder: str) -> dict:
    """Return the losses that a process prints, by the mode's name."""
    finished = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), part, folder],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | dict(environment),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    curves = json.loads(finished.stdout.splitlines()[-1])
    return {name: np.array(losses) for name, losses in curves.items()}


def started_and_resumed(
    script: str, environment: Mapping[str, str]
) -> dict[str, tuple[Curve, Curve]]:
    """Return for each mode the losses of all steps, and of the later half in a new process."""
    with TemporaryDirectory() as folder:
        started = get_curves(script, environment, "start", folder)
        resumed = get_curves(script, environment, "resume", folder)
    return {name: (started[name], resumed[name]) for name in started}


def difference(a: Curve, b: Curve, steps: int) -> float:
    """Return the greatest difference at any step."""
    if a.shape != (steps,) or b.shape != (steps,):
        sys.exit(f"{steps} steps were to be compared, but got {a.shape} and {b.shape}")
    return float(np.abs(a - b).max())


def main() -> None:
    expected = numpy_curve()
    print("greatest difference of the losses at any step")
    print(f"{'mode':32} {'from NumPy':>12} {'when resumed':>14}")
    differences = []
    with ThreadPoolExecutor(2) as pool:
        for curves in pool.map(lambda process: started_and_resumed(*process), PROCESSES):
            for name, (started, resumed) in curves.items():
                whole = difference(started, expected, STEPS)
                later = difference(resumed, started[HALF:], STEPS - HALF)
                print(f"{name:32} {whole:12.1e} {later:14.1e}", flush=True)
                differences += [whole, later]
    if not max(differences) < LIMIT:  # written so that NaN fails too
        sys.exit(f"the losses differ by {max(differences):.1e}, and may by {LIMIT:.0e}")


if __name__ == "__main__":
    main()
