"""The mutants of second routes apply: `routes.py` itself takes too long for the tests."""

import ast

import pytest
from routes import MUTANTS

from unidrop.conformance import CONTRACTS, backend_names


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.group}: {mutant.name}")
def test_applies_mutant(mutant):
    ast.parse(mutant.read())
    assert mutant.backend in backend_names()
    assert mutant.contracts
    assert set(mutant.contracts.split()) <= set(CONTRACTS)
