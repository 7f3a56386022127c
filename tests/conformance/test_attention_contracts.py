"""Test the definition of attention, its golden vectors, and the cells of its contracts."""

import re
from pathlib import Path

import mutant_backends as mutant
import numpy as np
import pytest

from unidrop import Key, keep_mask
from unidrop.conformance import BaseBackend, Cell, NotApplicable, cells
from unidrop.conformance.attention import attention
from unidrop.conformance.compare import ContractError, check_close
from unidrop.conformance.golden import golden_attention, read_golden

SPEC = Path(__file__).parents[2] / "docs" / "spec.md"
CONTRACTS = ["attention-mask", "attention-output", "attention-gradient", "attention-windows"]


@pytest.fixture(scope="module")
def definition():
    """Return the function that the specification shows."""
    (block,) = re.findall(r"```python\n(.*?def attention.*?)```", SPEC.read_text(), flags=re.DOTALL)
    names = {}
    exec(block, names)
    return names["attention"]


@pytest.mark.parametrize("golden", golden_attention(), ids=lambda golden: golden.name)
def test_equals_golden_attention_by_both_definitions(golden, definition):
    name = Key(golden.seed).fold_in(golden.step)
    inputs = golden.query, golden.key, golden.value, golden.p, name
    y, _ = attention(*inputs, is_causal=golden.is_causal)
    np.testing.assert_allclose(y, golden.y, rtol=0, atol=1e-14)
    queries, keys = golden.query.shape[2], golden.key.shape[2]
    pairs = np.tri(queries, keys, dtype=bool) if golden.is_causal else True
    shown = definition(*inputs, np.where(pairs, 0, -np.inf))
    np.testing.assert_allclose(shown, golden.y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("vector", read_golden()["attention"], ids=lambda vector: vector["name"])
def test_lists_ordinary_masks_in_golden_attention(vector):
    keep = keep_mask(vector["mask_shape"], vector["p"], Key(int(vector["key"], 16)))
    assert "".join(map(str, keep.ravel().astype(int))) == vector["keep"]


def test_accepts_errors_within_tolerance_only():
    expected = np.array([4.0, -1e-9])
    check_close(expected + 3.9e-6, expected, 1e-6, "sum")
    check_close(np.zeros((2, 0)), np.zeros((2, 0)), 1e-6, "nothing")
    for wrong in (expected + 4.1e-6, np.array([4.0, np.nan]), np.array([4.0, np.inf])):
        with pytest.raises(ContractError, match=r"sum: .* within 1e-06 of the largest"):
            check_close(wrong, expected, 1e-6, "sum")
    with pytest.raises(ContractError, match="shape"):
        check_close(expected[:1], expected, 1e-6, "sum")


class WithComplex(mutant.Correct):
    def dtypes(self, mode):
        return ("complex64", "bfloat16", "float32", "float64")


def test_runs_each_contract_for_its_dtypes():
    planned = {}
    for cell in cells(WithComplex(), CONTRACTS):
        planned.setdefault((cell.contract.name, cell.mode), []).append(cell.dtype)
    one = ["float32"]
    assert planned == {
        ("attention-mask", "eager"): one,
        ("attention-output", "eager"): ["bfloat16", "float32", "float64"],
        ("attention-gradient", "eager"): ["float32", "float64"],
        ("attention-windows", "eager"): one,
        ("attention-mask", "compiled"): one,
        ("attention-output", "compiled"): ["float32", "float64"],
        ("attention-gradient", "compiled"): one,
        ("attention-windows", "compiled"): one,
    }


def test_skips_backend_without_attention_with_reason():
    class Without(BaseBackend):
        name = "without"
        capabilities = {"attention": "it has none", "attention_windows": None}  # noqa: RUF012

    reasons = {item.reason for item in cells(Without(), CONTRACTS)}
    assert all(isinstance(item, NotApplicable) for item in cells(Without(), CONTRACTS))
    assert reasons == {"it has none"}


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_runs_all_cases_where_nothing_compiles(mode):
    seen = set()

    class Noting(mutant.Correct):
        def attention(self, query, key, value, *arguments, **options):
            seen.add((key.shape[2], bool(options.get("is_causal")), "mask" in options))
            return super().attention(query, key, value, *arguments, **options)

    chosen = [cell for cell in cells(Noting(), ["attention-mask"]) if cell.mode == mode]
    for cell in chosen:
        assert isinstance(cell, Cell)
        cell.check()
    main = (64, True, False)
    others = {(27, False, False), (1, False, False), (45, False, True)}
    assert seen == ({main} if mode == "compiled" else {main, *others})
