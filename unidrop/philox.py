"""Philox4x32-10, the counter-based generator under every mask.

J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2,
3", SC11, doi:10.1145/2063384.2063405.
"""

from typing import Any, Final

from unidrop.words import PYTHON, Words

__all__ = ["philox"]

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS: Final = (0x9E3779B9, 0xBB67AE85)

FourWords = tuple[Any, Any, Any, Any]


def philox(counter: FourWords, key: tuple[Any, Any], words: Words = PYTHON) -> FourWords:
    """Return the four words that Philox4x32-10 makes of a counter under a key.

    Parameters
    ----------
    counter : four words
        Python integers, or arrays of words that broadcast together.
    key : two words
        Python integers, or 0-d arrays of words.
    words : Words
        The arithmetic of the integers that hold them; Python's by default.

    Returns
    -------
    four words
        Of the counter's kind and broadcast shape.

    Examples
    --------
    >>> [f"{word:08x}" for word in philox((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in _round_keys(key, words):
        hi0, lo0 = words.mulhilo(c0, MULTIPLIERS[0])
        hi1, lo1 = words.mulhilo(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    return c0, c1, c2, c3


def _round_keys(key: tuple[Any, Any], words: Words) -> list[tuple[Any, Any]]:
    """Return the key of each round: the key, bumped by the increments before every later one."""
    concrete = isinstance(key[0], int)
    arithmetic = PYTHON if concrete else words
    # A traced key may have been made where words had another dtype, as in JAX with and without x64.
    keys = [key if concrete else (words.split(key[0], 32)[1], words.split(key[1], 32)[1])]
    for _ in range(ROUNDS - 1):
        k0, k1 = (
            arithmetic.add(k, arithmetic.constant(increment))[1]
            for k, increment in zip(keys[-1], KEY_INCREMENTS, strict=True)
        )
        keys.append((k0, k1))
    if not concrete:
        return keys
    return [(words.constant(k0), words.constant(k1)) for k0, k1 in keys]
