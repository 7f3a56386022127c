"""NumPy, compared with a multiply and with a hand-written dropout."""

from collections.abc import Iterator, Sequence

import numpy as np

import unidrop
from benchmarks.config import LARGE, MIDDLE, Config, Shape
from benchmarks.fixtures import KEEP, SCALE, P, key, one_thread, uniform
from benchmarks.rows import Row, timed
from benchmarks.thresholds import at_most, not_slower
from benchmarks.timing import Candidate
from unidrop.adapters.numpy import dropout, dropout_backward

__all__ = ["rows"]

_OWN = "hand-written"
_NO_KEY = "unidrop, no key"
_KEEP, _SCALE = np.float32(KEEP), np.float32(SCALE)

_WINDOW_COLUMNS = 31
_COLUMNS = 100

_PORTABLE: Shape = (10**6,)


def rows(config: Config) -> Iterator[Row]:
    """Yield the sweep over sizes, layouts, dtypes, dropout in place, and the portable path."""
    for shape in config.shapes:
        goal = not_slower(_OWN, "unidrop", _NO_KEY)
        yield Row("numpy", "forward", shape, timed(_forward, shape), own=_OWN, targets=goal)
    for shape in config.shapes:
        goal = not_slower(_OWN, "unidrop")
        if shape == LARGE:
            goal += (at_most(1.3, "unidrop", "multiply"),)
        yield Row("numpy", "forward, out=", shape, timed(_out, shape), own=_OWN, targets=goal)
    for shape in config.shapes:
        goal = not_slower(_OWN, "unidrop")
        both = timed(_forward_backward, shape)
        yield Row("numpy", "forward + backward", shape, both, own=_OWN, targets=goal)
    if MIDDLE in config.shapes:
        measure = timed(_out, MIDDLE, within=one_thread)
        goal = (at_most(2.2, "unidrop", "multiply"),)
        name = "forward, out=, 1 thread"
        yield Row("numpy", name, MIDDLE, measure, own=_OWN, targets=goal)
    square = (config.side, config.side)
    yield Row(
        "numpy",
        "layouts",
        square,
        timed(_layouts, config.side),
        base="contiguous",
        targets=tuple(at_most(3, name, "contiguous") for name in _LAYOUTS),
    )
    shape = (config.elements,)
    for dtype in ("float64", "float16"):
        yield Row("numpy", f"forward, out=, {dtype}", shape, timed(_dtype, shape, dtype))
    yield Row("numpy", "in place", shape, timed(_in_place, shape))
    if _PORTABLE in config.shapes:
        yield Row("numpy", "forward, portable", _PORTABLE, timed(_portable, _PORTABLE))


def _forward(shape: Shape) -> Sequence[Candidate]:
    x, rng = uniform(shape), np.random.default_rng(0)
    return (
        Candidate("unidrop", lambda step: dropout(x, P, key=key(step))),
        Candidate(_NO_KEY, lambda step: dropout(x, P)),
        Candidate("multiply", lambda step: x * _SCALE),
        Candidate(_OWN, lambda step: x * (rng.random(shape, dtype=np.float32) < _KEEP) * _SCALE),
    )


def _out(shape: Shape) -> Sequence[Candidate]:
    """Return candidates that write to an existing array, the hand-written one to three."""
    x, rng = uniform(shape), np.random.default_rng(0)
    y, random, keep = np.empty_like(x), np.empty_like(x), np.empty(shape, dtype=np.bool)

    def own(step: int) -> None:
        rng.random(dtype=np.float32, out=random)
        np.less(random, _KEEP, out=keep)
        np.multiply(x, keep, out=y)
        np.multiply(y, _SCALE, out=y)

    return (
        Candidate("unidrop", lambda step: dropout(x, P, key=key(step), out=y)),
        Candidate("multiply", lambda step: np.multiply(x, _SCALE, out=y)),
        Candidate(_OWN, own),
    )


def _forward_backward(shape: Shape) -> Sequence[Candidate]:
    x, rng = uniform(shape), np.random.default_rng(0)
    upstream = np.ones_like(x)

    def drop(step: int) -> object:
        now = key(step)
        return dropout(x, P, key=now), dropout_backward(upstream, P, key=now)

    def own(step: int) -> object:
        keep = rng.random(shape, dtype=np.float32) < _KEEP
        return x * keep * _SCALE, upstream * keep * _SCALE

    return (
        Candidate("unidrop", drop),
        Candidate("multiply", lambda step: (x * _SCALE, upstream * _SCALE)),
        Candidate(_OWN, own),
    )


_LAYOUTS = (
    "Fortran order",
    "Fortran order to C order",
    "inner axes transposed",
    "two columns in Fortran order",
    f"window of {_WINDOW_COLUMNS} columns",
    "one mask for all rows",
)


def _layouts(side: int) -> Sequence[Candidate]:
    """Return candidates of equal size, up to a few elements."""
    x = uniform((side, side))
    y = np.empty_like(x)
    fortran, columns = np.asfortranarray(x), np.asfortranarray(x.reshape(-1, 2))
    y_fortran, y_columns = np.empty_like(fortran), np.empty_like(columns)
    inner, y_inner = (a.reshape(16, side, -1).transpose(0, 2, 1) for a in (x, y))
    count = x.size // _WINDOW_COLUMNS
    window, y_window = (a.reshape(-1)[: count * _WINDOW_COLUMNS].reshape(count, -1) for a in (x, y))

    def narrow(step: int) -> object:
        whole = (count, _COLUMNS)
        return dropout(window, P, key=key(step), global_shape=whole, start=(0, 3), out=y_window)

    calls = (
        lambda step: dropout(fortran, P, key=key(step), out=y_fortran),
        lambda step: dropout(fortran, P, key=key(step), out=y),
        lambda step: dropout(inner, P, key=key(step), out=y_inner),
        lambda step: dropout(columns, P, key=key(step), out=y_columns),
        narrow,
        lambda step: dropout(x, P, key=key(step), broadcast_axes=(0,), out=y),
    )
    return (
        Candidate("contiguous", lambda step: dropout(x, P, key=key(step), out=y)),
        *(Candidate(name, call) for name, call in zip(_LAYOUTS, calls, strict=True)),
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


def _portable(shape: Shape) -> Sequence[Candidate]:
    """Return the candidates of `_forward`, with unidrop's kernels switched off."""
    unidrop_, *others = _forward(shape)
    return (Candidate("unidrop", unidrop_.call, lambda: unidrop.force_path("portable")), *others)
