"""Keys: the 64-bit numbers that name a mask, and how one key is folded into another."""

import hashlib
from typing import Any, Self

from unidrop.library import Library, get_library
from unidrop.philox import philox
from unidrop.words import checked_integer, split64

__all__ = ["Key", "check_key", "string_data"]

_TAG_INTEGER = 1
_TAG_STRING = 2


class Key:
    """The key of a mask: one 64-bit number, immutable and hashable.

    Fold in, in this order, what makes a mask your own: the site in the network, the rank (where
    replicas must differ), and the step. One key, one use: two masks of one key at two rates are
    nested, and a longer one begins with the shorter.

    Parameters
    ----------
    seed : int
        0 <= seed < 2^64, whatever `operator.index` accepts except a bool. The key is this number.

    Raises
    ------
    TypeError
        If seed is no integer.
    ValueError
        If seed is negative or 2^64 or more; nothing wraps.

    Examples
    --------
    >>> Key(42).fold_in("encoder/0").fold_in(7)
    Key(0x4569f48a8d0f18c9)
    """

    # A pair (lo, hi), or an array of these two that a library keeps as one.
    __slots__ = ("_words",)
    _words: Any

    def __init__(self, seed: int) -> None:
        hi, lo = divmod(checked_integer(seed, "seed"), 1 << 32)
        object.__setattr__(self, "_words", (lo, hi))

    @classmethod
    def from_words(cls, lo: Any, hi: Any) -> Self:
        """Return the key ``hi * 2**32 + lo`` of two words, which may be traced.

        Parameters
        ----------
        lo, hi : int or 0-d integer array
            Words in [0, 2^32). The values of arrays are not looked at; the low 32 bits are used.

        Raises
        ------
        TypeError
            If a word is neither an integer nor an array of integers.
        ValueError
            If a Python integer is not a word, or an array is not 0-d.

        Examples
        --------
        >>> Key.from_words(0xDDCCBBAA, 0x10)
        Key(0x00000010ddccbbaa)
        """
        for word, name in ((lo, "lo"), (hi, "hi")):
            if not _is_index(word):
                joined = _library_of_integer(word, name).joined(lo, hi)
                if joined is not None:
                    return cls.holding(joined)
        lo_word, hi_word = _word(lo, "lo"), _word(hi, "hi")
        if isinstance(lo_word, int) and isinstance(hi_word, int):
            return cls((hi_word << 32) + lo_word)
        if isinstance(lo_word, int):
            lo_word = _like(lo_word, hi_word)
        elif isinstance(hi_word, int):
            hi_word = _like(hi_word, lo_word)
        return cls.holding((lo_word, hi_word))

    @classmethod
    def holding(cls, words: Any) -> Self:
        """Return the key that holds its words as they are, unchecked: for a library's own trees.

        That is a pair (lo, hi), where whatever stands there for a word may be held, such as a batch
        of them, or None; or an array of shape (2,).
        """
        key = cls.__new__(cls)
        object.__setattr__(key, "_words", words)
        return key

    @property
    def words(self) -> tuple[Any, Any]:
        """The key's words ``(lo, hi)``, Python integers, or 0-d arrays of a traced key."""
        lo, hi = self._words
        return lo, hi

    @property
    def held(self) -> Any:
        """What holds the words: a pair (lo, hi), or an array of these two."""
        return self._words

    @property
    def is_traced(self) -> bool:
        """Whether the key's words are arrays, whose values may be unknown yet."""
        words = self._words
        return not (
            isinstance(words, tuple) and isinstance(words[0], int) and isinstance(words[1], int)
        )

    def fold_in(self, data: Any) -> Self:
        """Return the key made of this one and an integer or a string.

        Parameters
        ----------
        data : int, str or 0-d integer array
            An integer in [0, 2^64) (what `operator.index` accepts, except bool), or any string
            that UTF-8 can encode, the empty one included and not normalised; 7 and "7" differ.
            An array other than NumPy's is taken as traced: its value is not looked at, a 32-bit
            one is zero-extended, and the key returned is traced.

        Returns
        -------
        Key
            The first two words of Philox4x32-10 of ``(data.lo, data.hi, 0, tag)`` under this
            key, with tag 1 for integers and 2 for strings (BLAKE2b, 8 bytes, little-endian).

        Raises
        ------
        TypeError
            If data is neither, or a bool.
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
        if isinstance(data, str):
            return self._fold(split64(string_data(data)), _TAG_STRING, None)
        if _is_index(data):
            return self._fold(split64(checked_integer(data, "data")), _TAG_INTEGER, None)
        library = _library_of_integer(data, "data")
        folded = library.folded(self._words, data)
        if folded is not None:
            return type(self).holding(folded)
        return self._fold(library.split(data, "data"), _TAG_INTEGER, library)

    def _fold(self, data: tuple[Any, Any], tag: int, library: Library | None) -> Self:
        hi, lo = data
        like = self.words[0] if self.is_traced else lo
        if self.is_traced:
            library = get_library(like)
        if library is None:
            lo, hi, _, _ = philox((lo, hi, 0, tag), self._words)
            return type(self)((hi << 32) + lo)
        xp = library.namespace(like)
        lo, hi, _, _ = library.words(xp, (hi, lo), 1, self.words, tag, library.device(like))
        return type(self).holding((xp.reshape(lo, ()), xp.reshape(hi, ())))

    def __int__(self) -> int:
        if self.is_traced:
            raise TypeError("a traced Key has no value yet: use its .words")
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
    """Raise TypeError unless key is a `Key`, and ValueError if it is a batch of them."""
    if not isinstance(key, Key):
        raise TypeError(
            "key has to be a unidrop.Key, such as Key(42).fold_in(step), "
            f"but got {key!r} of type {type(key).__name__}"
        )
    if not (isinstance(key.held, tuple) and key.is_traced):
        return
    for word in key.held:
        shape = () if isinstance(word, int) else get_library(word, "key").shape(word)
        if shape != ():
            raise ValueError(
                f"key has to be one key, but got a batch of them, of shape {shape}: map the "
                "function that calls dropout over them, as vmap does"
            )


def _is_index(value: object) -> bool:
    """Tell whether a value's number may be read now: Python's and NumPy's integers, and the like.

    An array of another library is left unread even where it could be: reading it would stop a
    trace, or wait for a device.
    """
    # A subclass of int may have a dtype, as one has that stands for a constant of a trace. These
    # questions, in this order, are what a compiler can answer of what it traces.
    if isinstance(value, int):
        return True
    if hasattr(value, "dtype"):
        return type(value).__module__.partition(".")[0] == "numpy"
    return hasattr(value, "__index__")


def _like(word: int, array: Any) -> Any:
    """Return a Python word as an array like another word."""
    library = get_library(array)
    words = library.arithmetic(library.namespace(array), library.device(array))
    return (array & 0) | words.constant(word)


def string_data(data: str) -> int:
    """Return the number that a string folds as: BLAKE2b of its UTF-8 bytes, of 8 bytes.

    Raises
    ------
    ValueError
        If the string has a lone surrogate.
    """
    try:
        encoded = data.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"data has to be a string that UTF-8 can encode, but got {data!r}: {error.reason}"
        ) from None
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def _word(value: Any, name: str) -> Any:
    if _is_index(value):
        return checked_integer(value, name, bits=32)
    return _library_of_integer(value, name).split(value, name)[1]


def _library_of_integer(value: Any, name: str) -> Library:
    if not hasattr(value, "dtype"):
        raise TypeError(
            f"{name} has to be an integer, a string or a 0-d integer array, "
            f"but got {value!r} of type {type(value).__name__}"
        )
    return get_library(value)
