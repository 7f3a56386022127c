"""Dropout on two devices of JAX: what is communicated, and what is shared.

JAX counts its devices once, so one process with two of them runs all cases.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # runs about thirty programs in their own process

CASES = Path(__file__).parents[2] / "support" / "jax_two_devices.py"


@pytest.fixture(scope="module")
def results():
    """Return for each case "passed", or the traceback."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, str(CASES)], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


NAMES = [
    "partitioned_auto",
    "partitioned_explicit",
    "mask_beside_gradient",
    "gradients_of_shared_array_with_keys_of_devices",
    "gradients_of_shared_array_with_windows_of_devices",
    "partitioned_off_the_cpu",
    "windows_of_devices_off_the_cpu",
    "mask_on_requested_device",
    "kernels_on_second_device",
    "attention_of_batches",
    "attention_of_a_ring",
]


@pytest.mark.parametrize("name", NAMES)
def test_passes_on_two_devices(results, name):
    assert results[name] == "passed", results[name]


def test_knows_each_case_that_ran(results):
    assert list(results) == NAMES
