"""Operations that Keras layers need from Keras's backend, and that `keras.ops` lacks."""

import math
import sys
import threading
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope

from unidrop.adapters.frames import list_callers
from unidrop.library import get_library

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
elif keras.backend.backend() == "torch":
    import torch

    from unidrop.adapters.torch.func import randomness
elif keras.backend.backend() == "jax":
    import jax

__all__ = [
    "Replica",
    "advance_eagerly",
    "check_loop",
    "find_replica",
    "forget_programs",
    "get_thread",
    "make_increment",
    "restore_value",
    "writes_legacy_file",
]


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


def advance_eagerly(state: Any) -> Any | None:
    """Return ``[seed, calls]`` of a TensorFlow variable and count a call; None if Keras must.

    A read and an addition in place take a fifth of the time of Keras's own operations.
    """
    if (
        keras.backend.backend() != "tensorflow"
        or not tf.executing_eagerly()
        or type(state).__name__ != "ResourceVariable"  # a variable of replicas has another type
        or in_stateless_scope()  # which receives what is assigned to Keras's own variable
    ):
        return None
    before = state.value().numpy()
    state.assign_add(_make_eager_increment(state.dtype), read_value=False)
    return before


@cache
def _make_eager_increment(dtype: Any) -> Any:
    return tf.constant([0, 1], dtype)


def get_thread() -> int:
    """Return the thread, which on TensorFlow is the replica's own.

    It is 0 while torch.compile traces, because that cannot record the thread.
    """
    if keras.backend.backend() == "torch" and torch.compiler.is_compiling():
        return 0
    return threading.get_ident()


def forget_programs() -> None:
    """Let JAX retrace each function, whose program it would reuse in another `jax.jit`."""
    if keras.backend.backend() == "jax":
        jax.clear_caches()


def writes_legacy_file() -> bool:
    """Return whether Keras writes or reads an ``.h5`` file of a whole model."""
    return bool(global_state.get_global_attribute("use_legacy_config"))


def restore_value(variable: Any, name: str = "calls") -> None:
    """Let a trainer on JAX put back the value of a variable, which it removes while it fits.

    Callbacks read and set variables. Those that use ``self.model`` make the trainer do this, others
    do not. The trainer that calls the callback is on the stack.

    Raises
    ------
    RuntimeError
        If no trainer is on the stack.
    """
    if keras.backend.backend() != "jax" or variable._value is not None:
        return
    for _, trainer in list_callers(sys._getframe(1)):
        if hasattr(type(trainer), "jax_state_sync"):
            trainer.jax_state_sync()
            if variable._value is not None:
                return
    raise RuntimeError(
        f"{name} must be read and set between the steps of fit, in a callback: {variable.path} has "
        "no value while a model is fitted on JAX in another thread"
    )


def check_loop(name: str, x: Any, state: Any, advanced: Any) -> None:
    """Raise RuntimeError in a loop that runs a layer's code once, and carries no variable.

    TensorFlow's `while_loop`, and all loops that TensorFlow builds of it, carry variables.
    PyTorch's loops run a layer's code for each iteration.

    Parameters
    ----------
    name : str
        The name of the layer.
    x : array
        The input of the layer.
    state, advanced : array
        The state of the layer, before and after the call.
    """
    if keras.backend.backend() == "tensorflow" and not tf.executing_eagerly():
        is_wrong = _is_in_vectorized_map()
    elif keras.backend.backend() == "jax":
        # The variable would keep a value of the trace of the loop.
        is_wrong = _get_trace(advanced) is not _get_trace(state) or _is_in_vmap(x, state)
    else:
        if keras.backend.backend() == "torch":
            randomness(x, state)  # raises under `torch.vmap` by its own rule
        return
    if is_wrong:
        raise RuntimeError(
            f"the layer {name} must not be called in a loop or a transformation of "
            f"{keras.backend.backend()} that does not carry its call number, because each call "
            "would have the same mask: use the function with a key there, as in "
            "unidrop.dropout(x, rate, key.fold_in(i))"
        )


def _is_in_vectorized_map() -> bool:
    """Return whether `tf.vectorized_map` is building the body of its loop."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_pfor_impl":
            return True
        frame = frame.f_back
    return False


def _get_trace(x: Any) -> Any:
    """Return the trace that a value of JAX belongs to, or None."""
    return getattr(x, "_trace", None)


def _is_in_vmap(x: Any, state: Any) -> bool:
    """Return whether `jax.vmap` maps over an array, but not over the state."""
    while x is not None:
        if type(x).__name__ == "BatchTracer" and _get_trace(x) is not _get_trace(state):
            return True
        x = getattr(x, "primal", None)  # of a gradient
    return False


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
