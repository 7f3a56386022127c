"""Define the contracts of layers, which count their training calls."""

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

# At most one layer of a compiled mode, with its backend and the parameters that it was created for.
_cache: list[tuple[Any, tuple[Any, ...], Any]] = []


# Runs before the other contracts of layers, which reuse its trace.
@contract(
    "layer-traces",
    "Repeated calls of a layer in a compiled mode trace it once.",
    ("layer", "traces"),
    compiled_only=True,
)
def _layer_traces(cell: Cell) -> None:
    _cache.clear()
    x = cell.ones(SHAPE)
    before = cell.capable.traces(cell.mode)
    with _reset_layer(cell) as layer:
        for call in range(STEPS):
            _check_layer_call(cell, layer, x, call)
    traced = cell.capable.traces(cell.mode) - before
    if cell.is_untraced or traced != 0:  # else the layer may share the trace of an earlier one
        check_equal(traced, 1, f"traces over {STEPS} calls:")


@contract("layer-calls", "Training calls with p > 0 count, and select the key.", ("layer",))
def _layer_calls(cell: Cell) -> None:
    x = cell.ones(SHAPE)
    with _reset_layer(cell) as layer:
        for call in range(3):
            check_equal(int(layer.calls), call, "calls")
            _check_layer_call(cell, layer, x, call)
        layer.calls = 100
        _check_layer_call(cell, layer, x, 100)
    idle_layer = _make_layer(cell, 0.0)
    idle_layer(cell.array(x), training=True)
    check_equal(int(idle_layer.calls), 0, "calls at p = 0:")


@contract(
    "layer-evaluation",
    "In evaluation, a layer returns x unchanged and does not count the call.",
    ("layer",),
)
def _layer_evaluation(cell: Cell) -> None:
    x = cell.values(SHAPE)
    with _reset_layer(cell) as layer:
        for call in range(3):
            _check_layer_call(cell, layer, x, call)
            y = cell.backend.to_numpy(layer(cell.array(x), training=False))
            check_unchanged(y, x, "x unchanged in evaluation")
            check_equal(int(layer.calls), call + 1, "calls")


@contract("layer-error", "A layer does not count a call that raises.", ("layer",))
def _layer_error(cell: Cell) -> None:
    with _reset_layer(cell) as layer:
        try:
            layer(cell.array(np.ones(4, dtype="int32")), training=True)
        except (TypeError, ValueError):
            check_equal(int(layer.calls), 0, "calls")
            _check_layer_call(cell, layer, cell.ones(SHAPE), 0)
            return
        raise ContractError("TypeError or ValueError for integers", "no error")


@contract(
    "layer-resumes", "A layer that is saved and loaded continues with the next call.", ("layer",)
)
def _layer_resumes(cell: Cell) -> None:
    x = cell.ones(SHAPE)
    with _reset_layer(cell) as layer:
        for _ in range(3):
            layer(cell.array(x), training=True)
        resumed = _make_layer(cell, RATE)
        resumed.load(layer.save())
    check_equal(int(resumed.calls), 3, "calls")
    _check_layer_call(cell, resumed, x, 3)


@contract(
    "layer-gradient",
    "The backward pass uses the mask of its own call, also after recomputation and later calls.",
    ("layer", "layer_gradient"),
)
def _layer_gradient(cell: Cell) -> None:
    x, upstream = cell.values(SHAPE), cell.values(SHAPE)[::-1].copy()
    with _reset_layer(cell) as layer:
        pending = [layer.vjp(cell.array(x)) for _ in range(2)]
        check_equal(int(layer.calls), 2, "calls after two:")
        for call, (y, pullback) in reversed(list(enumerate(pending))):
            _check_call(cell, y, x, call, "output")
            _check_call(cell, pullback(cell.array(upstream)), upstream, call, "gradient")
        check_equal(int(layer.calls), 2, "calls after the backward passes:")


@contextmanager
def _reset_layer(cell: Cell) -> Iterator[Any]:
    """Yield a layer with ``calls = 0``.

    A compiled mode may compile each layer, so it reuses the layer of the previous contract unless
    that contract failed.
    """
    parameters = cell.device, cell.dtype, cell.mode, cell.seed
    found = (layer for b, p, layer in _cache if b is cell.backend and p == parameters)
    layer = next(found, None)
    _cache.clear()
    if layer is None:
        layer = _make_layer(cell, RATE)
    else:
        layer.calls = 0
    yield layer
    if cell.is_compiled:
        _cache.append((cell.backend, parameters, layer))


def _make_layer(cell: Cell, p: float) -> Any:
    return cell.capable.layer(p, cell.seed, dtype=cell.dtype, device=cell.device, mode=cell.mode)


def _check_layer_call(cell: Cell, layer: Any, x: NDArray[Any], call: int) -> None:
    _check_call(cell, layer(cell.array(x), training=True), x, call, "output")


def _check_call(cell: Cell, y: Any, x: NDArray[Any], call: int, name: str) -> None:
    """Compare the output or the gradient of a training call with the core."""
    model = StreamModel(cell.seed, (call,), RATE, x.shape)
    expected = reference_result(unidrop.dropout, x, RATE, model.key)
    check_model_output(model, cell.backend.to_numpy(y), expected, x, f"{name} of call {call}")
