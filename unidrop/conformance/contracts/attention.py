"""Define the contracts of attention, whose weights are dropped.

The mask is the mask of `unidrop.dropout` on the weights, of shape (batch, heads, queries, keys).
Values that are the identity matrix make the output the weights themselves, so their zeros are the
mask. Arrays then have as many features as keys, so that such values fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import unidrop
from unidrop.conformance.attention import attention
from unidrop.conformance.compare import (
    ContractError,
    check_close,
    check_equal,
    check_mask,
    numpy_dtype,
)
from unidrop.conformance.contracts.contract import RATE, Cell, contract, reference_result
from unidrop.conformance.diagnosis.search import find_mask_causes
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.conformance.golden import golden_attention

_BATCH = 2

# A step with a mask that drops and keeps some weights of each query, and another step.
_STEP, _OTHER_STEP = 3, 4

# The largest error of a component, relative to the largest component. A 16-bit dtype rounds the
# scores, the weights and the output.
_TOLERANCES: Mapping[str, float] = {
    "float16": 4e-3,
    "bfloat16": 3.2e-2,
    "float32": 1e-6,
    "float64": 1e-12,
}


@dataclass(frozen=True, slots=True)
class _Case:
    """Lengths of an attention, and which pairs attend."""

    heads: int
    groups: int
    queries: int
    keys: int
    is_causal: bool = False
    is_masked: bool = False
    features: int = 0  # 0 means as many as keys

    def __str__(self) -> str:
        pairs = "".join((", causal" * self.is_causal, ", masked" * self.is_masked))
        heads = f"{self.heads} heads in {self.groups} groups"
        return f"{heads}, {self.queries} queries and {self.keys} keys{pairs}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the weights."""
        return _BATCH, self.heads, self.queries, self.keys

    @property
    def attends(self) -> NDArray[np.bool]:
        """The flags of pairs that attend, of shape (batch, 1, queries, keys)."""
        pairs = np.ones((_BATCH, 1, *self.shape[2:]), dtype=bool)
        if self.is_causal:
            pairs &= np.tri(*self.shape[2:], dtype=bool)
        if self.is_masked:
            pairs[1, ..., 2::3] = False  # at least the first two keys attend
        return pairs

    def make_inputs(self, cell: Cell) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return queries, keys and values, with the cell's dtype."""
        features = self.features or self.keys
        of_keys = (_BATCH, self.groups, self.keys, features)
        query = (_BATCH, self.heads, self.queries, features)
        return _draw(cell, query, 1), _draw(cell, of_keys, 2), _draw(cell, of_keys, 3)

    def options(self, cell: Cell) -> dict[str, Any]:
        """Return the options of the backend's call."""
        options: dict[str, Any] = {"is_causal": True} if self.is_causal else {}
        if self.is_masked:
            options["mask"] = cell.array(self.attends)
        return options


# Compiled modes, and all dtypes but one, run this case only.
_MAIN_CASE = _Case(heads=4, groups=2, queries=11, keys=64, is_causal=True)

# Few cases, since some libraries compile attention for each shape in every mode.
_CASES = (
    _Case(heads=4, groups=1, queries=8, keys=27),
    _Case(heads=1, groups=1, queries=3, keys=1),
    _Case(heads=3, groups=3, queries=5, keys=45, is_masked=True),
    _MAIN_CASE,
)

# More queries and keys than a tile of any library has. Kernels of GPUs have few features.
_LONG_CASE = _Case(heads=1, groups=1, queries=70, keys=530, features=16)


@contract(
    "attention-mask",
    "The mask of attention is the mask of its weights, of shape (batch, heads, queries, keys).",
    ("attention",),
    in_derived_modes=False,
)
def _attention_mask(cell: Cell) -> None:
    for case in _cases(cell):
        query, key, _ = case.make_inputs(cell)
        value = np.broadcast_to(np.eye(case.keys, dtype=query.dtype), key.shape)
        for step in (_STEP, _OTHER_STEP):
            weights = _attend(cell, query, key, value, step, case.options(cell))
            check_equal(weights.shape, case.shape, f"shape of the output of {case}")
            _check_attention_mask(cell, case, step, weights != 0)


def _check_attention_mask(cell: Cell, case: _Case, step: int, keep: NDArray[np.bool]) -> None:
    expected = reference_result(unidrop.keep_mask, case.shape, RATE, cell.key(step))
    known = np.broadcast_to(case.attends, case.shape)
    try:
        check_mask(keep, expected & known, f"mask of {case}, step {step}")
    except ContractError as error:
        model = StreamModel(cell.seed, (step,), RATE, case.shape)
        raise error.with_causes(find_mask_causes(model, keep, known, pairs=False)) from None


@contract(
    "attention-output",
    "The output is dropout of the softmax of the scores, times the values, as in float64.",
    ("attention",),
    dtypes=tuple(_TOLERANCES),
    compiled_dtypes=("float64",),
    in_derived_modes=False,
)
def _attention_output(cell: Cell) -> None:
    # The golden outputs are doubles, and a compiled mode would compile each shape.
    for golden in golden_attention() if cell.dtype == "float64" and not cell.is_compiled else ():
        inputs = golden.query, golden.key, golden.value
        options = {"is_causal": golden.is_causal}
        y = _attend(cell, *inputs, golden.step, options, p=golden.p, seed=golden.seed)
        _check_close(cell, y, golden.y, f"golden attention {golden.name!r}")
    for case in (*_CASES, _LONG_CASE) if _runs_all_cases(cell) else (_MAIN_CASE,):
        inputs = case.make_inputs(cell)
        expected, _ = _reference(cell, case, inputs)
        y = _attend(cell, *inputs, _STEP, case.options(cell))
        _check_close(cell, y, expected, f"output of {case}")


@contract(
    "attention-gradient",
    "The gradients of queries, keys and values use the mask of the forward pass, as in float64.",
    ("attention", "attention_gradient"),
    # The output shows that 16-bit dtypes have the mask, and each dtype costs a compilation.
    dtypes=("float32", "float64"),
    in_derived_modes=False,
)
def _attention_gradient(cell: Cell) -> None:
    case = _LONG_CASE if _runs_all_cases(cell) else _MAIN_CASE
    inputs = case.make_inputs(cell)
    upstream = _draw(cell, (*case.shape[:3], inputs[2].shape[3]), 4)
    q, k, v, u = (cell.array(x) for x in (*inputs, upstream))
    options = case.options(cell)
    actual = cell.capable.attention_gradient(
        q, k, v, u, RATE, cell.seed, _STEP, mode=cell.mode, **options
    )
    _, pullback = _reference(cell, case, inputs)
    names = ("queries", "keys", "values")
    for name, array, expected in zip(names, actual, pullback(upstream), strict=True):
        gradient = cell.backend.to_numpy(array)
        _check_close(cell, gradient, expected, f"gradient of {name} of {case}")


@contract(
    "attention-windows",
    "A window of the weights has its slice of the mask, and of the causal output.",
    ("attention", "attention_windows"),
    in_derived_modes=False,
)
def _attention_windows(cell: Cell) -> None:
    case = _Case(heads=3, groups=3, queries=27, keys=27, is_causal=True)
    query, key, value = case.make_inputs(cell)
    expected = reference_result(unidrop.keep_mask, case.shape, RATE, cell.key(_STEP))
    identity = np.broadcast_to(np.eye(case.keys, dtype=query.dtype), key.shape)
    if not cell.is_compiled:  # each window costs a compilation, and the causal one has a mask too
        block = np.s_[1:2, 1:3, 7:27, 10:27]
        batch, heads, rows, columns = block
        of_keys = batch, heads, columns
        window = {"global_shape": case.shape, "start": tuple(axis.start for axis in block)}
        inputs = query[batch, heads, rows], key[of_keys], identity[of_keys]
        weights = _attend(cell, *inputs, _STEP, window)
        check_mask(weights[..., columns] != 0, expected[block], f"mask of the window {window}")
    output, _ = _reference(cell, case, (query, key, value))
    part = np.s_[1:, 1:, 13:24]
    window = {"global_shape": case.shape, "start": (1, 1, 13, 0)}
    inputs = query[part], key[part[:2]], value[part[:2]]
    y = _attend(cell, *inputs, _STEP, {"is_causal": True, **window})
    _check_close(cell, y, output[part], f"output of the window {window}")


def _cases(cell: Cell) -> tuple[_Case, ...]:
    return _CASES if _runs_all_cases(cell) else (_MAIN_CASE,)


def _runs_all_cases(cell: Cell) -> bool:
    is_main = cell.dtype == "float32" or "float32" not in cell.backend.dtypes(cell.mode)
    return is_main and not cell.is_compiled


def _draw(cell: Cell, shape: tuple[int, ...], number: int) -> NDArray[Any]:
    """Return values in [-1, 1] with the cell's dtype, the same for each number."""
    return np.random.default_rng(number).uniform(-1, 1, shape).astype(numpy_dtype(cell.dtype))


def _attend(
    cell: Cell,
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    step: int,
    options: Mapping[str, Any],
    *,
    p: float = RATE,
    seed: int | None = None,
) -> NDArray[Any]:
    """Return the backend's attention as a NumPy array."""
    q, k, v = (cell.array(x) for x in (query, key, value))
    seed = cell.seed if seed is None else seed
    y = cell.capable.attention(q, k, v, p, seed, step, mode=cell.mode, **options)
    return cell.backend.to_numpy(y)


def _reference(cell: Cell, case: _Case, inputs: tuple[NDArray[Any], ...]) -> Any:
    """Return the output and the function from its gradient, by the definition."""
    bias = np.where(case.attends, 0.0, -np.inf)
    return reference_result(attention, *inputs, RATE, cell.key(_STEP), bias=bias)


def _check_close(
    cell: Cell, actual: NDArray[Any], expected: NDArray[np.float64], name: str
) -> None:
    check_equal(actual.dtype, numpy_dtype(cell.dtype), f"{name}: dtype")
    check_close(actual, expected, _TOLERANCES[cell.dtype], name)
