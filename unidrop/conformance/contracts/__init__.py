"""Define the contracts: what every backend must satisfy, each with a name, a promise and a check.

A check is a function of a `Cell`. It raises `ContractError` if the backend breaks the promise. Any
other exception counts as a failure too. No contract names a backend: a contract requires
capabilities instead. A contract that depends on the dtype runs for every dtype, the others for one.
"""

# Importing a module registers its contracts. The matrix shows them in this order.
# ruff: isort: off
from unidrop.conformance.contracts import generator, masks, outputs, layers  # noqa: F401
from unidrop.conformance.contracts import family, attention, statistics  # noqa: F401

# ruff: isort: on
from unidrop.conformance.contracts.contract import CONTRACTS, SEED, Cell, Contract

__all__ = ["CONTRACTS", "SEED", "Cell", "Contract"]
