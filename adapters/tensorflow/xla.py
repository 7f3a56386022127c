"""Dropout of large tensors in a graph, by programs that XLA compiles for the CPU.

A graph runs one operation at a time, and each writes its result to memory. XLA compiles the
generator, the comparison and the selection into few passes. `tf.function(jit_compile=True)` asks
for a program, wherever the call is. A SavedModel contains it, and needs no unidrop.

Requirements this design meets:

* XLA fuses the generator's rounds into every consumer of a word, and recomputes them in each. A
  loop stops fusion. So an iteration leaves eight bits in a word, for the elements of one block.
* XLA compiles a program for each length of a tensor, which takes a fraction of a second. All shapes
  of one length share a program. A tensor whose length is unknown to the graph is padded, so that
  few lengths occur.

TensorFlow documentation: XLA, `tf.function`.
"""

import math
from functools import lru_cache, partial
from typing import Any, Final

import tensorflow as tf

from unidrop.dispatch import is_forced
from unidrop.output import select
from unidrop.philox import ODD_MULTIPLIER, philox
from unidrop.plan import DropoutPlan
from unidrop.protocols import ArrayLibrary
from unidrop.rate import KEEP_NOTHING
from unidrop.words import MASK32, SplitInteger

__all__ = ["LEAST", "can_compile", "dropout", "guess_size"]

#: From this number of elements on, a program is faster than the operations of a graph.
LEAST: int = 1 << 15

_UNKNOWN: Final = 64  # in place of a length that the graph does not know

_ITERATIONS: Final = 4  # blocks whose keep flags fit into 32 bits


def guess_size(shape: Any) -> int:
    """Return the number of elements of a shape that a graph does not know whole."""
    return math.prod(_UNKNOWN if n is None else n for n in shape) if shape.rank else LEAST


def can_compile(plan: DropoutPlan) -> bool:
    """Return whether the function that TensorFlow traces now may call a program of XLA."""
    return (
        tf.inside_function()
        and not (is_forced("portable") or is_forced("fused"))
        and not plan.window.broadcast_axes
        and plan.window.global_shape is None
        and (plan.rate.is_scheduled or 0 < plan.rate.threshold < KEEP_NOTHING)
        and not tf.distribute.has_strategy()
        and all(device.device_type == "CPU" for device in tf.config.list_logical_devices())
    )


def dropout(x: Any, key: Any, plan: DropoutPlan) -> Any:
    """Return dropout of a tensor of a graph by a program of XLA.

    Parameters
    ----------
    x : tensor
        A tensor of the graph.
    key : tensor of uint64
        The number of the key, of shape (1,).
    plan : DropoutPlan
        A plan that `can_compile` accepts.
    """
    rate: Any = plan.rate
    numbers = [key]
    kind = None
    if rate.is_scheduled:
        numbers, kind, rate = [key, rate.array], rate.array.dtype, rate.with_array(None)
    program = _get_program(plan.library, x.dtype, rate, kind)
    flat = tf.reshape(x, [-1])
    shape = plan.window.shape
    if all(isinstance(n, int) for n in shape):
        return tf.reshape(program(flat, *numbers), shape)
    size = tf.size(flat, out_type=tf.int64)
    padded = tf.pad(flat, [[0, _round_up(size) - size]])
    return tf.ensure_shape(tf.reshape(program(padded, *numbers)[:size], tf.shape(x)), x.shape)


def _round_up(size: Any) -> Any:
    """Return the next of the lengths that have programs: four between two powers of two."""
    size = tf.maximum(size, 32)
    exponent = tf.math.floor(tf.math.log(tf.cast(size, tf.float64)) / math.log(2))
    step = tf.cast(2.0 ** (exponent - 2), tf.int64)
    return (size + step - 1) // step * step


@lru_cache(maxsize=64)
def _get_program(library: ArrayLibrary, dtype: Any, rate: Any, kind: Any) -> Any:
    """Return a function of a flat tensor and a key, which XLA compiles for each length.

    ``kind`` is the dtype of a scheduled rate, which is the last argument of the function.
    """

    def unidrop_dropout(x: Any, key: Any, *p: Any) -> Any:
        decide = partial(_keep_flags, key, tf.size(x, out_type=tf.int64))
        if not p:
            return select(library, x, decide(_uint32(rate.threshold)), rate)
        one = rate.with_array(p[0])
        mask = one.keep(library, None, lambda threshold: decide(tf.cast(threshold, tf.uint32)))
        return select(library, x, mask, one)

    signature = [tf.TensorSpec([None], dtype), tf.TensorSpec([1], tf.uint64)]
    if kind is not None:
        signature.append(tf.TensorSpec([], kind))
    function = tf.function(unidrop_dropout, signature, autograph=False, jit_compile=True)
    with tf.init_scope():  # in no graph, because the functions of many call it
        return function.get_concrete_function()


class _Uint64Words:
    """Words in ``uint64`` tensors, whose upper halves are arbitrary: for the generator alone."""

    sums_wrap = True

    def constant(self, word: int) -> Any:
        """Return a Python word as a tensor."""
        return _uint64(word)

    def split(self, value: Any, bits: int) -> SplitInteger:
        """Return a word unchanged."""
        return None, value

    def mulhilo(self, a: Any, m: int) -> SplitInteger:
        """Return the words of a product, which has 64 bits."""
        product = (a & MASK32) * _uint64(m)
        return _right_shift(product, _uint64(32)), product


_WORDS: Any = _Uint64Words()

_left_shift, _right_shift = tf.bitwise.left_shift, tf.bitwise.right_shift


def _uint32(value: int) -> Any:
    return tf.constant(value, tf.uint32)


def _uint64(value: int) -> Any:
    return tf.constant(value, tf.uint64)


def _keep_flags(key: Any, size: Any, least: Any) -> Any:
    """Return whether each of the first elements of a mask has a u of ``least`` or more, flat."""
    flags = 8 * _ITERATIONS
    numbers = tf.cast(tf.range((size + flags - 1) // flags, dtype=tf.int64), tf.uint64)

    def iterate(i: Any, bits: Any) -> tuple[Any, Any]:
        # XLA does not know that this is 0, so it hoists nothing of the following out of the loop.
        zero_of_loop = _right_shift(i, _uint64(31))
        block = (numbers | zero_of_loop) * _uint64(_ITERATIONS) + i
        zero = tf.zeros_like(block)
        counter = block, _right_shift(block, _uint64(32)), zero, zero
        lo = key | zero_of_loop
        byte = tf.zeros_like(bits)
        for place, word in enumerate(philox(counter, (lo, _right_shift(lo, _uint64(32))), _WORDS)):
            even = tf.cast(word, tf.uint32)
            for u, bit in ((even, 2 * place), (even * ODD_MULTIPLIER, 2 * place + 1)):
                byte |= _left_shift(tf.cast(u >= least, tf.uint32), _uint32(bit))
        return i + 1, _right_shift(bits, _uint32(8)) | _left_shift(byte, _uint32(flags - 8))

    bits = tf.zeros_like(numbers, tf.uint32)
    _, bits = tf.while_loop(lambda i, _: i < _ITERATIONS, iterate, (_uint64(0), bits))
    keep = _right_shift(bits[:, None], tf.cast(tf.range(flags), tf.uint32)) & 1
    return tf.reshape(keep != 0, [-1])[:size]
