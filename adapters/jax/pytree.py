"""Keys as JAX pytrees of two ``uint32`` words."""

from typing import Any

import jax
import numpy as np

from unidrop.adapters.jax.arrays import as_jax_word
from unidrop.key import Key

__all__: list[str] = []


class _TreeInteger(int):
    """An integer in the place of a word in a tree, but not a word: an axis for `jax.vmap`."""


def _flatten(key: Key) -> tuple[tuple[Any, Any], None]:
    lo, hi = (
        int(word) if isinstance(word, _TreeInteger) else as_jax_word(word) for word in key.words
    )
    return (lo, hi), None


def _flatten_with_names(key: Key) -> tuple[tuple[Any, Any], None]:
    (lo, hi), _ = _flatten(key)
    return ((jax.tree_util.GetAttrKey("lo"), lo), (jax.tree_util.GetAttrKey("hi"), hi)), None


def _unflatten(_: None, leaves: Any) -> Key:
    """Return the key of two leaves: words, or any objects that JAX puts in their place."""
    lo, hi = leaves
    if isinstance(lo, np.uint32) and isinstance(hi, np.uint32):
        return Key.from_words(lo, hi)
    lo, hi = (_TreeInteger(leaf) if type(leaf) is int else leaf for leaf in leaves)
    return Key._from_raw_words((lo, hi))


jax.tree_util.register_pytree_with_keys(Key, _flatten_with_names, _unflatten, _flatten)
