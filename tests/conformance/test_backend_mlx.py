"""Test the package with the example backend for MLX."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "examples" / "backend_mlx"

pytestmark = pytest.mark.skipif(find_spec("mlx") is None, reason="MLX has no wheel for this system")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the example into a temporary folder, and return an environment that contains it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("pyproject.toml", "unidrop_mlx.py"):
        (source / name).write_bytes((PACKAGE / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True)
    paths = [str(target), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_passes_the_whole_matrix(installed, tmp_path):
    report = tmp_path / "matrix.json"
    command = ["-m", "unidrop.cli", "conformance", "--backend", "mlx", "--json", report]
    run = subprocess.run([sys.executable, *command], env=installed, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    cells = json.loads(report.read_text())["cells"]
    for mode in ("eager", "compile"):
        passed = {cell["contract"] for cell in cells if cell["mode"] == mode}
        assert {"mask", "windows", "output", "gradient", "layout", "traced-key"} <= passed
    assert {cell["dtype"] for cell in cells} == {
        *("float16", "bfloat16", "float32", "float64", "complex64")
    }


def test_accepts_mlx_arrays_in_core(installed):
    code = """
    import mlx.core as mx, numpy as np, unidrop
    key = unidrop.Key(42).fold_in("encoder/0").fold_in(7)
    y = unidrop.dropout(mx.ones((4, 8)), 0.2, key)
    assert np.array_equal(np.array(y), unidrop.dropout(np.ones((4, 8), "float32"), 0.2, key))
    mask = unidrop.keep_mask((4, 8), 0.2, key, xp=mx)
    assert np.array_equal(np.array(mask), unidrop.keep_mask((4, 8), 0.2, key))
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, "-c", lines], env=installed, check=True)
