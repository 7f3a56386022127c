"""The product of each dtype in vectors: x times the scale, rounded as the core rounds it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unidrop.fused.llvm import F32, F64, I8, I16, I32, Value

__all__ = ["KINDS", "Kind"]


def _multiply(x: Value, scale: Value) -> Value:
    if x.element == F32:
        scale = scale.convert("fptrunc", F32)
    return x.fmul(scale)


def _multiply_bfloat16(x: Value, scale: Value) -> Value:
    single = (x.convert("zext", I32) << 16).convert("bitcast", F32)
    product = _multiply(single, scale).convert("bitcast", I32)
    nearest_even = product + 0x7FFF + ((product >> 16) & 1)
    is_nan = (product & 0x7FFFFFFF) >= 0x7F800001
    return (is_nan.select(product | 0x400000, nearest_even) >> 16).convert("trunc", I16)


def _multiply_float16(x: Value, scale: Value) -> Value:
    product = _multiply(_widen_float16(x.convert("zext", I32)), scale)
    return _narrow_to_float16(product.convert("bitcast", I32))


def _widen_float16(x: Value) -> Value:
    """Return the float32 of a float16 in 32 bits: exact, even for subnormal numbers."""
    magnitude, sign = x & 0x7FFF, (x & 0x8000) << 16
    # The biases of the exponents differ by 112. Infinity and NaN have the largest exponent of both.
    normal = (magnitude << 13) + (112 << 23)
    normal = (magnitude >= 0x7C00).select(normal + (112 << 23), normal)
    # Avoid a subnormal float32: a processor may be set to treat it as 0.
    subnormal = magnitude.convert("sitofp", F32).fmul(2.0**-24).convert("bitcast", I32)
    return ((magnitude >= 0x400).select(normal, subnormal) | sign).convert("bitcast", F32)


def _narrow_to_float16(bits: Value) -> Value:
    """Return the float16 nearest to a float32 of 32 bits, ties to even."""
    magnitude, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
    half = ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13) - (112 << 10)
    # Below 2^-14 a float16 is a multiple of 2^-24. The last bit of 2^23 is worth 1, so adding 2^23
    # rounds to an integer, ties to even.
    whole = magnitude.convert("bitcast", F32).fmul(2.0**24).fadd(2.0**23).convert("bitcast", I32)
    half = (magnitude >= 0x38800000).select(half, whole - 0x4B000000)
    half = (magnitude >= 0x47800000).select(0x7C00, half)  # 2^16
    half = (magnitude >= 0x7F800001).select(0x7E00, half)  # NaN
    return (half | sign).convert("trunc", I16)


@dataclass(frozen=True)
class Kind:
    """A dtype: its size in bytes, the numbers that it consists of, and their product.

    Without ``multiply``, which multiplies numbers by the scale, the output is the mask.
    """

    size: int
    element: Any
    width: int
    multiply: Callable[[Value, Value], Value] | None


KINDS = {
    "float16": Kind(2, I16, 1, _multiply_float16),
    "bfloat16": Kind(2, I16, 1, _multiply_bfloat16),
    "float32": Kind(4, F32, 1, _multiply),
    "float64": Kind(8, F64, 1, _multiply),
    "complex64": Kind(8, F32, 2, _multiply),
    "complex128": Kind(16, F64, 2, _multiply),
    "bool": Kind(1, I8, 1, None),
}
