"""Each example runs with its documented command, and prints the results that it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each runs whole, in processes that import frameworks

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with the examples on the import path."""
    environment = os.environ | {
        "KERAS_BACKEND": "tensorflow",
        "PYTHONPATH": str(EXAMPLES),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def get_output(folder: Path, script: str, *arguments: str) -> str:
    """Run an example, check that it succeeds, and return its output."""
    finished = run(folder, str(EXAMPLES / script), *arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def numbers_after(label: str, output: str) -> list[float]:
    return [float(number) for number in re.findall(rf"{re.escape(label)}: (\S+)", output)]


def test_learns_in_numpy_example(tmp_path: Path) -> None:
    output = get_output(tmp_path, "numpy_dropout.py")
    assert "mean of a million ones: 1.000, after dropout: 1.00" in output
    assert numbers_after("train accuracy", output)[0] > 0.94
    assert numbers_after("test accuracy", output)[0] > 0.92


def test_learns_and_counts_calls_in_torch_example(tmp_path: Path) -> None:
    output = get_output(tmp_path, "torch_net.py", "--epochs", "8")
    assert numbers_after("test accuracy", output)[0] > 0.92
    assert numbers_after("training calls of the dropout", output) == [8 * 22]


def test_learns_and_resumes_in_keras_example(tmp_path: Path) -> None:
    output = get_output(tmp_path, "keras_sequential.py", "--epochs", "8")
    tests = numbers_after("test accuracy", output)
    assert len(tests) == 2
    assert min(tests) > 0.92
    assert numbers_after("training calls when saved", output) == [8 * 22] * 2
    assert numbers_after("training calls when loaded", output) == [8 * 22] * 2
    differences = numbers_after("greatest difference of weights, one epoch later", output)
    assert len(differences) == 2
    assert max(differences) < 1e-6


# A child process runs this, because one_curve imports every framework. It runs the example as its
# command does, calls the check with unequal curves, then breaks a layer.
ONE_CURVE = """
import runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")

import numpy as np, one_curve, pytest, torch, unidrop.adapters.torch
curve = np.linspace(2, 1, 5)
one_curve.check_one_curve({"a": curve, "b": curve + 1e-6, "c": curve})
for wrong in (1e-3, -1e-3, np.nan):
    other = curve.copy()
    other[3] += wrong
    for curves in ((other, curve, curve), (curve, other, curve), (curve, curve, other)):
        with pytest.raises(SystemExit, match="the curves are not one"):
            one_curve.check_one_curve(dict(zip("abc", curves, strict=True)))
print("checked")
one_curve.STEPS = 20
unidrop.adapters.torch.Dropout = lambda p, seed: torch.nn.Dropout(p)
one_curve.main(["--out", "unequal.png"])
"""


@pytest.fixture(scope="module")
def one_curve(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return the folder and the finished process of `ONE_CURVE`."""
    folder = tmp_path_factory.mktemp("one_curve")
    script = str(EXAMPLES / "one_curve.py")
    return folder, run(folder, "-c", ONE_CURVE, script, "--out", "plots/curves.png")


def test_draws_one_curve_only_with_unidrop(
    one_curve: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, finished = one_curve
    output = finished.stdout.partition("checked")[0]
    assert numbers_after("with unidrop", output)[0] < 1e-4
    assert numbers_after("with each framework's own dropout", output)[0] > 1e-2
    picture = (folder / "plots" / "curves.png").read_bytes()
    assert picture.startswith(PNG_SIGNATURE)
    assert len(picture) < 150_000


def test_fails_if_one_curve_is_not_one(
    one_curve: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, finished = one_curve
    assert finished.returncode == 1, finished.stderr
    assert "checked" in finished.stdout
    assert "the curves are not one: they differ by" in finished.stderr


# A child process runs the example as its command does, then with PyTorch's own layer.
ATTENTION = """
import runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
print("finished")

import attention, torch, training, unidrop.adapters.torch
own = torch.nn.MultiheadAttention
unidrop.adapters.torch.MultiheadAttention = lambda *args, seed, **kwargs: own(*args, **kwargs)
training.STEPS = 3
attention.main()
"""


def test_trains_attention_alike_only_with_unidrop(tmp_path: Path) -> None:
    finished = run(tmp_path, "-c", ATTENTION, str(EXAMPLES / "attention.py"))
    output, _, broken = finished.stdout.partition("finished")
    assert numbers_after("with unidrop", output)[0] < 1e-5, finished.stderr
    assert numbers_after("with each framework's own dropout", output)[0] > 1e-2
    losses = [float(row.split()[1]) for row in re.findall(r"^ +\d+ .*", output, re.MULTILINE)]
    assert losses[-1] < losses[0] / 2
    assert numbers_after("with unidrop", broken)[0] > 1e-3
    assert finished.returncode == 1
    assert "the curves are not one: they differ by" in finished.stderr


RUNS = {
    "torch eager",
    "torch.compile",
    "torch checkpoint",
    "torch checkpoint reentrant",
    "torch.compile of a checkpoint",
    "Keras on tensorflow, eager",
    "Keras on tensorflow, fit",
    "Keras on tensorflow, fit with XLA",
    "Keras on jax, fit",
    "Keras on torch, fit",
    "JAX jit",
}

# NumPy trains with another key than JAX, so that the losses differ.
ANOTHER_KEY = """
import every_mode
from unidrop import Key
every_mode.SITES = tuple((p, key.fold_in("other")) for p, key in every_mode.SITES)
every_mode.PROCESSES = [("train_jax.py", {})]
every_mode.main()
"""


def test_matches_numpy_and_resumes_in_every_mode(
    tmp_path: Path,
) -> None:
    output = get_output(tmp_path, "every_mode.py")
    rows = dict(re.findall(r"^(\S.*?) {2,}([\d.e+-]+ +[\d.e+-]+)$", output, re.MULTILINE))
    assert set(rows) == RUNS
    for name, row in rows.items():
        from_numpy, when_resumed = map(float, row.split())
        assert from_numpy < 1e-4, name
        assert when_resumed < 1e-5, name


def test_fails_if_every_mode_drops_other_elements(tmp_path: Path) -> None:
    finished = run(tmp_path, "-c", ANOTHER_KEY)
    assert finished.returncode == 1, finished.stderr
    assert "the losses differ by" in finished.stderr


def test_hides_no_package_behind_a_folder():
    """A script finds the folders beside it before a package that is not installed."""
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    assert not folders & {"triton", "torch", "tensorflow", "keras", "jax", "flax", "numpy", "mlx"}
