"""The kernels for a GPU give the right bits in Triton's interpreter, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_cases

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,  # the interpreter takes milliseconds for each program of a kernel
]


@pytest.fixture(scope="module")
def results():
    """Run all cases in one process, because Triton reads the variable when it is imported."""
    path = Path(triton_cases.__file__)
    run = subprocess.run(
        [sys.executable, str(path)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(line) for line in run.stdout.splitlines())


@pytest.mark.parametrize("name", triton_cases.CASES)
def test_gives_the_bits_of_the_core(results, name):
    assert results[name] is None, results[name]
