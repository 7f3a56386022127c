"""Arithmetic on 32-bit words, held in the integers that an array library has.

Requirements this design meets, each because of a library that has an adapter:

* No operation overflows: the array API standard leaves overflow to the implementation, and a
  compiler may treat it as undefined.
* No unsigned 64-bit arithmetic: some libraries lack it. Every operation works on ``int64``.
* No 64-bit integers at all if a library lacks them.

A `SplitInteger` is a 64-bit number as ``(hi, lo)``, two 32-bit words.
"""

from typing import Any, Final

__all__ = [
    "MASK32",
    "Int64Words",
    "SplitInteger",
    "Uint32Words",
    "WordArithmetic",
    "add_split",
    "arange64",
    "get_word_arithmetic",
    "mul_split",
    "shift_split",
    "split64",
]

MASK32: Final = 0xFFFFFFFF
_MASK16: Final = 0xFFFF

SplitInteger = tuple[Any, Any]


class Int64Words:
    """Words in ``int64`` arrays.

    Multipliers of 2^31 or more enter as themselves minus 2^32, which keeps every product of a word
    and a multiplier between -2^63 and 2^63. `mulhilo` corrects the high half by adding the word.
    """

    #: Whether ``a + b`` is the sum of two words modulo 2^32 without further operations.
    sums_wrap = False

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
        """Return ``a >> n``; a function, because some libraries lack the operator."""
        return self.xp.bitwise_right_shift(a, n)

    def shift_left(self, a: Any, n: int) -> Any:
        """Return ``a << n`` ; the result must fit in a word."""
        return self.xp.bitwise_left_shift(a, n)

    def add(self, a: Any, b: Any) -> SplitInteger:
        """Return ``(carry, sum)`` of two words."""
        total = a + b
        return self.shift_right(total, 32), total & MASK32

    def mulhilo(self, a: Any, m: int) -> SplitInteger:
        """Return the ``(hi, lo)`` words of the product of words ``a`` and a Python word ``m``."""
        if m < 1 << 31:
            product = a * m
            return self.shift_right(product, 32), product & MASK32
        product = a * (m - (1 << 32))
        return self.shift_right(product, 32) + a, product & MASK32

    def mullo(self, a: Any, m: int) -> Any:
        """Return the low word of the product of words ``a`` and a Python word ``m``."""
        return a * (m if m < 1 << 31 else m - (1 << 32)) & MASK32

    def split(self, value: Any, bits: int) -> SplitInteger:
        """Return the ``(hi, lo)`` words of an integer array of ``bits`` bits, zero-extended."""
        value = self.xp.astype(value, self.dtype, copy=False)
        lo = value & ((1 << min(bits, 32)) - 1)
        return (self.shift_right(value, 32) & MASK32 if bits == 64 else lo * 0), lo


class Uint32Words:
    """Words in ``uint32`` arrays, multiplied by 16-bit limbs."""

    sums_wrap = False

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
        """Return ``a << n`` ; the result must fit in a word."""
        return self.xp.bitwise_left_shift(a, n)

    def add(self, a: Any, b: Any) -> SplitInteger:
        """Return ``(carry, sum)`` of two words."""
        lo = (a & _MASK16) + (b & _MASK16)
        hi = self.shift_right(a, 16) + self.shift_right(b, 16) + self.shift_right(lo, 16)
        return self.shift_right(hi, 16), self._join(hi, lo)

    def mulhilo(self, a: Any, m: int) -> SplitInteger:
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

    def split(self, value: Any, bits: int) -> SplitInteger:
        """Return the ``(hi, lo)`` words of an integer array of ``bits`` bits, zero-extended."""
        lo = self.xp.astype(value, self.dtype) & self.constant((1 << min(bits, 32)) - 1)
        return lo & 0, lo

    def _join(self, hi: Any, lo: Any) -> Any:
        return self.shift_left(hi & _MASK16, 16) | (lo & _MASK16)


WordArithmetic = Int64Words | Uint32Words


def split64(value: int) -> tuple[int, int]:
    """Split a Python integer below 2^64 into its ``(hi, lo)`` words."""
    return value >> 32, value & MASK32


def get_word_arithmetic(xp: Any, device: Any = None) -> WordArithmetic:
    """Return `Int64Words` if the device of a namespace has ``int64``, else `Uint32Words`."""
    signed = xp.__array_namespace_info__().dtypes(device=device, kind="signed integer")
    return Int64Words(xp) if "int64" in signed else Uint32Words(xp, device)


def arange64(words: WordArithmetic, count: Any, device: Any = None) -> SplitInteger:
    """Return 0, 1, 2, ..., count - 1 as split integers."""
    numbers = words.xp.arange(count, dtype=words.dtype, device=device)
    return words.split(numbers, 64 if isinstance(words, Int64Words) else 32)


def add_split(words: WordArithmetic, a: SplitInteger, b: SplitInteger) -> SplitInteger:
    """Add two 64-bit numbers, modulo 2^64."""
    carry, lo = words.add(a[1], b[1])
    hi = words.add(a[0], b[0])[1]
    return words.add(hi, carry)[1], lo


def mul_split(words: WordArithmetic, a: SplitInteger, factor: int) -> SplitInteger:
    """Multiply a 64-bit number by a Python integer below 2^64, modulo 2^64."""
    factor_hi, factor_lo = factor >> 32, factor & MASK32
    hi, lo = words.mulhilo(a[1], factor_lo)
    cross = words.mullo(a[0], factor_lo)
    if factor_hi:
        cross = words.add(words.mullo(a[1], factor_hi), cross)[1]
    return words.add(hi, cross)[1], lo


def shift_split(words: WordArithmetic, a: SplitInteger, n: int) -> SplitInteger:
    """Shift a 64-bit number right by ``n`` bits, 0 < n < 32."""
    low_bits = a[0] & ((1 << n) - 1)
    return words.shift_right(a[0], n), words.shift_right(a[1], n) | words.shift_left(
        low_bits, 32 - n
    )
