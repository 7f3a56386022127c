"""The generator in programs of XLA: a loop on the CPU, pointwise operations everywhere else.

Requirements this design meets:

* XLA on the CPU fuses the generator's rounds into every consumer of a word, and recomputes them in
  each. A loop stops fusion. So four iterations of a loop compute the keep flags, and leave one bit
  for each element: an array of 32-bit integers, each for 32 elements. XLA fuses the ten rounds into
  an iteration, and writes nothing else to memory.
* XLA hoists loop invariants out of a loop, each with its whole computation. So the numbers of an
  iteration are made to look variant, and a separate loop folds a step into a key. Otherwise a
  program folds some twenty times, and compiles four times as long.
* On a GPU, each iteration of a loop launches kernels, which write their results to memory. There,
  each element computes its own block from its index, by pointwise operations. XLA fuses them with
  their neighbors into one kernel, without a mask in memory. A thread computes several elements, and
  LLVM merges the equal blocks of those whose alignment it can prove.
* No operation depends on an element's position, so a partitioner can give each device its own part
  without communication.
* A traced step has 32 bits unless the user has enabled 64, so words are always ``uint32``.
"""

import operator
from functools import partial, reduce
from typing import Any, cast

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from unidrop.philox import ODD_MULTIPLIER, ROUNDS, PhiloxBlock, next_round_key, philox
from unidrop.window import Window
from unidrop.words import MASK32, SplitInteger, Uint32Words, add_split

__all__ = [
    "WORDS",
    "generate",
    "generate_block",
    "keep_flags",
    "keep_flags_by_loop",
    "pointwise_mask",
]

_MASK64 = (1 << 64) - 1

_ITERATIONS = 4  # blocks whose keep flags fit into 32 bits
_MASK16 = 0xFFFF


class _WrappingUint32Words(Uint32Words):
    """Words in ``uint32`` arrays, whose sums and products XLA defines modulo 2^32."""

    sums_wrap = True

    def constant(self, word: int) -> Any:
        """Return a word that combines with arrays of words."""
        return np.uint32(word)

    def add(self, a: Any, b: Any) -> SplitInteger:
        """Return ``(carry, sum)`` of two words."""
        total = a + b
        return (total < b).astype(np.uint32), total

    def mulhilo(self, a: Any, m: int) -> SplitInteger:
        """Return the ``(hi, lo)`` words of the product of words ``a`` and a Python word ``m``."""
        hi_a, lo_a = a >> np.uint32(16), a & np.uint32(_MASK16)
        hi_m, lo_m = np.uint32(m >> 16), np.uint32(m & _MASK16)
        cross = lo_a * hi_m + (lo_a * lo_m >> np.uint32(16))
        cross2 = hi_a * lo_m + (cross & np.uint32(_MASK16))
        hi = hi_a * hi_m + (cross >> np.uint32(16)) + (cross2 >> np.uint32(16))
        return hi, self.mullo(a, m)

    def mullo(self, a: Any, m: int) -> Any:
        """Return the low word of the product of words ``a`` and a Python word ``m``."""
        return a * np.uint32(m)

    def split(self, value: Any, bits: int) -> SplitInteger:
        """Return the ``(hi, lo)`` words of an integer array of ``bits`` bits, zero-extended."""
        lo = lax.convert_element_type(value, np.uint32)
        if bits == 64:
            return lax.convert_element_type(value >> 32, np.uint32), lo
        return lo & np.uint32(0), lo & np.uint32((1 << min(bits, 32)) - 1)


class _Uint64Words:
    """Words in ``uint64`` arrays, whose upper halves are arbitrary: for the generator alone.

    One multiplication computes both words of a product, while `_WrappingUint32Words` needs five. So
    a program runs faster, and compiles in half the time.
    """

    sums_wrap = True

    def constant(self, word: int) -> Any:
        """Return a word that combines with arrays of words."""
        return np.uint64(word)

    def split(self, value: Any, bits: int) -> SplitInteger:
        """Return a word unchanged."""
        return None, value

    def mulhilo(self, a: Any, m: int) -> SplitInteger:
        """Return the words of a product."""
        product = (a & np.uint64(MASK32)) * np.uint64(m)
        return product >> np.uint64(32), product


class _WideningWords:
    """Words in ``uint32`` arrays, multiplied in ``uint64``: for the generator alone.

    A GPU has one instruction for both words of such a product.
    """

    sums_wrap = True

    def constant(self, word: int) -> Any:
        """Return a word that combines with arrays of words."""
        return np.uint32(word)

    def split(self, value: Any, bits: int) -> SplitInteger:
        """Return a word unchanged."""
        return None, value

    def mulhilo(self, a: Any, m: int) -> SplitInteger:
        """Return the words of a product."""
        return _split(lax.convert_element_type(a, np.uint64) * np.uint64(m))


WORDS = _WrappingUint32Words(jnp)

# Below this, indices have 32 bits, and the highest one is 0.
_NARROW = 1 << 31

# Up to this many blocks in a row, launching and compiling operations take most of the time.
_FEW = 1 << 11


@partial(jax.jit, static_argnames="count")
def generate(hi: Any, lo: Any, key_lo: Any, key_hi: Any, tag: Any, *, count: Any) -> PhiloxBlock:
    """Return the words of consecutive blocks, in ``uint32``, by one compiled program."""
    steps = lax.iota(np.uint32, count)
    zero = lax.full_like(steps, 0)
    hi, lo = add_split(WORDS, (hi, lo), (zero, steps))
    return generate_block(lo, hi, zero, tag, key_lo, key_hi)


def generate_block(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> PhiloxBlock:
    """Return the generator's words of a few counters, in ``uint32``, under keys."""
    numbers = (c0, c1, c2, c3, k0, k1)
    # A zero that depends on all operands varies as they do: between devices, or over a batch.
    zero = reduce(operator.or_, numbers) & np.uint32(0)
    alike = (zero | number for number in numbers)
    block: PhiloxBlock = lax.platform_dependent(
        *alike, cpu=_generate_by_loop, default=_generate_unrolled
    )
    return block


def _generate_unrolled(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> PhiloxBlock:
    with jax.enable_x64(True):
        return philox((c0, c1, c2, c3), (k0, k1), cast(Any, _WideningWords()))


def _generate_by_loop(*numbers: Any) -> PhiloxBlock:
    """Return the words by a loop, whose iterations would be kernel launches on a GPU."""
    c0, c1, c2, c3, _, _ = lax.fori_loop(0, ROUNDS, lambda _, state: _one_round(*state), numbers)
    return c0, c1, c2, c3


def _one_round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, ...]:
    block = philox((c0, c1, c2, c3), (k0, k1), WORDS, rounds=1)
    return (*block, *next_round_key((k0, k1), WORDS))


@partial(jax.jit, static_argnames="count")
def keep_flags(hi: Any, lo: Any, key_lo: Any, key_hi: Any, threshold: Any, *, count: Any) -> Any:
    """Return the keep flags of blocks, flat, by one compiled program for the platform.

    hi and lo, the number of the first block, are of shape () or (rows, 1).
    """
    by_loop = partial(keep_flags_by_loop, count=count)
    by_elements = partial(_keep_flags_by_elements, count=count)
    return lax.platform_dependent(
        hi, lo, key_lo, key_hi, threshold, cpu=by_loop, default=by_elements
    )


def keep_flags_by_loop(
    hi: Any, lo: Any, key_lo: Any, key_hi: Any, threshold: Any, *, count: Any
) -> Any:
    """Return the keep flags of blocks, flat; hi and lo are of shape () or (rows, 1)."""
    few = isinstance(count, int) and count <= _FEW
    iterations = 1 if few else _ITERATIONS
    numbers = lax.iota(np.uint32, -(-count // iterations))

    def iterate(i: Any, bits: Any) -> Any:
        index = lax.convert_element_type(i, np.uint32)
        # XLA does not know that this is 0, so it hoists nothing of the following out of the loop.
        zero_of_loop = index >> np.uint32(31)
        own = numbers | zero_of_loop
        # An array that is cut for many devices may have more than 2^32 blocks.
        high = own >> np.uint32(30) if iterations > 1 else lax.full_like(own, 0)
        low = own * np.uint32(iterations) + index
        block_hi, block_lo = add_split(WORDS, (hi, lo), (high, low))
        zero = lax.full_like(block_lo, 0)
        key = key_lo | zero_of_loop, key_hi | zero_of_loop
        byte = zero
        for place, word in enumerate(_generate_fast((block_lo, block_hi, zero, zero), key)):
            for u, bit in ((word, 2 * place), (word * np.uint32(ODD_MULTIPLIER), 2 * place + 1)):
                byte |= lax.convert_element_type(u >= threshold, np.uint32) << np.uint32(bit)
        return bits >> np.uint32(8) | byte << np.uint32(8 * (iterations - 1))

    # A zero that depends on all operands varies as they do: between devices, or over a batch.
    bits = (hi | lo | numbers | key_lo | key_hi) & np.uint32(0)
    bits = iterate(0, bits) if few else lax.fori_loop(0, iterations, iterate, bits)
    shifts = lax.broadcasted_iota(np.uint32, (1,) * bits.ndim + (8 * iterations,), bits.ndim)
    keep = (bits[..., None] >> shifts & np.uint32(1)) != 0
    *rows, words, _ = keep.shape
    return keep.reshape(*rows, words * 8 * iterations)[..., : count * 8].reshape(-1)


def _generate_fast(counter: PhiloxBlock, key: SplitInteger) -> PhiloxBlock:
    """Return the words of blocks, by 64-bit integers if JAX has them."""
    if not jax.config.jax_enable_x64:
        return philox(counter, key, WORDS)
    widen = partial(lax.convert_element_type, new_dtype=np.uint64)
    k0, k1 = map(widen, key)
    c0, c1, c2, c3 = map(widen, counter)
    block = philox((c0, c1, c2, c3), (k0, k1), cast(Any, _Uint64Words()))
    a, b, c, d = (lax.convert_element_type(word, np.uint32) for word in block)
    return a, b, c, d


def pointwise_mask(
    window: Window, key: SplitInteger, threshold: Any, batch: tuple[int, ...]
) -> Any:
    """Return the masks of a batch of windows that are not empty; each element computes its block.

    The words of the key, and of the starts of the window that are arrays, broadcast with the shape
    of the batch and the window. 64-bit integers must be enabled.
    """
    base, axes = window.whole
    skip = base % 8
    last = skip + sum((length - 1) * stride for length, stride in axes)
    is_aligned = all(stride % 8 == 0 for _, stride in window.offsets)
    is_narrow = is_aligned and max(last, *batch, 0) < _NARROW
    dtype = np.dtype(np.uint32 if is_narrow else np.uint64)
    lengths = (*batch, *(axis.length for axis in axes))
    shape = (*batch, *window.shape)
    # An index is eight times a number of blocks plus a number of elements. So LLVM can prove which
    # elements share a block, although it does not know the strides of rows.
    blocks, elements = lax.full(shape, 0, dtype), lax.full(shape, skip, dtype)
    for axis, (_, stride) in enumerate(axes, len(batch)):
        if lengths[axis] == 1:
            continue
        steps = lax.broadcasted_iota(dtype, lengths, axis).reshape(shape)
        if stride % 8 == 0:
            blocks = blocks + steps * dtype.type(stride // 8)
        else:
            elements = elements + steps * dtype.type(stride)
    for axis in range(len(batch)):
        # Otherwise XLA computes the first round once for all examples, in memory, and LLVM cannot
        # see which elements share a block.
        elements = elements | _unknown_zero(lax.broadcasted_iota(dtype, shape, axis))
    before = np.uint64(base - skip)
    for words, stride in window.offsets:
        before = before + _join(words) * np.uint64(stride & _MASK64)
    if is_narrow:
        low = blocks + (elements >> np.uint32(3))
        zero = _unknown_zero(low)
        block = add_split(WORDS, _split(before >> np.uint64(3)), (zero, low))
        return _decide(block, elements, key, threshold, zero)
    elements = elements + (blocks << np.uint64(3)) + before
    block = _split(elements >> np.uint64(3))
    lane = lax.convert_element_type(elements, np.uint32)
    return _decide(block, lane, key, threshold, _unknown_zero(block[0]))


def _keep_flags_by_elements(
    hi: Any, lo: Any, key_lo: Any, key_hi: Any, threshold: Any, *, count: int
) -> Any:
    elements = lax.iota(np.uint32, count * 8)
    low = elements >> np.uint32(3)
    zero = _unknown_zero(low)
    block = add_split(WORDS, (hi, lo), (zero, low))
    with jax.enable_x64(True):
        return _decide(block, elements, (key_lo, key_hi), threshold, zero).reshape(-1)


def _unknown_zero(number: Any) -> Any:
    """Return 0 for numbers below half of the dtype's range. LLVM knows that, and XLA does not."""
    return number >> number.dtype.type(8 * number.dtype.itemsize - 1)


def _decide(
    block: SplitInteger, lane: Any, key: SplitInteger, threshold: Any, unknown_zero: Any
) -> Any:
    """Return whether each element is kept, from its block and the low bits of its index.

    XLA would launch a kernel for the key of each round. It does not if it takes the key for an
    array of the mask's shape.
    """
    hi, lo = block
    zero = lax.full_like(lo, 0)
    key_lo, key_hi = (word | unknown_zero for word in key)
    a, b, c, d = philox((lo, hi, zero, zero), (key_lo, key_hi), cast(Any, _WideningWords()))

    def has(bit: int) -> Any:
        return lane & np.uint32(bit) != 0

    word = jnp.where(has(4), jnp.where(has(2), d, c), jnp.where(has(2), b, a))
    u = jnp.where(has(1), word * np.uint32(ODD_MULTIPLIER), word)
    return u >= jnp.asarray(threshold, np.uint32)


def _join(words: SplitInteger) -> Any:
    """Return two words as one 64-bit integer."""
    hi, lo = (lax.convert_element_type(word, np.uint64) for word in words)
    return hi << np.uint64(32) | lo


def _split(number: Any) -> SplitInteger:
    """Return a 64-bit integer as its high and low word."""
    hi = lax.convert_element_type(number >> np.uint64(32), np.uint32)
    return hi, lax.convert_element_type(number, np.uint32)
