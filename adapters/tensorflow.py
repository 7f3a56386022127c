"""Dropout for TensorFlow: what `tf.nn.dropout` is, under a key.

TensorFlow documentation: tf.nn.dropout, tf.nn.experimental.stateless_dropout.
"""

import math
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf

from unidrop.adapters.numpy import get_address, locate_array
from unidrop.dropout import DropoutPlan
from unidrop.key import Key, check_key
from unidrop.library import Library, Memory, Replica, get_library
from unidrop.philox import ODD_MULTIPLIER, PhiloxBlock
from unidrop.rate import Rate
from unidrop.window import noise_shape_axes
from unidrop.words import Pair

__all__ = ["TensorFlow", "dropout"]


def dropout(
    x: tf.Tensor,
    rate: float,
    noise_shape: Sequence[int | None] | None = None,
    *,
    key: Key,
) -> tf.Tensor:
    """Drop elements with probability rate and scale the rest by 1 / (1 - rate).

    Parameters
    ----------
    x : tf.Tensor
        Of any shape of known rank (lengths may be unknown), of a floating-point or complex dtype;
        or what `tf.convert_to_tensor` takes.
    rate : int or float
        The probability of dropping an element, in [0, 1].
    noise_shape : sequence of int or None, optional
        For each axis 1, where one decision is shared, or None or x's own length; the latter is
        not compared with a length that is unknown while a function is traced.
    key : unidrop.Key
        The name of the mask. Inside a `tf.function` fold the step in as a tensor:
        ``Key(42).fold_in(step)``.

    Returns
    -------
    tf.Tensor
        Of x's shape and dtype; x itself if rate is 0. The gradient makes the mask again from the
        key, and keeps nothing for it.

    Raises
    ------
    TypeError
        If x has an integer or bool dtype, rate is no Python number, or key no Key.
    ValueError
        If rate is outside [0, 1], or noise_shape does not fit x.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import dropout
    >>> dropout(tf.ones(6), 0.5, key=Key(42)).numpy()
    array([2., 0., 0., 0., 0., 2.], dtype=float32)
    """
    x = tf.convert_to_tensor(x)
    check_key(key)
    axes = noise_shape_axes(noise_shape, get_library(x).shape(x))
    call = DropoutPlan.from_args(x, Rate.from_p(rate, "rate"), broadcast_axes=axes)
    return call.drop(x, key) if call.drops else x


_PHILOX = 1

_EagerTensor = tf.__internal__.EagerTensor


def _placed(make: Callable[..., Any]) -> Callable[..., Any]:
    """Give a creation function the standard's ``device=`` keyword."""

    def placed(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None:
            return make(*args, **kwargs)
        with tf.device(device):
            return make(*args, **kwargs)

    return placed


_NAMESPACE = SimpleNamespace(
    __name__="tensorflow",
    __array_namespace_info__=lambda: SimpleNamespace(dtypes=lambda **_: {"int64": tf.int64}),
    bool=tf.bool,
    int64=tf.int64,
    float32=tf.float32,
    float64=tf.float64,
    arange=_placed(lambda stop, *, dtype: tf.range(tf.cast(stop, dtype), dtype=dtype)),
    asarray=_placed(lambda value, *, dtype: tf.constant(value, dtype)),
    ones=_placed(lambda shape, *, dtype=tf.float32: tf.ones(shape, dtype)),
    zeros=_placed(lambda shape, *, dtype=tf.float32: tf.zeros(shape, dtype)),
    empty=_placed(lambda shape, *, dtype=tf.float32: tf.zeros(shape, dtype)),
    zeros_like=tf.zeros_like,
    astype=lambda x, dtype, *, copy=True: tf.cast(x, dtype),
    reshape=tf.reshape,
    expand_dims=tf.expand_dims,
    stack=tf.stack,
    concat=lambda arrays, *, axis=0: tf.concat(arrays, axis),
    take=tf.gather,
    where=tf.where,
    real=tf.math.real,
    imag=tf.math.imag,
    complex=tf.complex,
    bitwise_left_shift=tf.bitwise.left_shift,
    bitwise_right_shift=tf.bitwise.right_shift,
)


class TensorFlow(Library):
    """TensorFlow tensors, eager or symbolic."""

    def namespace(self, x: Any) -> Any:
        """Return the functions of the standard that the core uses."""
        return _NAMESPACE

    def device(self, x: Any) -> Any:
        """Return the device of an eager tensor; a graph places its own."""
        return None if self.is_traced(x) else x.device

    def shape(self, x: Any) -> tuple[Any, ...]:
        """Return the shape, with a scalar tensor for each length that is not known yet."""
        if x.shape.rank is None:
            raise ValueError("x has to have a known rank, but got a tensor of unknown rank")
        if x.shape.is_fully_defined():
            return tuple(x.shape)
        lengths = tf.shape(x, out_type=tf.int64)
        return tuple(lengths[i] if n is None else n for i, n in enumerate(x.shape))

    def is_traced(self, x: Any) -> bool:
        """Tell whether a graph is being built."""
        return not tf.executing_eagerly()

    def is_mutable(self, x: Any) -> bool:
        """Return False: tensors can't be assigned to."""
        return False

    def words(
        self, xp: Any, first: Pair, count: Any, key: tuple[Any, Any], tag: int, device: Any
    ) -> PhiloxBlock:
        """Return the words of consecutive blocks, from TensorFlow's own Philox."""
        with tf.device(device):
            flat = _flat_words(first, count, key, tag)
            return tuple(tf.unstack(tf.reshape(tf.cast(flat, tf.int64), [-1, 4]), axis=1))

    def keep_flags(
        self, xp: Any, first: Pair, count: Any, key: tuple[Any, Any], threshold: int, device: Any
    ) -> Any:
        """Return the decisions of consecutive blocks, in as few passes over memory as there can be.

        The words of one run of blocks come in order. One product of 64 bits makes of each both
        numbers that it decides by: below, the word itself; above, the odd element's, mod 2^32.
        """
        is_one_run = isinstance(first[0], int) or first[0].shape.rank == 0
        if not is_one_run or sys.byteorder == "big":
            return super().keep_flags(xp, first, count, key, threshold, device)
        with tf.device(device):
            both = tf.constant(ODD_MULTIPLIER << 32 | 1, tf.uint64)
            wide = tf.cast(_flat_words(first, count, key, 0), tf.uint64) * both
            numbers = tf.reshape(tf.bitcast(wide, tf.uint32), [-1])
            return numbers >= tf.constant(threshold, tf.uint32)

    def linear(self, x: Any, forward: Callable[[Any], Any], transpose: Callable[[Any], Any]) -> Any:
        """Return ``forward(x)``, whose gradient is ``transpose`` and keeps nothing of it."""

        def backward(upstream: Any) -> Any:
            # The upstream gradient of a gather is sparse, and of a variable's reader not yet read.
            upstream = tf.convert_to_tensor(upstream)
            # Grappler would merge both passes' masks, and a graph may run what waits for nothing
            # at any time: either way every mask would be kept from the forward pass on.
            with tf.control_dependencies([upstream]):
                return transpose(upstream)

        def with_gradient(v: Any) -> Any:
            return forward(v), backward

        # AutoGraph, which tf.map_fn runs eagerly too, would make tensors of the integers below.
        run = tf.autograph.experimental.do_not_convert(tf.custom_gradient(with_gradient))
        return run(tf.convert_to_tensor(x))

    def replica(self, x: Any) -> Replica | None:
        """Return which replica of a `tf.distribute.Strategy` x belongs to.

        Replicas gather the lengths of their parts, an integer each, so that a batch which does
        not divide evenly gets the masks that one device would have given it, too.
        """
        if not tf.distribute.has_strategy():
            return None
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return None
        rank = context.replica_id_in_sync_group
        length, *inner = self.shape(x) or (None,)
        if length is None or not all(isinstance(n, int) for n in inner):
            return Replica(rank, None)
        mine = tf.one_hot(rank, context.num_replicas_in_sync, dtype=tf.int64)
        lengths = context.all_reduce(tf.distribute.ReduceOp.SUM, mine * tf.cast(length, tf.int64))
        start = tf.cumsum(lengths, exclusive=True)[rank]
        if not self.is_traced(x):  # a number that is known takes fewer operations
            start = int(start)
        longest = (1 << 64) // math.prod(max(1, n) for n in inner)
        return Replica(rank, ((longest, *inner), (start, *(0 for _ in inner))))

    def memory(self, x: Any) -> Memory | str:
        """Return where an eager tensor of the CPU lies."""
        if isinstance(x, tf.Variable):
            x = tf.convert_to_tensor(x)
        if not isinstance(x, _EagerTensor):
            return f"a {type(x).__name__} is no eager tf.Tensor"
        if not x.device.endswith("CPU:0"):
            return f"it is on {x.device}, and kernels are for the first CPU"
        if x.shape.rank == 0:
            return "it is a scalar, which TensorFlow gives no view of"
        return locate_array(np.asarray(x))

    def allocate_like(self, x: Any) -> tuple[Any, Memory]:
        """Return a tensor that nobody else has yet, from TensorFlow's own allocator."""
        with tf.device(x.device):
            y = tf.raw_ops.Empty(shape=x.shape, dtype=x.dtype)
        return y, Memory(get_address(np.asarray(y)), None)

    def from_numpy(self, mask: np.ndarray[Any, Any], device: Any) -> Any:
        """Return a tensor that is a copy."""
        with tf.device(device):
            return tf.constant(mask)


def _flat_words(first: Pair, count: Any, key: tuple[Any, Any], tag: int) -> Any:
    """Return the words of consecutive blocks, four a block, in order."""
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[4 * count],
        key=tf.reshape(_uint64(*key), [1]),
        counter=tf.stack([_uint64(*reversed(first)), tf.constant(tag << 32, tf.uint64)]),
        alg=_PHILOX,
        dtype=tf.uint32,
    )


def _uint64(lo: Any, hi: Any) -> Any:
    """Join two words."""
    if isinstance(lo, int):
        return tf.constant((hi << 32) | lo, tf.uint64)
    return tf.bitwise.left_shift(tf.cast(hi, tf.uint64), 32) | tf.cast(lo, tf.uint64)
