"""The generator in vectors: the core's `philox` on values of LLVM, in the order of elements."""

from collections.abc import Callable
from ctypes import PYFUNCTYPE, c_uint64
from typing import Any, Final, NamedTuple

from llvmlite import ir

from unidrop.fused.llvm import I32, I64, Function, Value, compile_module
from unidrop.philox import ODD_MULTIPLIER, philox
from unidrop.words import MASK32

__all__ = ["BLOCKS", "LANES", "Consecutive", "compile_fold", "generate"]

BLOCKS: Final = 8  # Philox blocks of a group
LANES: Final = 2 * BLOCKS  # the words of a vector of `generate`


class Consecutive(NamedTuple):
    """The numbers of the blocks of a group, of 32 bits: first, first + 1, ..."""

    first: Value
    blocks: int


class VectorWords:
    """The arithmetic of `philox` on 32-bit words in numbers of 64 bits, and in vectors of them.

    The upper half of a number may hold any bits. They cost nothing: a vector unit multiplies the
    lower halves of such lanes and ignores the upper halves. A word is a Python integer if it is
    the same in every call, a number if it is the same in all lanes, or else a vector.
    """

    sums_wrap = True

    def constant(self, word: int) -> int:
        """Return a Python word as it is."""
        return word

    def split(self, value: Value, bits: int) -> tuple[Any, Value]:
        """Return a word as it is."""
        return None, value

    def mulhilo(self, a: Any, m: int) -> tuple[Any, Any]:
        """Return the high and the low word of a product."""
        if isinstance(a, Consecutive):
            product = (a.first * m).fill(a.blocks)
            product = product + product.constant(i * m for i in range(a.blocks))
        else:
            product = (a & MASK32) * m
        return product >> 32, product


def generate(counter: tuple[Any, Any, Any, Any], key: Value) -> list[Value]:
    """Return the words of a group in the order of its elements, as vectors of 16 words."""
    four: Any = philox(counter, (key, key >> 32), VectorWords())  # type: ignore[arg-type] # it computes with values of LLVM
    vectors = []
    for i in range(0, four[0].lanes, BLOCKS):
        vectors += _order(*(word.shuffle(list(range(i, i + BLOCKS))) for word in four))
    return vectors


def _order(*four: Value) -> list[Value]:
    """Return the words of a group in the order of its elements, from the words of its blocks."""
    a, b, c, d = (_pair(word) for word in four)
    even, odd = [0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15]
    ab_even, ab_odd, cd_even, cd_odd = (
        first.shuffle(order, second) for first, second in ((a, b), (c, d)) for order in (even, odd)
    )
    vectors = []
    for low in (0, 4):
        order = [low, low + 1, low + 8, low + 9, low + 2, low + 3, low + 10, low + 11]
        evens, odds = ab_even.shuffle(order, cd_even), ab_odd.shuffle(order, cd_odd)
        vectors += [
            evens.shuffle([i, i + 1, i + 2, i + 3, i + 8, i + 9, i + 10, i + 11], odds)
            for i in (0, 4)
        ]
    return [vector.view(I32, 16) for vector in vectors]


def _pair(word: Value) -> Value:
    """Return the words of an even element, in the lower half of each lane, and of the odd one."""
    twice = word.view(I32, 2 * BLOCKS).shuffle([lane & -2 for lane in range(2 * BLOCKS)])
    return (twice * twice.constant([1, ODD_MULTIPLIER] * BLOCKS)).view(I64, BLOCKS)


def compile_fold() -> Callable[[int, int, int], int]:
    """Return a function of a key, data and a tag, each below 2^64, that returns the folded key."""
    module = ir.Module("fold")
    f = Function(module, "fold", 3, is_exported=True)
    key, data, tag = f.arguments
    counter: Any = (data & MASK32, data >> 32, 0, tag)
    four: Any = philox(counter, (key & MASK32, key >> 32), VectorWords())  # type: ignore[arg-type] # as above
    f.finish((four[0] & MASK32) | four[1] << 32)
    (address,) = compile_module(module, ["fold"])
    fold: Callable[[int, int, int], int] = PYFUNCTYPE(c_uint64, *[c_uint64] * 3)(address)
    return fold
