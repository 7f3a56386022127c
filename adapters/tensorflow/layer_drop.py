"""LayerDrop for TensorFlow."""

from contextlib import nullcontext
from typing import Any

import tensorflow as tf

import unidrop.layer_drop as core
from unidrop.key import Key
from unidrop.rate import Rate

__all__ = ["layer_drop"]


def layer_drop(num_layers: int, rate: float, *, key: Key, name: str | None = None) -> Any:
    """Return which layers of a stack run, if each is skipped with probability rate.

    `unidrop.family.layer_drop` describes the result, and the other parameters are as in `dropout`.
    In a graph, pass a decision to `tf.cond`.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import layer_drop
    >>> layer_drop(6, 0.5, key=Key(42)).numpy()
    array([ True, False, False, False, False,  True])
    """
    with nullcontext() if name is None else tf.name_scope(name):
        return core.layer_drop(num_layers, Rate.from_p(rate, "rate").p, key, xp=tf)
