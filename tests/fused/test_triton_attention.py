"""The kernels of attention are exact in Triton's interpreter, and compile for GPUs without one."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import triton_attention_cases

if find_spec("triton") is None:
    pytest.skip("the extra triton is not installed", allow_module_level=True)

import gpu_report

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,  # the interpreter takes milliseconds for each program of a kernel
]


@pytest.fixture(scope="module")
def results():
    """Run all cases in one process, because Triton reads the variable when it is imported."""
    path = Path(triton_attention_cases.__file__)
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


@pytest.mark.parametrize("name", triton_attention_cases.CASES)
def test_equals_attention_in_float64(results, name):
    assert results[name] is None, results[name]


# --- Compilation ----------------------------------------------------------------------------------

# Instructions of a kernel for a weight of one tile, at most, including all before the loop.
BUDGETS = {
    ("attend", 80): 54,
    ("attend", 90): 52,
    ("differentiate_queries", 90): 62,
    ("differentiate_keys", 90): 96,
}
MASK = 20  # instructions of them for the mask


@pytest.fixture(scope="module")
def compile_attention(tmp_path_factory):
    """Compile into an empty cache: another version may have written the usual one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield cache(gpu_report.compile_attention)


@pytest.mark.parametrize(("kernel", "architecture"), BUDGETS)
def test_attention_compiles_within_budget(compile_attention, kernel, architecture):
    code = compile_attention(kernel, architecture)
    assert code.per_element <= BUDGETS[kernel, architecture]
    assert code.spilled == 0
    assert code.count("LDL") == code.count("STL") == 0


def test_mask_of_attention_is_within_budget(compile_attention):
    with_mask, without = (compile_attention("attend", 90, p=p).per_element for p in (0.1, 0))
    assert 10 < with_mask - without <= MASK


def test_rows_that_straddle_blocks_spill_nothing(compile_attention):
    code = compile_attention("attend", 80, keys=1001)
    assert code.spilled == 0
    assert code.per_element <= 70
