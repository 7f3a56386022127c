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
from test_triton_compiled import Pointer, get_specialization

from unidrop.fused.triton import attention_launch
from unidrop.protocols import DeviceBuffer

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
    ("attend", 80): 55,
    ("attend", 90): 54,
    ("differentiate_queries", 80): 63,
    ("differentiate_queries", 90): 61,
    ("differentiate_keys", 80): 95,
    ("differentiate_keys", 90): 93,
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
    code = compile_attention(kernel, architecture, is_causal=True)
    assert code.per_element <= BUDGETS[kernel, architecture]
    assert code.spilled == 0
    assert code.count("LDL") == code.count("STL") == 0


def test_mask_of_attention_is_within_budget(compile_attention):
    with_mask = compile_attention("attend", 90, is_causal=True).per_element
    without = compile_attention("attend", 90, is_causal=True, p=0).per_element
    assert 10 < with_mask - without <= MASK


def test_rows_that_straddle_blocks_spill_nothing(compile_attention):
    code = compile_attention("attend", 80, keys=1001)
    assert code.spilled == 0
    assert code.per_element <= 70


# A thread of each has 255 registers, or nearly so.
@pytest.mark.parametrize(
    ("kernel", "architecture", "kind", "features", "bias"),
    [
        ("attend", 80, "bfloat16", 64, "bool"),
        ("attend", 80, "bfloat16", 128, "bool"),
        ("attend", 90, "bfloat16", 128, "bool"),
        ("differentiate_queries", 80, "bfloat16", 64, "bool"),
        ("differentiate_queries", 90, "bfloat16", 64, "bool"),
        ("differentiate_queries", 90, "bfloat16", 64, "float32"),
        ("differentiate_queries", 90, "bfloat16", 128, "bool"),
        ("differentiate_keys", 90, "bfloat16", 128, "float32"),
        ("differentiate_queries", 90, "float32", 128, None),
    ],
)
def test_masks_and_wide_heads_spill_nothing(
    compile_attention, kernel, architecture, kind, features, bias
):
    options = {"features": features, "bias": bias, "keys": 1001, "is_causal": True}
    assert compile_attention(kernel, architecture, kind, **options).spilled == 0


# --- Compilations ---------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Record the specialization of each launch. Triton compiles a kernel for every other one."""
    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*arguments, num_warps, num_stages, **constants):
                recorded.append(get_specialization(self.kernel, arguments, constants))

            return run

    kernels = attention_launch._get_kernels()
    for name in gpu_report.ATTENTION:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name)))
    return recorded


def launch(queries=512, keys=512, *, heads=8, p=0.1, key=(1, 2), start=0, **options):
    shapes = [(2, heads, length, 64) for length in (queries, keys, keys, queries)]
    buffers = [DeviceBuffer(Pointer("bfloat16"), gpu_report.get_c_strides(s)) for s in shapes]
    query, key_, value, output = buffers
    problem = attention_launch.Attention(
        *("bfloat16", 2, heads, heads, queries, keys, 64, 64, True, start, 0.125),
        *(attention_launch.Rate.from_p(p), gpu_report.get_c_strides((*shapes[0][:3], keys))[:3]),
        start,
    )
    x = Pointer("float32")
    attention_launch.attend(query, key_, value, None, output, x, problem, key)
    attention_launch.differentiate(
        output, x, query, key_, value, None, output, x, x, query, key_, value, problem, key
    )


def test_attention_compiles_nothing_for_values(launches):
    for queries in (1, 16, 512, 70_000):
        for keys in (8, 16, 4096):
            launch(queries, keys)
    for heads in (1, 3, 16):
        launch(heads=heads)
    for p in (2.0**-32, 0.5, 0.6):
        launch(p=p)
    for word in (0, 1, 16, 2**31, 2**32 - 1):
        launch(key=(word, word))
    for start in (8, 16, 2**20):
        launch(start=start)
    assert len(set(launches)) == 3  # one for each kernel
    launch(keys=1001)  # rows that straddle blocks
    assert len(set(launches)) == 6
