"""Train one network in every mode of every framework: the losses agree, also after resuming.

Each run has the same initial weights, batches and keys. The script compares the losses with NumPy
losses, from a hand-written backward pass (numpy_dropout.py). It saves each run after 25 of 50
steps, and a new process resumes it. The exit status is 1 if a loss differs by more than rounding.

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

# Some hundred times the spacing of float32 numbers near 2, the size of the losses.
LIMIT = 1e-4

# Each runs in a separate process, because Keras has only one backend per process.
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
    """Run a script in a process, and return the losses that it prints, by mode name."""
    finished = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), part, folder],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | dict(environment),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    curves = json.loads(finished.stdout.splitlines()[-1])
    return {name: np.array(losses) for name, losses in curves.items()}


def start_and_resume(script: str, environment: Mapping[str, str]) -> dict[str, tuple[Curve, Curve]]:
    """Return the losses of all steps, and of the resumed second half, by mode name."""
    with TemporaryDirectory() as folder:
        started = get_curves(script, environment, "start", folder)
        resumed = get_curves(script, environment, "resume", folder)
    return {name: (started[name], resumed[name]) for name in started}


def difference(a: Curve, b: Curve, steps: int) -> float:
    """Return the greatest difference at any step."""
    if a.shape != (steps,) or b.shape != (steps,):
        sys.exit(f"expected two curves of {steps} steps, got shapes {a.shape} and {b.shape}")
    return float(np.abs(a - b).max())


def main() -> None:
    expected = numpy_curve()
    print("greatest difference of the losses at any step")
    print(f"{'mode':33} {'from NumPy':>11} {'when resumed':>14}")
    differences = []
    with ThreadPoolExecutor(2) as pool:
        for curves in pool.map(lambda process: start_and_resume(*process), PROCESSES):
            for name, (started, resumed) in curves.items():
                whole = difference(started, expected, STEPS)
                later = difference(resumed, started[HALF:], STEPS - HALF)
                print(f"{name:33} {whole:11.1e} {later:14.1e}", flush=True)
                differences += [whole, later]
    if not max(differences) < LIMIT:  # NaN fails this comparison too
        sys.exit(f"the losses differ by {max(differences):.1e}, more than {LIMIT:.0e}")


if __name__ == "__main__":
    main()
