"""Define the statistical contracts: the realized rate and the independence of masks."""

import math

import numpy as np
from numpy.typing import NDArray

import unidrop
from unidrop.conformance.compare import ContractError
from unidrop.conformance.contracts.contract import Cell, contract, reference_result

# The rate of "large-mask", since a compiled mode compiles each rate.
_RATE = 0.1


@contract(
    "rate", "The realized rate over 2^18 elements or more is within 4 standard deviations of p."
)
def _rate(cell: Cell) -> None:
    for p in (_RATE,) if cell.is_compiled else (0.001, _RATE, 0.5, 0.9):
        drops = ~cell.keeps(_shape(cell), p, 6)
        _check_sigmas(drops.sum(), drops.size, p, f"share of dropped elements at p = {p}")


@contract(
    "independence",
    "Masks of neighbors, steps and sites agree as often as independent masks, within 4 "
    "standard deviations.",
)
def _independence(cell: Cell) -> None:
    shape, p = _shape(cell), _RATE
    mask = cell.keeps(shape, p, 0).ravel()
    others = {
        "the next element": np.roll(mask, 1),
        "the next row": np.roll(mask, shape[-1]),
        "the next step": cell.keeps(shape, p, 1).ravel(),
        "another site": _another_site_mask(cell, shape, p).ravel(),
    }
    for name, other in others.items():
        agreement = p**2 + (1 - p) ** 2
        _check_sigmas((mask == other).sum(), mask.size, agreement, f"agreement with {name}")


def _shape(cell: Cell) -> tuple[int, ...]:
    """Return a large shape; a compiled mode uses the shape that "large-mask" compiles."""
    return (3, 601, 601) if cell.is_compiled else (512, 512)


def _another_site_mask(cell: Cell, shape: tuple[int, ...], p: float) -> NDArray[np.bool]:
    """Return a mask of another seed; the core computes it for a mode that compiles each seed."""
    site = unidrop.Key(cell.seed).fold_in("another site")
    if not cell.is_compiled:
        return cell.keeps(shape, p, seed=int(site))
    mask: NDArray[np.bool] = reference_result(unidrop.keep_mask, shape, p, site.fold_in(0))
    return mask


def _check_sigmas(count: int, size: int, p: float, what: str) -> None:
    sigmas = (int(count) - size * p) / math.sqrt(size * p * (1 - p))
    if abs(sigmas) > 4:
        raise ContractError(
            f"{what} within 4 sigma of {p}", f"{count / size} ({sigmas:+.1f} sigma)"
        )
