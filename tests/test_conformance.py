"""The conformance matrix, a test a cell, for every backend in the modes that run at once.

The compiled columns take minutes, and are run by `unidrop conformance` alone, which CI runs too.
"""

import pytest

from unidrop.conformance import Cell, UnavailableBackend, cells, load_backends, run_cell

BACKENDS = list(load_backends())
CELLS = [
    cell
    for backend in BACKENDS
    if not isinstance(backend, UnavailableBackend)
    for cell in cells(backend)
    if isinstance(cell, Cell) and not cell.is_compiled
]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_every_registered_backend_is_installed_here(backend):
    assert not isinstance(backend, UnavailableBackend), repr(backend.error)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_contract_holds(cell):
    result = run_cell(cell)
    assert result.status == "passed", f"{result.came}\n{result.details}\n{result.reproduce}"
