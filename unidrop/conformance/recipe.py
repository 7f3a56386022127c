"""The stream with every choice of it as a parameter, to find the one that somebody made otherwise.

It is written for this alone, in NumPy's 64-bit integers, and slow: `unidrop.keep_mask` is the mask.
Section numbers are those of the specification, docs/spec.md.
"""

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unidrop.key import Key, string_data
from unidrop.philox import philox

__all__ = ["Recipe"]


def _by_x(lengths: Sequence[int]) -> str:
    return "x".join(map(str, lengths))


Words = NDArray[np.uint64]

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_ODD_MULTIPLIER = np.uint64(0x6C078965)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a mask is made; each field that has a default is what the specification says.

    Attributes
    ----------
    seed : int
    folded : tuple of int or str
        What is folded into the key of the seed, in order (section 3 and 9).
    p : float
    shape : tuple of int
        Of the array.
    broadcast_axes : tuple of int
        Section 11; not negative.
    global_shape, start : tuple of int, or None
        Section 12.
    rounds, key_rounds : int
        Of the generator (section 2), where it makes masks and where it folds keys.
    key_words, counter_words : tuple of int
        Which word of the key, and of (lo(block), hi(block), 0, 0), stands where.
    words : tuple of int
        Which word of a block serves its elements 0 and 1, which 2 and 3, and so on (section 5).
    elements_a_word : int
        How many elements one word decides.
    odd, even : callable
        What becomes of a word for an odd and for an even element.
    row : int
        To which multiple the last axis is rounded up before elements are numbered.
    index_bits : int
        With how many bits elements are numbered.
    order : tuple of int, or None
        The axes of the mask from the slowest to the fastest, C order if None (section 4).
    first_block : int
        The block of index 0.
    inverted : bool
        Whether 1 is where an element is dropped.
    threshold : callable
        From p to T (section 6).
    decide : callable
        From u and T to what is kept (section 7).
    """

    seed: int
    folded: tuple[int | str, ...]
    p: float
    shape: tuple[int, ...]
    broadcast_axes: tuple[int, ...] = ()
    global_shape: tuple[int, ...] | None = None
    start: tuple[int, ...] | None = None
    rounds: int = 10
    key_rounds: int = 10
    key_words: tuple[int, int] = (0, 1)
    counter_words: tuple[int, int, int, int] = (0, 1, 2, 3)
    words: tuple[int, int, int, int] = (0, 1, 2, 3)
    elements_a_word: int = 2
    even: Callable[[Words], Words] = lambda word: word
    odd: Callable[[Words], Words] = lambda word: word * _ODD_MULTIPLIER & _MASK32
    row: int = 1
    index_bits: int = 64
    order: tuple[int, ...] | None = None
    first_block: int = 0
    inverted: bool = False
    threshold: Callable[[float], int] = lambda p: round(p * 2**32)
    decide: Callable[[Words, int], NDArray[np.bool]] = lambda u, threshold: (
        u >= np.uint64(min(threshold, 2**32))
    )

    @property
    def key(self) -> Key:
        """The key of the mask."""
        key = Key(self.seed)
        for data in self.folded:
            key = key.fold_in(data) if self.key_rounds == 10 else self._folded(key, data)
        return key

    def _folded(self, key: Key, data: int | str) -> Key:
        number, tag = (string_data(data), 2) if isinstance(data, str) else (data, 1)
        counter = number % 2**32, number >> 32, 0, tag
        lo, hi, _, _ = philox(counter, key.words, rounds=self.key_rounds)
        return Key.from_words(lo, hi)

    @property
    def arguments(self) -> str:
        """What says to ``unidrop mask`` and ``unidrop diff`` which mask is meant.

        Examples
        --------
        >>> Recipe(42, (7,), 0.5, (4, 8)).arguments
        '--seed 0x2a --step 7 --p 0.5 --shape 4x8'
        """
        named = {"--seed": f"{self.seed:#x}"}
        named |= {"--site" if isinstance(i, str) else "--step": str(i) for i in self.folded}
        named |= {"--p": repr(self.p), "--shape": _by_x(self.shape)}
        if self.broadcast_axes:
            named["--broadcast-axes"] = ",".join(map(str, self.broadcast_axes))
        if self.global_shape is not None and self.start is not None:
            named |= {"--global-shape": _by_x(self.global_shape), "--start": _by_x(self.start)}
        return " ".join(f"{name} {shlex.quote(value)}" for name, value in named.items())

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The shape of the mask: the array's, with 1 along broadcast axes."""
        return tuple(1 if i in self.broadcast_axes else n for i, n in enumerate(self.shape))

    def keep(self, positions: NDArray[np.int64]) -> NDArray[np.bool]:
        """Return what is kept at positions of the array, counted in C order."""
        kept = self.decide(self.u(self.indices(positions)), self.threshold(self.p))
        return kept ^ self.inverted

    def indices(self, positions: NDArray[np.int64]) -> Words:
        """Return the numbers, in the whole mask, of positions of the array."""
        whole = self.mask_shape if self.global_shape is None else self.global_shape
        start = self.start or (0,) * len(whole)
        lengths = [1 if i in self.broadcast_axes else n for i, n in enumerate(whole)]
        if lengths:
            lengths[-1] = math.ceil(lengths[-1] / self.row) * self.row
        index = np.zeros(positions.shape, dtype=np.uint64)
        coordinates = np.unravel_index(positions, self.shape) if self.shape else ()
        for axis in self.order or range(len(lengths)):
            index *= np.uint64(lengths[axis])
            if axis not in self.broadcast_axes:
                index += coordinates[axis].astype(np.uint64) + np.uint64(start[axis])
        return index & np.uint64(2**self.index_bits - 1)

    def u(self, index: Words) -> Words:
        """Return the numbers that decide elements."""
        word, half = np.divmod(index, np.uint64(self.elements_a_word))
        block = (word // np.uint64(4) + np.uint64(self.first_block % 2**64)).astype(np.uint64)
        chosen = np.array(self.words)[(word % np.uint64(4)).astype(np.int64)]
        words = np.choose(chosen, self._philox(block))
        return np.where(half == 0, self.even(words), self.odd(words))

    def _philox(self, block: Words) -> Sequence[Words]:
        zero = np.zeros_like(block)
        counter = (block & _MASK32, block >> _SHIFT32, zero, zero)
        x0, x1, x2, x3 = (counter[i] for i in self.counter_words)
        for k0, k1 in self._round_keys():
            p0, p1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
            x0, x1, x2, x3 = (
                (p1 >> _SHIFT32) ^ x1 ^ k0,
                p1 & _MASK32,
                (p0 >> _SHIFT32) ^ x3 ^ k1,
                p0 & _MASK32,
            )
        return x0, x1, x2, x3

    def _round_keys(self) -> Iterator[tuple[np.uint64, np.uint64]]:
        k0, k1 = (int(self.key.words[i]) for i in self.key_words)
        for number in range(self.rounds):
            yield (
                np.uint64((k0 + number * 0x9E3779B9) % 2**32),
                np.uint64((k1 + number * 0xBB67AE85) % 2**32),
            )
