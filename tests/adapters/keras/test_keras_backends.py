"""Runs the tests of the Keras layers, ours and Keras' own, on each of Keras' backends."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from keras_process import run_tests

LAYERS, TRAINING = "keras_layers_on_any_backend.py", "keras_training_on_any_backend.py"
KERAS_OWN = Path(find_spec("keras").origin).parent / "src" / "layers" / "regularization"

# How many tests there are, so that none gets lost on the way to another process. Keras' torch
# backend lacks one way to fit, and its NumPy backend all training.


@pytest.mark.parametrize(("backend", "expected"), [("tensorflow", 46), ("jax", 45), ("torch", 44)])
def test_layers_and_their_training_behave_alike(backend, expected):
    run_tests(backend, LAYERS, TRAINING, expected=expected)


def test_layers_behave_alike_on_numpy():
    run_tests("numpy", LAYERS, expected=35)


def test_replicas_on_two_devices_train_as_one_device_does():
    run_tests("tensorflow", "keras_on_two_devices.py", expected=25)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_keras_own_tests_of_dropout_pass_with_our_layers(backend):
    tests = [str(KERAS_OWN / f"{name}_test.py") for name in ("dropout", "spatial_dropout")]
    run_tests(backend, "-p", "keras_own_tests", *tests, expected=14 + 9)
