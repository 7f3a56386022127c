"""Makes a framework accept keys as soon as both it and unidrop are imported, in any order.

A key is a JAX pytree of two ``uint32`` words, a state of `flax.serialization`, and an object that
`torch.load` reads safely. No adapter need be in use: a program may pass a key to `jax.jit`, or load
a checkpoint that contains one.
"""

import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from unidrop.key import Key

__all__: list[str] = []


class _TreeInteger(int):
    """An integer in the place of a word in a tree, but not a word: an axis for `jax.vmap`."""


def _register_in_jax() -> None:
    import numpy as np
    from jax.tree_util import GetAttrKey, register_pytree_with_keys

    # JAX would treat a Python integer as signed with 32 bits. Equinox compares leaves by identity.
    as_uint32 = lru_cache(maxsize=4096)(np.uint32)

    def as_leaf(word: Any) -> Any:
        """Return the leaf of a word, or the object that stands in its place."""
        if type(word) is _TreeInteger:
            return int(word)
        return as_uint32(word) if type(word) is int else word

    def flatten(key: Key) -> tuple[tuple[Any, Any], None]:
        lo, hi = key.words
        return (as_leaf(lo), as_leaf(hi)), None

    def flatten_with_names(key: Key) -> tuple[tuple[Any, Any], None]:
        (lo, hi), _ = flatten(key)
        return ((GetAttrKey("lo"), lo), (GetAttrKey("hi"), hi)), None

    def unflatten(_: None, leaves: Any) -> Key:
        """Return the key of two leaves: words, or any objects that JAX puts in their place."""
        lo, hi = leaves
        if type(lo) is type(hi) is np.uint32:
            return Key._from_raw_words((int(lo), int(hi)))
        lo, hi = (_TreeInteger(leaf) if type(leaf) is int else leaf for leaf in leaves)
        return Key._from_raw_words((lo, hi))

    register_pytree_with_keys(Key, flatten_with_names, unflatten, flatten)


def _register_in_torch() -> None:
    from torch.serialization import add_safe_globals

    add_safe_globals([Key])


def _register_in_flax() -> None:
    from flax.serialization import register_serialization_state

    def to_state(key: Key) -> dict[str, Any]:
        lo, hi = key.words
        return {"lo": lo, "hi": hi}

    def from_state(_: Key, state: dict[str, Any]) -> Key:
        return Key.from_words(state["lo"], state["hi"])

    register_serialization_state(Key, to_state, from_state)


_REGISTER = {"flax": _register_in_flax, "jax": _register_in_jax, "torch": _register_in_torch}


class _Finder:
    """Finds a framework as other finders do, and lets its import end with a registration."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the spec of a framework at its first import, and None for other modules."""
        if fullname not in self.names:
            return None
        self.names.remove(fullname)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = _then_register(loader.exec_module, fullname)
        return spec


def _then_register(execute: Callable[[ModuleType], None], name: str) -> Any:
    """Return a function that executes a module, and registers keys if it has the name."""

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ != name or name not in _REGISTER:
            return  # another module of an archive with one loader, or a second import
        try:
            _REGISTER.pop(name)()
        except Exception as error:  # the framework itself works
            warnings.warn(
                f"{name} does not accept a unidrop.Key: {error!r}", RuntimeWarning, stacklevel=2
            )

    return exec_module


def _register_everywhere() -> None:
    """Register keys in the frameworks that are imported, and in the others when they are."""
    later = []
    for name in list(_REGISTER):
        if sys.modules.get(name) is not None:
            _REGISTER.pop(name)()
        else:
            later.append(name)
    if later:
        sys.meta_path.insert(0, _Finder(later))


_register_everywhere()
