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
RNN, RNN_TRAINING = str(HERE / "test_keras_rnn.py"), str(HERE / "test_keras_rnn_training.py")
WEIGHTS = [str(HERE / f"test_keras_{name}.py") for name in ("embedding", "drop_connect")]
SCHEDULE = str(HERE / "test_keras_schedule.py")
WARNS = """
import warnings

def test_warns(request):
    warnings.warn("an error in our configuration")
    assert request.config.rootpath == request.path.parent
"""
KERAS_OWN = Path(find_spec("keras").origin).parent / "src" / "layers"

# How many tests there are, so that none gets lost on the way to another process. Keras's torch
# backend lacks one way to fit, and its NumPy backend all training.


@pytest.mark.parametrize(
    ("backend", "expected"), [("jax", 45 + 1 + 19 + 14), ("torch", 43 + 1 + 14 + 14)]
)
def test_passes_tests_of_layers_and_training(backend, expected):
    run_tests(backend, LAYERS, TRAINING, CONTROL_FLOW, ATTENTION, expected=expected)


def test_passes_tests_of_layers_on_numpy():
    run_tests("numpy", LAYERS, ATTENTION, expected=30 + 12)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_passes_tests_of_recurrent_layers(backend):
    run_tests(backend, RNN, expected=63)


@pytest.mark.parametrize(("backend", "fit"), [("jax", "LSTM-True"), ("torch", "GRU-False")])
def test_passes_some_tests_of_recurrent_layers_in_training(backend, fit):
    loops = [f"{RNN}::test_agrees_with_loop_in_numpy[0.3-0.4-{kind}]" for kind in ("LSTM", "GRU")]
    fits = f"{RNN_TRAINING}::test_has_masks_of_loop_in_each_step_of_fit[{fit}]"
    run_tests(backend, *loops, fits, expected=3)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_passes_tests_of_dropped_weights(backend):
    run_tests(backend, *WEIGHTS, expected=15 + 20)


def test_passes_tests_of_dropped_weights_on_numpy():
    run_tests("numpy", *WEIGHTS, "-k", "not test_trains and not fit", expected=14 + 18)


@pytest.mark.parametrize(("backend", "expected"), [("jax", 19), ("torch", 21)])
def test_passes_tests_of_scheduled_rates(backend, expected):
    run_tests(backend, SCHEDULE, expected=expected)


def test_passes_some_tests_of_scheduled_rates_on_numpy():
    names = "drops_at_exact_value_of_variable", "sets_value_of_variable", "rejects_other_variable"
    run_tests("numpy", *(f"{SCHEDULE}::test_{name}" for name in names), expected=4 + 1 + 6)


def test_trains_on_two_devices_as_on_one():
    run_tests("tensorflow", "keras_on_two_devices.py", expected=28)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_passes_keras_own_tests_of_dropout(backend):
    root = KERAS_OWN / "regularization"
    names = "alpha_dropout", "dropout", "spatial_dropout"
    tests = [str(root / f"{name}_test.py") for name in names]
    run_foreign_tests(backend, root, "-p", "keras_own_tests", *tests, expected=6 + 14 + 9)


def test_passes_keras_own_tests_of_recurrent_layers():
    root = KERAS_OWN / "rnn"
    tests = [f"{root}/lstm_test.py::LSTMTest", f"{root}/simple_rnn_test.py::SimpleRNNTest"]
    run_foreign_tests("torch", root, "-p", "keras_own_tests", *tests, expected=11)


def test_runs_foreign_tests_without_configuration(tmp_path):
    config = "[tool.pytest.ini_options]\nfilterwarnings = ['error']"
    (tmp_path / "pyproject.toml").write_text(config)
    (tmp_path / "conftest.py").write_text("raise RuntimeError")
    packages = tmp_path / ".venv" / "site-packages"
    packages.mkdir(parents=True)
    test = packages / "warns_test.py"
    test.write_text(WARNS)
    run_foreign_tests("numpy", packages, str(test), expected=1)
