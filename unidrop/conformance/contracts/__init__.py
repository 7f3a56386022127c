"""The contracts: what must be true of every backend, each with its name, promise and check.

A check is a function of a `Cell`. It raises `ContractError` where the promise does not hold; any
other exception is a failure too. No contract knows a backend's name: what one needs it asks for as
a capability. One that depends on the dtype is run for every dtype; the others once.
"""

# Imported for what they register, in the order in which the matrix shows it.
from unidrop.conformance.contracts import generator, masks, outputs, layers, statistics  # noqa: F401, I001
from unidrop.conformance.contracts.contract import CONTRACTS, SEED, Cell, Contract

__all__ = ["CONTRACTS", "SEED", "Cell", "Contract"]
