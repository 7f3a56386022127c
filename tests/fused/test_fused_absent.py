"""Dropout without kernels: without Numba, without its cache, or without unidrop.fused."""

import importlib
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from fused_arrays import FUSED, KEY, assert_bits, fused, get_output, portable, specified, values
from thread_scripts import assert_success, needs_fork, run_script

import unidrop
import unidrop.adapters
import unidrop.adapters.numpy
from unidrop import Key
from unidrop.fused import kernels

PATH = importlib.import_module("unidrop.dispatch")

PROGRAM = """
import sys
import numpy as np
import unidrop, unidrop.adapters.numpy
assert "numba" not in sys.modules or sys.modules["numba"] is None
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
    "numba is None": ("import sys; sys.modules['numba'] = None\n", {}, "not installed"),
    "numba is not installed": (BLOCKED.format(names=("numba", "llvmlite")), {}, "not installed"),
    "numba can't be imported": (BROKEN, {}, "can't be imported"),
    "compilation is off": ("", {"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT"),
}


@pytest.mark.parametrize("why", ABSENT)
def test_gives_same_bits_and_a_reason_without_numba(why, bits_of_the_program):
    before, environment, reason = ABSENT[why]
    path, bits = get_output(before + PROGRAM, **environment)
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
def test_imports_numba_only_for_a_kernel(code):
    (found,) = get_output(f"{code}\nimport sys; print('numba' in sys.modules)")
    assert found == "False"


NO_CACHE = {
    "no folder": (RuntimeError("cannot cache function: no locator available"), False),
    "damaged": (EOFError("Ran out of input"), True),
    "full disk": (OSError(28, "No space left on device"), True),
}


@pytest.mark.parametrize(("error", "warns"), NO_CACHE.values(), ids=NO_CACHE)
def test_compiles_without_numba_cache(monkeypatch, error, warns):
    compile_with = kernels._compile
    calls = []

    def no_cache(name, **options):
        calls.append((name, options.get("cache", False)))
        if options.get("cache"):
            raise error
        return compile_with(name, cache=True)  # saves time

    monkeypatch.setattr(kernels, "_compile", no_cache)
    kernels._get_function.cache_clear()
    FUSED._compile.cache_clear()
    FUSED.prepare.cache_clear()
    try:
        x = values((99,))
        with pytest.warns(match="delete the cache") if warns else nullcontext():
            assert_bits(fused(x, 0.4), portable(x, 0.4))
    finally:
        kernels._get_function.cache_clear()
        FUSED._compile.cache_clear()
        FUSED.prepare.cache_clear()
    names = [name for name, cached in calls if cached]
    assert {"select_float32", "rows"} < set(names)
    assert calls == [(name, cached) for name in names for cached in (True, False)]


def test_compiles_one_function_more_for_another_dtype():
    one, other = (kernels.make_kernel("tiles", name) for name in ("float32", "bool"))
    assert one.select != other.select
    assert one == other._replace(select=one.select)


def test_compiles_one_function_more_for_another_traversal():
    one, other = (kernels.make_kernel(traversal, "float32") for traversal in ("rows", "tiles"))
    assert one.run is not other.run
    assert one == other._replace(run=one.run)


@pytest.mark.slow
def test_keeps_kernels_of_several_processes_apart(tmp_path):
    # In each process, Numba's name of the first function contains the same number.
    program = """
import sys, ml_dtypes, numpy as np, unidrop
for name in {names}:
    x = np.arange(1, 301).astype(name)
    y = unidrop.dropout(x, 0.4, unidrop.Key(1))
    with unidrop.force_path("portable"):
        print((y == unidrop.dropout(x, 0.4, unidrop.Key(1))).all(), end=" ")
"""
    first, second = ("float16",), ("bfloat16",)
    for names in (first, second, first + second):
        (actual,) = get_output(program.format(names=names), NUMBA_CACHE_DIR=str(tmp_path))
        assert actual.split() == ["True"] * len(names), names


@pytest.mark.slow
@needs_fork
def test_computes_same_bits_with_damaged_numba_cache(tmp_path):
    code = """
    import warnings
    from pathlib import Path

    def damage(kind, extension):
        for path in Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*." + extension):
            content = path.read_bytes()
            path.unlink()
            if kind == "folder":
                path.mkdir()
            else:
                path.write_bytes(content[: len(content) // 2] if kind == "half" else b"")

    def check(*kinds):
        with warnings.catch_warnings(record=True) as caught:
            damage(*kinds)
            check_bits()
        assert "delete the cache" in str(caught[0].message), kinds

    with unidrop.force_path("portable"):
        PORTABLE[KEY] = dropout(X, 0.1, key=KEY)
    assert run_in_fork(check_bits) == 0  # writes the cache
    for kinds in ("half", "nbi"), ("half", "nbc"), ("empty", "nbi"), ("folder", "nbi"):
        assert run_in_fork(lambda: check(*kinds)) == 0, kinds
    """
    assert_success(run_script(tmp_path, code, NUMBA_CACHE_DIR=str(tmp_path / "cache")))
