"""Tests of the compiled function that folds an integer into a key."""

from itertools import product

import numpy as np
import pytest
import reference

import unidrop
from unidrop import Key

pytest.importorskip("llvmlite")

EDGES = (0, 1, 42, 2**32 - 1, 2**32, 2**63, 2**64 - 1)


@pytest.fixture(params=["compiled", "Python"])
def fold(request, monkeypatch):
    """Let keys fold by the compiled function and by Python integers in turn."""
    from unidrop.fused.generator import compile_fold

    compiled = compile_fold() if request.param == "compiled" else None
    monkeypatch.setattr("unidrop.key._compiled_fold", compiled)


@pytest.mark.usefixtures("fold")
def test_folds_integers_as_the_reference():
    for key, data in product(EDGES, EDGES):
        assert int(Key(key).fold_in(data)) == reference.fold_in(key, data)


@pytest.mark.usefixtures("fold")
@pytest.mark.parametrize("data", ["", "encoder/0", "\u00e9"])
def test_folds_strings_as_the_reference(data):
    assert int(Key(42).fold_in(data)) == reference.fold_in(42, data)


@pytest.mark.usefixtures("fold")
@pytest.mark.parametrize(
    ("data", "error"),
    [(-1, ValueError), (2**64, ValueError), (True, TypeError), (1.0, TypeError), (None, TypeError)],
    ids=repr,
)
def test_rejects_the_same_data(data, error):
    with pytest.raises(error, match="data must be"):
        Key(42).fold_in(data)


def test_first_kernel_compiles_the_fold():
    with unidrop.force_path("fused"):
        unidrop.dropout(np.ones(8), 0.5, Key(42))
    assert unidrop.key._compiled_fold is not None
