"""Tests of the attributes of `unidrop` and `unidrop.adapters`: lazy, and public names alone."""

import subprocess
import sys

import pytest

import unidrop

FRAMEWORKS = ["flax", "jax", "keras", "numpy", "tensorflow", "torch"]


def run(code):
    """Run code in a new process and return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_imports_subpackages_at_first_use():
    code = """
import sys, unidrop
def loaded():
    return sorted(name for name in sys.modules if name.startswith("unidrop."))
before = loaded()
unidrop.conformance.BaseBackend, unidrop.adapters.numpy.dropout
print(*(name for name in before if name.startswith("unidrop.adapters.")), "|")
print(*(name for name in loaded() if name not in before and name.count(".") == 1))
print(*(name for name in loaded() if name not in before and name.startswith("unidrop.adapters.")))
"""
    first = ["unidrop.adapters.key_types", "|", "unidrop.conformance"]
    parts = [
        f"unidrop.adapters.numpy{part}"
        for part in (
            "",
            ".arrays",
            ".drop_head",
            ".embedding",
            ".family",
            ".functional",
            ".layer_drop",
            ".word_dropout",
            ".zoneout",
        )
    ]
    assert run(code) == [
        *first,
        *(f"unidrop.{m}" for m in ("drop_block", "drop_head", "embedding", "family", "gaussian")),
        *(
            f"unidrop.{m}"
            for m in ("layer_drop", "normal", "permutation", "word_dropout", "zoneout")
        ),
        *parts,
    ]


@pytest.mark.parametrize("name", ["adapters", "conformance", "testing"])
def test_has_each_subpackage_as_attribute(name):
    assert run(f"import unidrop; print(unidrop.{name}.__name__)") == [f"unidrop.{name}"]


def test_completes_public_names_alone():
    code = "import unidrop, unidrop.conformance, unidrop.adapters.numpy; print(*dir({}))"
    public = sorted([*unidrop.__all__, "adapters", "conformance", "testing"])
    assert run(code.format("unidrop")) == public
    assert run(code.format("unidrop.adapters")) == FRAMEWORKS


@pytest.mark.parametrize(("old", "new"), [("only", "force_path"), ("explain", "explain_path")])
def test_rejects_old_name_and_names_the_new_one(old, new):
    with pytest.raises(AttributeError, match=rf"no attribute '{old}'; its new name is '{new}'"):
        getattr(unidrop, old)
    assert hasattr(unidrop, new)


@pytest.mark.parametrize("package", [unidrop, unidrop.adapters], ids=lambda p: p.__name__)
def test_rejects_unknown_attribute(package):
    with pytest.raises(AttributeError, match=f"'{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_names_missing_framework_of_adapter():
    code = """
import sys; sys.modules["torch"] = None
import unidrop
try:
    unidrop.adapters.torch
except ModuleNotFoundError as error:
    print(error)
"""
    assert "torch" in run(code)
