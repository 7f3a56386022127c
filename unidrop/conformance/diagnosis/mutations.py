"""The mistakes that people make of a mask and of an output, to be tried on one that is wrong.

Each is a recipe or a product with one choice made otherwise; section numbers are those of the
specification, docs/spec.md.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidrop.conformance.compare import components, numpy_dtype
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.dtypes import compute_dtype, dtype_name
from unidrop.key import string_data

__all__ = ["Kept", "mask_mutations", "mistakes_of_product", "times"]

Kept = NDArray[np.bool]
Changes = Iterator[tuple[str, dict[str, Any]]]


def mask_mutations(recipe: StreamModel) -> Changes:
    """Yield what people get wrong of a recipe, and the fields of it that this changes."""
    families = (_of_generator, _of_words, _of_comparison, _of_key, _of_folding, _of_numbering)
    for family in families:
        yield from family(recipe)


def _of_generator(recipe: StreamModel) -> Changes:
    for rounds in range(1, 17):
        if rounds != recipe.rounds:
            what = f"the generator makes {rounds} round{'s' * (rounds > 1)} instead of 10"
            yield what, {"rounds": rounds}
            yield f"{what}, for keys too", {"rounds": rounds, "key_rounds": rounds}
            yield f"{what}, for keys alone", {"key_rounds": rounds}
    yield "the key's words are swapped", {"key_words": (1, 0)}
    yield "the block number's words are swapped", {"counter_words": (1, 0, 2, 3)}
    yield "the block number's upper word is lost", {"counter_words": (0, 4, 2, 3)}
    yield (
        "the block number is in the counter's upper half",
        {"counter_words": (2, 3, 0, 1)},
    )
    for first in (-1, 1):
        yield (
            f"the counter is {'ahead' if first > 0 else 'behind'} by one block",
            {"first_block": first},
        )


def _of_words(recipe: StreamModel) -> Changes:
    even, odd = recipe.even, recipe.odd
    yield "odd elements take the word itself, and not its product with 0x6C078965", {"odd": even}
    yield "odd elements take the upper half of the product with 0x6C078965", {"odd": _upper}
    yield "the even element takes the product, and the odd one the word", {"even": odd, "odd": even}
    yield "each word decides one element, and not two", {"elements_a_word": 1}
    for order in itertools.permutations(range(4)):
        if order == (3, 2, 1, 0):
            yield "the words of a block are in reverse order", {"words": order}
        elif order != recipe.words:
            yield f"the words of a block are in the order {order}", {"words": order}


def _upper(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    upper: NDArray[np.uint64] = words * np.uint64(0x6C078965) >> np.uint64(32)
    return upper


def _of_comparison(recipe: StreamModel) -> Changes:
    yield "the mask is inverted: 1 where an element is dropped", {"inverted": True}
    yield "the comparison is u > T, and not u >= T", {"decide": _greater}
    yield "what is kept is u < 2^32 - T, the small numbers", {"decide": _small}
    yield "u and T are compared as signed integers", {"decide": _signed}
    yield "u is narrowed to float32 before it is compared", {"decide": _as_float32(recipe.p)}
    for bits in (8, 16, 23, 24, 31):
        yield f"the threshold has {bits} bits, and not 32", {"decide": _of_bits(recipe.p, bits)}
    yield "the threshold is rounded down", {"threshold": lambda p: math.floor(p * 2**32)}
    yield "the threshold is rounded up", {"threshold": lambda p: math.ceil(p * 2**32)}
    yield "p is narrowed to float32", {"p": float(np.float32(recipe.p))}
    yield "p is narrowed to float16", {"p": float(np.float16(recipe.p))}
    yield "p is taken for the probability of keeping", {"p": 1 - recipe.p}


def _of_key(recipe: StreamModel) -> Changes:
    folded = recipe.folded
    for i, data in enumerate(folded):
        rest = folded[:i], folded[i + 1 :]
        what = _named(data)
        yield f"{what} is not folded in", {"folded": rest[0] + rest[1]}
        yield f"{what} is folded in twice", {"folded": (*rest[0], data, data, *rest[1])}
        if isinstance(data, str):
            continue
        yield f"{what} is folded in as a string", {"folded": (*rest[0], str(data), *rest[1])}
        for other in sorted({0, data - 2, data - 1, data + 1, data + 2}):
            if 0 <= other < 2**64 and other != data:
                yield (
                    f"the step is {other}, and not {data}",
                    {"folded": (*rest[0], other, *rest[1])},
                )
        yield from _of_counter(what, data, {"folded": rest[0] + rest[1]})
    for i in range(len(folded) + 1):
        # Such as a rank, the number of a first call, or a name that is not set.
        for extra in (0, 1, ""):
            if extra not in folded[max(0, i - 1) : i + 1]:
                where = f"before {_named(folded[i])}" if i < len(folded) else "at the end"
                with_it = (*folded[:i], extra, *folded[i:])
                yield f"{extra!r} is folded in too, {where}", {"folded": with_it}
    if len(folded) > 1:
        yield "the site and the step are folded in the other way round", {"folded": folded[::-1]}
    if recipe.seed >= 2**32:
        yield "the seed's upper 32 bits are lost", {"seed": recipe.seed % 2**32}
        yield "the seed's lower 32 bits are lost", {"seed": recipe.seed >> 32}


def _named(data: int | str) -> str:
    return f"the site {data!r}" if isinstance(data, str) else f"the step {data}"


def _of_counter(what: str, step: int, unfolded: dict[str, Any]) -> Changes:
    """Yield where else in the generator a step may go that is not folded into the key."""
    instead = "and not folded in"
    yield f"{what} is added to the block number, {instead}", {"first_block": step, **unfolded}
    if step < 2**32:
        yield f"{what} is the counter's third word, {instead}", {"upper": (step, 0), **unfolded}
        yield f"{what} is the counter's last word, {instead}", {"upper": (0, step), **unfolded}


def _of_folding(recipe: StreamModel) -> Changes:
    if not recipe.folded:
        return
    yield "the counter that folds has no tag", {"fold_counter": (0, 1, 2, 2)}
    yield "the counter that folds has its tag in the third word", {"fold_counter": (0, 1, 3, 2)}
    yield "the words of what is folded in are swapped", {"fold_counter": (1, 0, 2, 3)}
    yield "what is folded in loses its upper 32 bits", {"fold_counter": (0, 2, 2, 3)}
    yield "the words of a folded key are swapped", {"fold_words": (1, 0)}
    yield "a folded key is of the generator's words 2 and 3", {"fold_words": (2, 3)}
    yield "a folded key loses its upper 32 bits", {"fold_words": (0, 4)}
    yield "the counter of a mask ends in tag 1, as one that folds", {"upper": (0, 1)}
    if any(isinstance(data, str) for data in recipe.folded):
        yield "strings are folded with tag 1, as integers are", {"fold_tags": (1, 1)}
        yield "the digest of a string is read big-endian", {"digest": _big_endian}
        for length in (16, 32, 64):
            what = f"the digest of a string is one of {length} bytes, cut to 8"
            yield what, {"digest": _cut_from(length)}
    if any(isinstance(data, int) for data in recipe.folded):
        yield "integers are folded with tag 2, as strings are", {"fold_tags": (2, 2)}
        for verb, fold in _NO_FOLDS.items():
            yield f"integers are {verb} the key, and not folded in", {"fold_integer": fold}


_NO_FOLDS: Mapping[str, Callable[[int, int], int]] = {
    "added to": lambda key, data: (key + data) % 2**64,
    "xored with": lambda key, data: key ^ data,
    "added to the upper word of": lambda key, data: (key + (data << 32)) % 2**64,
}


def _big_endian(data: str) -> int:
    return int.from_bytes(string_data(data).to_bytes(8, "little"), "big")


def _cut_from(length: int) -> Callable[[str], int]:
    def digest(data: str) -> int:
        longer = hashlib.blake2b(data.encode(), digest_size=length).digest()
        return int.from_bytes(longer[:8], "little")

    return digest


def _of_numbering(recipe: StreamModel) -> Changes:
    axes = tuple(range(len(recipe.shape)))
    if 1 < len(axes) <= 5:
        for order in _orders(axes):
            if order == axes[::-1]:
                yield "elements are numbered in Fortran order", {"order": order}
            elif order != (recipe.order or axes):
                how = f"with axes in the order {order}, as memory may have them"
                yield f"elements are numbered {how}", {"order": order}
    for multiple in (4, 8):
        yield f"rows are rounded up to a multiple of {multiple} elements", {"row": multiple}
    yield "elements are numbered in 32 bits", {"index_bits": 32}
    if recipe.broadcast_axes:
        yield "each element has a decision of its own", {"broadcast_axes": ()}
    if recipe.global_shape is not None:
        yield "the window's start is ignored", {"start": (0,) * len(axes)}
        yield "the window is ignored", {"global_shape": None, "start": None}


def _orders(axes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield orders of axes: all of few, and of five those that move one, as formats of memory do.

    All 120 would be as many as all other mistakes, to be tried with each of them.
    """
    if len(axes) < 5:
        yield from itertools.permutations(axes)
        return
    moved = {axes[::-1]}
    for axis in axes:
        rest = tuple(other for other in axes if other != axis)
        moved |= {(*rest[:i], axis, *rest[i:]) for i in axes}
    yield from sorted(moved)


def _greater(u: NDArray[np.uint64], threshold: int) -> Kept:
    return u > np.uint64(threshold)


def _small(u: NDArray[np.uint64], threshold: int) -> Kept:
    return u < np.uint64(2**32 - threshold)


def _signed(u: NDArray[np.uint64], threshold: int) -> Kept:
    return u.astype(np.uint32).view(np.int32) >= (threshold + 2**31) % 2**32 - 2**31


def _as_float32(p: float) -> Callable[..., Kept]:
    return lambda u, threshold: u.astype(np.float32) * np.float32(2**-32) >= np.float32(p)


def _of_bits(p: float, bits: int) -> Callable[..., Kept]:
    return lambda u, threshold: u >> np.uint64(32 - bits) >= np.uint64(round(p * 2**bits))


def mistakes_of_product(x: NDArray[Any], p: float) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield what people get wrong of x and its scale at 0 < p < 1, and the products so made."""
    compute = numpy_dtype(compute_dtype(x.dtype))
    s = 1 / (1 - p)
    yield "kept elements are not scaled", x
    yield "kept elements are multiplied by 1 - p", times(x, compute, 1 - p)
    for narrow in ("float16", "bfloat16", "float32"):
        if narrow != compute.name:
            rounded = float(numpy_dtype(narrow).type(s))
            what = f"the scale is rounded to {narrow} before the product"
            yield what, times(x, compute, rounded)
    narrow_p, one = np.float32(p), np.float32(1)
    yield "p is narrowed to float32 for the scale", times(x, compute, 1 / (1 - float(narrow_p)))
    yield "the scale is computed in float32", times(x, compute, float(one / (one - narrow_p)))
    yield "kept elements are scaled twice", times(times(x, compute, s), compute, s)
    if components(x).dtype.itemsize < compute.itemsize:
        what = f"the product with the {compute} scale is rounded once, to {dtype_name(x.dtype)}"
        yield what, times(x, np.float64, float(compute.type(s)))
    yield "the product is computed in float64 and rounded once", times(x, np.float64, s)
    for dtype in dict.fromkeys((dtype_name(components(x).dtype), compute.name, "float64")):
        quotients = times(x, numpy_dtype(dtype), 1 - p, np.divide)
        yield f"x is divided by 1 - p, in {dtype}", quotients


def times(
    x: NDArray[Any], dtype: Any, factor: float, operation: Callable[..., Any] = np.multiply
) -> NDArray[Any]:
    """Return x times a factor, in a dtype and rounded to x's own; complex numbers by component."""
    parts = components(x)
    product = _rounded(operation(parts.astype(dtype), np.dtype(dtype).type(factor)), parts.dtype)
    products: NDArray[Any] = product.view(x.dtype).reshape(x.shape)
    return products


def _rounded(product: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a product rounded once: ml_dtypes makes a float32 of a float64 on the way."""
    if product.dtype != np.float64 or dtype.itemsize > 2:
        return product.astype(dtype)
    # What lies between two float32 numbers goes to the one that is odd, and so is halfway between
    # two of half the width only where it was so before.
    near = product.astype(np.float32)
    bits = near.view(np.uint32)
    beyond = np.abs(near.astype(np.float64)) > np.abs(product)
    odd = np.where(near == product, bits, bits - beyond | np.uint32(1))
    return odd.view(np.float32).astype(dtype)
