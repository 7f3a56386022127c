"""TensorFlow's part of the core: its tensors, its generator, and dropout as one operator."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf

from unidrop.adapters.numpy.arrays import allocate_aligned_like, get_address, locate_array
from unidrop.adapters.tensorflow import lite, xla
from unidrop.adapters.tensorflow.tape import run_with_gradient
from unidrop.dispatch import is_forced
from unidrop.key import Key
from unidrop.philox import ODD_MULTIPLIER, PhiloxBlock
from unidrop.plan import DropoutPlan
from unidrop.protocols import ArrayLibrary, Arrays, Buffer, Buffers, Operator, Words
from unidrop.words import MASK32, Int64Words, SplitInteger

__all__ = ["LIBRARY", "EagerTensor", "check_dense"]

_REMEDIES = {
    tf.RaggedTensor: "tf.ragged.map_flat_values(dropout, x, rate, key=key)",
    tf.SparseTensor: "x.with_values(dropout(x.values, rate, key=key))",
}


def check_dense(kind: type, name: str) -> None:
    """Raise TypeError, with a remedy, for tensors whose elements have no index in an array."""
    if kind in _REMEDIES:
        raise TypeError(
            f"{name} must be a dense tensor, got a {kind.__name__}: apply dropout to its values, "
            f"as in {_REMEDIES[kind]}"
        )


_PHILOX = 1  # the algorithm of raw_ops

#: The class of eager tensors.
EagerTensor = tf.__internal__.EagerTensor

_LARGE = 1 << 20  # bytes


def _with_device(make: Callable[..., Any]) -> Callable[..., Any]:
    """Add the standard's keyword ``device`` to a creation function."""

    def make_on(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None:
            return make(*args, **kwargs)
        with tf.device(device):
            return make(*args, **kwargs)

    return make_on


_NAMESPACE = SimpleNamespace(
    __name__="tensorflow",
    __array_namespace_info__=lambda: SimpleNamespace(dtypes=lambda **_: {"int64": tf.int64}),
    bool=tf.bool,
    int32=tf.int32,
    int64=tf.int64,
    float32=tf.float32,
    float64=tf.float64,
    arange=_with_device(lambda stop, *, dtype: tf.range(tf.cast(stop, dtype), dtype=dtype)),
    asarray=_with_device(lambda value, *, dtype: tf.constant(value, dtype)),
    full=_with_device(lambda shape, value, *, dtype: tf.fill(shape, tf.constant(value, dtype))),
    ones=_with_device(lambda shape, *, dtype=tf.float32: tf.ones(shape, dtype)),
    zeros=_with_device(lambda shape, *, dtype=tf.float32: tf.zeros(shape, dtype)),
    empty=_with_device(lambda shape, *, dtype=tf.float32: tf.zeros(shape, dtype)),
    zeros_like=tf.zeros_like,
    astype=lambda x, dtype, *, copy=True: tf.cast(x, dtype),
    reshape=tf.reshape,
    expand_dims=tf.expand_dims,
    stack=tf.stack,
    sum=tf.reduce_sum,
    concat=lambda arrays, *, axis=0: tf.concat(arrays, axis),
    take=tf.gather,
    argsort=lambda x, *, axis, stable: tf.argsort(x, axis=axis, stable=stable),
    searchsorted=tf.searchsorted,
    sort=lambda x, *, axis: tf.sort(x, axis=axis),
    where=tf.where,
    round=tf.round,  # half to even
    real=tf.math.real,
    imag=tf.math.imag,
    complex=tf.complex,
    bitwise_left_shift=tf.bitwise.left_shift,
    bitwise_right_shift=tf.bitwise.right_shift,
)


class TensorFlowArrays(Arrays):
    """TensorFlow tensors, eager or symbolic."""

    def check_type(self, kind: type, name: str) -> None:
        """Raise TypeError for ragged and sparse tensors."""
        check_dense(kind, name)

    def namespace(self, x: Any) -> Any:
        """Return the functions of the standard that the core uses."""
        return _NAMESPACE

    def device(self, x: Any) -> Any:
        """Return the device of an eager tensor; a graph or a keras.Variable places its own."""
        return getattr(x, "device", None) if tf.executing_eagerly() else None

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

    def is_on_cpu(self, x: Any) -> bool:
        """Return whether the device of an eager tensor is a CPU."""
        return bool(tf.DeviceSpec.from_string(x.device).device_type == "CPU")

    def is_mutable(self, x: Any) -> bool:
        """Return False: tensors are immutable."""
        return False

    def read_rate(self, p: Any, x: Any, name: str) -> Any:
        """Return the rate as a float if it is known; a graph reads a variable when it runs."""
        if tf.executing_eagerly() or type(p) is EagerTensor:
            return float(p.numpy())
        return tf.convert_to_tensor(p)


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
        if is_forced("portable") and _is_lite(first):
            block = lite.generate(first, count, key, tag)
            return tuple(tf.cast(words, tf.int64) for words in block)
        with tf.device(device):
            flat = _generate_words(first, count, key, tag)
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
        if is_forced("portable") and _is_lite(first):
            return lite.keep_flags(first, count, key, threshold)
        is_one_run = isinstance(first[0], int) or first[0].shape.rank == 0
        if not is_one_run or sys.byteorder == "big":
            return super().keep_flags(xp, device, first, count, key, threshold)
        with tf.device(device):
            both = tf.constant(ODD_MULTIPLIER << 32 | 1, tf.uint64)
            products = tf.cast(_generate_words(first, count, key, 0), tf.uint64) * both
            numbers = tf.reshape(tf.bitcast(products, tf.uint32), [-1])
            as_word = tf.constant if isinstance(threshold, int) else tf.cast
            return numbers >= as_word(threshold, tf.uint32)


class TensorFlowOperator(Operator):
    """Dropout with a custom gradient."""

    def fold_in(self, words: Any, data: Any, tag: int) -> Any:
        """Return the words of a key after folding in a tensor."""
        if is_forced("portable") and not tf.executing_eagerly():
            number = lite.split(data, LIBRARY.words.width(data, "data"))
            lo, hi, _, _ = lite.generate(number, 1, words, tag)
            return tf.reshape(lo, []), tf.reshape(hi, [])
        bits = LIBRARY.words.width(data, "data")
        if tf.executing_eagerly():
            flat = tf.cast(_generate_words(_WORDS.split(data, bits), 1, words, tag), tf.int64)
            return flat[0], flat[1]
        unsigned = data if data.dtype.is_unsigned else tf.bitcast(data, f"uint{bits}")
        number = _generate(tf.cast(unsigned, tf.uint64), 1, _join_key(*words), tag, tf.uint64)
        lo = tf.cast(number[0] & MASK32, tf.int64)
        hi = tf.cast(tf.bitwise.right_shift(number[0], 32), tf.int64)
        # TensorFlow removes both words from a graph that reads the number alone.
        lo._unidrop_key = hi, number
        return lo, hi

    def dropout(self, x: Any, key: Key, plan: DropoutPlan, mask: Any = None) -> Any:
        """Apply dropout as one operator, whose gradient recomputes the mask."""
        x = x if type(x) is EagerTensor else tf.convert_to_tensor(x)
        size = x.shape.num_elements()
        if size is None:
            size = xla.guess_size(x.shape)
        is_large = size >= xla.LEAST

        def backward(upstream: Any) -> Any:
            # A gather passes a sparse upstream gradient, and a variable's reader an unread one.
            upstream = tf.convert_to_tensor(upstream)
            # Without this dependency, Grappler merges the masks of both passes, or computes the
            # second one early. Both keep every mask from the forward pass to the backward pass.
            with tf.control_dependencies([upstream]):
                return plan.apply(upstream, key)

        def with_gradient(v: Any) -> tuple[Any, Any]:
            if is_large and mask is None and plan.has_kernels and xla.can_compile(plan):
                return xla.dropout(v, _join_key(*key._words), plan), backward
            return plan.run(v, key, mask), backward

        return run_with_gradient(with_gradient, x)


class TensorFlowBuffers(Buffers):
    """Eager tensors of the first CPU."""

    def locate(self, x: Any) -> Buffer | str:
        """Return the buffer of an eager tensor of the CPU."""
        if isinstance(x, tf.Variable):
            x = tf.convert_to_tensor(x)
        if not isinstance(x, EagerTensor):
            return f"a {type(x).__name__} is not an eager tf.Tensor"
        if not x.device.endswith("CPU:0"):
            return f"it is on {x.device}, and kernels are for the first CPU"
        if x.shape.rank == 0:
            return "it is a scalar, and TensorFlow has no view of scalars"
        return locate_array(np.asarray(x))

    def allocate_like(self, x: Any) -> tuple[Any, Buffer]:
        """Return a tensor, or a NumPy array whose memory a tensor can share.

        NumPy allocates a small array in less time than TensorFlow runs an operation. TensorFlow
        keeps the memory of large tensors for later ones, and NumPy returns it to the system.
        """
        like = np.asarray(x)
        if like.nbytes < _LARGE and x.dtype != tf.bfloat16:  # which DLPack of NumPy lacks
            y = allocate_aligned_like(like)
            return y, Buffer(get_address(y), None)
        with tf.device(x.device):
            y = tf.raw_ops.Empty(shape=x.shape, dtype=x.dtype)
        return y, Buffer(get_address(np.asarray(y)), None)

    def wrap(self, handle: Any, x: Any) -> Any:
        """Return the tensor of a handle."""
        if isinstance(handle, np.ndarray):
            return tf.experimental.dlpack.from_dlpack(handle.__dlpack__())
        return handle

    def from_numpy(self, mask: np.ndarray[Any, Any], device: Any) -> Any:
        """Return a copy as a tensor."""
        with tf.device(device):
            return tf.constant(mask)


def _is_lite(first: SplitInteger) -> bool:
    """Return whether TensorFlow Lite has operators for a trace: they count from a Python integer.

    Users of TensorFlow Lite trace under ``force_path("portable")``.
    """
    return isinstance(first[0], int) and not tf.executing_eagerly()


LIBRARY = ArrayLibrary(
    TensorFlowArrays(), TensorFlowWords(), TensorFlowOperator(), TensorFlowBuffers()
)


def _generate_words(first: SplitInteger, count: Any, key: tuple[Any, Any], tag: int) -> Any:
    """Return the words of consecutive blocks in order, four words for each block."""
    return _generate(_join_uint64(*reversed(first)), 4 * count, _join_key(*key), tag, tf.uint32)


def _generate(first: Any, count: Any, key: Any, tag: int, dtype: Any) -> Any:
    """Return the first numbers of consecutive blocks; a number of 64 bits is of two words."""
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[count],
        key=key,
        counter=tf.stack([first, tf.constant(tag << 32, tf.uint64)]),
        alg=_PHILOX,
        dtype=dtype,
    )


def _join_key(lo: Any, hi: Any) -> Any:
    """Return the words of a key as one 64-bit integer, of shape (1,)."""
    former_hi, number = getattr(lo, "_unidrop_key", (None, None))
    return number if former_hi is hi else tf.reshape(_join_uint64(lo, hi), [1])


def _join_uint64(lo: Any, hi: Any) -> Any:
    """Return two words as one 64-bit integer."""
    if isinstance(lo, int):
        return tf.constant((hi << 32) | lo, tf.uint64)
    return tf.bitwise.left_shift(tf.cast(hi, tf.uint64), 32) | tf.cast(lo, tf.uint64)
