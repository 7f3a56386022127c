"""Test that the matrix has a backend for each library, and that its cells run as pytest items.

The command `unidrop conformance` runs the cells of the registered backends.
"""

from importlib.util import find_spec

import pytest
from mutant_backends import Correct

from unidrop.conformance import backend_names
from unidrop.testing import parametrize_with_contracts

# The matrix skips a backend whose library is missing, so the test environment must have them all.
LIBRARIES = {
    "array-api-strict": "array_api_strict",
    "flax": "flax",
    "jax": "jax",
    "jax-2-devices": "jax",
    "keras": "keras",
    "keras-2-devices": "tensorflow",
    "keras-jax": "jax",
    "keras-numpy": "numpy",
    "keras-torch": "torch",
    "numpy": "numpy",
    "tensorflow": "tensorflow",
    "torch": "torch",
}
NOT_IN_TEST = {"cupy", "jax-cuda", "torch-cuda", "torch-triton"}


def test_knows_the_library_of_every_registered_backend():
    assert sorted({*LIBRARIES, *NOT_IN_TEST}) == backend_names()


@pytest.mark.parametrize("library", sorted({*LIBRARIES.values()}))
def test_finds_every_library(library):
    assert find_spec(library) is not None


@parametrize_with_contracts([Correct()], contracts=["mask", "output", "layer-calls"])
def test_backend_conforms(cell):
    cell.check()
