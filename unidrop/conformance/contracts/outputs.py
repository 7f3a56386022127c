"""Define the contracts of outputs, of gradients and of invalid arguments."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

import unidrop
from unidrop.conformance.compare import (
    ContractError,
    check_equal,
    check_mask,
    check_output,
    check_unchanged,
    numpy_dtype,
)
from unidrop.conformance.contracts.contract import (
    RATE,
    SHAPE,
    Cell,
    check_model_output,
    contract,
    reference_result,
    require_nonempty,
)
from unidrop.conformance.diagnosis.search import find_mask_causes, find_output_causes
from unidrop.conformance.golden import GoldenOutput, golden_outputs
from unidrop.dtypes import DTYPES


@contract(
    "scale",
    "Kept elements are multiplied by 1 / (1 - p) in the compute type, then rounded to x's dtype.",
    every_dtype=True,
)
def _scale(cell: Cell) -> None:
    compared = 0
    for golden in _golden_outputs(cell):
        if not 0 < golden.p < 1:
            continue
        with np.errstate(all="ignore"):
            y = cell.dropout(golden.x, golden.p, golden.step, seed=golden.seed)
            check_equal(y.shape, golden.y.shape, "shape")
            # Compare only elements that both keep, since other contracts check the mask.
            kept = (y != 0) & (golden.y != 0)
            compared += int(np.count_nonzero(kept))
            x, actual, expected = golden.x[kept], y[kept], golden.y[kept]
            try:
                check_output(actual, expected, x, f"kept elements of output {golden.name!r}")
            except ContractError as error:
                causes = find_output_causes(x, golden.p, np.ones(x.shape, dtype=bool), actual)
                raise error.with_causes(causes) from None
    require_nonempty(range(compared))


@contract(
    "output",
    "The output equals the golden outputs bit for bit, by the output rule.",
    every_dtype=True,
    compiled_dtypes=DTYPES,
)
def _output(cell: Cell) -> None:
    for golden in _golden_outputs(cell):
        with np.errstate(all="ignore"):
            y = cell.dropout(golden.x, golden.p, golden.step, seed=golden.seed)
            name, diff = f"output {golden.name!r}", cell.diff_command(golden.model)
            check_model_output(golden.model, y, golden.y, golden.x, name, diff)


@contract("gradient-mask", "The gradient uses the mask of the forward pass.", ("gradient",))
def _gradient_mask(cell: Cell) -> None:
    golden = _golden_outputs(cell)[0]
    x = cell.values(golden.x.shape)
    arguments = golden.p, golden.seed, golden.step
    y = cell.backend.dropout(cell.array(x), *arguments, mode=cell.mode)
    upstream = cell.array(cell.ones(x.shape))
    actual = cell.capable.gradient(cell.array(x), upstream, *arguments, mode=cell.mode)
    name = f"nonzero elements of the gradient at p = {golden.p}, step {golden.step}"
    keep = cell.backend.to_numpy(actual) != 0
    try:
        check_mask(keep, cell.backend.to_numpy(y) != 0, name)
    except ContractError as error:
        if keep.shape != x.shape:
            raise
        raise error.with_causes(find_mask_causes(golden.model, keep, pairs=False)) from None


@contract(
    "gradient",
    "The gradient is dropout of the upstream gradient, with the mask of the forward pass.",
    ("gradient",),
    every_dtype=True,
    # A compiler may round the scale or the products of a 16-bit dtype twice.
    compiled_dtypes=("float16",),
)
def _gradient(cell: Cell) -> None:
    for golden in _golden_outputs(cell):
        x = cell.array(cell.values(golden.x.shape))
        upstream = cell.array(golden.x)
        with np.errstate(all="ignore"):
            actual = cell.capable.gradient(
                x, upstream, golden.p, golden.seed, golden.step, mode=cell.mode
            )
            name = f"gradient for the upstream gradient x of output {golden.name!r}"
            actual = cell.backend.to_numpy(actual)
            check_model_output(golden.model, actual, golden.y, golden.x, name)


@contract(
    "dropped-is-zero",
    "Dropped elements are +0, even if NaN or infinite, and p = 1 drops every element.",
    every_dtype=True,
)
def _dropped_is_zero(cell: Cell) -> None:
    x = cell.ones(SHAPE)
    keep = reference_result(unidrop.keep_mask, SHAPE, RATE, cell.key(0))
    for value in (np.nan, np.inf, -np.inf, -1.0):
        x[...] = value
        with np.errstate(all="ignore"):
            y, all_dropped = cell.dropout(x, RATE), cell.dropout(x, 1)
        zeros = np.zeros_like(x)
        check_output(y[~keep], zeros[~keep], x[~keep], f"dropped {value}")
        check_output(all_dropped, zeros, x, f"{value} at p = 1")


@contract("nothing-to-drop", "p = 0 and training = False return x unchanged.", every_dtype=True)
def _nothing_to_drop(cell: Cell) -> None:
    x = cell.values(SHAPE)
    x.reshape(-1)[:4] = (np.nan, np.inf, -np.inf, -0.0)
    calls = ((0, True), (RATE, False), (0.0, True))
    for p, training in calls[:2] if cell.is_compiled else calls:
        y = cell.dropout(x, p, training=training)
        check_unchanged(y, x, "x unchanged")


@contract(
    "shape-dtype-device",
    "The output has the shape, dtype and device of x, also if x is 0-d or empty.",
    every_dtype=True,
)
def _shape_dtype_device(cell: Cell) -> None:
    few: tuple[tuple[int, ...], ...] = (SHAPE, (), (3, 0, 2))
    for shape in few if cell.is_compiled else (*few, (0,), (1,), (2, 3, 5)):
        x = cell.array(cell.values(shape))
        # A compiled mode compiles each rate, and the 0-d golden mask has the rate 0.5.
        y = cell.backend.dropout(x, RATE if shape else 0.5, cell.seed, 0, mode=cell.mode)
        check_equal(cell.backend.get_device(y), cell.device, "device")
        actual = cell.backend.to_numpy(y)
        check_equal(actual.shape, shape, "shape")
        check_equal(actual.dtype, numpy_dtype(cell.dtype), "dtype")


@contract(
    "bad-rate",
    "A rate outside [0, 1] raises ValueError, a rate that is not a Python number TypeError, with "
    "the value in the message.",
)
def _bad_rate(cell: Cell) -> None:
    for outside in (-0.1, 1.5, math.nan):
        _check_raises(cell, (ValueError,), cell.ones((4,)), outside, str(outside))
    for other in (True, np.float32(0.1), "0.5", None):
        _check_raises(cell, (TypeError,), cell.ones((4,)), other, str(other))


@contract(
    "bad-dtype",
    "An array of integers or bools raises TypeError or ValueError, with the dtype in the message.",
)
def _bad_dtype(cell: Cell) -> None:
    for dtype in ("int32",) if cell.is_compiled else ("int32", "int64", "uint8", "bool"):
        x = np.ones(4, dtype=dtype)
        _check_raises(cell, (TypeError, ValueError), x, 0.5, _backend_dtype(cell, x))


def _backend_dtype(cell: Cell, x: NDArray[Any]) -> str:
    """Return the name of the dtype that the backend converts x to, or of x if it cannot."""
    try:
        return str(cell.backend.to_numpy(cell.array(x)).dtype)
    except (TypeError, ValueError):
        return str(x.dtype)


def _golden_outputs(cell: Cell) -> list[GoldenOutput]:
    limit = cell.backend.step_limit
    selected = [g for g in golden_outputs() if g.dtype == cell.dtype and g.step < limit]
    if cell.is_compiled:
        # At this rate no dtype represents the scale exactly. Some products lie halfway between two
        # neighbors, so that rounding twice differs from rounding once.
        selected = [g.reshaped(SHAPE) for g in selected if g.p == RATE]
    require_nonempty(selected)
    return selected


def _check_raises(
    cell: Cell, errors: tuple[type[Exception], ...], x: NDArray[Any], p: Any, mention: str
) -> None:
    names = " or ".join(error.__name__ for error in errors)
    expected = f"{names} that contains {mention!r}, for p = {p!r} and x of {x.dtype}"
    try:
        cell.dropout(x, p)
    except Exception as error:
        if not isinstance(error, errors) or mention not in str(error):
            raise ContractError(expected, repr(error)) from None
        return
    raise ContractError(expected, "no error")
