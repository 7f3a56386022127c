"""Where a mask or an output is not what the specification says, and which mistake makes it so.

Each cause is tried for real: it is named only where the mask, or the output, that it makes is the
one at hand in every element.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidrop.conformance.compare import (
    ContractError,
    check_output,
    components,
    differing,
    numpy_dtype,
)
from unidrop.conformance.recipe import Recipe
from unidrop.dtypes import compute_dtype, dtype_name

__all__ = [
    "Diagnosis",
    "Difference",
    "causes_of_mask",
    "causes_of_masks",
    "causes_of_output",
    "diagnose",
    "first_difference",
]

# Enough elements to tell causes apart, before one is tried on all.
_SAMPLE = 2048
_CHUNK = 1 << 20

Kept = NDArray[np.bool]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first element, in C order, in which a mask is not that of the specification.

    Attributes
    ----------
    position : tuple of int
        In the array.
    index : int
        Its number in the whole mask.
    block, word, half : int
        Which block decides it, which word of that, and whether as the even (0) or odd (1) element.
    u, threshold : int
    expected, came : bool
        Whether it is kept.
    count, size : int
        How many elements differ, of how many.
    """

    position: tuple[int, ...]
    index: int
    block: int
    word: int
    half: int
    u: int
    threshold: int
    expected: bool
    came: bool
    count: int
    size: int

    def __str__(self) -> str:
        kept = {True: "kept", False: "dropped"}
        where = f"at {self.position}, " if self.position else ""
        half = ("even", "odd")[self.half]
        return (
            f"{self.count} of {self.size} elements differ, the first {where}index {self.index}: "
            f"block {self.block}, word {self.word}, its {half} element\n"
            f"u = {self.u:08x}, T = {self.threshold:08x}: {kept[self.expected]} by the "
            f"specification, but {kept[self.came]} here"
        )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong with an array or its mask, and each mistake that explains all of it."""

    what: str
    causes: tuple[str, ...]
    is_of_mask: bool


def diagnose(
    recipe: Recipe, array: NDArray[Any], x: NDArray[Any] | None = None, *, pairs: bool = True
) -> Diagnosis | None:
    """Say how an array differs from what the specification says; None where it does not.

    Parameters
    ----------
    recipe : Recipe
        Of the mask that is meant.
    array : array
        A mask, of bools or of integers 0 and 1; or an output, of which what is not 0 was kept.
    x : array, optional
        What was dropped from, of the output's shape and dtype, to compare the output to the bit.
        Where it is 0, the mask is not compared.
    pairs : bool, default True
        Whether two mistakes together are tried on a mask, which takes seconds.
    """
    expected = np.concatenate([recipe.keep(p) for p in _chunks(array.size)] or [np.zeros(0, bool)])
    expected = expected.reshape(array.shape)
    told = np.ones(array.shape, dtype=bool) if x is None else _tells(x, array)
    kept = np.where(told, array != 0, expected)
    difference = first_difference(recipe, kept)
    if difference is not None:
        causes = causes_of_mask(recipe, kept, told, pairs=pairs)
        hint = _resemblance(recipe.p, difference, causes)
        if x is None and array.dtype.kind in "fcV" and not causes and not np.any(kept & ~expected):
            hint += _ZEROS
        return Diagnosis(f"{difference}{hint}", tuple(causes), is_of_mask=True)
    if x is None:
        return None
    with np.errstate(all="ignore"):
        y = _output(x, recipe.p, expected)
    try:
        check_output(array, y, x, "output")
    except ContractError as error:
        what = f"expected {error.expected}, came {error.came}"
        what = f"the mask is right, but the output is not: {what}"
        causes = causes_of_output(x, recipe.p, expected, array)
        return Diagnosis(what, tuple(causes), is_of_mask=False)
    return None


def _tells(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.bool]:
    """Return where an output says whether its element was kept.

    It does not where x is 0, or so small that a zero conforms; nor where x is no number, nor the
    output, which may be what a product with the mask gives.
    """
    compute = np.finfo(numpy_dtype(compute_dtype(x.dtype)))
    width = 2 if x.dtype.kind == "c" else 1
    parts = components(x).reshape(*x.shape, width).astype(np.float64)
    with np.errstate(invalid="ignore"):
        is_small = (np.abs(parts) < float(compute.tiny)).all(axis=-1)
        is_lost = np.isnan(y) & ~np.isfinite(parts).all(axis=-1)
    tells: NDArray[np.bool] = ~is_small & ~is_lost
    return tells


_ZEROS = "\nwhere the input is 0 the output does not tell: give the input too, with --input"


def _resemblance(p: float, difference: Difference, causes: Sequence[str]) -> str:
    """Return what can be said of a mask that no mistake explains."""
    if causes:
        return ""
    agree = 1 - difference.count / difference.size
    by_chance = p**2 + (1 - p) ** 2
    return (
        f"\n{agree:.2%} agree; of two masks that have nothing to do with each other {by_chance:.2%}"
    )


def first_difference(recipe: Recipe, kept: Kept) -> Difference | None:
    """Return where a mask, of the array's shape, first differs from a recipe's; None if nowhere.

    Examples
    --------
    >>> recipe = Recipe(42, (7,), 0.5, (3,))
    >>> kept = recipe.keep(np.arange(3))
    >>> print(first_difference(recipe, ~kept))
    3 of 3 elements differ, the first at (0,), index 0: block 0, word 0, its even element
    u = 756ef526, T = 80000000: dropped by the specification, but kept here
    """
    flat = kept.reshape(-1)
    count, first = 0, None
    for positions in _chunks(flat.size):
        wrong = positions[recipe.keep(positions) != flat[positions]]
        count += wrong.size
        if first is None and wrong.size:
            first = wrong[:1]
    if first is None:
        return None
    index = recipe.indices(first)
    number = int(index[0])
    return Difference(
        position=tuple(int(i) for i in np.unravel_index(int(first[0]), recipe.shape)),
        index=number,
        block=number // 8,
        word=number // 2 % 4,
        half=number % 2,
        u=int(recipe.u(index)[0]),
        threshold=recipe.threshold(recipe.p),
        expected=bool(recipe.keep(first)[0]),
        came=bool(flat[first[0]]),
        count=count,
        size=flat.size,
    )


def causes_of_mask(
    recipe: Recipe, kept: Kept, told: Kept | None = None, *, pairs: bool = True
) -> list[str]:
    """Return the mistakes, one or two together, that make a recipe's mask the one given.

    Several are returned where this mask does not tell them apart, none where none explains it.

    Parameters
    ----------
    recipe : Recipe
        Of the mask that was expected.
    kept : array of bool
        The mask at hand, in the array's shape.
    told : array of bool, optional
        Where that is known; everywhere if not given. Elsewhere it is what is expected.
    pairs : bool, default True
        Whether two mistakes together are tried, which takes seconds.
    """
    flat = kept.reshape(-1)
    known = np.ones(flat.shape, dtype=bool) if told is None else told.reshape(-1)
    wrong = _some_wrong(recipe, flat)
    # What is wrong tells most: few of it first, then a sample, then all.
    sampled = _sampled(flat.size)
    stages = [wrong[:64], np.union1d(wrong, sampled[known[sampled]])]

    def explains(changed: Recipe) -> bool:
        chunks = (positions[known[positions]] for positions in _chunks(flat.size))
        return all(
            np.array_equal(changed.keep(positions), flat[positions])
            for positions in itertools.chain(stages, chunks)
        )

    singles = list(_mistakes(recipe))
    found = [what for what, changed, _ in singles if explains(changed)]
    if found or not pairs:
        return found
    return [
        f"{first}, and {second}"
        for first, changed, fields in singles
        for second, both, others in _mistakes(changed)
        # Each pair once, whichever comes first, and of different things.
        if first < second and fields.isdisjoint(others) and explains(both)
    ]


def causes_of_masks(masks: Sequence[tuple[Recipe, Kept]]) -> list[str]:
    """Return the mistakes, each alone, that explain all of several masks.

    Parameters
    ----------
    masks : sequence of (Recipe, array of bool)
        What was expected and the mask at hand, the first of which is not the one expected. What is
        right among the others tells of mistakes too, that they are not made.

    Examples
    --------
    >>> recipes = [Recipe(42, (7,), 0.3, (size,)) for size in (2, 60)]
    >>> inverted = [(recipe, ~recipe.keep(np.arange(*recipe.shape))) for recipe in recipes]
    >>> len(causes_of_masks(inverted[:1])) > 1
    True
    >>> causes_of_masks(inverted)
    ['the mask is inverted: 1 where an element is dropped']
    """
    (recipe, kept), *others = masks
    found = causes_of_mask(recipe, kept, pairs=False)
    for recipe, kept in others:
        # A mistake that can't be made in a mask is not told of by it.
        changed = {what: changed for what, changed, _ in _mistakes(recipe) if what in found}
        positions, flat = np.arange(kept.size), kept.reshape(-1)
        found = [
            what
            for what in found
            if what not in changed or np.array_equal(changed[what].keep(positions), flat)
        ]
    return found


def _chunks(size: int) -> Iterator[NDArray[np.int64]]:
    for begin in range(0, size, _CHUNK):
        yield np.arange(begin, min(begin + _CHUNK, size))


def _some_wrong(recipe: Recipe, flat: Kept) -> NDArray[np.int64]:
    """Return the first positions at which a mask differs from a recipe's."""
    found: list[NDArray[np.int64]] = []
    for positions in _chunks(flat.size):
        found.append(positions[recipe.keep(positions) != flat[positions]])
        if sum(part.size for part in found) >= _SAMPLE:
            break
    return np.concatenate([*found, np.zeros(0, dtype=np.int64)])[:_SAMPLE]


def _sampled(size: int) -> NDArray[np.int64]:
    """Return positions at the beginning and all over, the same ones every time."""
    if size <= _SAMPLE:
        return np.arange(size)
    anywhere = np.random.default_rng(0).integers(0, size, _SAMPLE // 2)
    return np.unique(np.concatenate([np.arange(_SAMPLE // 2), anywhere]))


def _mistakes(recipe: Recipe) -> Iterator[tuple[str, Recipe, frozenset[str]]]:
    """Yield what people get wrong, the recipe with it, and which of its fields that changes."""
    for family in (_of_generator, _of_words, _of_comparison, _of_key, _of_numbering):
        for what, changes in family(recipe):
            yield what, replace(recipe, **changes), frozenset(changes)


Changes = Iterator[tuple[str, dict[str, Any]]]


def _of_generator(recipe: Recipe) -> Changes:
    for rounds in range(1, 17):
        if rounds != recipe.rounds:
            what = f"the generator makes {rounds} rounds instead of 10"
            yield what, {"rounds": rounds}
            yield f"{what}, for keys too", {"rounds": rounds, "key_rounds": rounds}
            yield f"{what}, for keys alone", {"key_rounds": rounds}
    yield "the key's words are swapped", {"key_words": (1, 0)}
    yield "the block number's words are swapped", {"counter_words": (1, 0, 2, 3)}
    yield "the block number's upper word is lost", {"counter_words": (0, 2, 2, 3)}
    yield (
        "the block number is in the counter's upper half",
        {"counter_words": (2, 3, 0, 1)},
    )
    for first in (-1, 1):
        yield (
            f"the counter is {'ahead' if first > 0 else 'behind'} by one block",
            {"first_block": first},
        )


def _of_words(recipe: Recipe) -> Changes:
    even, odd = recipe.even, recipe.odd
    yield "odd elements take the word itself, and not its product with 0x6C078965", {"odd": even}
    yield "the even element takes the product, and the odd one the word", {"even": odd, "odd": even}
    yield "each word decides one element, and not two", {"elements_a_word": 1}
    for order in itertools.permutations(range(4)):
        if order == (3, 2, 1, 0):
            yield "the words of a block are in reverse order", {"words": order}
        elif order != recipe.words:
            yield f"the words of a block are in the order {order}", {"words": order}


def _of_comparison(recipe: Recipe) -> Changes:
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


def _of_key(recipe: Recipe) -> Changes:
    folded = recipe.folded
    for i, data in enumerate(folded):
        rest = folded[:i], folded[i + 1 :]
        what = f"the site {data!r}" if isinstance(data, str) else f"the step {data}"
        yield f"{what} is not folded in", {"folded": rest[0] + rest[1]}
        yield f"{what} is folded in twice", {"folded": (*rest[0], data, data, *rest[1])}
        if isinstance(data, str):
            continue
        yield f"{what} is folded in as a string", {"folded": (*rest[0], str(data), *rest[1])}
        for other in (data - 2, data - 1, data + 1, data + 2):
            if 0 <= other < 2**64:
                yield (
                    f"the step is {other}, and not {data}",
                    {"folded": (*rest[0], other, *rest[1])},
                )
    if len(folded) > 1:
        yield "the site and the step are folded in the other way round", {"folded": folded[::-1]}
    if recipe.seed >= 2**32:
        yield "the seed's upper 32 bits are lost", {"seed": recipe.seed % 2**32}
        yield "the seed's lower 32 bits are lost", {"seed": recipe.seed >> 32}


def _of_numbering(recipe: Recipe) -> Changes:
    axes = tuple(range(len(recipe.shape)))
    if 1 < len(axes) <= 5:
        for order in itertools.permutations(axes):
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


def causes_of_output(x: NDArray[Any], p: float, kept: Kept, came: NDArray[Any]) -> list[str]:
    """Return the mistakes that make of x, under a mask that is right, the output given.

    Parameters
    ----------
    x, came : array
        The input, and the output at hand, of one shape and dtype.
    p : float
    kept : array of bool
    """
    if p == 1:
        return []
    with np.errstate(all="ignore"):
        return [
            what
            for what, products in _wrong_products(x, p)
            if not differing(came, _selected(products, kept), x).size
        ] + _wrong_selections(x, p, kept, came)


def _wrong_products(x: NDArray[Any], p: float) -> Iterator[tuple[str, NDArray[Any]]]:
    compute = numpy_dtype(compute_dtype(x.dtype))
    s = 1 / (1 - p)
    name = dtype_name(x.dtype)
    yield "kept elements are not scaled", x
    yield "kept elements are multiplied by 1 - p", _times(x, compute, 1 - p)
    yield (
        f"the scale is rounded to {name} before the product",
        _times(x, compute, float(components(x).dtype.type(s))),
    )
    yield "the product is computed in float64 and rounded once", _times(x, np.float64, s)
    yield "x is divided by 1 - p", _times(x, compute, 1 - p, np.divide)


def _wrong_selections(x: NDArray[Any], p: float, kept: Kept, came: NDArray[Any]) -> list[str]:
    scaled = _times(x, numpy_dtype(compute_dtype(x.dtype)), 1 / (1 - p))
    multiplied = components(scaled) * np.repeat(
        kept.reshape(-1), components(x).size // max(1, x.size)
    ).astype(components(x).dtype)
    if differing(came, multiplied.view(x.dtype).reshape(x.shape), x).size:
        return []
    return ["the products are multiplied by the mask, and not selected: -0 and NaN remain"]


def _times(
    x: NDArray[Any], dtype: Any, factor: float, operation: Callable[..., Any] = np.multiply
) -> NDArray[Any]:
    parts = components(x)
    product = operation(parts.astype(dtype), np.dtype(dtype).type(factor)).astype(parts.dtype)
    products: NDArray[Any] = product.view(x.dtype).reshape(x.shape)
    return products


def _output(x: NDArray[Any], p: float, kept: Kept) -> NDArray[Any]:
    """Return the output of the specification (section 8)."""
    if p == 0:
        return x
    if p == 1:
        return np.zeros_like(x)
    return _selected(_times(x, numpy_dtype(compute_dtype(x.dtype)), 1 / (1 - p)), kept)


def _selected(products: NDArray[Any], kept: Kept) -> NDArray[Any]:
    return np.where(kept, products, np.zeros_like(products))
