"""Define the contracts of the family's members, whose masks are ordinary masks."""

from collections.abc import Iterator
from typing import Any

import numpy as np

import unidrop
from unidrop.conformance.compare import check_equal, check_output
from unidrop.conformance.contracts.contract import RATE, Cell, contract, reference_result
from unidrop.conformance.family import drop_member, get_axes

# With three axes, channels differ from elements.
_SHAPE = (8, 4, 4)

_STEP = 3

_DTYPES = ("float16", "bfloat16", "float32", "float64")

# The options of each member. The first two have all formulas, so compiled modes run those.
_MEMBERS: tuple[dict[str, Any], ...] = (
    {"member": "alpha_dropout"},
    {"member": "drop_path", "scale_by_keep": False},
    {"member": "drop_path"},
    {"member": "feature_alpha_dropout"},
)


@contract(
    "family-output",
    "Alpha dropout and stochastic depth have their ordinary masks, and their formulas bit for bit.",
    ("family",),
    every_dtype=True,
    in_derived_modes=False,
    dtypes=_DTYPES,
)
def _family_output(cell: Cell) -> None:
    x = cell.values(_SHAPE)
    for options, keep in _members(cell):
        with np.errstate(all="ignore"):
            y = cell.dropout(x, RATE, _STEP, **options)
            expected = drop_member(x, keep, RATE, **options)
        check_equal(y.dtype, x.dtype, f"dtype of {options}")
        check_output(y, expected, x, f"output of {options}")


@contract(
    "family-gradient",
    "The gradient of a member is its scale times the upstream gradient where the mask keeps.",
    ("family", "family_gradient", "gradient"),
    in_derived_modes=False,
    dtypes=_DTYPES,
)
def _family_gradient(cell: Cell) -> None:
    x, upstream = cell.values(_SHAPE), cell.values(_SHAPE)[::-1].copy()
    for options, keep in _members(cell):
        arguments = cell.array(x), cell.array(upstream), RATE, cell.seed, _STEP
        gradient = cell.capable.gradient(*arguments, mode=cell.mode, **options)
        expected = drop_member(upstream, keep, RATE, **options, is_gradient=True)
        actual = cell.backend.to_numpy(gradient)
        check_output(actual, expected, upstream, f"gradient of {options}")


def _members(cell: Cell) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield the options of each member, and its mask."""
    for options in _MEMBERS[:2] if cell.is_compiled else _MEMBERS:
        axes = get_axes(options["member"], len(_SHAPE))
        key = cell.key(_STEP)
        yield (
            options,
            reference_result(unidrop.keep_mask, _SHAPE, RATE, key, broadcast_axes=axes),
        )
