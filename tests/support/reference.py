"""The stream, version 1, in plain Python integers: the specification as a program.

It shares no code with the package and uses no array library: the two agree only where both follow
the specification. Read it beside the text; a test that needs to know what is right asks here.

A key is one integer below 2**64, a mask a flat list of 0 (dropped) and 1 (kept) in C order, and an
array a list of bit patterns. Values are exact fractions, rounded only where the text requires it.
"""

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b

STREAM_VERSION = 1
MASK_TAG, INT_TAG, STR_TAG = 0, 1, 2

Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Return the four words of Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def _lo_hi(number: int) -> tuple[int, int]:
    if not 0 <= number < 2**64:
        raise ValueError(f"expected an integer in [0, 2**64), got {number}")
    return number % 2**32, number // 2**32


def fold_in(key: int, data: int | str) -> int:
    """Return the key that ``data``, an integer below 2**64 or a string, derives from ``key``."""
    if isinstance(data, bool):
        raise TypeError("expected an integer or a string, got a bool")
    if isinstance(data, str):
        tag, number = (
            STR_TAG,
            int.from_bytes(blake2b(data.encode(), digest_size=8).digest(), "little"),
        )
    else:
        tag, number = INT_TAG, operator.index(data)
    lo, hi, _, _ = philox((*_lo_hi(number), 0, tag), _lo_hi(key))
    return lo + hi * 2**32


# Eight neighbors share a block.
@lru_cache(maxsize=2**16)
def _block_words(key: int, block: int) -> Words:
    return philox((*_lo_hi(block), 0, MASK_TAG), _lo_hi(key))


def u(key: int, i: int) -> int:
    """Return the 32-bit number that decides element ``i`` of the masks of ``key``."""
    if not 0 <= i < 2**64:
        raise ValueError(f"expected an index in [0, 2**64), got {i}")
    word = _block_words(key, i // 8)[(i // 2) % 4]
    return word if i % 2 == 0 else word * 0x6C078965 % 2**32


def threshold(p: float) -> int:
    """Return T: the elements with u >= T are kept."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability must be between 0 and 1, got {p}")
    return round(Fraction(p) * 2**32)  # round() of a Fraction is exact, and half to even


def scale(p: float) -> float:
    """Return the factor of the kept elements, in double precision."""
    return 1.0 / (1.0 - p)


def _axes(ndim: int, broadcast_axes: Collection[int]) -> set[int]:
    if not all(-ndim <= axis < ndim for axis in broadcast_axes):
        raise ValueError(f"expected broadcast axes of {ndim} dimensions, got {broadcast_axes}")
    return {axis % ndim for axis in broadcast_axes}


def mask_shape(shape: Sequence[int], broadcast_axes: Collection[int] = ()) -> tuple[int, ...]:
    """Return the shape of the mask of an array of shape ``shape``: 1 along the broadcast axes."""
    axes = _axes(len(shape), broadcast_axes)
    return tuple(1 if axis in axes else length for axis, length in enumerate(shape))


def mask_indices(
    shape: Sequence[int],
    *,
    broadcast_axes: Collection[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
) -> list[int]:
    """Return the logical index of each element of the mask, in C order.

    For a window (``global_shape`` and ``start``) it is the index in the whole array's mask.
    """
    if (global_shape is None) != (start is None):
        raise ValueError("global_shape and start must be given together")
    axes = _axes(len(shape), broadcast_axes)
    whole = mask_shape(shape if global_shape is None else global_shape, broadcast_axes)
    origin = [0] * len(shape) if start is None else start
    indices = [0]
    for axis, (count, length, first) in enumerate(
        zip(mask_shape(shape, broadcast_axes), whole, origin, strict=True)
    ):
        at = 0 if axis in axes else first
        if not 0 <= at <= at + count <= length:
            raise ValueError(f"the window leaves the whole array along axis {axis}")
        indices = [index * length + j for index in indices for j in range(at, at + count)]
    return indices


def keep_mask(
    shape: Sequence[int],
    p: float,
    key: int,
    *,
    broadcast_axes: Collection[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
) -> list[int]:
    """Return the decisions (1 = kept) of a mask of shape ``mask_shape(shape, broadcast_axes)``."""
    least = threshold(p)
    indices = mask_indices(
        shape, broadcast_axes=broadcast_axes, global_shape=global_shape, start=start
    )
    return [int(u(key, i) >= least) for i in indices]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format of IEEE 754: a sign, an exponent and a fraction.

    A *magnitude* is a bit pattern without its sign; magnitudes are ordered as their values are.
    """

    exponent_bits: int
    fraction_bits: int

    @property
    def sign(self) -> int:
        """The pattern of -0."""
        return 1 << self.exponent_bits + self.fraction_bits

    @property
    def infinity(self) -> int:
        """The magnitude of infinity; larger ones are NaN."""
        return self.sign - self.normal

    @property
    def normal(self) -> int:
        """The magnitude of the smallest normal number."""
        return 1 << self.fraction_bits

    @property
    def nan(self) -> int:
        """The canonical quiet NaN."""
        return self.infinity + self.normal // 2

    @property
    def _least_exponent(self) -> int:
        return 2 - (1 << self.exponent_bits - 1)

    def decode(self, magnitude: int) -> Fraction:
        """Return the value of a finite magnitude."""
        exponent, fraction = divmod(magnitude, self.normal)
        significand = fraction + self.normal if exponent else fraction
        power = max(exponent, 1) - 1 + self._least_exponent - self.fraction_bits
        return significand * Fraction(2) ** power

    def encode(self, value: Fraction) -> int:
        """Return the magnitude nearest to a value >= 0, half to even, infinity on overflow.

        The value's denominator must be a power of two, as it is for all products here.
        """
        if value == 0:
            return 0
        exponent = value.numerator.bit_length() - value.denominator.bit_length()
        exponent = max(exponent, self._least_exponent)
        significand = round(value / Fraction(2) ** (exponent - self.fraction_bits))
        # A normal significand's leading bit adds 1 to the exponent field, and so does a carry.
        magnitude = (exponent - self._least_exponent) * self.normal + significand
        return min(magnitude, self.infinity)


FORMATS = {
    "float16": Format(5, 10),
    "bfloat16": Format(8, 7),
    "float32": Format(8, 23),
    "float64": Format(11, 52),
}
COMPONENTS = {"complex64": "float32", "complex128": "float64"}


def component_format(dtype: str) -> Format:
    """Return the format of a real dtype's elements, or of a complex one's components."""
    return FORMATS[COMPONENTS.get(dtype, dtype)]


def _compute_format(stored: Format) -> Format:
    return FORMATS["float64" if stored == FORMATS["float64"] else "float32"]


def _scaled(bits: int, stored: Format, s: Fraction) -> int:
    sign, magnitude = bits & stored.sign, bits & ~stored.sign
    if magnitude > stored.infinity:
        return stored.nan
    if magnitude == stored.infinity:
        return bits
    compute = _compute_format(stored)
    product = compute.encode(stored.decode(magnitude) * s)
    if product == compute.infinity:
        return sign | stored.infinity
    return sign | stored.encode(compute.decode(product))


def dropout_bits(bits: Sequence[int], dtype: str, keep: Sequence[int], p: float) -> list[int]:
    """Return the output's bit patterns, given the input's and the decision for each element.

    Complex elements are two patterns each, [re, im, re, im, ...]. Subnormals are not flushed, and
    every NaN that the rule computes is the dtype's canonical one.
    """
    width = 2 if dtype in COMPONENTS else 1
    decisions = [decision for decision in keep for _ in range(width)]
    if len(decisions) != len(bits):
        raise ValueError(f"expected {len(decisions)} patterns of {dtype}, got {len(bits)}")
    if p == 0:
        return list(bits)
    if threshold(p) == 2**32:  # nothing is kept, and at p = 1 there is no scale to form
        if any(keep):
            raise ValueError(f"p = {p} keeps nothing, but keep holds a 1")
        return [0] * len(bits)
    stored = component_format(dtype)
    compute = _compute_format(stored)
    s = compute.decode(compute.encode(Fraction(scale(p))))
    return [_scaled(x, stored, s) if d else 0 for x, d in zip(bits, decisions, strict=True)]
