"""The conformance matrix, a test a cell, for every backend in the modes that run at once.

The compiled columns take minutes, and are run by `unidrop conformance` alone, which CI runs too.
"""

import pytest

from unidrop.conformance import backend_names, load_backends
from unidrop.testing import parametrize_with_contracts


@pytest.mark.parametrize("name", backend_names())
def test_every_registered_backend_is_installed_here(name):
    (backend,) = load_backends([name])
    assert backend.name == name
    assert backend.modes


@parametrize_with_contracts(where=lambda cell: not cell.is_compiled)
def test_contract_holds(cell):
    cell.check()
