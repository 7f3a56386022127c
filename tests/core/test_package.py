"""The package as a whole: its imports, its version, and the files it ships."""

import ast
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import unidrop
import unidrop.adapters

FRAMEWORKS = {
    "torch", "tensorflow", "keras", "jax", "flax", "llvmlite", "dask", "rich", "click", "ml_dtypes",
}  # fmt: skip


def get_output(code, cwd=None):
    """Return the lines that a new Python prints."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, text=True
    )
    return run.stdout.splitlines()


LIGHT = """
import sys
import unidrop
print(*sys.modules)
import unidrop.adapters.numpy
print(*sys.modules)
import numpy
with unidrop.force_path("portable"):
    unidrop.dropout(numpy.ones(9), 0.5, unidrop.Key(1))
print(*sys.modules)
unidrop.set_num_threads(2)
print(*sys.modules)
"""


def test_imports_no_framework():
    steps = get_output(LIGHT)
    assert len(steps) == 4
    for modules in steps:
        assert FRAMEWORKS.isdisjoint(modules.split()), modules


def get_imports(source, anywhere=True):
    """Return what a module imports, anywhere or at once; unidrop's own names in full."""
    tree = ast.parse(source)
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        for name in names:
            top = name.partition(".")[0]
            yield name if top == "unidrop" else top


def test_uses_numpy_and_strict_arrays_alone_in_core_tests():
    others = {"array_api_strict", "hypothesis", "ml_dtypes", "numpy", "pytest", "unidrop"}
    tools = {"make_golden", "random_inputs", "reference", "standard_arrays"}
    allowed = others | tools | sys.stdlib_module_names
    folder = Path(__file__).parent
    files = [*folder.glob("*.py"), *(folder.parent / "support" / f"{n}.py" for n in tools)]
    files.remove(folder.parent / "support" / "make_golden.py")  # it is in tools/
    for file in files:
        imported = set(get_imports(file.read_text(encoding="utf-8")))
        assert not any(name.startswith("unidrop.adapters.") for name in imported), file
        assert {name.partition(".")[0] for name in imported} <= allowed, file


ADAPTERS = {"jax": {"jax", "jaxlib"}, "flax": {"flax", "jax"}}


def test_imports_its_own_framework_alone_in_each_adapter():
    folder = Path(unidrop.adapters.__file__).parent
    files = [file for file in folder.rglob("*.py") if file.parent.name != "backends"]
    assert len(files) > 7
    for file in files:
        name = file.relative_to(folder).parts[0].removesuffix(".py").partition("_")[0]
        imported = set(get_imports(file.read_text(encoding="utf-8"), anywhere=False))
        assert imported & FRAMEWORKS <= ADAPTERS.get(name, {name}), file


# Keras imports the fewest other frameworks on its NumPy backend.
KERAS = """
import os, sys
os.environ["KERAS_BACKEND"] = "numpy"
import keras
before = set(sys.modules)
import unidrop.adapters.keras
print(*set(sys.modules) - before)
"""


def test_makes_keras_import_no_other_framework():
    (modules,) = get_output(KERAS)
    assert FRAMEWORKS.isdisjoint(modules.split())
    assert "unidrop.adapters.keras" in modules.split()


def test_has_version_of_distribution():
    assert importlib.metadata.version("unidrop") == unidrop.__version__


def test_ships_type_information():
    files = {str(file) for file in importlib.metadata.files("unidrop") or ()}
    direct = importlib.metadata.distribution("unidrop").read_text("direct_url.json") or ""
    assert "unidrop/py.typed" in files or '"editable": true' in direct


def test_finds_adapters_of_clone_that_shadows_package(tmp_path):
    clone = tmp_path / "unidrop"
    clone.mkdir()
    for file in Path(unidrop.__file__).parent.glob("*.py"):
        shutil.copy(file, clone)
    code = "import unidrop, unidrop.adapters.numpy; print(unidrop.__file__)"
    assert get_output(code, cwd=tmp_path) == [str(clone / "__init__.py")]
