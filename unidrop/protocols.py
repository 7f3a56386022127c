"""What the core asks of an array library: four small protocols and their defaults.

The defaults serve every library that follows the array API standard. A library that differs
overrides methods of a protocol and registers an `ArrayLibrary`; see `unidrop.library`.

* `Arrays` fills gaps of the standard: the namespace, whether an array is traced, complex numbers.
* `Words` holds the generator's 32-bit words in the library's integers.
* `Operator` makes dropout one differentiable operation of the library.
* `Buffers` locates elements in this process's memory, or on a GPU, for the fused kernels.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat
import numpy

from unidrop.dtypes import integer_bits
from unidrop.philox import PhiloxBlock, keep_flags, philox
from unidrop.threads import fork_guard
from unidrop.words import (
    SplitInteger,
    Uint32Words,
    WordArithmetic,
    add_split,
    arange64,
    get_word_arithmetic,
)

if TYPE_CHECKING:
    from unidrop.key import Key
    from unidrop.plan import DropoutPlan
    from unidrop.rate import Rate
    from unidrop.window import Window

__all__ = ["ArrayLibrary", "Arrays", "Buffer", "Buffers", "DeviceBuffer", "Operator", "Words"]


_DLPACK_CPU = 1


class Arrays:
    """Gaps of the array API standard, filled for one library."""

    def check_type(self, kind: type, name: str) -> None:
        """Raise TypeError, naming the argument, for a class of arrays that dropout would break."""

    def check(self, x: Any, name: str) -> None:
        """Raise TypeError, naming the argument, for an array that dropout would break."""
        return  # a framework that transforms source needs a statement

    def namespace(self, x: Any) -> Any:
        """Return the standard's namespace for an array."""
        with fork_guard:  # array-api-compat imports a library's namespace at its first call
            return array_api_compat.array_namespace(x)

    def device(self, x: Any) -> Any:
        """Return the device for new arrays that are combined with x; None is the default device."""
        return array_api_compat.device(x)

    def shape(self, x: Any) -> tuple[Any, ...]:
        """Return the shape: integers, or a symbol for each length that is not known yet."""
        return tuple(x.shape)

    def is_traced(self, x: Any) -> bool:
        """Return whether operations on x are recorded rather than run.

        If True, the core writes one expression; if False, it computes in pieces.
        """
        return bool(array_api_compat.is_lazy_array(x))

    def is_on_cpu(self, x: Any) -> bool:
        """Return whether eager operations on x run on the CPU, by the standard's DLPack device.

        If True, the core computes in cache-sized pieces; if False, in pieces of so many elements
        that an operation takes longer than its launch.
        """
        if not hasattr(x, "__dlpack_device__"):
            return True
        device, _ = x.__dlpack_device__()
        return int(device) == _DLPACK_CPU

    def is_mutable(self, x: Any) -> bool:
        """Return whether items of x can be assigned."""
        return bool(array_api_compat.is_writeable_array(x))

    def complex(self, xp: Any, real: Any, imag: Any) -> Any:
        """Return the complex array of two real ones, exact in every bit of each component.

        The standard has no such function, and ``real + 1j * imag`` loses infinities and the signs
        of zeros. Without ``xp.complex``, ``xp.real`` must be a view that can be written through.
        """
        if hasattr(xp, "complex"):
            return xp.complex(real, imag)
        dtype = xp.complex64 if real.dtype == xp.float32 else xp.complex128
        if array_api_compat.is_lazy_array(real):
            raise TypeError(
                "x of a complex dtype needs a library with a function complex(real, imag), "
                f"which {xp.__name__} lacks"
            )
        z = xp.empty(real.shape, dtype=dtype, device=self.device(real))
        xp.real(z)[...] = real
        xp.imag(z)[...] = imag
        return z

    def match_strides(self, y: Any, x: Any) -> Any:
        """Return y in x's memory layout, if users of the library expect outputs to keep it."""
        return y

    def read_rate(self, p: Any, x: Any, name: str) -> Any:
        """Return a scheduled rate as a float, or as the array that a program receives.

        Parameters
        ----------
        p : array
            Of shape (), float32 or float64.
        x : array
            The array to drop elements of.
        name : str
            The name of the rate in error messages.
        """
        return p if self.is_traced(p) else float(p)


class Words:
    """The generator's 32-bit words, held in one library's integers."""

    def arithmetic(self, xp: Any, device: Any) -> WordArithmetic:
        """Return the arithmetic on words for arrays on a device."""
        return get_word_arithmetic(xp, device)

    def generate(
        self, xp: Any, device: Any, first: SplitInteger, count: Any, key: tuple[Any, Any], tag: int
    ) -> PhiloxBlock:
        """Return the words of consecutive Philox blocks.

        Parameters
        ----------
        xp, device
            The namespace and the device of the words.
        first : (hi, lo)
            The number of the first block: Python integers or 0-d arrays. Arrays of shape (rows, 1)
            give each row its own blocks.
        count : int
            The number of blocks.
        key : (lo, hi)
            The words of the key: Python integers or 0-d arrays.
        tag : int
            The last word of the counter.

        Returns
        -------
        four arrays of shape (count,) or (rows, count)
            In the dtype of `arithmetic`.
        """
        words = self.arithmetic(xp, device)
        base = tuple(words.constant(w) if isinstance(w, int) else w for w in first)
        hi, lo = add_split(words, base, arange64(words, count, device))
        zero = xp.zeros((1,), dtype=words.dtype, device=device)
        return philox((lo, hi, zero, zero + words.constant(tag)), key, words)

    def keep_flags(
        self,
        xp: Any,
        device: Any,
        first: SplitInteger,
        count: Any,
        key: tuple[Any, Any],
        threshold: int,
    ) -> Any:
        """Return whether each element of consecutive blocks is kept, flat: eight flags a block.

        Parameters
        ----------
        xp, device, first, count, key
            As in `generate`.
        threshold : int
            0 < threshold < 2^32.
        """
        block = self.generate_runs(xp, device, first, count, key, 0)
        return keep_flags(xp, self.arithmetic(xp, device), block, threshold)

    def generate_runs(
        self, xp: Any, device: Any, first: SplitInteger, count: Any, key: tuple[Any, Any], tag: int
    ) -> PhiloxBlock:
        """Run `generate` for one run of blocks, or for one of each row."""
        # A native generator of the library accepts one run of consecutive blocks.
        is_one_run = isinstance(first[0], int) or tuple(first[0].shape) == ()
        arguments = (xp, device, first, count, key, tag)
        return self.generate(*arguments) if is_one_run else Words.generate(self, *arguments)

    def width(self, value: Any, name: str) -> int:
        """Return the number of bits of a 0-d integer array.

        Raises
        ------
        TypeError
            If value does not have an integer dtype.
        ValueError
            If value is not 0-d.
        """
        bits = integer_bits(value.dtype)
        if bits is None:
            raise TypeError(f"{name} must be an integer, got an array of dtype {value.dtype}")
        if tuple(value.shape) != ():
            raise ValueError(f"{name} must be 0-d, got shape {tuple(value.shape)}")
        return bits

    def split(self, xp: Any, device: Any, value: Any, name: str) -> SplitInteger:
        """Return a 0-d integer array as ``(hi, lo)`` 0-d words, zero-extended from its width.

        Raises
        ------
        TypeError, ValueError
            As `width`; and ValueError if value has 64 bits but words have only 32.
        """
        bits = self.width(value, name)
        words = self.arithmetic(xp, device)
        if bits == 64 and isinstance(words, Uint32Words):
            raise ValueError(
                f"{name} must have at most 32 bits without 64-bit integers, got dtype {value.dtype}"
            )
        return words.split(value, bits)


class Operator:
    """Dropout as an operation of one library, with the gradient and the traces of that library."""

    def dropout(self, x: Any, key: "Key", plan: "DropoutPlan", mask: Any = None) -> Any:
        """Apply a plan that drops something.

        Override to make dropout one differentiable operator: compute values with
        ``plan.run(x, key)``, and the gradient with ``plan.apply(upstream, key)``. The backward pass
        then keeps the key and not the mask. ``mask`` is the mask of the key if the caller has it.
        """
        return plan.run(x, key, mask)

    def traced_mask(self, like: Any, key: "Key", window: "Window", rate: "Rate") -> Any | None:
        """Return the mask as one operator of the trace that ``like`` belongs to, or None."""
        return None

    def traced_permutation(self, like: Any, key: "Key", window: "Window") -> Any | None:
        """Return permutations as one operator of the trace that ``like`` belongs to, or None."""
        return None

    def pack_key(self, lo: Any, hi: Any) -> Any | None:
        """Return two words of a key as one array of shape (2,) by a single operator, or None.

        At least one word is an array of this library. Raises as `Words.width` does.
        """
        return None

    def fold_in(self, words: Any, data: Any, tag: int) -> Any | None:
        """Return the words of a key after folding in an array natively, or None.

        ``words`` are ``(lo, hi)`` or one array of both, and so is the result; ``tag`` is the last
        word of the counter. Raises as `Words.width` does.
        """
        return None

    def fold_in_constant(self, words: Any, data: int, tag: int) -> Any | None:
        """Return what `fold_in` returns, for an integer in [0, 2^64) and words in arrays."""
        return None


class Buffer(NamedTuple):
    """The place of an array's elements in this process's memory.

    Attributes
    ----------
    address : int
        The address of the first element.
    strides : tuple of int or None
        The distance between neighbors along each axis, in elements; None means C order, no gaps.
    """

    address: int
    strides: tuple[int, ...] | None


class DeviceBuffer(NamedTuple):
    """The place of an array's elements in the memory of a GPU.

    Attributes
    ----------
    pointer : object
        Has a method ``data_ptr()`` and a ``dtype``, as Triton expects. The dtype of a complex array
        is the one of its components.
    strides : tuple of int
        The distance between neighbors along each axis, in elements.
    """

    pointer: Any
    strides: tuple[int, ...]


class Buffers:
    """Elements in memory, where fused kernels read and write them.

    The core calls the other methods only after `locate` has returned a `Buffer`, or
    `locate_on_device` a `DeviceBuffer`.
    """

    def locate(self, x: Any) -> Buffer | str:
        """Return where the elements of x are, or the reason why kernels cannot reach them."""
        return "its library does not locate the elements of an array"

    def locate_on_device(self, x: Any) -> DeviceBuffer | None:
        """Return where the elements of x are on a GPU, or None if kernels cannot reach them."""
        return None

    def gather(self, numbers: Any, x: Any) -> Any | None:
        """Return integers as an ``int64`` array on the GPU of x, or None if they can be read.

        Reading a number that the GPU computes would wait for it.

        Parameters
        ----------
        numbers : sequence of int and 0-d integer arrays, or one array
            Narrow arrays are zero-extended.
        x : array

        Raises
        ------
        RuntimeError
            If the library records what the GPU runs, and would repeat a number that it reads now.
        """
        return None

    def use_device(self, x: Any) -> AbstractContextManager[Any]:
        """Return a context that lets kernels run on the GPU of x."""
        return nullcontext()

    def allocate_like(self, x: Any) -> tuple[Any, Buffer]:
        """Return a handle of an uninitialized output like x, without gaps, and its buffer."""
        raise TypeError(f"{type(self).__name__} locates no elements, so it allocates no outputs")

    def wrap(self, handle: Any, x: Any) -> Any:
        """Return the array of a handle from `allocate_like`, after kernels have written it."""
        return handle

    def copy_into(self, out: Any, x: Any) -> None:
        """Copy the elements of x into an array or a handle of the same shape and dtype."""
        out[...] = x

    def from_numpy(self, mask: "numpy.ndarray[Any, Any]", device: Any) -> Any:
        """Return a new NumPy array as an array on a device of the CPU; its memory may be reused."""
        return mask


@dataclass(frozen=True, eq=False, slots=True)
class ArrayLibrary:
    """One array library, as the core sees it.

    Examples
    --------
    >>> ArrayLibrary().buffers.locate(None)
    'its library does not locate the elements of an array'
    """

    arrays: Arrays = field(default_factory=Arrays)
    words: Words = field(default_factory=Words)
    operator: Operator = field(default_factory=Operator)
    buffers: Buffers = field(default_factory=Buffers)

    def split(self, value: Any, name: str) -> SplitInteger:
        """Return a 0-d integer array as ``(hi, lo)`` words; raises as `Words.split`."""
        xp, device = self.arrays.namespace(value), self.arrays.device(value)
        return self.words.split(xp, device, value, name)
