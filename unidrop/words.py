"""Arithmetic on 32-bit words held in whatever integers an array library has.

Requirements this design meets, because each has a library behind it:

* No operation may overflow: the array API standard leaves overflow to the implementation, and a
  compiler may take it as undefined.
* No unsigned 64-bit arithmetic: PyTorch has none. ``int64`` is complete wherever it exists.
* No 64-bit integers at all where there are none: JAX without x64.

A *pair* is a 64-bit number as ``(hi, lo)``, two 32-bit words.
"""

import operator
from typing import Any, Final

from unidrop.dtypes import integer_bits

__all__ = [
    "MASK32",
    "Int64Words",
    "Pair",
    "Uint32Words",
    "Words",
    "add_pairs",
    "arange64",
    "checked_integer",
    "get_words",
    "mul_pair",
    "shift_pair",
    "split64",
]

MASK32: Final = 0xFFFFFFFF
_MASK16: Final = 0xFFFF

Pair = tuple[Any, Any]


class Int64Words:
    """Words in ``int64`` arrays.

    A multiplier of 2^31 or more is taken as itself minus 2^32, so that the product of a word and
    a multiplier always lies between -2^63 and 2^63; the word is then added to the high half.
    """

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    @property
    def dtype(self) -> Any:
        """The dtype that carries a word."""
        return self.xp.int64

    def constant(self, word: int) -> Any:
        """Return a Python word in a form that combines with arrays of words."""
        return word

    def shift_right(self, a: Any, n: int) -> Any:
        """Return ``a >> n``; a function, because not every library has the operator."""
        return self.xp.bitwise_right_shift(a, n)

    def shift_left(self, a: Any, n: int) -> Any:
        """Return ``a << n`` where the result still is a word."""
        return self.xp.bitwise_left_shift(a, n)

    def add(self, a: Any, b: Any) -> Pair:
        """Return ``(carry, sum)`` of two words."""
        total = a + b
        return self.shift_right(total, 32), total & MASK32

    def mulhilo(self, a: Any, m: int) -> Pair:
        """Return the ``(hi, lo)`` words of the product of words ``a`` and a Python word ``m``."""
        if m < 1 << 31:
            product = a * m
            return self.shift_right(product, 32), product & MASK32
        product = a * (m - (1 << 32))
        return self.shift_right(product, 32) + a, product & MASK32

    def mullo(self, a: Any, m: int) -> Any:
        """Return the low word of the product of words ``a`` and a Python word ``m``."""
        return a * (m if m < 1 << 31 else m - (1 << 32)) & MASK32

    def split(self, value: Any, bits: int) -> Pair:
        """Return the ``(hi, lo)`` words of an integer array of ``bits`` bits, zero-extended."""
        value = self.xp.astype(value, self.dtype)
        lo = value & ((1 << min(bits, 32)) - 1)
        return (self.shift_right(value, 32) & MASK32 if bits == 64 else lo * 0), lo


class Uint32Words:
    """Words in ``uint32`` arrays, multiplied by 16-bit limbs."""

    def __init__(self, xp: Any, device: Any = None) -> None:
        self.xp = xp
        self.device = device

    @property
    def dtype(self) -> Any:
        """The dtype that carries a word."""
        return self.xp.uint32

    def constant(self, word: int) -> Any:
        """Return a Python word in a form that combines with arrays of words."""
        return self.xp.asarray(word, dtype=self.dtype, device=self.device)

    def shift_right(self, a: Any, n: int) -> Any:
        """Return ``a >> n``."""
        return self.xp.bitwise_right_shift(a, n)

    def shift_left(self, a: Any, n: int) -> Any:
        """Return ``a << n`` where the result still is a word."""
        return self.xp.bitwise_left_shift(a, n)

    def add(self, a: Any, b: Any) -> Pair:
        """Return ``(carry, sum)`` of two words."""
        lo = (a & _MASK16) + (b & _MASK16)
        hi = self.shift_right(a, 16) + self.shift_right(b, 16) + self.shift_right(lo, 16)
        return self.shift_right(hi, 16), self._join(hi, lo)

    def mulhilo(self, a: Any, m: int) -> Pair:
        """Return the ``(hi, lo)`` words of the product of words ``a`` and a Python word ``m``."""
        hi_a, lo_a = self.shift_right(a, 16), a & _MASK16
        hi_m, lo_m = m >> 16, m & _MASK16
        low, cross, cross2 = lo_a * lo_m, lo_a * hi_m, hi_a * lo_m
        middle = self.shift_right(low, 16) + (cross & _MASK16) + (cross2 & _MASK16)
        hi = hi_a * hi_m + self.shift_right(cross, 16) + self.shift_right(cross2, 16)
        return hi + self.shift_right(middle, 16), self._join(middle, low)

    def mullo(self, a: Any, m: int) -> Any:
        """Return the low word of the product of words ``a`` and a Python word ``m``."""
        return self.mulhilo(a, m)[1]

    def split(self, value: Any, bits: int) -> Pair:
        """Return the ``(hi, lo)`` words of an integer array of ``bits`` bits, zero-extended."""
        lo = self.xp.astype(value, self.dtype) & self.constant((1 << min(bits, 32)) - 1)
        return lo & 0, lo

    def _join(self, hi: Any, lo: Any) -> Any:
        return self.shift_left(hi & _MASK16, 16) | (lo & _MASK16)


Words = Int64Words | Uint32Words


def checked_integer(value: Any, name: str, *, bits: int = 64) -> int:
    """Return what `operator.index` makes of a value, if it is unsigned and fits; never wraps.

    Raises
    ------
    TypeError
        If value is no integer, or a bool; names the argument.
    ValueError
        If value is negative, or 2^bits or more.

    Examples
    --------
    >>> checked_integer(7, "step")
    7
    """
    try:
        # Some libraries' arrays have an index whatever their dtype is.
        if type(value) is not int and (
            isinstance(value, bool) or integer_bits(getattr(value, "dtype", "int64")) is None
        ):
            raise TypeError
        # Also of Python's own, which a compiler then no longer takes for variable.
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} has to be an integer, 0 <= {name} < 2**{bits}, "
            f"but got {value!r} of type {type(value).__name__}"
        ) from None
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{name} has to be 0 <= {name} < 2**{bits}, but got {number}")
    return number


def split64(value: int) -> tuple[int, int]:
    """Split a Python integer below 2^64 into its ``(hi, lo)`` words."""
    return value >> 32, value & MASK32


def get_words(xp: Any, device: Any = None) -> Words:
    """Return the word arithmetic of a namespace's device: `Int64Words` wherever it has ``int64``."""
    signed = xp.__array_namespace_info__().dtypes(device=device, kind="signed integer")
    return Int64Words(xp) if "int64" in signed else Uint32Words(xp, device)


def arange64(words: Words, count: Any, device: Any = None) -> Pair:
    """Return 0, 1, 2, ... below count as a pair."""
    numbers = words.xp.arange(count, dtype=words.dtype, device=device)
    return words.split(numbers, 64 if isinstance(words, Int64Words) else 32)


def add_pairs(words: Words, a: Pair, b: Pair) -> Pair:
    """Add two 64-bit numbers, modulo 2^64."""
    carry, lo = words.add(a[1], b[1])
    hi = words.add(a[0], b[0])[1]
    return words.add(hi, carry)[1], lo


def mul_pair(words: Words, a: Pair, factor: int) -> Pair:
    """Multiply a 64-bit number by a Python integer below 2^64, modulo 2^64."""
    factor_hi, factor_lo = factor >> 32, factor & MASK32
    hi, lo = words.mulhilo(a[1], factor_lo)
    cross = words.mullo(a[0], factor_lo)
    if factor_hi:
        cross = words.add(words.mullo(a[1], factor_hi), cross)[1]
    return words.add(hi, cross)[1], lo


def shift_pair(words: Words, a: Pair, n: int) -> Pair:
    """Shift a 64-bit number right by ``n`` bits, 0 < n < 32."""
    low_bits = a[0] & ((1 << n) - 1)
    return words.shift_right(a[0], n), words.shift_right(a[1], n) | words.shift_left(
        low_bits, 32 - n
    )
