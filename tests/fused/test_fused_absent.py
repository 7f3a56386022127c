"""Dropout without kernels: without llvmlite, or without unidrop.fused."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from fused_arrays import KEY, get_output, specified
from thread_scripts import assert_success, run_script

import unidrop
import unidrop.adapters
import unidrop.adapters.numpy
from unidrop import Key

PATH = importlib.import_module("unidrop.dispatch")

PROGRAM = """
import sys
import numpy as np
import unidrop, unidrop.adapters.numpy
assert "llvmlite" not in sys.modules or sys.modules["llvmlite"] is None
x = np.arange(1, 4000, dtype="float32").reshape(3, -1)
y, mask = unidrop.dropout(np.asfortranarray(x), 0.4, unidrop.Key(7), return_mask=True)
out = unidrop.adapters.numpy.dropout(x, 0.4, key=unidrop.Key(7), out=np.empty_like(x))
far = unidrop.dropout(x, 0.4, unidrop.Key(7), global_shape=(3, 2**40), start=(0, 2**35))
parts = (np.ascontiguousarray(y), mask, out, far)
print(unidrop.explain_path(x))
print("".join(part.tobytes().hex() for part in parts))
"""


@pytest.fixture(scope="module")
def bits_of_the_program():
    """Return the bits that the program prints, computed by the specification."""
    x = np.arange(1, 4000, dtype="float32").reshape(3, -1)
    y = specified(x, 0.4, Key(7))
    far = specified(x, 0.4, Key(7), global_shape=(3, 2**40), start=(0, 2**35))
    return "".join(part.tobytes().hex() for part in (y, y != 0, y, far))


@pytest.fixture(scope="module")
def without_kernels(tmp_path_factory):
    """Return a folder with a copy of the package that lacks its kernels."""
    folder = tmp_path_factory.mktemp("without_kernels")
    ignored = shutil.ignore_patterns("__pycache__", "fused")
    shutil.copytree(Path(unidrop.__file__).parent, folder / "unidrop", ignore=ignored)
    adapters = Path(unidrop.adapters.__file__).parent
    shutil.copytree(adapters, folder / "unidrop" / "adapters", ignore=ignored)
    return folder


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
BROKEN = """
import sys, types
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "llvmlite":
            raise ImportError("libLLVM is too old", name=name)
sys.meta_path.insert(0, Broken())
"""
ABSENT = {
    "llvmlite is None": ("import sys; sys.modules['llvmlite'] = None\n", "not installed"),
    "llvmlite is not installed": (BLOCKED.format(names=("llvmlite",)), "not installed"),
    "llvmlite can't be imported": (BROKEN, "can't be imported"),
}


@pytest.mark.parametrize("why", ABSENT)
def test_gives_same_bits_and_a_reason_without_llvmlite(why, bits_of_the_program):
    before, reason = ABSENT[why]
    path, bits = get_output(before + PROGRAM)
    assert path.startswith("portable: ")
    assert reason in path
    assert bits == bits_of_the_program


# A copy would import missing parts from the installed package, editable or not.
ALONE = """
import sys
sys.meta_path = [found for found in sys.meta_path if "editable" not in str(found).lower()]
import unidrop
unidrop.__path__[1:] = []
"""


def test_gives_same_bits_without_package_of_kernels(without_kernels, bits_of_the_program):
    path, bits = get_output(ALONE + PROGRAM, cwd=without_kernels)
    assert path == "portable: the package unidrop.fused is missing"
    assert bits == bits_of_the_program


def test_refuses_fused_path_without_package_of_kernels(without_kernels):
    program = """
import numpy, unidrop
try:
    with unidrop.force_path("fused"):
        unidrop.dropout(numpy.ones(3), 0.5, unidrop.Key(1))
except RuntimeError as error:
    print(error)
"""
    (message,) = get_output(ALONE + program, cwd=without_kernels)
    assert "unidrop.fused is missing" in message


def test_raises_import_errors_inside_package_of_kernels(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(PATH, "import_module", absent)
    PATH._get_package.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match="other"):
            unidrop.dropout(np.ones(3), 0.5, KEY)
    finally:
        PATH._get_package.cache_clear()


@pytest.mark.parametrize(
    "code",
    [
        "import unidrop",
        "import unidrop.adapters.numpy",
        "import unidrop, numpy; unidrop.dropout(numpy.ones(9), 0, unidrop.Key(1))",
        "import unidrop, numpy; unidrop.dropout(numpy.ones(9), 1, unidrop.Key(1))",
        "import unidrop, numpy\n"
        "with unidrop.force_path('portable'): unidrop.dropout(numpy.ones(9), 0.5, unidrop.Key(1))",
        "import unidrop, numpy; unidrop.dropout(numpy.ones(9, '>f4'), 0.5, unidrop.Key(1))",
    ],
)
def test_imports_llvmlite_only_for_a_kernel(code):
    (found,) = get_output(f"{code}\nimport sys; print('llvmlite' in sys.modules)")
    assert found == "False"


def test_needs_no_folder_that_can_be_written(tmp_path):
    nowhere = dict.fromkeys(["HOME", "TMPDIR", "XDG_CACHE_HOME"], "/dev/null")
    assert_success(run_script(tmp_path, "check_bits()", **nowhere))
