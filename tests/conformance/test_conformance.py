"""The conformance matrix, a test a cell, for backends of this process in modes that run at once.

The compiled columns, and backends that need processes of their own, take minutes, and are run by
`unidrop conformance` alone, which CI runs too.
"""

import pytest

from unidrop.conformance import backend_names, load_backends
from unidrop.testing import parametrize_with_contracts

HERE = ("array-api-strict", "flax", "jax", "keras", "numpy", "tensorflow", "torch")
ELSEWHERE = ("jax-2-devices", "keras-2-devices", "keras-jax", "keras-numpy", "keras-torch")
ON_A_GPU = ("cupy",)


def test_every_registered_backend_is_run_here_or_by_the_command():
    assert sorted((*HERE, *ELSEWHERE, *ON_A_GPU)) == backend_names()


@pytest.mark.parametrize("name", HERE)
def test_every_backend_that_is_run_here_is_installed(name):
    (backend,) = load_backends([name])
    assert backend.name == name
    assert backend.modes


@parametrize_with_contracts(HERE, where=lambda cell: not cell.is_compiled)
def test_contract_holds(cell):
    cell.check()
