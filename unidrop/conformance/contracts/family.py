"""Define the contracts of the family's members: one for each row of the table of members."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidrop.conformance.backend import missing_member
from unidrop.conformance.compare import check_equal, check_output
from unidrop.conformance.contracts.contract import RATE, Cell, contract, reference_result
from unidrop.conformance.family import MEMBERS
from unidrop.conformance.golden import GoldenMember, golden_members

_STEP = 3

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def _check_member(member: str, cell: Cell) -> None:
    for golden in golden_members():
        if golden.member == member and _runs(cell, golden):
            arguments = golden.x, golden.p, golden.step
            with np.errstate(all="ignore"):
                y = cell.dropout(*arguments, seed=golden.seed, member=member, **golden.options)
            x = _like(golden.x, golden.y)
            check_output(y, golden.y, x, f"golden output {golden.name!r}")
    for options, x, expected, _ in _cases(cell, member):
        with np.errstate(all="ignore"):
            y = cell.dropout(x, RATE, _STEP, member=member, **options)
        name = f"output of {member} with {dict(options)}"
        check_equal(y.dtype, x.dtype, f"{name}: dtype")
        check_output(y, expected, _like(x, expected), name)


for _name, _member in MEMBERS.items():
    contract(
        f"family-{_name.replace('_', '-')}",
        _member.promise,
        ("family",),
        member=_name,
        in_derived_modes=False,
        dtypes=_DTYPES,
    )(partial(_check_member, _name))


@contract(
    "family-gradient",
    "The gradient of each member has the draws of the forward pass, and the member's own scale.",
    ("family", "family_gradient", "gradient"),
    in_derived_modes=False,
    dtypes=_DTYPES,
)
def _family_gradient(cell: Cell) -> None:
    for member, row in MEMBERS.items():
        is_left_out = cell.is_compiled and not row.compiles_gradient
        if is_left_out or missing_member(cell.backend, member, cell.mode) is not None:
            continue
        for options, x, y, pullback in _cases(cell, member):
            upstream = cell.values(y.shape)[::-1].copy()
            arguments = cell.array(x), cell.array(upstream), RATE, cell.seed, _STEP
            options = {"member": member, **options}
            gradient = cell.capable.gradient(*arguments, mode=cell.mode, **options)
            actual, expected = cell.backend.to_numpy(gradient), pullback(upstream)
            check_output(actual, expected, expected, f"gradient of {options}")


_Case = tuple[Mapping[str, Any], NDArray[Any], NDArray[Any], Callable[[NDArray[Any]], NDArray[Any]]]


def _cases(cell: Cell, member: str) -> Iterator[_Case]:
    """Yield the options of a case, an input, its output and the function of gradients."""
    row = MEMBERS[member]
    x = cell.values(row.shape)
    # Options do not depend on the dtype, and JAX compiles each in its eager modes too.
    has_all = not cell.is_compiled and cell.dtype == "float32"
    for options in row.cases if has_all else row.cases[:1]:
        y, pullback = reference_result(row.formula, x, RATE, cell.key(_STEP), **options)
        yield options, x, y, pullback


def _runs(cell: Cell, golden: GoldenMember) -> bool:
    """Return True for a golden output to compare, in compiled modes only if no program is new."""
    row = MEMBERS[golden.member]
    is_first = (golden.x.shape, golden.p, golden.options) == (row.shape, RATE, row.cases[0])
    is_possible = golden.dtype == cell.dtype and golden.step < cell.backend.step_limit
    return is_possible and (is_first or not cell.is_compiled)


def _like(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Return the input to compare an output for, which may have another shape."""
    return x if x.shape == y.shape else y
