"""The kernels compile for GPUs without one: no spills, wide loads, and budgets of instructions."""

import re
from functools import cache
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("the extra triton is not installed", allow_module_level=True)

import gpu_report
from gpu_report import ARCHITECTURES, CHIPS, WIDE_LOAD, WIDE_STORE, compile_next_key, make_cases
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from unidrop.fused.triton import launch
from unidrop.protocols import DeviceBuffer

pytestmark = [pytest.mark.triton, pytest.mark.slow]  # Triton and ptxas compile each kernel

CASES = {case.name: case for case in make_cases()}

# Instructions for an element, at most, and wide loads of a thread.
FLAT = {"flat bfloat16": (17, 2), "flat float32": (16, 4)}
OTHERS = {
    "flat bfloat16, 64-bit": (17, 2),
    "flat float32, 64-bit": (16, 4),
    "flat float64": (19, 8),
    "flat complex64": (20, 8),
    "window bfloat16": (22, 2),
    "transposed bfloat16": (31, 2),
    "channels bfloat16": (20, 2),
}
BUDGETS = {(name, sm): budget for name, budget in FLAT.items() for sm in ARCHITECTURES}
BUDGETS |= {(name, 90): budget for name, budget in OTHERS.items()}
BUDGETS["unaligned window float32", 100] = (44, 0)  # which has the most addresses in registers


@pytest.fixture(scope="module", autouse=True)
def compile_anew(tmp_path_factory):
    """Compile all kernels, instead of reading a cache that another version may have written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@cache
def compile_case(name, architecture):
    return CASES[name].compile(architecture)


@pytest.mark.parametrize(("name", "architecture"), BUDGETS)
def test_keeps_within_budget_of_instructions(name, architecture):
    code = compile_case(name, architecture)
    most, wide = BUDGETS[name, architecture]
    assert code.per_element <= most
    assert code.count(WIDE_LOAD) == code.count(WIDE_STORE) == wide


@pytest.mark.parametrize(("name", "architecture"), BUDGETS)
def test_spills_nothing_and_leaves_room_for_warps(name, architecture):
    code = compile_case(name, architecture)
    assert code.spilled == 0
    assert code.count("LDL") == code.count("STL") == 0
    assert code.registers <= 80  # so that 24 warps of a multiprocessor run at once


@pytest.mark.parametrize(("name", "architecture"), BUDGETS)
def test_flushes_no_subnormal_numbers(name, architecture):
    instructions = compile_case(name, architecture).instructions
    products = [name for name in instructions if re.match("[FDH]MUL", name)]
    assert products
    assert not [name for name in products if "FTZ" in name]


@pytest.mark.parametrize("name", FLAT)
def test_is_bound_by_memory_by_the_estimate(name):
    for chip in CHIPS:
        code = compile_case(name, chip.architecture)
        size = gpu_report.ITEM_SIZES[CASES[name].kind]
        assert code.estimate(chip, size) < 0.75


def test_advances_call_number_in_one_small_kernel():
    code = compile_next_key(90)
    assert code.spilled == 0
    assert len(code.instructions) < 200


# --- Compilations ---------------------------------------------------------------------------------


class Pointer:
    """What a launch accepts as a pointer."""

    def __init__(self, dtype, address=0):
        self.dtype, self.address = dtype, address

    def data_ptr(self):
        return self.address


def get_specialization(kernel, arguments, constants):
    """Return the types and properties of arguments, which are the key of a compiled kernel."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, _ = bind(*arguments, **constants)
    return str(specialization)


@pytest.fixture
def launches(monkeypatch):
    """Record the specialization of each launch. Triton compiles a kernel for every other one."""
    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*arguments, num_warps=4, **constants):
                recorded.append(get_specialization(self.kernel, arguments, constants))

            return run

    kernels = launch._get_kernels()
    for name in ("flat", "rows", "next_key", "fold"):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name)))
    launch._prepare.cache_clear()
    yield recorded
    launch._prepare.cache_clear()


def run(shape, mask_strides, strides, *, key=(1, 2), base=0, p=0.1, kind="float32"):
    component = "float64" if kind == "complex128" else kind
    elements = DeviceBuffer(Pointer(component), strides)
    rate = launch.Rate.from_p(p)
    launch.dropout(elements, elements, kind, shape, mask_strides, rate, key, base)


WORDS = [0, 1, 16, 2**31 - 1, 2**31, 2**32 - 1]


def test_compiles_nothing_for_values_of_keys_and_rates(launches):
    for lo in WORDS:
        for hi in WORDS:
            run((64,), (1,), (1,), key=(lo, hi))
    for p in (2.0**-32, 0.1, 0.5, 0.6, 1 - 2.0**-32):
        run((64,), (1,), (1,), p=p)
    assert len(set(launches)) == 1


def test_compiles_nothing_for_sizes_and_starts(launches):
    for size in (8, 16, 24, 64, 2**20, 2**30):
        for base in (0, 8, 16, 2**31, 2**34):
            run((size,), (1,), (1,), base=base)
    assert len(set(launches)) == 1
    run((64,), (1,), (1,), base=2**35)  # 64-bit blocks
    run((65,), (1,), (1,))  # a part of a block at the end
    assert len(set(launches)) == 3


def test_compiles_nothing_for_lengths_of_windows(launches):
    for rows in (64, 1024, 4096, 70_000):
        for columns, whole in ((2048, 4096), (4096, 8200), (2**14, 2**33)):
            run((rows, columns), (whole, 1), (columns, 1), base=columns)
    assert len(set(launches)) == 1


@pytest.mark.parametrize("kind", ["float64", "complex128"])
def test_compiles_nothing_for_scales_of_64_bits(launches, kind):
    for p in (0.1, 0.5, 0.9):
        run((64,), (1,), (1,), p=p, kind=kind)
    assert len(set(launches)) == 1


def test_compiles_nothing_for_call_numbers(launches):
    pointer = Pointer("int64")
    for address in (0, 8, 16):
        key = Pointer("int64", address)
        launch.next_key(Pointer("int64", address), key, pointer, count=1 + address)
        launch.next_key(pointer, key, pointer, count=8, key_stride=2)
    assert len(set(launches)) == 1
