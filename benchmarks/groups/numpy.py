"""NumPy, compared with a multiply, a random mask alone, and a hand-written dropout."""

from collections.abc import Iterator, Sequence

import numpy as np

import unidrop
from benchmarks.config import LARGE, Config, Shape
from benchmarks.fixtures import KEEP, SCALE, P, key, uniform
from benchmarks.rows import Row, timed
from benchmarks.thresholds import Target, at_most, faster
from benchmarks.timing import Candidate
from unidrop.adapters.numpy import dropout

__all__ = ["rows"]

_RAND = "rand < keep"
_NAIVE = "naive"
_FROM_A_MILLION = at_most(1.3, "portable", _NAIVE)

_TARGETS: dict[Shape, tuple[Target, ...]] = {
    LARGE: (at_most(1.5, "unidrop", "multiply"), faster(8, "unidrop", _RAND), _FROM_A_MILLION),
    (10**6,): (_FROM_A_MILLION,),
}


def rows(config: Config) -> Iterator[Row]:
    """Yield the sweep over sizes, layouts, dtypes, and dropout in place."""
    for shape in config.shapes:
        targets = _TARGETS.get(shape, ())
        yield Row("numpy", "forward", shape, timed(_forward, shape), own=_NAIVE, targets=targets)
    square = (config.side, config.side)
    for name, measure in (("transposed", _transposed), ("Fortran order", _fortran)):
        yield Row(
            "numpy",
            name,
            square,
            timed(measure, square),
            base="contiguous",
            targets=(at_most(4, name, "contiguous"),),
        )
    yield Row("numpy", "transposed to row-major", square, timed(_to_row_major, square))
    shape = (config.elements,)
    for dtype in ("float64", "float16"):
        yield Row("numpy", dtype, shape, timed(_dtype, shape, dtype))
    yield Row("numpy", "in place", shape, timed(_in_place, shape))


def _forward(shape: Shape) -> Sequence[Candidate]:
    x = uniform(shape)
    y = np.empty_like(x)
    scale = np.float32(SCALE)

    def drop(step: int) -> None:
        dropout(x, P, key=key(step), out=y)

    return (
        Candidate("unidrop", drop),
        Candidate("portable", drop, lambda: unidrop.force_path("portable")),
        Candidate("multiply", lambda step: np.multiply(x, scale, out=y)),
        Candidate(_RAND, lambda step: np.random.rand(*shape) < KEEP),
        Candidate(_NAIVE, lambda step: x * (np.random.rand(*shape) < KEEP) / KEEP),
    )


def _transposed(shape: Shape) -> Sequence[Candidate]:
    x = uniform(shape)
    return (
        Candidate("contiguous", lambda step: dropout(x, P, key=key(step))),
        Candidate("transposed", lambda step: dropout(x.T, P, key=key(step))),
    )


def _fortran(shape: Shape) -> Sequence[Candidate]:
    x = uniform(shape)
    fortran = np.asfortranarray(x)
    y, y_fortran = np.empty_like(x), np.empty_like(fortran)
    return (
        Candidate("contiguous", lambda step: dropout(x, P, key=key(step), out=y)),
        Candidate("Fortran order", lambda step: dropout(fortran, P, key=key(step), out=y_fortran)),
    )


def _to_row_major(shape: Shape) -> Sequence[Candidate]:
    x = uniform(shape).T
    y = np.empty(x.shape, dtype=x.dtype)
    scale = np.float32(SCALE)
    return (
        Candidate("unidrop", lambda step: dropout(x, P, key=key(step), out=y)),
        Candidate("multiply", lambda step: np.multiply(x, scale, out=y)),
    )


def _dtype(shape: Shape, dtype: str) -> Sequence[Candidate]:
    x = uniform(shape).astype(dtype)
    y = np.empty_like(x)
    scale = x.dtype.type(SCALE)
    return (
        Candidate("unidrop", lambda step: dropout(x, P, key=key(step), out=y)),
        Candidate("multiply", lambda step: np.multiply(x, scale, out=y)),
    )


def _in_place(shape: Shape) -> Sequence[Candidate]:
    dropped, multiplied = uniform(shape), uniform(shape)
    # In place, repeated multiplication by more than 1 would soon reach infinity.
    one = np.float32(1)
    return (
        Candidate("unidrop", lambda step: dropout(dropped, P, key=key(step), out=dropped)),
        Candidate("multiply", lambda step: np.multiply(multiplied, one, out=multiplied)),
    )
