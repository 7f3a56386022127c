"""Dropout for TensorFlow: what `tf.nn.dropout` is, under a key.

TensorFlow documentation: tf.nn.dropout, tf.nn.experimental.stateless_dropout.
"""

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf

from unidrop.adapters.noise_shape import noise_shape_axes
from unidrop.adapters.numpy import get_address, locate_array
from unidrop.key import Key, check_key
from unidrop.philox import ODD_MULTIPLIER, PhiloxBlock
from unidrop.plan import DropoutPlan
from unidrop.protocols import ArrayLibrary, Arrays, Buffer, Buffers, Operator, Words
from unidrop.rate import Rate
from unidrop.words import Int64Words, SplitInteger

__all__ = ["LIBRARY", "dropout"]


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
    axes = noise_shape_axes(noise_shape, LIBRARY.arrays.shape(x))
    plan = DropoutPlan.from_args(x, Rate.from_p(rate, "rate"), broadcast_axes=axes)
    return plan.apply(x, key) if plan.drops else x


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


class TensorFlowArrays(Arrays):
    """TensorFlow tensors, eager or symbolic."""

    def namespace(self, x: Any) -> Any:
        """Return the functions of the standard that the core uses."""
        return _NAMESPACE

    def device(self, x: Any) -> Any:
        """Return the device of an eager tensor; a graph places its own."""
        return x.device if tf.executing_eagerly() else None

    def shape(self, x: Any) -> tuple[Any, ...]:
        """Return the shape, with a scalar tensor for each length that is not known yet."""
        if x.shape.rank is None:
            raise ValueError("x must have a known rank, got a tensor of unknown rank")
        if x.shape.is_fully_defined():
            return tuple(x.shape)
        lengths = tf.shape(x, out_type=tf.int64)
        return tuple(lengths[i] if n is None else n for i, n in enumerate(x.shape))

    def is_traced(self, x: Any) -> bool:
        """Return whether TensorFlow is building a graph."""
        return not tf.executing_eagerly()

    def is_mutable(self, x: Any) -> bool:
        """Return False: tensors are immutable."""
        return False


_WORDS = Int64Words(_NAMESPACE)


class TensorFlowWords(Words):
    """Words from TensorFlow's own Philox, in ``int64``."""

    def arithmetic(self, xp: Any, device: Any) -> Int64Words:
        """Return arithmetic on ``int64``."""
        return _WORDS

    def generate(
        self, xp: Any, device: Any, first: SplitInteger, count: Any, key: tuple[Any, Any], tag: int
    ) -> PhiloxBlock:
        """Return the words of consecutive blocks."""
        with tf.device(device):
            flat = _flat_words(first, count, key, tag)
            return tuple(tf.unstack(tf.reshape(tf.cast(flat, tf.int64), [-1, 4]), axis=1))

    def keep_flags(
        self,
        xp: Any,
        device: Any,
        first: SplitInteger,
        count: Any,
        key: tuple[Any, Any],
        threshold: int,
    ) -> Any:
        """Return whether each element is kept, with as few passes over memory as possible.

        The generator returns the words of a single run of blocks in order. One 64-bit product turns
        each word into both of its numbers u: the word itself in the low half, the odd element's in
        the high half, modulo 2^32.
        """
        is_one_run = isinstance(first[0], int) or first[0].shape.rank == 0
        if not is_one_run or sys.byteorder == "big":
            return super().keep_flags(xp, device, first, count, key, threshold)
        with tf.device(device):
            both = tf.constant(ODD_MULTIPLIER << 32 | 1, tf.uint64)
            products = tf.cast(_flat_words(first, count, key, 0), tf.uint64) * both
            numbers = tf.reshape(tf.bitcast(products, tf.uint32), [-1])
            return numbers >= tf.constant(threshold, tf.uint32)


class TensorFlowOperator(Operator):
    """Dropout with a custom gradient."""

    def fold_in(self, words: Any, data: Any, tag: int) -> Any:
        """Return the words of a key after folding in a tensor."""
        split = _WORDS.split(data, LIBRARY.words.width(data, "data"))
        flat = tf.cast(_flat_words(split, 1, words, tag), tf.int64)
        return flat[0], flat[1]

    def dropout(self, x: Any, key: Key, plan: DropoutPlan, mask: Any = None) -> Any:
        """Apply dropout as one operator, whose gradient recomputes the mask."""

        def backward(upstream: Any) -> Any:
            # The upstream gradient of a gather is sparse; of a variable's reader, it is unread.
            upstream = tf.convert_to_tensor(upstream)
            # Without this dependency Grappler merges the masks of both passes, or runs the second
            # one early: either way every mask would be kept from the forward pass on.
            with tf.control_dependencies([upstream]):
                return plan.apply(upstream, key)

        def with_gradient(v: Any) -> Any:
            return plan.run(v, key, mask), backward

        # AutoGraph, which tf.map_fn applies eagerly too, would turn the core's integers to tensors.
        run = tf.autograph.experimental.do_not_convert(tf.custom_gradient(with_gradient))
        return run(tf.convert_to_tensor(x))


class TensorFlowBuffers(Buffers):
    """Eager tensors of the first CPU."""

    def locate(self, x: Any) -> Buffer | str:
        """Return the buffer of an eager tensor of the CPU."""
        if isinstance(x, tf.Variable):
            x = tf.convert_to_tensor(x)
        if not isinstance(x, _EagerTensor):
            return f"a {type(x).__name__} is not an eager tf.Tensor"
        if not x.device.endswith("CPU:0"):
            return f"it is on {x.device}, and kernels are for the first CPU"
        if x.shape.rank == 0:
            return "it is a scalar, which TensorFlow gives no view of"
        return locate_array(np.asarray(x))

    def allocate_like(self, x: Any) -> tuple[Any, Buffer]:
        """Return a tensor from TensorFlow's own allocator that nobody else references yet."""
        with tf.device(x.device):
            y = tf.raw_ops.Empty(shape=x.shape, dtype=x.dtype)
        return y, Buffer(get_address(np.asarray(y)), None)

    def from_numpy(self, mask: np.ndarray[Any, Any], device: Any) -> Any:
        """Return a tensor that is a copy."""
        with tf.device(device):
            return tf.constant(mask)


LIBRARY = ArrayLibrary(
    TensorFlowArrays(), TensorFlowWords(), TensorFlowOperator(), TensorFlowBuffers()
)


def _flat_words(first: SplitInteger, count: Any, key: tuple[Any, Any], tag: int) -> Any:
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
