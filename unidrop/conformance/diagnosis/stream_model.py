"""The stream with every choice of it as a parameter, to find the one that somebody made otherwise.

It is written for this alone, in NumPy's 64-bit integers, and slow: `unidrop.keep_mask` is the mask.
Section numbers are those of the specification, docs/spec.md.
"""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unidrop.key import Key, string_data
from unidrop.philox import philox

__all__ = ["StreamModel"]


def _by_x(lengths: Sequence[int]) -> str:
    return "x".join(map(str, lengths))


Words = NDArray[np.uint64]

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_INCREMENTS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_ODD_MULTIPLIER = np.uint64(0x6C078965)


@dataclass(frozen=True, slots=True)
class StreamModel:
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
    fold_counter : tuple of int
        Which word of (lo(d), hi(d), 0, tag) stands where in the counter that folds d (section 3).
    fold_tags : tuple of int
        The tag of an integer, and that of a string.
    fold_words : tuple of int
        Which of the four words that the generator gives, and of 0 behind them, make the new key.
    digest : callable
        From a string to d.
    fold_integer : callable, or None
        From a key and an integer to the new key, where it is made otherwise.
    key_words : tuple of int
        Which word of the key stands where in the generator's.
    counter_words : tuple of int
        Which word of (lo(block), hi(block), upper 0, upper 1), and of 0 behind them, stands where.
    upper : tuple of int
        The third and the fourth word of a mask's counter.
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
    fold_counter: tuple[int, int, int, int] = (0, 1, 2, 3)
    fold_tags: tuple[int, int] = (1, 2)
    fold_words: tuple[int, int] = (0, 1)
    digest: Callable[[str], int] = string_data
    fold_integer: Callable[[int, int], int] | None = None
    key_words: tuple[int, int] = (0, 1)
    counter_words: tuple[int, int, int, int] = (0, 1, 2, 3)
    upper: tuple[int, int] = (0, 0)
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
        key = int(Key(self.seed))
        for data in self.folded:
            key = self._folded(key, data)
        return Key(key)

    def _folded(self, key: int, data: int | str) -> int:
        if isinstance(data, str):
            number, tag = self.digest(data), self.fold_tags[1]
        elif self.fold_integer is not None:
            return self.fold_integer(key, data)
        else:
            number, tag = data, self.fold_tags[0]
        given = number % 2**32, number >> 32, 0, tag
        c0, c1, c2, c3 = (given[i] for i in self.fold_counter)
        made = philox((c0, c1, c2, c3), (key % 2**32, key >> 32), rounds=self.key_rounds)
        lo, hi = ((*made, 0)[i] for i in self.fold_words)
        return int(hi) << 32 | int(lo)

    @property
    def arguments(self) -> str:
        """What says to ``unidrop mask`` and ``unidrop diff`` which mask is meant.

        Examples
        --------
        >>> StreamModel(42, (7,), 0.5, (4, 8)).arguments
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
        rest = (np.full_like(block, word) for word in (*self.upper, 0))
        counter = (block & _MASK32, block >> _SHIFT32, *rest)
        # Words 0 and 2, and 1 and 3, side by side: half as many operations.
        even, odd = (np.stack([counter[i] for i in self.counter_words[j::2]]) for j in (0, 1))
        for key in self._round_keys(self.key.words):
            product = (even * _MULTIPLIERS)[::-1]
            even, odd = (product >> _SHIFT32) ^ odd ^ key, product & _MASK32
        return even[0], odd[0], even[1], odd[1]

    def _round_keys(self, key: tuple[int, int]) -> Words:
        words = np.array([[key[i]] for i in self.key_words], dtype=np.uint64)
        number = np.arange(self.rounds, dtype=np.uint64).reshape(-1, 1, 1)
        keys: Words = (words + number * _INCREMENTS) & _MASK32
        return keys
