"""Philox4x32-10, the counter-based generator under every mask.

J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2,
3", SC11, doi:10.1145/2063384.2063405.
"""

from typing import Any, Final

from unidrop.words import MASK32, WordArithmetic

__all__ = ["ODD_MULTIPLIER", "ROUNDS", "PhiloxBlock", "keep_flags", "next_round_key", "philox"]

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS: Final = (0x9E3779B9, 0xBB67AE85)

#: One word serves two elements of a mask: as it is for the even one, times this for the odd one.
ODD_MULTIPLIER: Final = 0x6C078965

PhiloxBlock = tuple[Any, Any, Any, Any]


def philox(
    counter: PhiloxBlock,
    key: tuple[Any, Any],
    words: WordArithmetic | None = None,
    rounds: int = ROUNDS,
) -> PhiloxBlock:
    """Return the four words of Philox4x32-10 for a counter under a key.

    Parameters
    ----------
    counter : four words
        Python integers, or arrays of words that broadcast together.
    key : two words
        Python integers, or words that broadcast with the counter's.
    words : WordArithmetic, optional
        The arithmetic on arrays of words; if None, all words are Python integers.
    rounds : int, default 10
        Number of rounds. To run them one at a time, pass ``rounds=1``, feed the result back as the
        counter and advance the key by `next_round_key`.

    Returns
    -------
    four words
        Of the counter's kind and broadcast shape.

    Examples
    --------
    >>> [f"{word:08x}" for word in philox((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    if words is None:
        return _philox_of_integers(counter, key, rounds)
    c0, c1, c2, c3 = counter
    for k0, k1 in _round_keys(key, words, rounds):
        hi0, lo0 = words.mulhilo(c0, MULTIPLIERS[0])
        hi1, lo1 = words.mulhilo(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    return c0, c1, c2, c3


def _philox_of_integers(counter: PhiloxBlock, key: tuple[int, int], rounds: int) -> PhiloxBlock:
    """Run `philox` on Python integers, whose products are exact.

    A layer folds its call number into its key at every call, so each operation counts. High bits
    that no multiplication reads stay until the end.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    first, second = MULTIPLIERS
    increment0, increment1 = KEY_INCREMENTS
    for _ in range(rounds):
        product0, product1 = c0 * first, c2 * second
        c0, c2 = (product1 >> 32 ^ c1 ^ k0) & MASK32, (product0 >> 32 ^ c3 ^ k1) & MASK32
        c1, c3 = product1, product0
        k0 += increment0
        k1 += increment1
    return c0, c1 & MASK32, c2, c3 & MASK32


def keep_flags(xp: Any, words: WordArithmetic, four: PhiloxBlock, threshold: int) -> Any:
    """Return whether each of the eight elements of a block is kept, flat: u >= threshold.

    Parameters
    ----------
    xp : namespace
    words : WordArithmetic
    four : four arrays of words
        The blocks' words, of one shape.
    threshold : int
        0 < threshold < 2^32.
    """
    least = words.constant(threshold)
    # Stack before comparing: a compiler may take half a minute for eight comparisons.
    even = xp.stack(four, axis=-1)
    odd = words.mullo(even, ODD_MULTIPLIER)
    return xp.reshape(xp.stack([even >= least, odd >= least], axis=-1), (-1,))


def next_round_key(key: tuple[Any, Any], words: WordArithmetic) -> tuple[Any, Any]:
    """Return the key of the next round, for a key of arrays of words."""
    k0, k1 = key
    first, second = (words.constant(increment) for increment in KEY_INCREMENTS)
    if words.sums_wrap:
        return k0 + first, k1 + second
    return words.add(k0, first)[1], words.add(k1, second)[1]


def _round_keys(key: tuple[Any, Any], words: WordArithmetic, rounds: int) -> list[tuple[Any, Any]]:
    """Return the key of each round: the key plus the increments, once for every earlier round."""
    k0, k1 = key
    if isinstance(k0, int):
        return [
            tuple(
                words.constant((k + i * increment) & MASK32)
                for k, increment in zip(key, KEY_INCREMENTS, strict=True)
            )
            for i in range(rounds)
        ]
    # The words of a traced key may have another dtype, if 64-bit integers were switched on since.
    keys = [(words.split(k0, 32)[1], words.split(k1, 32)[1])]
    if words.sums_wrap:
        first, second = (words.constant(increment) for increment in KEY_INCREMENTS)
        for _ in range(1, rounds):
            k0, k1 = keys[-1]
            keys.append((k0 + first, k1 + second))
    else:
        for _ in range(1, rounds):
            keys.append(next_round_key(keys[-1], words))
    return keys
