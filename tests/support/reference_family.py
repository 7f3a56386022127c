"""Members of the family in plain Python numbers: sections 19 to 21 of the specification.

Like `reference`, it shares no code with the package and uses no array library. Arrays are lists of
bit patterns in C order. Sums and products of single precision are computed in double and rounded
once more, which is exact rounding: double precision has more than twice the digits.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from statistics import NormalDist

import reference
from reference import FORMATS, Format

NORMAL_TAG, PERMUTATION_TAG = 3, 4

# The product of SELU's two constants, as doubles.
LIMIT = 1.6732632423543772848 * 1.0507009873554804934

Index = tuple[int, ...]


def decode(bits: int, fmt: Format) -> float:
    """Return the value of a pattern."""
    sign, magnitude = (-1.0 if bits & fmt.sign else 1.0), bits & ~fmt.sign
    if magnitude >= fmt.infinity:
        return sign * (math.inf if magnitude == fmt.infinity else math.nan)
    return sign * float(fmt.decode(magnitude))


def encode(value: float, fmt: Format) -> int:
    """Return the pattern nearest to a value; every NaN is the canonical one."""
    if math.isnan(value):
        return fmt.nan
    sign = fmt.sign if math.copysign(1.0, value) < 0 else 0
    return sign | (fmt.infinity if math.isinf(value) else fmt.encode(Fraction(abs(value))))


class Arithmetic:
    """Sums and products of a dtype, in its compute type."""

    def __init__(self, dtype: str) -> None:
        self.stored = FORMATS[dtype]
        self.compute = FORMATS["float64" if dtype == "float64" else "float32"]

    def load(self, bits: int) -> float:
        """Return the value of a pattern of the dtype."""
        return decode(bits, self.stored)

    def store(self, value: float) -> int:
        """Return the pattern of the dtype for a value of the compute type."""
        return encode(value, self.stored)

    def round(self, value: float) -> float:
        """Return the nearest value of the compute type."""
        return decode(encode(value, self.compute), self.compute)

    def add(self, a: float, b: float) -> float:
        """Return a rounded sum."""
        return self.round(a + b)

    def multiply(self, a: float, b: float) -> float:
        """Return a rounded product."""
        return self.round(a * b)


def words(key: int, tag: int, size: int) -> list[int]:
    """Return the words of a numbering that has four elements a block."""
    lo, hi = key % 2**32, key // 2**32
    blocks = (
        reference.philox((b % 2**32, b // 2**32, 0, tag), (lo, hi)) for b in itertools.count()
    )
    return list(itertools.islice(itertools.chain.from_iterable(blocks), size))


def permutations(shape: Sequence[int], key: int) -> list[list[int]]:
    """Return a permutation for each row of an array of two axes."""
    rows, length = shape
    drawn = words(key, PERMUTATION_TAG, rows * length)
    parts = [drawn[row * length : (row + 1) * length] for row in range(rows)]
    return [sorted(range(length), key=part.__getitem__) for part in parts]


def table(level: int, entry: int) -> int:
    """Return an entry of the table of quantiles."""
    word = Fraction(entry) * Fraction(2) ** (19 - 8 * level)
    u = min(float((word + Fraction(1, 2)) / 2**32), 0.5)
    return round(2**21 * abs(NormalDist().inv_cdf(u)))


def normal_size(word: int, stddev: float) -> tuple[int, int]:
    """Return the numbers N and e of a word: the deviate's magnitude is N * 2^(e - 21)."""
    rank, level = (word if word < 2**31 else 2**32 - 1 - word), 0
    for _ in range(3):
        if rank < 2**23:
            rank, level = rank * 2**8, level + 1
    entry, place = rank // 2**19, rank // 2**3 % 2**16
    quantile = table(level, entry)
    quantile -= (quantile - table(level, entry + 1)) * place // 2**16
    fraction, exponent = math.frexp(stddev)
    return quantile * math.floor(fraction * 2**32) // 2**32, exponent


def deviate(word: int, stddev: float) -> float:
    """Return the deviate of a word."""
    size, exponent = normal_size(word, stddev)
    return math.ldexp(-size if word < 2**31 else size, exponent - 21)


def indices(shape: Sequence[int]) -> Iterator[Index]:
    """Yield the indices of an array in C order."""
    return itertools.product(*map(range, shape))


def spread(keep: Sequence[int], mask_shape: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Return the decision of each element, for a mask with length 1 along broadcast axes."""
    decisions = dict(zip(indices(mask_shape), keep, strict=True))
    return [
        decisions[tuple(min(i, n - 1) for i, n in zip(index, mask_shape, strict=True))]
        for index in indices(shape)
    ]


def decide(shape: Sequence[int], p: float, key: int, axes: Sequence[int] = ()) -> list[int]:
    """Return the decision of each element, with one along each of the axes."""
    keep = reference.keep_mask(list(shape), p, key, broadcast_axes=axes)
    return spread(keep, reference.mask_shape(shape, axes), shape)


def drop_path(
    x: Sequence[int],
    shape: Index,
    dtype: str,
    key: int,
    *,
    p: float,
    mode: str = "row",
    scale_by_keep: bool = True,
) -> list[int]:
    """Return stochastic depth."""
    keep = decide(shape, p, key, range(mode == "row", len(shape)))
    return _scaled(x, dtype, keep, 1 / (1 - p) if scale_by_keep else 1.0)


def locked_dropout(
    x: Sequence[int], shape: Index, dtype: str, key: int, *, p: float, axis: int
) -> list[int]:
    """Return locked dropout."""
    return _scaled(x, dtype, decide(shape, p, key, [axis]), 1 / (1 - p))


def drop_head(
    x: Sequence[int], shape: Index, dtype: str, key: int, *, p: float, axis: int
) -> list[int]:
    """Return DropHead."""
    shared = [i for i in range(1, len(shape)) if i != axis]
    return _scaled(x, dtype, decide(shape, p, key, shared), 1 / (1 - p))


def alpha_dropout(
    x: Sequence[int], shape: Index, dtype: str, key: int, *, p: float, axes: Sequence[int] = ()
) -> list[int]:
    """Return alpha dropout, with one decision along each of the axes."""
    scale = 1 / math.sqrt((1 - p) * (1 + p * LIMIT**2))
    keep = decide(shape, p, key, axes)
    return _filled(x, dtype, keep, LIMIT * p, scale, -LIMIT * (1 - p) * scale)


def feature_alpha_dropout(
    x: Sequence[int], shape: Index, dtype: str, key: int, *, p: float
) -> list[int]:
    """Return feature alpha dropout."""
    return alpha_dropout(x, shape, dtype, key, p=p, axes=range(2, len(shape)))


def drop_key(x: Sequence[int], shape: Index, dtype: str, key: int, *, p: float) -> list[int]:
    """Return DropKey."""
    return _filled(x, dtype, decide(shape, p, key), 0.0, 1.0, -math.inf)


def drop_block(
    x: Sequence[int],
    shape: Index,
    dtype: str,
    key: int,
    *,
    p: float,
    block_size: int,
    axes: Sequence[int],
) -> list[int]:
    """Return DropBlock."""
    corners = [n - block_size + 1 if axis in axes else n for axis, n in enumerate(shape)]
    lengths = math.prod(shape[axis] for axis in axes)
    places = block_size ** len(axes) * math.prod(corners[axis] for axis in axes)
    keep = decide(corners, p * lengths / places, key)
    dropped = {corner for corner, flag in zip(indices(corners), keep, strict=True) if not flag}
    reach = [range(block_size if axis in axes else 1) for axis in range(len(shape))]
    flags = [
        int(
            dropped.isdisjoint(
                tuple(i - d for i, d in zip(index, steps, strict=True))
                for steps in itertools.product(*reach)
            )
        )
        for index in indices(shape)
    ]
    if not any(flags):
        return [0] * len(x)
    arithmetic = Arithmetic(dtype)
    size, kept = (arithmetic.round(float(n)) for n in (len(flags), sum(flags)))
    return _scaled(x, dtype, flags, arithmetic.round(size / kept))


def patch_dropout(
    x: Sequence[int],
    shape: Index,
    dtype: str,
    key: int,
    *,
    p: float,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
) -> list[int]:
    """Return the tokens that patch dropout keeps; `patch_shape` is their shape."""
    rows, length, *rest = shape
    width = math.prod(rest)
    kept = patch_shape(shape, p, num_prefix_tokens)[1] - num_prefix_tokens
    y: list[int] = []
    for row, order in enumerate(permutations((rows, length - num_prefix_tokens), key)):
        chosen = sorted(order[:kept]) if ordered else order[:kept]
        for token in (*range(num_prefix_tokens), *(num_prefix_tokens + i for i in chosen)):
            first = (row * length + token) * width
            y += x[first : first + width]
    return y


def patch_shape(shape: Sequence[int], p: float, num_prefix_tokens: int = 1) -> list[int]:
    """Return the shape of the output of patch dropout."""
    rows, length, *rest = shape
    others = length - num_prefix_tokens
    return [rows, num_prefix_tokens + max(1, math.floor(others * (1 - p))), *rest]


def gaussian_dropout(
    x: Sequence[int], shape: Index, dtype: str, key: int, *, p: float
) -> list[int]:
    """Return Gaussian dropout."""
    ari, stddev = Arithmetic(dtype), math.sqrt(p / (1 - p))
    factors = (ari.add(1.0, deviate(w, stddev)) for w in words(key, NORMAL_TAG, len(x)))
    return [
        ari.store(ari.multiply(ari.load(bits), factor))
        for bits, factor in zip(x, factors, strict=True)
    ]


def gaussian_noise(
    x: Sequence[int], shape: Index, dtype: str, key: int, *, stddev: float
) -> list[int]:
    """Return an array with Gaussian noise."""
    ari = Arithmetic(dtype)
    drawn = words(key, NORMAL_TAG, len(x))
    return [
        ari.store(ari.add(ari.load(bits), deviate(word, stddev)))
        for bits, word in zip(x, drawn, strict=True)
    ]


#: The members, by the name of their function in `unidrop.family`.
MEMBERS: dict[str, Callable[..., list[int]]] = {
    function.__name__: function
    for function in (
        *(drop_path, alpha_dropout, feature_alpha_dropout, drop_key, drop_head, locked_dropout),
        *(drop_block, patch_dropout, gaussian_dropout, gaussian_noise),
    )
}


def _scaled(x: Sequence[int], dtype: str, keep: Sequence[int], scale: float) -> list[int]:
    ari = Arithmetic(dtype)
    factor = ari.round(scale)
    return [
        ari.store(ari.multiply(ari.load(bits), factor)) if flag else 0
        for bits, flag in zip(x, keep, strict=True)
    ]


def _filled(
    x: Sequence[int], dtype: str, keep: Sequence[int], shift: float, scale: float, fill: float
) -> list[int]:
    ari = Arithmetic(dtype)
    shift, scale, fill = map(ari.round, (shift, scale, fill))
    return [
        ari.store(
            ari.add(ari.multiply(ari.add(ari.load(bits), shift), scale), 0.0)
            if flag
            else ari.add(0.0, fill)
        )
        for bits, flag in zip(x, keep, strict=True)
    ]
