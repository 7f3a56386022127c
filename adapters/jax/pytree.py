"""Keys as JAX pytrees of two ``uint32`` words."""

from typing import Any

import jax
import numpy as np

from unidrop.adapters.jax.arrays import as_jax_word
from unidrop.key import Key

__all__: list[str] = []


class _TreeInteger(int):
    """An integer that stands in a tree for a word, such as an axis for `jax.vmap`, and is none."""


def _leaves(key: Key) -> tuple[tuple[Any, Any], None]:
    lo, hi = (
        int(word) if isinstance(word, _TreeInteger) else as_jax_word(word) for word in key.words
    )
    return (lo, hi), None


def _named_leaves(key: Key) -> tuple[tuple[Any, Any], None]:
    (lo, hi), _ = _leaves(key)
    return ((jax.tree_util.GetAttrKey("lo"), lo), (jax.tree_util.GetAttrKey("hi"), hi)), None


def _key_of(_: None, leaves: Any) -> Key:
    """Return the key of two leaves, which stand for words, or in JAX's trees for anything."""
    lo, hi = leaves
    if isinstance(lo, np.uint32) and isinstance(hi, np.uint32):
        return Key.from_words(lo, hi)
    lo, hi = (_TreeInteger(leaf) if type(leaf) is int else leaf for leaf in leaves)
    return Key._from_raw_words((lo, hi))


jax.tree_util.register_pytree_with_keys(Key, _named_leaves, _key_of, _leaves)
