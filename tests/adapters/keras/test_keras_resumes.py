"""Trains with Keras on each backend, stops half-way, and goes on in new processes, on any other."""

import json

import numpy as np
import pytest
from keras_process import TESTS, run_python
from small_network import HALF, STEPS, expected_losses

pytestmark = pytest.mark.slow  # four processes import Keras, and train

# In this order. Each process resumes what the ones before it have saved.
BACKENDS = ["tensorflow", "jax", "torch"]


def get_losses(backend, command, folder):
    """Run `keras_training.py` and return the losses of each training."""
    output = run_python(backend, str(TESTS / "keras_training.py"), command, str(folder))
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Return the losses of each process, by training or resumed file."""
    folder = tmp_path_factory.mktemp("halves")
    losses = {backend: get_losses(backend, "run", folder) for backend in BACKENDS}
    return losses | {"last": get_losses(BACKENDS[0], "resume", folder)}


def assert_losses(actual, expected):
    """Compare losses to float32 rounding, which 50 steps of training make more of."""
    assert len(actual) == len(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_learns_from_network_of_expected_losses():
    expected = expected_losses()
    assert expected[-1] < expected[0] / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_has_same_losses_on_every_backend(losses, backend):
    trainings = {"fit", "stateless"} if backend == "jax" else {"fit"}
    assert trainings <= losses[backend].keys()
    for name in trainings:
        assert_losses(losses[backend][name], expected_losses())


@pytest.mark.parametrize(
    ("process", "files"),
    [
        ("jax", {"tensorflow.weights.h5"}),
        ("torch", {"tensorflow.weights.h5", "jax.weights.h5"}),
        ("last", {"tensorflow.keras", *(f"{backend}.weights.h5" for backend in BACKENDS)}),
    ],
)
def test_resumes_in_new_process_from_other_backends(losses, process, files):
    assert losses[process].keys() - {"fit", "stateless"} == files
    for name in files:
        assert_losses(losses[process][name], expected_losses()[HALF:STEPS])
