"""Contracts of statistics: the realised rate, and the independence of masks."""

import math

import numpy as np

import unidrop
from unidrop.conformance.compare import ContractError
from unidrop.conformance.contracts.contract import Cell, contract


@contract("rate", "The realised rate over 2^18 elements is within 4 standard deviations of p.")
def _rate(cell: Cell) -> None:
    for p in (0.1,) if cell.is_compiled else (0.001, 0.1, 0.5, 0.9):
        drops = ~cell.keeps((512, 512), p, 6)
        _check_sigmas(drops.sum(), drops.size, p, f"dropped share at p = {p}")


@contract(
    "independence",
    "Masks of neighbours, steps and sites agree as often as independent ones, within 4 "
    "standard deviations.",
)
def _independence(cell: Cell) -> None:
    shape, p = (512, 512), 0.1
    site = int(unidrop.Key(cell.seed).fold_in("another site"))
    mask = cell.keeps(shape, p, 0).ravel()
    others = {
        "the next element": np.roll(mask, 1),
        "the next row": np.roll(mask, shape[1]),
        "the next step": cell.keeps(shape, p, 1).ravel(),
        "another site": cell.keeps(shape, p, seed=site).ravel(),
    }
    for name, other in others.items():
        agreement = p**2 + (1 - p) ** 2
        _check_sigmas((mask == other).sum(), mask.size, agreement, f"agreement with {name}")


def _check_sigmas(count: int, size: int, p: float, what: str) -> None:
    sigmas = (int(count) - size * p) / math.sqrt(size * p * (1 - p))
    if abs(sigmas) > 4:
        raise ContractError(
            f"{what} within 4 sigma of {p}", f"{count / size} ({sigmas:+.1f} sigma)"
        )
