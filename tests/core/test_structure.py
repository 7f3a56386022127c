"""The structure of the core: it names no framework, imports nothing above it, keeps no class."""

import ast
import gc
import re
import weakref
from pathlib import Path

import numpy as np
import pytest

import unidrop

ROOT = Path(unidrop.__file__).parent
CORE = sorted(path for path in ROOT.glob("*.py") if path.name != "testing.py")
FUSED = sorted((ROOT / "fused").rglob("*.py"))
FRAMEWORKS = r"torch|tensorflow|keras|jax|flax|dask|cupy|mlx|dynamo|inductor|xla|symint"

# The package's modules in order: each imports only modules listed before it.
LAYERS = [
    "dtypes",
    "arguments",
    "rate",
    "threads",
    "words",
    "philox",
    "protocols",
    "library",
    "schedule",
    "window",
    "key",
    "device",
    "dispatch",
    "mask",
    "output",
    "plan",
    "dropout",
    "normal",
    "gaussian",
    "drop_block",
    "drop_head",
    "embedding",
    "permutation",
    "layer_drop",
    "word_dropout",
    "zoneout",
    "family",
]


def get_imports(path):
    """Return the modules of the package that a module imports, except for annotations."""
    tree = ast.parse(path.read_text())
    annotations = [
        n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    skipped = {id(node) for block in annotations for node in ast.walk(block)}
    nodes = [node for node in ast.walk(tree) if id(node) not in skipped]
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name for name in names if name.startswith("unidrop")}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_names_no_framework_in_core(path):
    assert re.findall(FRAMEWORKS, path.read_text(), re.IGNORECASE) == []


@pytest.mark.parametrize("name", LAYERS)
def test_imports_lower_layers_alone(name):
    lower = {f"unidrop.{layer}" for layer in LAYERS[: LAYERS.index(name)]}
    assert get_imports(ROOT / f"{name}.py") <= lower


def test_has_layer_for_every_core_module():
    assert {path.stem for path in CORE} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("path", FUSED, ids=lambda path: path.stem)
def test_knows_no_library_in_fused(path):
    assert {"unidrop.library", "unidrop.dispatch", "unidrop.plan"}.isdisjoint(get_imports(path))


@pytest.mark.parametrize("path", [*CORE, *FUSED], ids=lambda path: path.stem)
def test_begins_with_one_sentence(path):
    first = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    assert first.endswith(".")
    assert first.count(".") == 1


class Standard:
    """An array of a library that follows the standard."""

    dtype, shape = np.dtype("float32"), ()

    def __array_namespace__(self, api_version=None):
        return np


def test_frees_classes_made_at_run_time():
    references = []
    for _ in range(300):
        local = type("Local", (Standard,), {})
        assert unidrop.dropout(local(), 0, unidrop.Key(0)).dtype == "float32"
        references.append(weakref.ref(local))
    del local
    gc.collect()
    # array-api-compat keeps the last 100.
    assert sum(reference() is not None for reference in references) <= 100
