"""Mutants of the kernels: the matrix turns red for each of them."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
from fused_arrays import FUSED

from unidrop.conformance import Cell, cells, run_cell
from unidrop.conformance.backends.numpy import Numpy
from unidrop.fused import kernels

pytestmark = pytest.mark.slow  # Numba compiles each mutant

SOURCE = Path(kernels.__file__).read_text(encoding="utf-8")
PHILOX = Path(sys.modules["unidrop.philox"].__file__).read_text(encoding="utf-8")
TENTH_ROUND = ("ROUNDS: Final = 10", "ROUNDS: Final = 9")


def load_module(name, source, folder):
    """Import a module from its source."""
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replace_once(source, old, new):
    """Replace a text that occurs once."""
    assert source.count(old) == 1, f"{old!r} must occur once"
    return source.replace(old, new)


@pytest.fixture
def mutate(tmp_path, monkeypatch):
    """Return a function that compiles the kernels from another source."""

    def replace(source):
        mutant = load_module("mutant_kernels", source, tmp_path)
        monkeypatch.setattr(kernels, "make_kernel", mutant.make_kernel)
        FUSED._compile.cache_clear()
        FUSED.prepare.cache_clear()

    yield replace
    monkeypatch.undo()
    FUSED._compile.cache_clear()
    FUSED.prepare.cache_clear()


def fails(contract, dtype=None):
    """Return whether NumPy's backend fails a contract, in any mode and in one or every dtype."""
    chosen = [cell for cell in cells(Numpy(), [contract]) if isinstance(cell, Cell)]
    results = [run_cell(cell) for cell in chosen if dtype in (None, cell.dtype)]
    assert results
    return any(result.status == "failed" for result in results)


MUTANTS = {
    "another multiplier for odd elements": (
        "from unidrop.philox import ODD_MULTIPLIER, philox",
        "from unidrop.philox import philox\n\nODD_MULTIPLIER = 0x6C078967",
        "mask",
        None,
    ),
    "greater for greater or equal": (
        'icmp_unsigned(">="',
        'icmp_unsigned(">"',
        "threshold",
        None,
    ),
    "a signed comparison": ("icmp_unsigned(", "icmp_signed(", "mask", None),
    "bfloat16 half up": ("0x7FFF + ((product >> 16) & 1)", "0x8000", "output", "bfloat16"),
    "float16 half up": ("0xFFF + ((magnitude >> 13) & 1)", "0x1000", "output", "float16"),
    "a product for selection": ("keep.select(product, 0)", "product", "dropped-is-zero", "float32"),
    "a counter of 32 bits": ("blocks >> 32, zero, zero", "zero, zero, zero", "windows", None),
    "a wrong transpose": (
        "row.store(builder.add(tile",
        "columns[i].store(builder.add(tile",
        "layout",
        "float32",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_turns_matrix_red_by_mutant(mutate, mutant):
    old, new, contract, dtype = MUTANTS[mutant]
    mutate(replace_once(SOURCE, old, new))
    assert fails(contract, dtype)


def test_turns_matrix_red_by_one_round_fewer(mutate, tmp_path, monkeypatch):
    source = replace_once(PHILOX, *TENTH_ROUND)
    monkeypatch.setitem(
        sys.modules, "mutant_philox", load_module("mutant_philox", source, tmp_path)
    )
    mutate(replace_once(SOURCE, "from unidrop.philox import", "from mutant_philox import"))
    assert fails("mask")


@pytest.mark.parametrize("blocks", ["32", "_BLOCKS"])
def test_stays_green_with_any_number_of_blocks(mutate, blocks):
    chosen = '32 if get_host_cpu_features().get("avx512f") else _BLOCKS'
    mutate(replace_once(SOURCE, f"_MANY_BLOCKS = {chosen}", f"_MANY_BLOCKS = {blocks}"))
    assert not any(fails(name) for name in ("mask", "windows"))


def test_stays_green_with_kernels_of_same_source(mutate):
    mutate(SOURCE)
    assert not any(fails(name) for name in ("mask", "threshold", "windows"))
    assert not any(fails(name, "float32") for name in ("layout", "output", "dropped-is-zero"))
