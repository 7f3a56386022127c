"""Where a mask or an output is not what the specification says, and which mistake makes it so.

Each cause is tried for real: it is named only where the mask, or the output, that it makes is the
one at hand in every element.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from unidrop.conformance.compare import (
    ContractError,
    check_output,
    components,
    differing,
    numpy_dtype,
)
from unidrop.conformance.diagnosis.mutations import Kept, mask_mutations, mistakes_of_product, times
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.dtypes import compute_dtype

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

# What a mask is that is the same everywhere.
_CONSTANT = {
    True: "nothing is dropped, as in evaluation or at p = 0",
    False: "all is dropped, as at p = 1",
}

# Of information in a mask: one of 10^4 pairs of mistakes explains it by chance once in 1000 times.
_ENOUGH_BITS = 23


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
    expected, actual : bool
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
    actual: bool
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
            f"specification, but {kept[self.actual]} here"
        )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong with an array or its mask, and each mistake that explains all of it.

    Attributes
    ----------
    what : str
    causes : tuple of str
    is_of_mask : bool
        Whether the mask is wrong, and not only the output.
    is_small : bool
        Whether there is so little of a mask that some mistake may explain it by chance; two
        together are then not tried.
    """

    what: str
    causes: tuple[str, ...]
    is_of_mask: bool
    is_small: bool = False


def diagnose(
    recipe: StreamModel, array: NDArray[Any], x: NDArray[Any] | None = None, *, pairs: bool = True
) -> Diagnosis | None:
    """Say how an array differs from what the specification says; None where it does not.

    Parameters
    ----------
    recipe : StreamModel
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
    told = np.ones(array.shape, dtype=bool) if x is None else _tells(x, array, recipe.p)
    kept = np.where(told, array != 0, expected)
    difference = first_difference(recipe, kept)
    if difference is not None:
        causes = causes_of_mask(recipe, kept, told, pairs=pairs)
        hint = _resemblance(recipe.p, difference, causes)
        if x is None and array.dtype.kind in "fcV" and not causes and not np.any(kept & ~expected):
            hint += _ZEROS
        return Diagnosis(
            f"{difference}{hint}", tuple(causes), is_of_mask=True, is_small=_is_small(recipe, kept)
        )
    if x is None:
        return None
    with np.errstate(all="ignore"):
        y = _output(x, recipe.p, expected)
    try:
        check_output(array, y, x, "output")
    except ContractError as error:
        what = f"expected {error.expected}, actual {error.actual}"
        what = f"the mask is right, but the output is not: {what}"
        causes = causes_of_output(x, recipe.p, expected, array)
        return Diagnosis(what, tuple(causes), is_of_mask=False)
    return None


def _tells(x: NDArray[Any], y: NDArray[Any], p: float) -> NDArray[np.bool]:
    """Return where an output says whether its element was kept.

    It does not where x is 0, or so small that a zero conforms; nor where the output is no number,
    and x none either or so large that x / (1 - p) is infinite: a product with the mask gives that.
    """
    compute = np.finfo(numpy_dtype(compute_dtype(x.dtype)))
    width = 2 if x.dtype.kind == "c" else 1
    parts = components(x).reshape(*x.shape, width).astype(np.float64)
    most = float(ml_dtypes.finfo(x.dtype).max) * (1 - p)
    with np.errstate(invalid="ignore"):
        is_small = (np.abs(parts) < float(compute.tiny)).all(axis=-1)
        is_lost = np.isnan(y) & ~(np.abs(parts) <= most).all(axis=-1)
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


def first_difference(recipe: StreamModel, kept: Kept) -> Difference | None:
    """Return where a mask, of the array's shape, first differs from a recipe's; None if nowhere.

    Examples
    --------
    >>> recipe = StreamModel(42, (7,), 0.5, (3,))
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
        actual=bool(flat[first[0]]),
        count=count,
        size=flat.size,
    )


def causes_of_mask(
    recipe: StreamModel, kept: Kept, told: Kept | None = None, *, pairs: bool = True
) -> list[str]:
    """Return the mistakes, one or two together, that make a recipe's mask the one given.

    Several are returned where this mask does not tell them apart, none where none explains it. Two
    together are tried only where the mask is large enough not to be explained by chance.

    Parameters
    ----------
    recipe : StreamModel
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
    constant = _constant(flat[known])
    if constant and not _is_small(recipe, kept):
        return [constant]  # which arithmetic at an odd rate may give as well, and nobody means
    wrong = _some_wrong(recipe, flat)
    # What is wrong tells most: few of it first, then a sample, then all.
    sampled = _sampled(flat.size)
    stages = [wrong[:64], np.union1d(wrong, sampled[known[sampled]])]

    def explains(changed: StreamModel) -> bool:
        chunks = (positions[known[positions]] for positions in _chunks(flat.size))
        return all(
            np.array_equal(changed.keep(positions), flat[positions])
            for positions in itertools.chain(stages, chunks)
        )

    singles = [
        (what, changes, replace(recipe, **changes)) for what, changes in mask_mutations(recipe)
    ]
    found = [what for what, _, changed in singles if explains(changed)]
    found = [constant, *found] if constant else found
    if found or not pairs or _is_small(recipe, kept):
        return found
    return [
        f"{first}, and {second}"
        for first, changes, changed in singles
        for second, others in mask_mutations(changed)
        # Each pair once, whichever comes first, and of different things.
        if first < second
        and changes.keys().isdisjoint(others)
        and explains(replace(changed, **others))
    ]


def causes_of_masks(masks: Sequence[tuple[StreamModel, Kept]]) -> list[str]:
    """Return the mistakes, each alone, that explain all of several masks.

    Parameters
    ----------
    masks : sequence of (StreamModel, array of bool)
        What was expected and the mask at hand, the first of which is not the one expected. What is
        right among the others tells of mistakes too, that they are not made.

    Examples
    --------
    >>> recipes = [StreamModel(42, (7,), 0.3, (size,)) for size in (2, 60)]
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
        changed = {
            what: replace(recipe, **changes)
            for what, changes in mask_mutations(recipe)
            if what in found
        }
        positions, flat = np.arange(kept.size), kept.reshape(-1)
        found = [
            what
            for what in found
            if (
                np.array_equal(changed[what].keep(positions), flat)
                if what in changed
                else what not in _CONSTANT.values() or what == _constant(flat)
            )
        ]
    return found


def _constant(flat: Kept) -> str:
    """Return what a mask is that is the same everywhere, or nothing."""
    return "" if flat.any() != flat.all() else _CONSTANT[bool(flat.all())]


def _is_small(recipe: StreamModel, kept: Kept) -> bool:
    """Tell whether one of the pairs of mistakes may explain a mask by chance."""
    shared = recipe.broadcast_axes
    decided = kept[tuple(slice(1) if axis in shared else slice(None) for axis in range(kept.ndim))]
    kept_count = int(np.count_nonzero(decided))
    # Whichever is likelier: mistakes make masks of the rate p, and of 1 - p.
    some = 2.0**-32
    bits = [-math.log2(min(max(q, some), 1 - some)) for q in (1 - recipe.p, recipe.p)]
    dropped_count = decided.size - kept_count
    information = min(
        kept_count * of_kept + dropped_count * of_dropped
        for of_kept, of_dropped in (bits, bits[::-1])
    )
    return information < _ENOUGH_BITS


def _chunks(size: int) -> Iterator[NDArray[np.int64]]:
    for begin in range(0, size, _CHUNK):
        yield np.arange(begin, min(begin + _CHUNK, size))


def _some_wrong(recipe: StreamModel, flat: Kept) -> NDArray[np.int64]:
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


def causes_of_output(x: NDArray[Any], p: float, kept: Kept, actual: NDArray[Any]) -> list[str]:
    """Return the mistakes that make of x, under a mask that is right, the output given.

    Parameters
    ----------
    x, actual : array
        The input, and the output at hand, of one shape and dtype.
    p : float
    kept : array of bool
    """
    if p == 1:
        return []
    with np.errstate(all="ignore"):
        return [
            what
            for what, products in mistakes_of_product(x, p)
            if not differing(actual, _selected(products, kept), x).size
        ] + _wrong_selections(x, p, kept, actual)


def _wrong_selections(x: NDArray[Any], p: float, kept: Kept, actual: NDArray[Any]) -> list[str]:
    scaled = times(x, numpy_dtype(compute_dtype(x.dtype)), 1 / (1 - p))
    multiplied = components(scaled) * np.repeat(
        kept.reshape(-1), components(x).size // max(1, x.size)
    ).astype(components(x).dtype)
    if differing(actual, multiplied.view(x.dtype).reshape(x.shape), x).size:
        return []
    return ["the products are multiplied by the mask, and not selected: -0 and NaN remain"]


def _output(x: NDArray[Any], p: float, kept: Kept) -> NDArray[Any]:
    """Return the output of the specification (section 8)."""
    if p == 0:
        return x
    if p == 1:
        return np.zeros_like(x)
    return _selected(times(x, numpy_dtype(compute_dtype(x.dtype)), 1 / (1 - p)), kept)


def _selected(products: NDArray[Any], kept: Kept) -> NDArray[Any]:
    return np.where(kept, products, np.zeros_like(products))
