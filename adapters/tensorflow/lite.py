"""Random words by the few integer operators that TensorFlow Lite has.

TensorFlow Lite multiplies and adds ``int64``, and combines the bits of ``uint32``. It has neither
TensorFlow's generator nor shifts of 64 bits, so a `tf.bitcast` cuts a product into its words.

TensorFlow documentation: TensorFlow Lite and TensorFlow operator compatibility.
"""

from typing import Any

import tensorflow as tf

from unidrop.philox import ODD_MULTIPLIER, PhiloxBlock, philox
from unidrop.words import SplitInteger

__all__ = ["generate", "keep_flags", "split"]


class _LiteWords:
    """Words in ``uint32`` tensors."""

    sums_wrap = False

    def constant(self, word: int) -> Any:
        """Return a Python word as a tensor."""
        return tf.constant(word, tf.uint32)

    def add(self, a: Any, b: Any) -> SplitInteger:
        """Return ``(carry, sum)`` of two words."""
        return _cut(tf.cast(a, tf.int64) + tf.cast(b, tf.int64))

    def mulhilo(self, a: Any, m: int) -> SplitInteger:
        """Return the ``(hi, lo)`` words of the product of words ``a`` and a Python word ``m``."""
        wide = tf.cast(a, tf.int64)
        if m < 1 << 31:
            return _cut(wide * m)
        # A product by m itself may overflow; this one lacks 2^32 times a.
        lo, hi = tf.unstack(tf.bitcast(wide * (m - (1 << 32)), tf.int32), axis=-1)
        return tf.cast(tf.cast(hi, tf.int64) + wide, tf.uint32), tf.bitcast(lo, tf.uint32)

    def mullo(self, a: Any, m: int) -> Any:
        """Return the low word of the product of words ``a`` and a Python word ``m``."""
        return self.mulhilo(a, m)[1]

    def split(self, value: Any, bits: int) -> SplitInteger:
        """Return the ``(hi, lo)`` words of an integer tensor, zero-extended from its bits."""
        return split(value, bits)


_WORDS: Any = _LiteWords()


def _cut(value: Any) -> SplitInteger:
    """Return the ``(hi, lo)`` words of ``int64`` numbers."""
    lo, hi = tf.unstack(tf.bitcast(value, tf.int32), axis=-1)
    return tf.bitcast(hi, tf.uint32), tf.bitcast(lo, tf.uint32)


def split(value: Any, bits: int) -> SplitInteger:
    """Return the ``(hi, lo)`` words of an integer tensor, zero-extended from its bits."""
    if bits == 64:
        return _cut(tf.cast(value, tf.int64))
    numbers = tf.cast(value, tf.int64)
    return _cut(numbers if value.dtype.is_unsigned else tf.math.floormod(numbers, 1 << bits))


def generate(first: SplitInteger, count: Any, key: tuple[Any, Any], tag: int) -> PhiloxBlock:
    """Return the words of consecutive blocks, four tensors of ``uint32``."""
    if isinstance(first[0], int):
        numbers = _cut(tf.range(tf.cast(count, tf.int64)) + (first[0] << 32 | first[1]))
    else:
        numbers = tuple(tf.reshape(word, [1]) for word in first)
    hi, lo = numbers
    zero, last = tf.zeros_like(lo), tf.fill(tf.shape(lo), _WORDS.constant(tag))
    return philox((lo, hi, zero, last), key, _WORDS)


def keep_flags(first: SplitInteger, count: Any, key: tuple[Any, Any], threshold: int) -> Any:
    """Return whether each element of consecutive blocks is kept, flat: eight flags a block."""
    even = tf.stack(generate(first, count, key, 0), axis=-1)
    both = tf.stack([even, _WORDS.mullo(even, ODD_MULTIPLIER)], axis=-1)
    # TensorFlow Lite compares no unsigned numbers.
    return tf.reshape(tf.cast(both, tf.int64) >= threshold, [-1])
