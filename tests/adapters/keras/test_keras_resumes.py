"""Trains with Keras on each backend, stops half-way, and goes on in new processes, on any other."""

import json

import numpy as np
import pytest
from keras_process import TESTS, run_python
from small_network import HALF, STEPS, expected_losses

pytestmark = pytest.mark.slow  # six processes import Keras, and train

BACKENDS = ["tensorflow", "jax", "torch"]


def get_losses(backend, command, folder):
    """Run `keras_training.py` and return the losses of each training."""
    output = run_python(backend, str(TESTS / "keras_training.py"), command, str(folder))
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder into which every backend saves its first half."""
    return tmp_path_factory.mktemp("halves")


@pytest.fixture(scope="module")
def whole_runs(folder):
    """Return the losses of all runs that nothing interrupts."""
    return {backend: get_losses(backend, "run", folder) for backend in BACKENDS}


def assert_losses(actual, expected):
    """Compare losses to float32 rounding, which 50 steps of training make more of."""
    assert len(actual) == len(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_learns_from_network_of_expected_losses():
    expected = expected_losses()
    assert expected[-1] < expected[0] / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_has_same_losses_on_every_backend(whole_runs, backend):
    runs = whole_runs[backend]
    assert len(runs) == 1 + (backend == "jax")  # JAX has stateless calls too
    for losses in runs.values():
        assert_losses(losses, expected_losses())


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumes_in_new_process_from_every_backend(whole_runs, folder, backend):
    resumed = get_losses(backend, "resume", folder)
    assert len(resumed) == 1 + len(BACKENDS)
    for losses in resumed.values():
        assert_losses(losses, expected_losses()[HALF:STEPS])
