"""How many kernels PyTorch's own operations launch for one call on a GPU.

Meta tensors make PyTorch import Triton, which crashes a process that has imported TensorFlow. So
all calls run in their own process.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # imports PyTorch in its own process

CALLS = Path(__file__).parents[2] / "support" / "torch_launches.py"

# A number may fall. If it rises, small tensors take longer on a GPU.
MOST = {
    "small": 144,
    "large": 144,
    "two pieces": 292,
    "bfloat16": 146,
    "module": 144,
    "channels": 144,
    "window": 186,
}


@pytest.fixture(scope="module")
def counts():
    done = subprocess.run([sys.executable, str(CALLS)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MOST)
def test_launches_no_more_kernels(counts, name):
    assert sum(counts[name].values()) <= MOST[name], counts[name]
    assert counts[name]["bitwise_xor"] == (80 if name == "two pieces" else 40)
    assert "_local_scalar_dense" not in counts[name]  # no value was read on the host
