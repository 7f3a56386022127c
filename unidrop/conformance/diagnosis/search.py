"""Find where a mask or an output differs from the specification, and which mutation explains it.

The search applies each mutation. It reports a cause only if the mutated mask or output equals the
given one in every element.
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
from unidrop.conformance.diagnosis.mutations import Keep, mask_mutations, product_mutations, scale
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.dtypes import compute_dtype

__all__ = [
    "Diagnosis",
    "Difference",
    "diagnose",
    "find_common_causes",
    "find_mask_causes",
    "find_output_causes",
    "first_difference",
]

# A sample of this size rejects most mutations before the search computes whole masks.
_SAMPLE = 2048
_CHUNK = 1 << 20

_CONSTANT_CAUSES = {
    True: "nothing is dropped, as in evaluation or at p = 0",
    False: "everything is dropped, as at p = 1",
}

# With this much information in a mask, one of 10^4 pairs of mutations fits by chance in 1 of 1000
# masks.
_MIN_BITS = 23


@dataclass(frozen=True, slots=True)
class Difference:
    """The first element, in C order, that differs between a mask and the specification.

    Attributes
    ----------
    position : tuple of int
        Position in the array.
    index : int
        Index in the global mask.
    block, word, half : int
        The block and the word that decide the element; half is 0 for even elements, 1 for odd ones.
    u, threshold : int
    expected, actual : bool
        True if kept.
    count, size : int
        Number of elements that differ, and of all elements.
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
        names = {True: "kept", False: "dropped"}
        position = f"at {self.position}, " if self.position else ""
        half = ("even", "odd")[self.half]
        return (
            f"{self.count} of {self.size} elements differ, the first {position}index {self.index}: "
            f"block {self.block}, word {self.word}, its {half} element\n"
            f"u = {self.u:08x}, T = {self.threshold:08x}: expected {names[self.expected]}, "
            f"got {names[self.actual]}"
        )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The difference between an array and the specification, with each cause that explains it.

    Attributes
    ----------
    description : str
        The difference in words.
    causes : tuple of str
        Each mutation, or pair of mutations, that reproduces the array.
    is_mask_wrong : bool
        True if the mask differs, False if only the output does.
    is_small : bool
        True if the mask has so few elements that a mutation may fit by chance. Pairs of mutations
        were not tried then.
    """

    description: str
    causes: tuple[str, ...]
    is_mask_wrong: bool
    is_small: bool = False


def diagnose(
    model: StreamModel, array: NDArray[Any], x: NDArray[Any] | None = None, *, pairs: bool = True
) -> Diagnosis | None:
    """Return how an array differs from the specification, or None if it conforms.

    Parameters
    ----------
    model : StreamModel
        Model of the expected mask.
    array : array
        A mask of bools or of integers 0 and 1, or an output, whose nonzero elements were kept.
    x : array, optional
        Input of the output, with its shape and dtype. If given, the output is compared bit for bit.
        The mask is not compared in elements where x is 0.
    pairs : bool, default True
        If True, also try pairs of mutations of a mask, which takes seconds.
    """
    expected = np.concatenate([model.keep(p) for p in _chunks(array.size)] or [np.zeros(0, bool)])
    expected = expected.reshape(array.shape)
    known = np.ones(array.shape, dtype=bool) if x is None else _is_informative(x, array, model.p)
    keep = np.where(known, array != 0, expected)
    difference = first_difference(model, keep)
    if difference is not None:
        causes = find_mask_causes(model, keep, known, pairs=pairs)
        hint = "" if causes else _agreement_hint(model.p, difference)
        if x is None and array.dtype.kind in "fcV" and not causes and not np.any(keep & ~expected):
            hint += _INPUT_HINT
        is_small = _is_small(model, keep)
        return Diagnosis(f"{difference}{hint}", tuple(causes), True, is_small)
    if x is None:
        return None
    with np.errstate(all="ignore"):
        y = _expected_output(x, model.p, expected)
    try:
        check_output(array, y, x, "output")
    except ContractError as error:
        causes = find_output_causes(x, model.p, expected, array)
        return Diagnosis(f"the mask is right, the output is wrong: {error}", tuple(causes), False)
    return None


def _is_informative(x: NDArray[Any], y: NDArray[Any], p: float) -> NDArray[np.bool]:
    """Return the flags of elements whose output shows whether they were kept.

    An output of 0 shows nothing if x is 0, or so small that a zero conforms. A NaN shows nothing if
    x is NaN or so large that x / (1 - p) overflows: multiplying by the mask results in NaN too.
    """
    compute = np.finfo(numpy_dtype(compute_dtype(x.dtype)))
    width = 2 if x.dtype.kind == "c" else 1
    parts = components(x).reshape(*x.shape, width).astype(np.float64)
    most = float(ml_dtypes.finfo(x.dtype).max) * (1 - p)
    with np.errstate(invalid="ignore"):
        is_small = (np.abs(parts) < float(compute.tiny)).all(axis=-1)
        is_lost = np.isnan(y) & ~(np.abs(parts) <= most).all(axis=-1)
    is_informative: NDArray[np.bool] = ~is_small & ~is_lost
    return is_informative


_INPUT_HINT = "\nan output of 0 may come from an input of 0: pass the input too, with --input"


def _agreement_hint(p: float, difference: Difference) -> str:
    """Return the share of equal elements, beside the share in two independent masks."""
    agree = 1 - difference.count / difference.size
    by_chance = p**2 + (1 - p) ** 2
    return f"\n{agree:.2%} of the elements agree; independent masks agree in {by_chance:.2%}"


def first_difference(model: StreamModel, keep: Keep) -> Difference | None:
    """Return the first difference between a mask of the array's shape and the model, or None.

    Examples
    --------
    >>> model = StreamModel(42, (7,), 0.5, (3,))
    >>> keep = model.keep(np.arange(3))
    >>> print(first_difference(model, ~keep))
    3 of 3 elements differ, the first at (0,), index 0: block 0, word 0, its even element
    u = 756ef526, T = 80000000: expected dropped, got kept
    """
    flat = keep.reshape(-1)
    count, first = 0, None
    for positions in _chunks(flat.size):
        wrong = positions[model.keep(positions) != flat[positions]]
        count += wrong.size
        if first is None and wrong.size:
            first = wrong[:1]
    if first is None:
        return None
    index = model.indices(first)
    number = int(index[0])
    return Difference(
        position=tuple(int(i) for i in np.unravel_index(int(first[0]), model.shape)),
        index=number,
        block=number // 8,
        word=number // 2 % 4,
        half=number % 2,
        u=int(model.u(index)[0]),
        threshold=model.threshold(model.p),
        expected=bool(model.keep(first)[0]),
        actual=bool(flat[first[0]]),
        count=count,
        size=flat.size,
    )


def find_mask_causes(
    model: StreamModel, keep: Keep, known: Keep | None = None, *, pairs: bool = True
) -> list[str]:
    """Return each mutation of the model, or pair of mutations, that reproduces a mask.

    Several causes mean that this mask cannot distinguish them. Pairs are tried only if no single
    mutation fits and the mask is large enough to exclude chance.

    Parameters
    ----------
    model : StreamModel
        Model of the expected mask.
    keep : array of bool
        The actual mask, in the array's shape.
    known : array of bool, optional
        Flags of the elements to compare; all by default.
    pairs : bool, default True
        If True, also try pairs of mutations, which takes seconds.
    """
    flat = keep.reshape(-1)
    is_known = np.ones(flat.shape, dtype=bool) if known is None else known.reshape(-1)
    constant = _constant_cause(flat[is_known])
    if constant and not _is_small(model, keep):
        # Rare arithmetic mutations make the mask constant too, but are not the likely cause.
        return [constant]
    wrong = _first_wrong(model, flat)
    # Wrong elements reject most mutations, so compare a few of them first, then a sample, then all.
    sample = _sample(flat.size)
    stages = [wrong[:64], np.union1d(wrong, sample[is_known[sample]])]

    def explains(changed: StreamModel) -> bool:
        chunks = (positions[is_known[positions]] for positions in _chunks(flat.size))
        return all(
            np.array_equal(changed.keep(positions), flat[positions])
            for positions in itertools.chain(stages, chunks)
        )

    singles = [
        (what, changes, replace(model, **changes)) for what, changes in mask_mutations(model)
    ]
    found = [what for what, _, changed in singles if explains(changed)]
    found = [constant, *found] if constant else found
    if found or not pairs or _is_small(model, keep):
        return found
    return [
        f"{first}, and {second}"
        for first, changes, changed in singles
        for second, others in mask_mutations(changed)
        # Each pair once, in alphabetical order, and only if the two change different fields.
        if first < second
        and changes.keys().isdisjoint(others)
        and explains(replace(changed, **others))
    ]


def find_common_causes(masks: Sequence[tuple[StreamModel, Keep]]) -> list[str]:
    """Return each single mutation that reproduces all of several masks.

    Parameters
    ----------
    masks : sequence of (StreamModel, array of bool)
        Model of the expected mask and the actual mask. The first mask must be wrong. The others may
        be right, which excludes the mutations that would change them.

    Examples
    --------
    >>> models = [StreamModel(42, (7,), 0.3, (size,)) for size in (2, 60)]
    >>> inverted = [(model, ~model.keep(np.arange(*model.shape))) for model in models]
    >>> len(find_common_causes(inverted[:1])) > 1
    True
    >>> find_common_causes(inverted)
    ['the mask is inverted: 1 means dropped']
    """
    (model, keep), *others = masks
    found = find_mask_causes(model, keep, pairs=False)
    for model, keep in others:
        # A mutation that does not apply to this mask stays a candidate.
        changed = {
            what: replace(model, **changes)
            for what, changes in mask_mutations(model)
            if what in found
        }
        positions, flat = np.arange(keep.size), keep.reshape(-1)
        found = [
            what
            for what in found
            if (
                np.array_equal(changed[what].keep(positions), flat)
                if what in changed
                else what not in _CONSTANT_CAUSES.values() or what == _constant_cause(flat)
            )
        ]
    return found


def _constant_cause(flat: Keep) -> str:
    """Return the cause of a constant mask, or an empty string."""
    return "" if flat.any() != flat.all() else _CONSTANT_CAUSES[bool(flat.all())]


def _is_small(model: StreamModel, keep: Keep) -> bool:
    """Return True if one of the pairs of mutations may reproduce a mask by chance."""
    shared = model.broadcast_axes
    decided = keep[tuple(slice(1) if axis in shared else slice(None) for axis in range(keep.ndim))]
    kept_count = int(np.count_nonzero(decided))
    dropped_count = decided.size - kept_count
    # Mutations make masks of the rate p or 1 - p. Assume the rate with less information.
    least = 2.0**-32
    bits = [-math.log2(min(max(q, least), 1 - least)) for q in (1 - model.p, model.p)]
    information = min(
        kept_count * kept_bits + dropped_count * dropped_bits
        for kept_bits, dropped_bits in (bits, bits[::-1])
    )
    return information < _MIN_BITS


def _chunks(size: int) -> Iterator[NDArray[np.int64]]:
    for begin in range(0, size, _CHUNK):
        yield np.arange(begin, min(begin + _CHUNK, size))


def _first_wrong(model: StreamModel, flat: Keep) -> NDArray[np.int64]:
    """Return the first positions of elements that differ between a mask and the model."""
    found: list[NDArray[np.int64]] = []
    for positions in _chunks(flat.size):
        found.append(positions[model.keep(positions) != flat[positions]])
        if sum(part.size for part in found) >= _SAMPLE:
            break
    return np.concatenate([*found, np.zeros(0, dtype=np.int64)])[:_SAMPLE]


def _sample(size: int) -> NDArray[np.int64]:
    """Return the first positions and random ones, the same for equal sizes."""
    if size <= _SAMPLE:
        return np.arange(size)
    random = np.random.default_rng(0).integers(0, size, _SAMPLE // 2)
    return np.unique(np.concatenate([np.arange(_SAMPLE // 2), random]))


def find_output_causes(x: NDArray[Any], p: float, keep: Keep, actual: NDArray[Any]) -> list[str]:
    """Return each mutation of the product that reproduces an output whose mask is right.

    Parameters
    ----------
    x, actual : array
        The input and the actual output, with the same shape and dtype.
    p : float
    keep : array of bool
    """
    if p == 1:
        return []
    with np.errstate(all="ignore"):
        return [
            what
            for what, products in product_mutations(x, p)
            if not differing(actual, _select(products, keep), x).size
        ] + _selection_causes(x, p, keep, actual)


def _selection_causes(x: NDArray[Any], p: float, keep: Keep, actual: NDArray[Any]) -> list[str]:
    scaled = scale(x, numpy_dtype(compute_dtype(x.dtype)), 1 / (1 - p))
    multiplied = components(scaled) * np.repeat(
        keep.reshape(-1), components(x).size // max(1, x.size)
    ).astype(components(x).dtype)
    if differing(actual, multiplied.view(x.dtype).reshape(x.shape), x).size:
        return []
    return ["products are multiplied by the mask instead of selected: -0 and NaN remain"]


def _expected_output(x: NDArray[Any], p: float, keep: Keep) -> NDArray[Any]:
    """Return the output that the specification defines (section 8)."""
    if p == 0:
        return x
    if p == 1:
        return np.zeros_like(x)
    return _select(scale(x, numpy_dtype(compute_dtype(x.dtype)), 1 / (1 - p)), keep)


def _select(products: NDArray[Any], keep: Keep) -> NDArray[Any]:
    return np.where(keep, products, np.zeros_like(products))
