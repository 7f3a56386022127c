"""What the package as a whole promises: what it imports, exports and ships, and its docstrings."""

import doctest
import importlib
import importlib.metadata
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unidrop
import unidrop.adapters

FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "numba", "dask", "rich", "click", "ml_dtypes")
MODULES = sorted(
    module.name
    for package in (unidrop, unidrop.adapters)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
)


def imported_by(code):
    code += "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import unidrop",
        "import unidrop, numpy; path = unidrop.force_path('portable'); path.__enter__(); "
        "unidrop.dropout(numpy.ones(9), 0.5, unidrop.Key(1))",
        "import unidrop; unidrop.set_num_threads(2)",
        "import unidrop.adapters.numpy",
    ],
)
def test_nothing_imports_a_framework_that_its_user_did_not(code):
    assert imported_by(code).isdisjoint(FRAMEWORKS)


@pytest.mark.parametrize("adapter", ["torch", "tensorflow", "keras"])
def test_an_adapter_imports_no_framework_that_its_own_does_not(adapter):
    own = imported_by(f"import {adapter}")
    assert imported_by(f"import unidrop.adapters.{adapter}") & set(FRAMEWORKS) <= own


def loaded(name):
    """Import a module of the package, or skip the test where it is CuPy's and there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "cupy":  # which is of no use without a GPU, and so not in the extra "test"
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("name", MODULES)
def test_every_public_module_says_what_it_exports(name):
    module = loaded(name)
    assert module.__doc__
    for exported in getattr(module, "__all__", ()):
        assert hasattr(module, exported)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")
def test_examples_in_docstrings_print_what_they_say(name):
    module = loaded(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_the_version_is_the_distributions():
    assert importlib.metadata.version("unidrop") == unidrop.__version__


def test_type_information_is_shipped():
    files = {str(file) for file in importlib.metadata.files("unidrop") or ()}
    direct = importlib.metadata.distribution("unidrop").read_text("direct_url.json") or ""
    assert "unidrop/py.typed" in files or '"editable": true' in direct


def test_a_clone_that_shadows_the_installed_package_finds_its_adapters(tmp_path):
    clone = tmp_path / "unidrop"
    clone.mkdir()
    for file in Path(unidrop.__file__).parent.glob("*.py"):
        shutil.copy(file, clone)
    code = "import unidrop, unidrop.adapters.numpy; print(unidrop.__file__)"
    run = [sys.executable, "-c", code]
    shown = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert shown.strip() == str(clone / "__init__.py")
