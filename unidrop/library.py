"""What the core must know of an array library beyond the array API standard.

Requirements this design meets:

* The core imports no framework and names none. A library that follows the standard, through
  array-api-compat or by itself, needs nothing: `Library` describes it.
* One that differs (it is traced, has its own gradient or Philox, no standard namespace, or knows
  where its elements lie) says so in a subclass, found through the entry-point group
  ``unidrop.libraries`` by the top-level module of its array class, and imported only when such an
  array arrives.
* A type seen once is looked up in a dictionary ever after.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat
import numpy

from unidrop.dtypes import integer_bits
from unidrop.philox import PhiloxBlock, keep_flags, philox
from unidrop.words import Pair, Uint32Words, Words, add_pairs, arange64, get_words

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["Library", "Memory", "Replica", "get_library", "get_namespace_library"]


class Memory(NamedTuple):
    """Where an array's elements lie in this process's memory.

    Attributes
    ----------
    address : int
        Of the first element.
    strides : tuple of int or None
        How many elements apart neighbours along each axis are; None means C order, no gaps.
    """

    address: int
    strides: tuple[int, ...] | None


class Replica(NamedTuple):
    """Which of several replicas, that run one step on parts of a batch, an array belongs to.

    Attributes
    ----------
    rank : int or 0-d integer array
        The replica's number.
    window : (global_shape, start) or None
        Where the array lies in that of all replicas, if that is known: one behind the other along
        the first axis, whose length in ``global_shape`` only bounds what it may be.
    """

    rank: Any
    window: tuple[tuple[int, ...], tuple[Any, ...]] | None


class Library:
    """A library that follows the array API standard; the base class of those that differ.

    The last five methods are for libraries whose arrays lie in this process's memory, so that
    fused kernels can read and write them; `allocate_like`, `finished` and `from_numpy` are called
    only where `memory` has returned a `Memory`.
    """

    def namespace(self, x: Any) -> Any:
        """Return the standard's namespace for an array of this library."""
        return array_api_compat.array_namespace(x)

    def device(self, x: Any) -> Any:
        """Return where new arrays that meet x have to be made; None is the default device."""
        return array_api_compat.device(x)

    def shape(self, x: Any) -> tuple[Any, ...]:
        """Return the shape of x: integers, or what stands for one that is not known yet."""
        return tuple(x.shape)

    def is_traced(self, x: Any) -> bool:
        """Tell whether operations on x are recorded rather than run.

        What is recorded is one expression; what runs at once is done in cache-sized pieces.
        """
        return bool(array_api_compat.is_lazy_array(x))

    def is_mutable(self, x: Any) -> bool:
        """Tell whether items of x may be assigned."""
        return bool(array_api_compat.is_writeable_array(x))

    def arithmetic(self, xp: Any, device: Any) -> Words:
        """Return how this library's integers hold words."""
        return get_words(xp, device)

    def words(
        self, xp: Any, first: Pair, count: Any, key: tuple[Any, Any], tag: int, device: Any
    ) -> PhiloxBlock:
        """Return the words of consecutive Philox blocks.

        Parameters
        ----------
        xp : namespace
        first : (hi, lo)
            The number of the first block: Python integers or 0-d arrays; or arrays of shape
            (rows, 1), and each row has blocks of its own.
        count : int
            The number of blocks.
        key : (lo, hi)
            The key's words: Python integers or 0-d arrays.
        tag : int
            The counter's last word.
        device : device
            Where to make them.

        Returns
        -------
        four arrays of shape (count,) or (rows, count)
            In the dtype of `arithmetic`.
        """
        words = self.arithmetic(xp, device)
        base = tuple(words.constant(w) if isinstance(w, int) else w for w in first)
        hi, lo = add_pairs(words, base, arange64(words, count, device))
        zero = xp.zeros((1,), dtype=words.dtype, device=device)
        return philox((lo, hi, zero, zero + words.constant(tag)), key, words)

    def keep_flags(
        self, xp: Any, first: Pair, count: Any, key: tuple[Any, Any], threshold: int, device: Any
    ) -> Any:
        """Return the decisions of consecutive blocks of a mask, flat: eight a block.

        Parameters
        ----------
        xp : namespace
        first : (hi, lo)
            The number of the first block: Python integers or 0-d arrays; or arrays of shape
            (rows, 1), and each row has blocks of its own.
        count : int
            The number of blocks, in each row.
        key : (lo, hi)
            The key's words: Python integers or 0-d arrays.
        threshold : int
            0 < threshold < 2^32.
        device : device
            Where to make them.
        """
        # A library's own generator counts one run of blocks.
        is_one_run = isinstance(first[0], int) or self.shape(first[0]) == ()
        args = (xp, first, count, key, 0, device)
        four = self.words(*args) if is_one_run else Library.words(self, *args)
        return keep_flags(xp, self.arithmetic(xp, device), four, threshold)

    def width(self, value: Any, name: str) -> int:
        """Return how many bits a 0-d integer array has.

        Raises
        ------
        TypeError
            If the dtype of value is no integer's.
        ValueError
            If value is not 0-d.
        """
        bits = integer_bits(value.dtype)
        if bits is None:
            raise TypeError(f"{name} has to be an integer, but got an array of dtype {value.dtype}")
        if self.shape(value) != ():
            raise ValueError(f"{name} has to be 0-d, but got shape {self.shape(value)}")
        return bits

    def split(self, value: Any, name: str) -> Pair:
        """Return a 0-d integer array as ``(hi, lo)`` 0-d words, zero-extended from its width.

        Raises
        ------
        TypeError, ValueError
            As `width`; and ValueError if value has 64 bits where there are no such words.
        """
        bits = self.width(value, name)
        words = self.arithmetic(self.namespace(value), self.device(value))
        if bits == 64 and isinstance(words, Uint32Words):
            raise ValueError(
                f"{name} has dtype {value.dtype}, but there are no 64-bit integers here and now: "
                "give it as a 32-bit one"
            )
        return words.split(value, bits)

    def complex(self, xp: Any, real: Any, imag: Any) -> Any:
        """Return the complex array of two real ones, each component kept to the bit.

        The standard has no such function, and ``real + 1j * imag`` loses infinities and zeros'
        signs. Namespaces with ``complex`` have it; elsewhere ``xp.real`` is a view that can be
        written through.
        """
        if hasattr(xp, "complex"):
            return xp.complex(real, imag)
        dtype = xp.complex64 if real.dtype == xp.float32 else xp.complex128
        if array_api_compat.is_lazy_array(real):
            raise TypeError(
                f"x of a complex dtype needs a library with a function complex(real, imag), "
                f"which {xp.__name__} lacks"
            )
        z = xp.empty(real.shape, dtype=dtype, device=self.device(real))
        xp.real(z)[...] = real
        xp.imag(z)[...] = imag
        return z

    def match_strides(self, y: Any, x: Any) -> Any:
        """Return y in x's memory layout, where the library's users expect that to be kept."""
        return y

    def linear(self, x: Any, forward: Callable[[Any], Any], transpose: Callable[[Any], Any]) -> Any:
        """Return ``forward(x)`` for a linear function, differentiated by ``transpose``.

        A library with a gradient overrides this, so that its backward pass calls
        ``transpose(upstream)`` and keeps nothing of the forward pass. Here it is left to whatever
        differentiates forward's own operations.
        """
        return forward(x)

    def recorded(self, x: Any, p: float, key: Any, window: Any) -> Any:
        """Return the output as one operator of what traces x, which is differentiated as one.

        It is asked first, and only where x is traced; None leaves x to `linear`, kernels and
        `compiled`. A library whose compiler would keep what lies between its operations, as a mask,
        has one.
        """
        return None

    def compiled(self, x: Any, rate: Any, key: Any, window: Any) -> Any:
        """Return the output as one program in place of single operations, or None.

        It is asked last, where kernels can't take x, traced or not, and something is to be dropped.
        A library whose operations are slow one by one, or whose gradient keeps what lies between
        them, has one.
        """
        return None

    def recorded_mask(self, like: Any, p: float, key: Any, window: Any) -> Any:
        """Return the mask as one operator of what traces an array like this, or None."""
        return None

    def joined(self, lo: Any, hi: Any) -> Any | None:
        """Return the words of a key as one array of shape (2,), made by one operator, or None.

        It is asked before the words are split, of which one at least is this library's, and raises
        what `width` does.
        """
        return None

    def folded(self, key: Any, data: Any) -> Any | None:
        """Return a key and an array as the words of another, made by one operator, or None.

        It is asked before the array is split, and raises what `width` does. The words are what a
        `Key` holds: a pair, or an array of shape (2,).
        """
        return None

    def counted(self, state: Any) -> Any | None:
        """Return a seed and a call number ``[seed, calls]`` with one call more, or None.

        A library has one where what else makes the sum would be long to trace.
        """
        return None

    def replica(self, x: Any) -> Replica | None:
        """Return which of several replicas x belongs to; None where there is one alone.

        A library that itself runs one step in several replicas overrides this; they all have to
        call it together, since they may have to tell each other how long their parts are.
        """
        return None

    def memory(self, x: Any) -> Memory | str:
        """Return where the elements of x lie, or why they can't be reached."""
        return "its library does not say where an array's elements lie"

    def allocate_like(self, x: Any) -> tuple[Any, Memory]:
        """Return something like x to be written, and where; neither gaps nor values are in it."""
        raise TypeError(f"{type(self).__name__} has no memory, and so no output in it")

    def finished(self, output: Any, x: Any) -> Any:
        """Return the array of what `allocate_like` returned for x, now that it is written."""
        return output

    def assign(self, out: Any, x: Any) -> None:
        """Write the elements of x to an array or an output of the same shape and dtype."""
        out[...] = x

    def from_numpy(self, mask: numpy.ndarray[Any, Any], device: Any) -> Any:
        """Return the array, on a device of the CPU, of a NumPy array that nobody else has."""
        return mask


_NOT_AN_ARRAY = (
    "{name} has to be an array of NumPy, PyTorch, TensorFlow, JAX or another library that follows "
    "the array API standard, but got {kind}"
)
_STANDARD = Library()
_by_type: dict[type, Library] = {}


def get_library(x: Any, name: str = "x") -> Library:
    """Return the library of an array.

    Raises
    ------
    TypeError
        If x is no array of a library that follows the standard or is registered; names the
        argument.
    """
    library = _by_type.get(type(x))
    if library is None:
        library = _by_type[type(x)] = _find(x, name)
    return library


def get_namespace_library(xp: Any) -> tuple[Library, Any]:
    """Return the library of a namespace as users name it, and the namespace the core uses.

    Examples
    --------
    >>> import numpy
    >>> _, xp = get_namespace_library(numpy)
    >>> xp.__name__
    'array_api_compat.numpy'
    """
    if not hasattr(xp, "zeros"):
        raise TypeError(f"xp has to be an array namespace such as numpy or torch, but got {xp!r}")
    probe = xp.zeros((0,))
    library = get_library(probe, "xp.zeros((0,))")
    return library, library.namespace(probe)


def _find(x: Any, name: str) -> Library:
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        raise TypeError(_NOT_AN_ARRAY.format(name=name, kind=type(x).__name__))
    roots = [base.__module__.partition(".")[0] for base in type(x).__mro__]
    for root in roots:
        if root in _registered():
            return _load(_registered()[root].value)
    if array_api_compat.is_array_api_obj(x):
        return _STANDARD
    raise TypeError(_NOT_AN_ARRAY.format(name=name, kind=type(x).__name__))


@cache
def _registered() -> "dict[str, EntryPoint]":
    # Imported when the first array arrives: it takes as long as a third of NumPy.
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group="unidrop.libraries")}


@cache
def _load(value: str) -> Library:
    point = next(point for point in _registered().values() if point.value == value)
    library: Library = point.load()()
    return library
