"""Runs the tests of the Keras layers, ours and Keras's own, on each of Keras's backends."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from keras_process import run_foreign_tests, run_tests

pytestmark = pytest.mark.slow  # each process imports Keras and a backend

HERE = Path(__file__).parent
LAYERS, TRAINING = str(HERE / "test_keras_layers.py"), str(HERE / "test_keras_training.py")
CONTROL_FLOW = str(HERE / "test_keras_control_flow.py")
ATTENTION = str(HERE / "test_keras_attention.py")
WARNS = """
import warnings

def test_warns(request):
    warnings.warn("an error in our configuration")
    assert request.config.rootpath == request.path.parent
"""
KERAS_OWN = Path(find_spec("keras").origin).parent / "src" / "layers" / "regularization"

# How many tests there are, so that none gets lost on the way to another process. Keras's torch
# backend lacks one way to fit, and its NumPy backend all training.


@pytest.mark.parametrize(
    ("backend", "expected"), [("jax", 45 + 1 + 19 + 14), ("torch", 43 + 1 + 14 + 14)]
)
def test_passes_tests_of_layers_and_training(backend, expected):
    run_tests(backend, LAYERS, TRAINING, CONTROL_FLOW, ATTENTION, expected=expected)


def test_passes_tests_of_layers_on_numpy():
    run_tests("numpy", LAYERS, ATTENTION, expected=30 + 12)


def test_trains_on_two_devices_as_on_one():
    run_tests("tensorflow", "keras_on_two_devices.py", expected=26)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_passes_keras_own_tests_of_dropout(backend):
    names = "alpha_dropout", "dropout", "spatial_dropout"
    tests = [str(KERAS_OWN / f"{name}_test.py") for name in names]
    run_foreign_tests(backend, KERAS_OWN, "-p", "keras_own_tests", *tests, expected=6 + 14 + 9)


def test_runs_foreign_tests_without_configuration(tmp_path):
    config = "[tool.pytest.ini_options]\nfilterwarnings = ['error']"
    (tmp_path / "pyproject.toml").write_text(config)
    (tmp_path / "conftest.py").write_text("raise RuntimeError")
    packages = tmp_path / ".venv" / "site-packages"
    packages.mkdir(parents=True)
    test = packages / "warns_test.py"
    test.write_text(WARNS)
    run_foreign_tests("numpy", packages, str(test), expected=1)
