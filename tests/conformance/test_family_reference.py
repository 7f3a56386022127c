"""Test the formulas of members that the matrix compares with, and their golden vectors."""

import numpy as np
import pytest

import unidrop
from unidrop import Key, family
from unidrop.conformance import MEMBERS
from unidrop.conformance.backends.numpy import Numpy
from unidrop.conformance.compare import check_output
from unidrop.conformance.golden import golden_members, golden_permutations


def test_has_a_row_for_every_member():
    others = {"AffinePlan", "Mode", "permutation"}
    # They take two arrays, tokens, or a count of layers. Tests of adapters compare their bits.
    others |= {"embedding_dropout", "layer_drop", "word_dropout", "zoneout"}
    names = {n for n in family.__all__ if not n.startswith(("plan_", "check_"))} - others
    assert names == {*MEMBERS} == {golden.member for golden in golden_members()}
    assert {*Numpy.members} == names


@pytest.mark.parametrize("golden", golden_members(), ids=lambda golden: golden.name)
def test_computes_golden_outputs_in_formulas_and_core(golden):
    key = Key(golden.seed).fold_in(golden.step)
    x = golden.x if golden.x.shape == golden.y.shape else golden.y
    with np.errstate(all="ignore"):
        y, _ = MEMBERS[golden.member].formula(golden.x, golden.p, key, **golden.options)
        check_output(y, golden.y, x, "output of the formula")
        with unidrop.force_path("portable"):
            y = getattr(family, golden.member)(golden.x, golden.p, key, **golden.options)
        check_output(y, golden.y, x, "output of the core")


@pytest.mark.parametrize("golden", golden_permutations(), ids=lambda golden: golden.name)
def test_computes_golden_permutations_in_core(golden):
    key = Key(golden.seed).fold_in(golden.step)
    assert np.array_equal(family.permutation(golden.indices.shape, key), golden.indices)


@pytest.mark.parametrize("member", MEMBERS)
def test_differentiates_a_formula_as_a_linear_map(member):
    row = MEMBERS[member]
    x = np.random.default_rng(0).standard_normal(row.shape)
    key = Key(42)
    for options in row.cases:
        y, pullback = row.formula(x, 0.4, key, **options)
        upstream = np.random.default_rng(1).standard_normal(y.shape)
        for axis in np.ndindex(x.shape[:2]):
            step = np.zeros(x.shape)
            step[axis] = 2.0**-20
            moved, _ = row.formula(x + step, 0.4, key, **options)
            finite = np.isfinite(y)
            change = ((moved[finite] - y[finite]) * upstream[finite]).sum()
            assert change == pytest.approx((pullback(upstream) * step).sum(), abs=1e-13)
