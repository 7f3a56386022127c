"""The kit for writers of kernels: its header and its Triton kernel pass the golden vectors."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import unidrop.conformance

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HEADER, CHECK = EXAMPLES / "cuda" / "unidrop.cuh", EXAMPLES / "cuda" / "check.cu"
KERNEL = EXAMPLES / "triton_kernel" / "dropout_add.py"
VECTORS = Path(unidrop.conformance.__file__).parent / "vectors" / "vectors.json"
COMPILER = shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def run(*command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def compile_host(folder, source=CHECK):
    program = folder / "check"
    flags = ["-std=c++14", "-O1", "-Wall", "-Wextra", "-Werror"]
    compiled = run(COMPILER, "-x", "c++", *flags, "-o", program, source)
    assert compiled.returncode == 0, compiled.stderr
    return program


def test_keeps_header_short():
    assert len(HEADER.read_text(encoding="utf-8").splitlines()) < 100


@pytest.mark.slow
@needs_compiler
def test_accepts_the_vectors_in_cpp(tmp_path):
    checked = run(compile_host(tmp_path), VECTORS)
    assert checked.returncode == 0, checked.stderr
    numbers = [int(number) for number in re.findall(r"\d+", checked.stdout)]
    assert numbers[0] > 180
    assert numbers[1] == 0


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("round < 10", "round < 9"),
        ("u >= threshold", "u > threshold"),
        ("{(uint32_t)integer, (uint32_t)(integer >> 32), 0, 1}", "{(uint32_t)integer, 0, 0, 1}"),
        ("keep ? x * scale : 0.0f", "x * (keep ? scale : 0.0f)"),
    ],
)
def test_fails_with_mutated_header(tmp_path, right, wrong):
    text = HEADER.read_text(encoding="utf-8")
    assert text.count(right) == 1
    (tmp_path / HEADER.name).write_text(text.replace(right, wrong), encoding="utf-8")
    source = shutil.copy(CHECK, tmp_path)
    checked = run(compile_host(tmp_path, source), VECTORS)
    assert checked.returncode == 1
    assert "vector failed" in checked.stderr


@pytest.mark.slow
@needs_nvcc
def test_compiles_kernel_by_nvcc(tmp_path):
    program = tmp_path / "check"
    flags = ["-arch=sm_90", "-Xptxas=-v", "-Werror=all-warnings"]
    compiled = run(NVCC, *flags, "-o", program, CHECK)
    assert compiled.returncode == 0, compiled.stderr
    assert "0 bytes spill stores" in compiled.stdout + compiled.stderr
    checked = run(program, VECTORS)
    assert checked.returncode == 0, checked.stderr
    assert "0 failed" in checked.stdout


# --- The kernel in Triton -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.triton
def test_accepts_the_vectors_in_triton():
    check = KERNEL.with_name("check.py")
    checked = run(sys.executable, check, VECTORS, TRITON_INTERPRET="1")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert re.fullmatch(r"\d\d vectors checked on cpu, 0 failed\n", checked.stdout)
    assert checked.stderr == ""


def test_imports_triton_alone_in_kernel():
    imports = re.findall(
        r"^(?:import|from) (\w+)", KERNEL.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert imports == ["triton", "triton"]


def import_kernel():
    spec = spec_from_file_location("dropout_add", KERNEL)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 1.5}, r"^p must be in \[0, 1\], got 1.5$"),
        ({"p": float("nan")}, r"^p must be in \[0, 1\], got nan$"),
        ({"x": torch.ones(6, 4).T}, r"^x must be contiguous, got strides \(1, 4\)$"),
        ({"residual": torch.ones(6, 4).T}, r"^residual must be contiguous"),
        ({"y": torch.ones(4, 5)}, r"^y must have shape \(4, 6\), got \(4, 5\)$"),
    ],
    ids=["rate", "nan", "x", "residual", "y"],
)
def test_rejects_bad_arguments_of_example(change, message):
    arguments = {name: torch.ones(4, 6) for name in ("x", "residual", "y")}
    with pytest.raises(ValueError, match=message):
        import_kernel().dropout_add(**{**arguments, "p": 0.5, "key": (1, 2), **change})


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_check_of_example_needs_a_gpu():
    checked = run(sys.executable, KERNEL.with_name("check.py"), VECTORS, TRITON_INTERPRET="0")
    assert checked.returncode == 1
    assert checked.stderr.startswith("PyTorch finds no GPU; set TRITON_INTERPRET=1")


@pytest.mark.slow
@pytest.mark.triton
def test_compiles_example_for_gpu():
    from gpu_report import THREADS, WIDE_LOAD, WIDE_STORE, Compiled, compile_kernel

    module = import_kernel()
    types = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr"), "*bf16") | {"size": "i32"}
    code = compile_kernel(module.kernel, types, {"BLOCKS": 256}, 90, aligned=tuple(types))
    compiled = Compiled(*code, 8 * 256 / THREADS)
    assert compiled.spilled == 0
    assert (compiled.count(WIDE_LOAD), compiled.count(WIDE_STORE)) == (4, 2)
    assert compiled.per_element < 24
