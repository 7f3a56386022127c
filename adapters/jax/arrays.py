"""JAX's part of the core: words, keep flags, the operator, and buffers.

Requirements this design meets:

* XLA on the CPU fuses the generator's rounds into every consumer of a word, and recomputes them in
  each. A loop stops fusion. So four iterations of a loop compute the keep flags, and leave one bit
  for each element: an array of 32-bit integers, each for 32 elements. XLA fuses the ten rounds into
  an iteration, and writes nothing else to memory.
* XLA hoists loop invariants out of a loop, each with its whole computation. So the numbers of an
  iteration are made to look variant, and a separate loop folds a step into a key. Otherwise a
  program folds some twenty times, and compiles four times as long.
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

from unidrop.adapters.jax.primitive import drop, keep_mask
from unidrop.adapters.numpy import allocate_aligned_like, get_address, locate_array
from unidrop.dispatch import check_fused, is_forced
from unidrop.key import Key
from unidrop.philox import ODD_MULTIPLIER, ROUNDS, PhiloxBlock, next_round_key, philox
from unidrop.plan import DropoutPlan
from unidrop.protocols import ArrayLibrary, Arrays, Buffer, Buffers, Operator, Words
from unidrop.rate import Rate
from unidrop.window import Window
from unidrop.words import MASK32, SplitInteger, Uint32Words, WordArithmetic, add_split

__all__ = ["LIBRARY", "as_jax_word", "generate_block"]

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


_WORDS = _WrappingUint32Words(jnp)

# Up to this many blocks in a row, launching and compiling operations take most of the time.
_FEW = 1 << 11


class JaxArrays(Arrays):
    """JAX arrays and tracers."""

    def check_type(self, kind: type, name: str) -> None:
        """Raise TypeError for other classes of JAX, such as sparse matrices and references."""
        if not issubclass(kind, jax.Array | jax.core.Tracer | np.ndarray):
            raise TypeError(f"{name} must be a jax.Array, got {kind.__name__}")

    def device(self, x: Any) -> None:
        """Leave placement to JAX: uncommitted arrays follow x, also under a trace."""
        return

    def is_traced(self, x: Any) -> bool:
        """Return whether x is a tracer."""
        return isinstance(x, jax.core.Tracer)

    def complex(self, xp: Any, real: Any, imag: Any) -> Any:
        """Return ``jax.lax.complex``."""
        return lax.complex(real, imag)


class JaxWords(Words):
    """Words in ``uint32``, also if JAX has 64-bit integers."""

    def arithmetic(self, xp: Any, device: Any) -> WordArithmetic:
        """Return arithmetic on ``uint32``."""
        return _WORDS

    def generate(
        self, xp: Any, device: Any, first: SplitInteger, count: Any, key: tuple[Any, Any], tag: int
    ) -> PhiloxBlock:
        """Return the words of consecutive blocks, by one compiled program."""
        block: PhiloxBlock = _generate(*map(as_jax_word, (*first, *key, tag)), count=count)
        return block

    def keep_flags(
        self,
        xp: Any,
        device: Any,
        first: SplitInteger,
        count: Any,
        key: tuple[Any, Any],
        threshold: int,
    ) -> Any:
        """Return whether each element is kept, flat, computed as one bit for each."""
        numbers = map(as_jax_word, (*first, *key, threshold))
        return _compiled_keep_flags(*numbers, count=count)

    def split(self, xp: Any, device: Any, value: Any, name: str) -> SplitInteger:
        """Return an integer as words; it may have 64 bits if the user has enabled x64."""
        if isinstance(value, tuple):
            return value
        bits = self.width(value, name)
        if bits == 64 and not jax.config.jax_enable_x64:
            return super().split(xp, device, value, name)  # raises
        return _WORDS.split(value, bits)


class JaxOperator(Operator):
    """Dropout as a JAX primitive."""

    def dropout(self, x: Any, key: Key, plan: DropoutPlan, mask: Any = None) -> Any:
        """Apply dropout by the primitive."""
        if mask is not None or plan.is_trivial(x):
            return plan.run(x, key, mask)
        if is_forced("fused"):
            check_fused(LIBRARY, x, key, plan.window)
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise TypeError(f"x has dtype {x.dtype}, which jax.numpy does not support without x64")
        return drop(x, *_get_operands(key, plan.window), plan, is_forced("portable"))

    def traced_mask(self, like: Any, key: Key, window: Window, rate: Rate) -> Any:
        """Return the mask by the primitive, whose generator is faster."""
        check_fused(LIBRARY, like, key, window)
        return keep_mask(
            *_get_operands(key, window), DropoutPlan(LIBRARY, window, rate, drops=True)
        )


class JaxBuffers(Buffers):
    """Arrays on the first device, if that is a CPU."""

    def locate(self, x: Any) -> Buffer | str:
        """Return the buffer of an array on the first CPU device."""
        devices = x.devices()
        if devices != {jax.devices()[0]}:
            return "it is not on JAX's first device alone, and kernels would put its output there"
        if jax.devices()[0].platform != "cpu":
            return f"it is on {jax.devices()[0]}, and kernels are for the CPU"
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            return f"JAX does not support {x.dtype} without x64"
        return locate_array(np.asarray(x))

    def allocate_like(self, x: Any) -> tuple[np.ndarray[Any, Any], Buffer]:
        """Return a NumPy array, whose memory JAX can adopt."""
        y = allocate_aligned_like(np.asarray(x))
        return y, Buffer(get_address(y), None)

    def wrap(self, handle: np.ndarray[Any, Any], x: Any) -> Any:
        """Return an array in the same memory, or a copy if JAX cannot adopt it."""
        return jax.device_put(handle, x.sharding if x.committed else None)

    def from_numpy(self, mask: np.ndarray[Any, Any], device: Any) -> Any:
        """Return an array in the same memory, or a copy if JAX cannot adopt it."""
        return jax.device_put(mask)


LIBRARY = ArrayLibrary(JaxArrays(), JaxWords(), JaxOperator(), JaxBuffers())


def _get_operands(key: Key, window: Window) -> tuple[SplitInteger, list[SplitInteger]]:
    """Return the words of a key, and the words of the starts of a window that are arrays."""
    lo, hi = map(as_jax_word, key._words)
    offsets = () if window.start is None else window.offsets
    return (lo, hi), [LIBRARY.split(start, "start") for start, _ in offsets]


def as_jax_word(word: Any) -> Any:
    """Return a word in ``uint32``: JAX would treat a Python integer as signed with 32 bits."""
    if isinstance(word, int):
        return np.uint32(word)
    return word if word.dtype == np.uint32 else LIBRARY.split(word, "key")[1]


@partial(jax.jit, static_argnames="count")
def _generate(hi: Any, lo: Any, key_lo: Any, key_hi: Any, tag: Any, *, count: Any) -> PhiloxBlock:
    steps = lax.iota(np.uint32, count)
    zero = lax.full_like(steps, 0)
    hi, lo = add_split(_WORDS, (hi, lo), (zero, steps))
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
    return philox((c0, c1, c2, c3), (k0, k1), _WORDS)


def _generate_by_loop(*numbers: Any) -> PhiloxBlock:
    """Return the words by a loop, whose iterations would be kernel launches on a GPU."""
    c0, c1, c2, c3, _, _ = lax.fori_loop(0, ROUNDS, lambda _, state: _one_round(*state), numbers)
    return c0, c1, c2, c3


def _one_round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, ...]:
    block = philox((c0, c1, c2, c3), (k0, k1), _WORDS, rounds=1)
    return (*block, *next_round_key((k0, k1), _WORDS))


def _keep_flags(hi: Any, lo: Any, key_lo: Any, key_hi: Any, threshold: Any, count: Any) -> Any:
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
        block_hi, block_lo = add_split(_WORDS, (hi, lo), (high, low))
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


_compiled_keep_flags = jax.jit(_keep_flags, static_argnames="count", inline=True)


def _generate_fast(counter: PhiloxBlock, key: SplitInteger) -> PhiloxBlock:
    """Return the words of blocks, by 64-bit integers if JAX has them."""
    if not jax.config.jax_enable_x64:
        return philox(counter, key, _WORDS)
    widen = partial(lax.convert_element_type, new_dtype=np.uint64)
    k0, k1 = map(widen, key)
    c0, c1, c2, c3 = map(widen, counter)
    block = philox((c0, c1, c2, c3), (k0, k1), cast(Any, _Uint64Words()))
    a, b, c, d = (lax.convert_element_type(word, np.uint32) for word in block)
    return a, b, c, d
