"""Check backends against contracts: one cell for each contract, backend, device, dtype and mode.

`check` runs one contract for one backend. `run_matrix` runs all cells, as the command
``unidrop conformance`` does. Tests call `cells` and `run_cell`. `Backend` defines the interface.
"""

from unidrop.conformance.backend import (
    CAPABILITIES,
    Backend,
    BackendNotRun,
    BackendUnavailableError,
    BaseBackend,
    CapableBackend,
    Layer,
    backend_names,
    load_backends,
)
from unidrop.conformance.compare import ContractError
from unidrop.conformance.contracts import CONTRACTS, SEED, Cell, Contract
from unidrop.conformance.core_backend import (
    FUSED,
    GENERAL,
    CoreBackend,
    eager_modes,
    missing_eager_modes,
    use_mode_path,
)
from unidrop.conformance.family import MEMBERS
from unidrop.conformance.isolation import Outcome, Progress
from unidrop.conformance.matrix import check, run_matrix
from unidrop.conformance.runner import NotApplicable, Result, cells, run_cell
from unidrop.conformance.subprocess_backend import SubprocessBackend

__all__ = [
    "CAPABILITIES",
    "CONTRACTS",
    "FUSED",
    "GENERAL",
    "MEMBERS",
    "SEED",
    "Backend",
    "BackendNotRun",
    "BackendUnavailableError",
    "BaseBackend",
    "CapableBackend",
    "Cell",
    "Contract",
    "ContractError",
    "CoreBackend",
    "Layer",
    "NotApplicable",
    "Outcome",
    "Progress",
    "Result",
    "SubprocessBackend",
    "backend_names",
    "cells",
    "check",
    "eager_modes",
    "load_backends",
    "missing_eager_modes",
    "run_cell",
    "run_matrix",
    "use_mode_path",
]
