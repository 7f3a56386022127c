"""Keys: the 64-bit numbers that name masks, and how data is folded into them."""

import hashlib
import operator
from collections.abc import Callable
from typing import Any, Self

from unidrop.arguments import NUMPY_TYPES, checked_integer
from unidrop.library import get_library
from unidrop.philox import philox
from unidrop.protocols import ArrayLibrary
from unidrop.words import MASK32, SplitInteger, split64

__all__ = ["Key", "check_key", "fold_number", "set_compiled_fold", "string_data"]

_TAG_INTEGER = 1
_TAG_STRING = 2

_compiled_fold: Callable[[int, int, int], int] | None = None


class Key:
    """The key of a mask: one 64-bit number, immutable and hashable.

    Fold in the site in the network, the rank (if replicas must differ) and the step, in this
    order. Use each key once: under one key, a lower rate keeps all that a higher rate keeps, and a
    longer mask begins with the shorter one.

    Parameters
    ----------
    seed : int
        The key itself, 0 <= seed < 2^64. Anything that `operator.index` accepts, except a bool.

    Raises
    ------
    TypeError
        If seed is not an integer.
    ValueError
        If seed is negative or 2^64 or more; nothing wraps.

    Examples
    --------
    >>> Key(42).fold_in("encoder/0").fold_in(7)
    Key(0x4569f48a8d0f18c9)
    """

    # Two words, or one array of shape (2,) if a library packs them.
    __slots__ = ("_words",)
    _words: Any

    def __init__(self, seed: int) -> None:
        hi, lo = split64(checked_integer(seed, "seed"))
        object.__setattr__(self, "_words", (lo, hi))

    @classmethod
    def from_words(cls, lo: Any, hi: Any) -> Self:
        """Return the key ``hi * 2**32 + lo`` of two words, which may be traced.

        Parameters
        ----------
        lo, hi : int or 0-d integer array
            Words in [0, 2^32). Values of arrays are not read; only their low 32 bits count.

        Raises
        ------
        TypeError
            If a word is neither an integer nor an array of integers.
        ValueError
            If a Python integer is outside [0, 2^32), or an array is not 0-d.

        Examples
        --------
        >>> Key.from_words(0xDDCCBBAA, 0x10)
        Key(0x00000010ddccbbaa)
        """
        for word, name in ((lo, "lo"), (hi, "hi")):
            if not _is_index(word):
                packed = _get_integer_library(word, name).operator.pack_key(lo, hi)
                if packed is not None:
                    return cls._from_raw_words(packed)
        lo_word, hi_word = _as_word(lo, "lo"), _as_word(hi, "hi")
        if isinstance(lo_word, int) and not isinstance(hi_word, int):
            lo_word = _as_array_word(lo_word, hi_word)
        elif isinstance(hi_word, int) and not isinstance(lo_word, int):
            hi_word = _as_array_word(hi_word, lo_word)
        return cls._from_raw_words((lo_word, hi_word))

    @classmethod
    def _from_raw_words(cls, words: Any) -> Self:
        """Return a key of unchecked words: ``(lo, hi)``, or an array of shape (2,).

        An adapter that registers keys as a pytree passes whatever a transformation puts in place of
        a word, such as a batch or None.
        """
        key = cls.__new__(cls)
        object.__setattr__(key, "_words", words)
        return key

    @property
    def words(self) -> tuple[Any, Any]:
        """The words ``(lo, hi)`` of the key: Python integers, or 0-d arrays if it is traced."""
        lo, hi = self._words
        return lo, hi

    @property
    def is_traced(self) -> bool:
        """Whether the words of the key are arrays, whose values may not be known yet."""
        words = self._words
        # A bool may be in the place of a word, where a tree of flags has the structure of a key.
        return not (isinstance(words, tuple) and type(words[0]) is type(words[1]) is int)

    def fold_in(self, data: Any) -> Self:
        """Return the key made of this one and an integer or a string.

        Parameters
        ----------
        data : int, str or 0-d integer array
            An integer in [0, 2^64) (anything that `operator.index` accepts, except a bool), or
            any string that UTF-8 can encode. Strings are not normalized; 7 and "7" differ. Arrays
            other than NumPy's count as traced: their values are not read, narrow integers are
            zero-extended, and the returned key is traced.

        Returns
        -------
        Key
            The first two words of Philox4x32-10 of ``(data.lo, data.hi, 0, tag)`` under this
            key, with tag 1 for integers and 2 for strings. The data of a string is the 8-byte
            BLAKE2b digest of its UTF-8 bytes, read little-endian.

        Raises
        ------
        TypeError
            If data is a bool, or neither an integer nor a string.
        ValueError
            If an integer is negative or too large, a string has a lone surrogate, or an array is
            not 0-d.

        Examples
        --------
        >>> Key(0).fold_in("")
        Key(0x916cf6162038707f)
        >>> Key(2**64 - 1).fold_in(2**64 - 1)
        Key(0xa1951b70d619276d)
        """
        tag = _TAG_INTEGER
        if type(data) is int and 0 <= data < 1 << 64:  # the call number of a layer
            data = operator.index(data)  # which compilers treat as a constant, not as a symbol
        elif isinstance(data, str):
            data, tag = string_data(data), _TAG_STRING
        elif _is_index(data):
            data = checked_integer(data, "data")
        return self._fold(data, tag)

    def _fold(self, data: Any, tag: int) -> Self:
        """Return the key made of this one and an integer in [0, 2^64), or a 0-d array."""
        split = None
        if not isinstance(data, int):
            library = _get_integer_library(data, "data")
            words = library.operator.fold_in(self._words, data, tag)
            if words is not None:
                return self._from_raw_words(words)
            xp, device = library.arrays.namespace(data), library.arrays.device(data)
            split = library.words.split(xp, device, data, "data")
            if not self.is_traced:
                return self._generate(library, xp, device, split, tag)
        if not self.is_traced:
            lo, hi = self._words
            number = fold_number(hi << 32 | lo, data, tag)
            return self._from_raw_words((number & MASK32, number >> 32))
        word, _ = self.words
        library = get_library(word)
        if split is None:
            words = library.operator.fold_in_constant(self._words, data, tag)
            if words is not None:
                return self._from_raw_words(words)
        xp, device = library.arrays.namespace(word), library.arrays.device(word)
        return self._generate(library, xp, device, split or split64(data), tag)

    def _generate(
        self, library: ArrayLibrary, xp: Any, device: Any, data: SplitInteger, tag: int
    ) -> Self:
        lo, hi, _, _ = library.words.generate(xp, device, data, 1, self.words, tag)
        return self._from_raw_words((xp.reshape(lo, ()), xp.reshape(hi, ())))

    def __int__(self) -> int:
        if self.is_traced:
            raise TypeError("the number of a Key made of arrays is not read: use its .words")
        lo, hi = self._words
        return int(hi) << 32 | int(lo)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        if self.is_traced or other.is_traced:
            return self is other
        return int(self) == int(other)

    def __hash__(self) -> int:
        return id(self) if self.is_traced else hash((Key, self._words))

    def __repr__(self) -> str:
        if self.is_traced:
            lo, hi = self.words
            return f"Key.from_words(lo={lo!r}, hi={hi!r})"
        return f"Key(0x{int(self):016x})"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Key is immutable: cannot set {name!r}; fold_in makes another")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Key is immutable: cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        if self.is_traced:
            return type(self).from_words, self.words
        return type(self), (int(self),)


def check_key(key: object) -> None:
    """Raise TypeError unless key is a `Key`, and ValueError if it is a batch of keys."""
    if not isinstance(key, Key):
        raise TypeError(
            "key must be a unidrop.Key, such as Key(42).fold_in(step), "
            f"got {key!r} of type {type(key).__name__}"
        )
    words = key._words
    if isinstance(words, tuple):
        for word in words:
            if type(word) is not int:
                check_array_words(word)
                _check_scalar_word(word)


def check_array_words(*words: Any) -> None:
    """Raise TypeError unless words of a key are arrays or integers, not what a tree may hold."""
    for word in words:
        if type(word) is not int and not hasattr(word, "dtype"):
            raise TypeError(f"key must be a Key of two words, got one with {word!r} in their place")


def _check_scalar_word(word: Any) -> None:
    shape = get_library(word, "key").arrays.shape(word)
    if shape != ():
        raise ValueError(
            f"key must be one key, got a batch of them, of shape {shape}: map the function that "
            "calls dropout over the batch, as vmap does"
        )


def _is_index(value: object) -> bool:
    """Return whether the number of a value can be read now, as Python and NumPy integers can.

    Arrays of other libraries stay unread even if they have a value: reading one would stop a trace
    or wait for a device.
    """
    # Keep this order, which compilers can trace. A subclass of int with a dtype stands for a
    # constant of a trace.
    if isinstance(value, int):
        return True
    if hasattr(value, "dtype"):
        return isinstance(value, NUMPY_TYPES)
    return hasattr(value, "__index__")


def _as_array_word(word: int, array: Any) -> Any:
    """Return a Python word as an array, with the dtype and on the device of another word."""
    library = get_library(array)
    xp, device = library.arrays.namespace(array), library.arrays.device(array)
    return (array & 0) | library.words.arithmetic(xp, device).constant(word)


def fold_number(key: int, data: int, tag: int) -> int:
    """Return the key made of a key and data, three integers below 2^64."""
    if _compiled_fold is not None:
        return _compiled_fold(key, data, tag)
    lo, hi, _, _ = philox((data & MASK32, data >> 32, 0, tag), (key & MASK32, key >> 32))
    folded: int = hi << 32 | lo
    return folded


def set_compiled_fold(fold: Callable[[int, int, int], int]) -> None:
    """Let `fold_number` call a compiled function with its arguments and result.

    `unidrop.fused` sets one with its first kernel. A layer folds its call number into its key at
    every call, and Python integers take three times as long.
    """
    global _compiled_fold
    _compiled_fold = fold


def string_data(data: str) -> int:
    """Return the number that stands for a string: the 8-byte BLAKE2b digest of its UTF-8 bytes.

    Raises
    ------
    ValueError
        If the string has a lone surrogate.
    """
    try:
        encoded = data.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"data must be a string that UTF-8 can encode, got {data!r}: {error.reason}"
        ) from None
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def _as_word(value: Any, name: str) -> Any:
    if _is_index(value):
        return checked_integer(value, name, bits=32)
    return _get_integer_library(value, name).split(value, name)[1]


def _get_integer_library(value: Any, name: str) -> ArrayLibrary:
    if not hasattr(value, "dtype"):
        accepted = "an integer, a string or a 0-d integer array"
        if name != "data":
            accepted = "an integer or a 0-d integer array"
        raise TypeError(f"{name} must be {accepted}, got {value!r} of type {type(value).__name__}")
    return get_library(value)
