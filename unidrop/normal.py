"""Normal deviates of a key: a table of quantiles in integers, so equal in every library.

Element i has word ``i % 4`` of block ``i // 4`` of the generator, in a separate numbering. The
word w stands for the quantile of ``(w + 1/2) / 2^32``, in units of 2^-21. A table holds the
quantiles of some words, and the others are interpolated by one product of integers. docs/spec.md
defines the rest.

Logarithms and cosines differ between libraries in the last bit, and compilers fuse a product and a
sum of floats. Neither happens to integers.
"""

import math
from functools import cache
from statistics import NormalDist
from typing import Any, Final

import numpy

from unidrop.key import Key
from unidrop.mask import compute_window
from unidrop.protocols import ArrayLibrary
from unidrop.window import Window
from unidrop.words import MASK32, SplitInteger, WordArithmetic

__all__ = ["NORMAL_TAG", "make_normal"]

#: The last counter word of normal deviates.
NORMAL_TAG: Final = 3

_UNIT_BITS: Final = 21
# Each level has the quantiles of words 2^8 times as small as the ones of the level before.
_LEVELS: Final = 4
_ENTRY_BITS: Final = 12
_FRACTION_BITS: Final = 16


@cache
def _make_tables() -> tuple[Any, Any]:
    """Return the quantiles of all levels, and their distances from the next ones."""
    inverse = NormalDist().inv_cdf
    entries = 1 << _ENTRY_BITS
    quantiles = numpy.empty((_LEVELS, entries + 1), numpy.int64)
    for level in range(_LEVELS):
        for k in range(entries + 1):
            u = (math.ldexp(k, 19 - 8 * level) + 0.5) / 2**32
            quantiles[level, k] = round(-inverse(min(u, 0.5)) * 2**_UNIT_BITS)
    table = quantiles[:, :-1].reshape(-1)
    slopes = (quantiles[:, :-1] - quantiles[:, 1:]).reshape(-1)
    return table, slopes


def make_normal(
    library: ArrayLibrary, like: Any, key: Key, window: Window, stddev: float, dtype: Any
) -> Any:
    """Return normal deviates of mean 0 for a window that is not empty.

    Parameters
    ----------
    library : ArrayLibrary
        The library of ``like``.
    like : array
        The deviates are on its device, and traced if it is traced.
    key : Key
    window : Window
    stddev : float
        The standard deviation, above 0.
    dtype : dtype
        The dtype of the deviates: single or double precision, both exact.
    """
    xp = library.arrays.namespace(like)
    device = library.arrays.device(like)
    words = library.words.arithmetic(xp, device)
    table, slopes = (xp.asarray(a, dtype=words.dtype, device=device) for a in _make_tables())
    fraction, exponent = math.frexp(stddev)
    multiplier = math.floor(math.ldexp(fraction, 32))
    unit = math.ldexp(1.0, exponent - _UNIT_BITS)

    def compute(first: SplitInteger, count: Any) -> Any:
        lo, hi = key._words
        block = library.words.generate_runs(xp, device, first, count, (lo, hi), NORMAL_TAG)
        word = xp.reshape(xp.stack(block, axis=-1), (-1,))
        is_positive = word >= words.constant(1 << 31)
        rank = xp.where(is_positive, word ^ words.constant(MASK32), word)
        quantile = _look_up(xp, words, rank, table, slopes)
        # Below 2^24, and a power of two: the conversion and the product are exact.
        size = xp.astype(words.mulhilo(quantile, multiplier)[0], dtype) * unit
        return xp.where(is_positive, size, -size)

    return compute_window(library, like, key, window, device, 4, compute, dtype)


def _look_up(xp: Any, words: WordArithmetic, rank: Any, table: Any, slopes: Any) -> Any:
    """Return the distance of a quantile from 0, for words below 2^31."""
    level = rank ^ rank
    for _ in range(1, _LEVELS):
        is_small = xp.astype(rank < words.constant(1 << 23), words.dtype)
        level = level + is_small
        rank = rank * (is_small * 255 + 1)
    entry = words.shift_left(level, _ENTRY_BITS) + words.shift_right(rank, 31 - _ENTRY_BITS)
    fraction = words.shift_right(rank, 3) & ((1 << _FRACTION_BITS) - 1)
    fall = words.shift_right(xp.take(slopes, entry, axis=0) * fraction, _FRACTION_BITS)
    return xp.take(table, entry, axis=0) - fall
