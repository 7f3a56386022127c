"""Model the stream with every choice as a parameter, to find the choice that differs.

The model serves the diagnosis only: it is slow, and computes in 64-bit integers of NumPy. Call
`unidrop.keep_mask` for masks. The section numbers refer to the specification, docs/spec.md.
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


Words = NDArray[np.uint64]

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_INCREMENTS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_ODD_MULTIPLIER = np.uint64(0x6C078965)


@dataclass(frozen=True, slots=True)
class StreamModel:
    """A mask, with every choice that determines it; the defaults follow the specification.

    Attributes
    ----------
    seed : int
    folded : tuple of int or str
        Data folded into the key of the seed, in order (sections 3 and 9).
    p : float
    shape : tuple of int
        Shape of the array.
    broadcast_axes : tuple of int
        Non-negative axes (section 11).
    global_shape, start : tuple of int, or None
        Window (section 12).
    rounds, key_rounds : int
        Rounds of the generator (section 2) for masks and for keys.
    fold_counter : tuple of int
        Indices into (lo(d), hi(d), 0, tag) that form the counter of fold_in (section 3).
    fold_tags : tuple of int
        Tags of integers and of strings.
    fold_words : tuple of int
        Indices into the generator's four words and 0 that form the new key.
    digest : callable
        Maps a string to d.
    fold_integer : callable, or None
        Maps a key and an integer to the new key, if fold_in does not use the generator.
    key_words : tuple of int
        Indices into the key's words that form the generator's key.
    counter_words : tuple of int
        Indices into (lo(block), hi(block), *upper_words, 0) that form the counter of a mask.
    upper_words : tuple of int
        Third and fourth word of a mask's counter.
    words : tuple of int
        Indices of the words that decide the elements 0 and 1, 2 and 3, and so on (section 5).
    elements_per_word : int
        Number of elements that one word decides.
    odd, even : callable
        Map a word to the u of an odd and of an even element.
    row_multiple : int
        The last axis is padded to a multiple of this number before elements are numbered.
    tile : int, or None
        The last axis is cut into tiles of this length, and each is numbered like a whole array.
    index_bits : int
        Number of bits of an element's index.
    order : tuple of int, or None
        Axes of the mask from slowest to fastest; C order if None (section 4).
    first_block : int
        Block of the index 0.
    is_inverted : bool
        If True, 1 means dropped.
    threshold : callable
        Maps p to T (section 6).
    keep_flags : callable
        Maps u and T to the flags of kept elements (section 7).
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
    upper_words: tuple[int, int] = (0, 0)
    words: tuple[int, int, int, int] = (0, 1, 2, 3)
    elements_per_word: int = 2
    even: Callable[[Words], Words] = lambda word: word
    odd: Callable[[Words], Words] = lambda word: word * _ODD_MULTIPLIER & _MASK32
    row_multiple: int = 1
    tile: int | None = None
    index_bits: int = 64
    order: tuple[int, ...] | None = None
    first_block: int = 0
    is_inverted: bool = False
    threshold: Callable[[float], int] = lambda p: round(p * 2**32)
    keep_flags: Callable[[Words, int], NDArray[np.bool]] = lambda u, threshold: (
        u >= np.uint64(min(threshold, 2**32))
    )

    @property
    def key(self) -> Key:
        """The key of the mask."""
        key = int(Key(self.seed))
        for data in self.folded:
            key = self._fold_in(key, data)
        return Key(key)

    def _fold_in(self, key: int, data: int | str) -> int:
        if isinstance(data, str):
            number, tag = self.digest(data), self.fold_tags[1]
        elif self.fold_integer is not None:
            return self.fold_integer(key, data)
        else:
            number, tag = data, self.fold_tags[0]
        unordered = number % 2**32, number >> 32, 0, tag
        c0, c1, c2, c3 = (unordered[i] for i in self.fold_counter)
        words = philox((c0, c1, c2, c3), (key % 2**32, key >> 32), rounds=self.key_rounds)
        lo, hi = ((*words, 0)[i] for i in self.fold_words)
        return int(hi) << 32 | int(lo)

    @property
    def cli_arguments(self) -> str:
        """The arguments that select this mask in ``unidrop mask`` and ``unidrop diff``.

        Examples
        --------
        >>> StreamModel(42, (7,), 0.5, (4, 8)).cli_arguments
        '--seed 0x2a --step 7 --p 0.5 --shape 4x8'
        """
        options = {"--seed": f"{self.seed:#x}"}
        options |= {"--site" if isinstance(i, str) else "--step": str(i) for i in self.folded}
        options |= {"--p": repr(self.p), "--shape": _format_shape(self.shape)}
        if self.broadcast_axes:
            options["--broadcast-axes"] = ",".join(map(str, self.broadcast_axes))
        if self.global_shape is not None and self.start is not None:
            options["--global-shape"] = _format_shape(self.global_shape)
            options["--start"] = _format_shape(self.start)
        return " ".join(f"{name} {shlex.quote(value)}" for name, value in options.items())

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The array's shape with length 1 along broadcast axes."""
        return tuple(1 if i in self.broadcast_axes else n for i, n in enumerate(self.shape))

    def keep(self, positions: NDArray[np.int64]) -> NDArray[np.bool]:
        """Return the flags of kept elements at flat C-order positions in the array."""
        keep = self.keep_flags(self.u(self.indices(positions)), self.threshold(self.p))
        return keep ^ self.is_inverted

    def indices(self, positions: NDArray[np.int64]) -> Words:
        """Map flat C-order positions in the array to indices in the global mask."""
        whole = self.mask_shape if self.global_shape is None else self.global_shape
        start = self.start or (0,) * len(whole)
        lengths = [1 if i in self.broadcast_axes else n for i, n in enumerate(whole)]
        if lengths:
            lengths[-1] = math.ceil(lengths[-1] / self.row_multiple) * self.row_multiple
        index = np.zeros(positions.shape, dtype=np.uint64)
        coordinates = np.unravel_index(positions, self.shape) if self.shape else ()
        for axis in self.order or range(len(lengths)):
            if axis == len(lengths) - 1 and self.tile:
                first = coordinates[axis] // self.tile * self.tile
                index *= np.minimum(self.tile, lengths[axis] - first).astype(np.uint64)
                index += (coordinates[axis] - first).astype(np.uint64)
                continue
            index *= np.uint64(lengths[axis])
            if axis not in self.broadcast_axes:
                index += coordinates[axis].astype(np.uint64) + np.uint64(start[axis])
        return index & np.uint64(2**self.index_bits - 1)

    def u(self, index: Words) -> Words:
        """Return the u of each index: the number that is compared with the threshold."""
        word, half = np.divmod(index, np.uint64(self.elements_per_word))
        block = (word // np.uint64(4) + np.uint64(self.first_block % 2**64)).astype(np.uint64)
        chosen = np.array(self.words)[(word % np.uint64(4)).astype(np.int64)]
        words = np.choose(chosen, self._philox(block))
        return np.where(half == 0, self.even(words), self.odd(words))

    def _philox(self, block: Words) -> Sequence[Words]:
        rest = (np.full_like(block, word) for word in (*self.upper_words, 0))
        counter = (block & _MASK32, block >> _SHIFT32, *rest)
        # Stacking words 0 and 2, and words 1 and 3, halves the number of NumPy calls.
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


def _format_shape(lengths: Sequence[int]) -> str:
    return "x".join(map(str, lengths))
