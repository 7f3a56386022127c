"""Operations that Keras layers need from Keras's backend, and that `keras.ops` lacks."""

import math
from typing import Any, NamedTuple

import keras

from unidrop.library import get_library

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
elif keras.backend.backend() == "torch":
    import torch

__all__ = ["Replica", "find_replica", "make_increment"]


class Replica(NamedTuple):
    """One of several replicas that train on the parts of a batch.

    Attributes
    ----------
    rank : int or 0-d integer array
        The number of the replica.
    window : (global_shape, start) or None
        The place of the part in the whole batch, or None if a length is unknown. Parts follow one
        another along the first axis, whose length in ``global_shape`` is only an upper bound.
    """

    rank: Any
    window: tuple[tuple[int, ...], tuple[Any, ...]] | None


def make_increment(state: Any) -> Any:
    """Return the increment of ``[seed, calls]`` for one call."""
    if keras.backend.backend() == "torch":
        # torch.compile takes long to trace keras.ops.arange.
        return torch.arange(2, dtype=state.dtype, device=state.device)
    return keras.ops.arange(2, dtype=keras.backend.standardize_dtype(state.dtype))


def find_replica(x: Any) -> Replica | None:
    """Return the replica of a `tf.distribute.Strategy` that an array belongs to, or None.

    All replicas must call this together, because they gather the lengths of their parts. So a batch
    that does not divide evenly gets the same masks as on a single device.
    """
    if keras.backend.backend() != "tensorflow" or not tf.distribute.has_strategy():
        return None
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    rank = context.replica_id_in_sync_group
    arrays = get_library(x).arrays
    length, *inner = arrays.shape(x) or (None,)
    if length is None or not all(isinstance(n, int) for n in inner):
        return Replica(rank, None)
    mine = tf.one_hot(rank, context.num_replicas_in_sync, dtype=tf.int64)
    lengths = context.all_reduce(tf.distribute.ReduceOp.SUM, mine * tf.cast(length, tf.int64))
    start = tf.cumsum(lengths, exclusive=True)[rank]
    if not arrays.is_traced(x):  # a Python integer needs fewer operations
        start = int(start)
    longest = (1 << 64) // math.prod(max(1, n) for n in inner)
    return Replica(rank, ((longest, *inner), (start, *(0 for _ in inner))))
