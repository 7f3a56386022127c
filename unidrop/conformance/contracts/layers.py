"""Contracts of layers that count their calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

import unidrop
from unidrop.conformance.compare import ContractError, check_equal, check_unchanged
from unidrop.conformance.contracts.contract import (
    RATE,
    SHAPE,
    STEPS,
    Cell,
    check_model_output,
    contract,
    reference_result,
)
from unidrop.conformance.diagnosis.stream_model import StreamModel

# At most one layer, and of which backend and where it is.
_kept: list[tuple[Any, tuple[Any, ...], Any]] = []


# The first of all: what it has traced serves the others.
@contract(
    "layer-traces",
    "A layer in a compiled mode is traced once, however often it is called.",
    ("layer", "traces"),
    compiled_only=True,
)
def _layer_traces(cell: Cell) -> None:
    _kept.clear()
    x = cell.ones(SHAPE)
    before = cell.able.traces(cell.mode)
    with _layer_at_rest(cell) as layer:
        for call in range(STEPS):
            _check_layer_call(cell, layer, x, call)
    traced = cell.able.traces(cell.mode) - before
    if cell.is_fresh or traced != 0:  # else layers may share what is traced
        check_equal(traced, 1, f"traces over {STEPS} calls:")


@contract(
    "layer-calls", "A layer's training calls advance its key; at p = 0 they do not.", ("layer",)
)
def _layer_calls(cell: Cell) -> None:
    x = cell.ones(SHAPE)
    with _layer_at_rest(cell) as layer:
        for call in range(3):
            check_equal(int(layer.calls), call, "calls")
            _check_layer_call(cell, layer, x, call)
        layer.calls = 100
        _check_layer_call(cell, layer, x, 100)
    idle_layer = _layer(cell, 0.0)
    idle_layer(cell.array(x), training=True)
    check_equal(int(idle_layer.calls), 0, "calls at p = 0:")


@contract(
    "layer-evaluation",
    "In evaluation a layer returns x unchanged, and its calls do not count.",
    ("layer",),
)
def _layer_evaluation(cell: Cell) -> None:
    x = cell.values(SHAPE)
    with _layer_at_rest(cell) as layer:
        for call in range(3):
            _check_layer_call(cell, layer, x, call)
            y = cell.backend.to_numpy(layer(cell.array(x), training=False))
            check_unchanged(y, x, "x unchanged in evaluation")
            check_equal(int(layer.calls), call + 1, "calls")


@contract("layer-error", "A layer's call that raises does not count.", ("layer",))
def _layer_error(cell: Cell) -> None:
    with _layer_at_rest(cell) as layer:
        try:
            layer(cell.array(np.ones(4, dtype="int32")), training=True)
        except (TypeError, ValueError):
            check_equal(int(layer.calls), 0, "calls")
            _check_layer_call(cell, layer, cell.ones(SHAPE), 0)
            return
        raise ContractError("an error for integers", "none")


@contract("layer-resumes", "A layer saved and loaded continues with the next call.", ("layer",))
def _layer_resumes(cell: Cell) -> None:
    x = cell.ones(SHAPE)
    with _layer_at_rest(cell) as layer:
        for _ in range(3):
            layer(cell.array(x), training=True)
        resumed = _layer(cell, RATE)
        resumed.load(layer.save())
    check_equal(int(resumed.calls), 3, "calls")
    _check_layer_call(cell, resumed, x, 3)


@contract(
    "layer-gradient",
    "A layer's gradient is by the mask of its own call, also where the backward pass computes "
    "that again, and where another call actual between.",
    ("layer", "layer_gradient"),
)
def _layer_gradient(cell: Cell) -> None:
    x, upstream = cell.values(SHAPE), cell.values(SHAPE)[::-1].copy()
    with _layer_at_rest(cell) as layer:
        pending = [layer.vjp(cell.array(x)) for _ in range(2)]
        check_equal(int(layer.calls), 2, "calls after two:")
        for call, (y, pullback) in reversed(list(enumerate(pending))):
            _check_output_of_call(cell, y, x, call, "output")
            _check_output_of_call(cell, pullback(cell.array(upstream)), upstream, call, "gradient")
        check_equal(int(layer.calls), 2, "calls after the backward passes:")


@contextmanager
def _layer_at_rest(cell: Cell) -> Iterator[Any]:
    """Yield a layer whose next call is the first.

    In a compiled mode, where another layer can be another program, it is that of the contract
    before, if that held.
    """
    which = cell.device, cell.dtype, cell.mode, cell.seed
    layer = next((kept for at, of, kept in _kept if at is cell.backend and of == which), None)
    _kept.clear()
    if layer is None:
        layer = _layer(cell, RATE)
    else:
        layer.calls = 0
    yield layer
    if cell.is_compiled:
        _kept.append((cell.backend, which, layer))


def _layer(cell: Cell, p: float) -> Any:
    return cell.able.layer(p, cell.seed, dtype=cell.dtype, device=cell.device, mode=cell.mode)


def _check_layer_call(cell: Cell, layer: Any, x: NDArray[Any], call: int) -> None:
    _check_output_of_call(cell, layer(cell.array(x), training=True), x, call, "output")


def _check_output_of_call(cell: Cell, y: Any, x: NDArray[Any], call: int, what: str) -> None:
    recipe = StreamModel(cell.seed, (call,), RATE, x.shape)
    expected = reference_result(unidrop.dropout, x, RATE, recipe.key)
    check_model_output(recipe, cell.backend.to_numpy(y), expected, x, f"{what} of call {call}")
