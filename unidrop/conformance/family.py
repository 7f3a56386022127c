"""Compute members of the family by NumPy, as docs/spec.md specifies: a formula for each member.

To add a member to the matrix, write a formula, and add a row to `MEMBERS` that names it. The row is
then a contract, and a part of the contract of gradients. A backend that has the member must list
it in its attribute `members`.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from unidrop import Key, keep_mask
from unidrop.philox import philox

__all__ = ["MEMBERS", "Formula", "Member"]

_Array = NDArray[Any]

#: Maps x, the rate, the key and options to the output, and to a function from the output's gradient
#: to the gradient of x.
Formula = Callable[..., tuple[_Array, Callable[[_Array], _Array]]]

# SELU's limit at minus infinity, without its sign.
_LIMIT: Final = 1.7580993408473766

_NORMAL_TAG, _PERMUTATION_TAG = 3, 4


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the family, as a row of the matrix.

    Attributes
    ----------
    promise : str
        One sentence that is true of a backend that passes.
    formula : callable
        Its arguments are x, the rate, the key, and the options of a case.
    cases : tuple of mapping
        Options of the function of `unidrop.family`. Compiled modes, and other dtypes than float32,
        run the first case only.
    shape : tuple of int
        The shape of x. Its first length is even, so that two devices can share x.
    compiles_gradient : bool
        If False, gradients of compiled modes are not compared, because they have the operations of
        another member.
    """

    promise: str
    formula: Formula
    cases: tuple[Mapping[str, Any], ...] = ({},)
    shape: tuple[int, ...] = (8, 3, 4)
    compiles_gradient: bool = False


def _drop_path(x: _Array, p: float, key: Key, *, scale_by_keep: bool = True) -> Any:
    keep = keep_mask(x.shape, p, key, broadcast_axes=tuple(range(1, x.ndim)))
    scale = partial(_scale, keep=keep, scale=1 / (1 - p) if scale_by_keep else 1.0)
    return scale(x), scale


def _locked_dropout(x: _Array, p: float, key: Key, *, axis: int) -> Any:
    keep = keep_mask(x.shape, p, key, broadcast_axes=(axis,))
    scale = partial(_scale, keep=keep, scale=1 / (1 - p))
    return scale(x), scale


def _drop_head(x: _Array, p: float, key: Key, *, axis: int) -> Any:
    keep = keep_mask(x.shape, p, key, broadcast_axes=tuple({*range(1, x.ndim)} - {axis}))
    scale = partial(_scale, keep=keep, scale=1 / (1 - p))
    return scale(x), scale


def _alpha_dropout(x: _Array, p: float, key: Key, *, shared_from: int | None = None) -> Any:
    axes = () if shared_from is None else tuple(range(shared_from, x.ndim))
    keep = keep_mask(x.shape, p, key, broadcast_axes=axes)
    scale = 1 / math.sqrt((1 - p) * (1 + p * _LIMIT**2))
    shift, fill = _LIMIT * p, -_LIMIT * (1 - p) * scale
    return _fill(x, keep, scale, shift, fill), partial(_scale, keep=keep, scale=scale)


def _drop_key(x: _Array, p: float, key: Key) -> Any:
    keep = keep_mask(x.shape, p, key)
    return _fill(x, keep, 1.0, 0.0, -math.inf), partial(_scale, keep=keep, scale=1.0)


def _drop_block(x: _Array, p: float, key: Key, *, block_size: int, axes: tuple[int, ...]) -> Any:
    corners = [n - block_size + 1 if axis in axes else n for axis, n in enumerate(x.shape)]
    lengths, places = (math.prod(s[axis] for axis in axes) for s in (x.shape, corners))
    gamma = p * lengths / (block_size ** len(axes) * places)
    is_corner = ~keep_mask(tuple(corners), gamma, key)
    keep = np.ones(x.shape, dtype=bool)
    for distances in itertools.product(range(block_size), repeat=len(axes)):
        first = dict(zip(axes, distances, strict=True))
        reached = (slice(first.get(i, 0), first.get(i, 0) + n) for i, n in enumerate(corners))
        keep[tuple(reached)] &= ~is_corner
    compute = _compute_type(x)
    kept = max(1, np.count_nonzero(keep))
    scale = partial(_scale, keep=keep, scale=compute(x.size) / compute(kept))
    return scale(x), scale


def _patch_dropout(
    x: _Array, p: float, key: Key, *, num_prefix_tokens: int = 1, ordered: bool = False
) -> Any:
    rows, length = x.shape[:2]
    others = length - num_prefix_tokens
    words = _words(key, _PERMUTATION_TAG, rows * others).reshape(rows, others)
    order = np.argsort(words, axis=1, kind="stable")[:, : max(1, math.floor(others * (1 - p)))]
    order = np.sort(order, axis=1) if ordered else order
    prefix = np.tile(np.arange(num_prefix_tokens), (rows, 1))
    columns = np.concatenate([prefix, order + num_prefix_tokens], axis=1)
    places = np.arange(rows)[:, None], columns

    def pullback(upstream: _Array) -> _Array:
        gradient = np.zeros(x.shape, dtype=upstream.dtype)
        gradient[places] = upstream
        return gradient

    return x[places], pullback


def _gaussian_dropout(x: _Array, p: float, key: Key) -> Any:
    compute = _compute_type(x)
    factor = compute(1) + _deviates(x, math.sqrt(p / (1 - p)), key)

    def multiply(v: _Array) -> _Array:
        product: _Array = (v.astype(compute) * factor).astype(v.dtype)
        return product

    return multiply(x), multiply


def _gaussian_noise(x: _Array, stddev: float, key: Key) -> Any:
    compute = _compute_type(x)
    y = (x.astype(compute) + _deviates(x, stddev, key)).astype(x.dtype)
    return y, lambda upstream: upstream


#: Every member that the matrix compares, by the name of its function of `unidrop.family`.
MEMBERS: Mapping[str, Member] = {
    "drop_path": Member(
        "Stochastic depth drops whole rows, and scales the others only if it should.",
        _drop_path,
        ({"scale_by_keep": False}, {"scale_by_keep": True}),
        compiles_gradient=True,
    ),
    "alpha_dropout": Member(
        "Alpha dropout has its formula bit for bit, which is a sum, a product and a sum.",
        _alpha_dropout,
        compiles_gradient=True,
    ),
    "feature_alpha_dropout": Member(
        "Feature alpha dropout decides once for each channel, and has the same formula.",
        partial(_alpha_dropout, shared_from=2),
    ),
    "drop_key": Member(
        "DropKey sets scores to minus infinity, and leaves the others.",
        _drop_key,
    ),
    "drop_head": Member(
        "DropHead has one decision for each head of an example, and the scale of dropout.",
        _drop_head,
        ({"axis": 1}, {"axis": 2}),
    ),
    "locked_dropout": Member(
        "Locked dropout has one mask along the axis of time.",
        _locked_dropout,
        ({"axis": 1}, {"axis": 0}),
    ),
    "drop_block": Member(
        "DropBlock drops whole blocks, and scales by the counts of all elements and kept ones.",
        _drop_block,
        ({"block_size": 3, "axes": (2, 3)}, {"block_size": 2, "axes": (2, 3)}),
        (2, 2, 5, 6),
    ),
    "patch_dropout": Member(
        "Patch dropout keeps the tokens that stable permutations of each row name first.",
        _patch_dropout,
        (
            {"num_prefix_tokens": 1, "ordered": False},
            {"num_prefix_tokens": 1, "ordered": True},
            {"num_prefix_tokens": 0, "ordered": False},
        ),
        (4, 9, 3),
        compiles_gradient=True,
    ),
    "gaussian_dropout": Member(
        "Gaussian dropout multiplies by 1 plus a normal deviate of the key.",
        _gaussian_dropout,
        compiles_gradient=True,
    ),
    "gaussian_noise": Member(
        "Gaussian noise adds a normal deviate of the key.",
        _gaussian_noise,
    ),
}


def _compute_type(x: _Array) -> Any:
    """Return the type that computes, for x of a real dtype."""
    return np.float64 if x.dtype == np.float64 else np.float32


def _scale(x: _Array, keep: _Array, scale: Any) -> _Array:
    """Return kept elements times a scale, and +0 for others."""
    compute = _compute_type(x)
    y: _Array = np.where(keep, x.astype(compute) * compute(scale), compute(0)).astype(x.dtype)
    return y


def _fill(x: _Array, keep: _Array, scale: float, shift: float, fill: float) -> _Array:
    """Return kept elements plus a shift, times a scale, and the value to fill in for others."""
    compute = _compute_type(x)
    kept = (x.astype(compute) + compute(shift)) * compute(scale) + compute(0)
    y: _Array = np.where(keep, kept, compute(fill)).astype(x.dtype)
    return y


def _words(key: Key, tag: int, size: int) -> _Array:
    """Return the words of a numbering of four elements a block, in order."""
    number = int(key)
    halves = number % 2**32, number >> 32
    blocks = (philox((n % 2**32, n >> 32, 0, tag), halves) for n in range(-(-size // 4)))
    return np.array([int(word) for block in blocks for word in block][:size], dtype=np.int64)


def _deviates(x: _Array, stddev: float, key: Key) -> _Array:
    """Return normal deviates of x's shape, in the type that computes."""
    words = _words(key, _NORMAL_TAG, x.size)
    deviates = [_deviate(int(word), stddev) for word in words]
    return np.array(deviates, dtype=_compute_type(x)).reshape(x.shape)


def _deviate(word: int, stddev: float) -> float:
    """Return the deviate of a word, by integers of any length."""
    rank, level = min(word, 2**32 - 1 - word), 0
    while level < 3 and rank < 2**23:
        rank, level = rank * 2**8, level + 1
    entry, place = rank // 2**19, rank // 2**3 % 2**16
    above, below = _quantile(level, entry), _quantile(level, entry + 1)
    quantile = above - (above - below) * place // 2**16
    fraction, exponent = math.frexp(stddev)
    size = math.ldexp(quantile * math.floor(fraction * 2**32) // 2**32, exponent - 21)
    return -size if word < 2**31 else size


def _quantile(level: int, entry: int) -> int:
    probability = min((entry * 2.0 ** (19 - 8 * level) + 0.5) / 2**32, 0.5)
    return round(-NormalDist().inv_cdf(probability) * 2**21)
