"""Frameworks accept keys after their import and unidrop's, in any order and without an adapter."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from unidrop.adapters import key_types

USES = {
    "jax": "import jax.numpy as jnp; print(jax.jit(lambda k: k.fold_in(7).words[0] * 0)(key))",
    "torch": "import io; file = io.BytesIO(); torch.save({'key': key}, file); file.seek(0); "
    "assert torch.load(file, weights_only=True) == {'key': key}; print(0)",
    "flax": "import flax.serialization as s; data = s.to_bytes(key); "
    "assert s.from_bytes(unidrop.Key(0), data) == key; print(0)",
}


@pytest.mark.slow  # six processes import a framework
@pytest.mark.parametrize("framework", USES)
@pytest.mark.parametrize("order", ["unidrop first", "framework first"])
def test_accepts_key_after_two_imports(framework, order):
    own, other = "import unidrop; key = unidrop.Key(2**63 + 5)", f"import {framework}"
    lines = [own, other] if order == "unidrop first" else [other, own]
    code = "\n".join([*lines, USES[framework], "import sys; print(*sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    value, modules = done.stdout.splitlines()
    assert value == "0"
    assert f"unidrop.adapters.{framework}" not in modules.split() or framework == "jax"


@pytest.fixture
def loader(monkeypatch):
    """Return the loader of a module that a finder of this test finds, and its registrations."""
    registered = []
    loader = SimpleNamespace(create_module=lambda spec: None, exec_module=lambda module: None)
    monkeypatch.setitem(key_types._REGISTER, "a_framework", lambda: registered.append(1))
    specs = {name: ModuleSpec(name, loader) for name in ("a_framework", "another_module")}
    finder = SimpleNamespace(find_spec=lambda name, path, target=None: specs.get(name))
    monkeypatch.setattr(sys, "meta_path", [key_types._Finder(["a_framework"]), finder])
    monkeypatch.setattr(key_types, "find_spec", specs.get)
    yield loader, registered
    sys.modules.pop("a_framework", None)


def test_registers_once_after_import(loader):
    _, registered = loader
    for _ in range(2):
        sys.modules.pop("a_framework", None)
        __import__("a_framework")
        assert registered == [1]


def test_registers_after_no_other_module_of_its_loader(loader):
    shared, registered = loader
    key_types._then_register(shared.exec_module, "a_framework")(ModuleType("another_module"))
    assert registered == []


def test_warns_if_framework_refuses_registration(loader, monkeypatch):
    monkeypatch.setitem(key_types._REGISTER, "a_framework", lambda: 1 / 0)
    with pytest.warns(RuntimeWarning, match="a_framework does not accept a unidrop.Key: Zero"):
        __import__("a_framework")
    assert "a_framework" in sys.modules
