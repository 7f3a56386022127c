"""Mutants of the kernels: the matrix turns red for each of them."""

import importlib
import sys
from pathlib import Path

import pytest
from fused_arrays import FUSED

from unidrop.adapters.numpy import functional as adapter
from unidrop.conformance import FUSED as FUSED_MODE
from unidrop.conformance import Cell, cells, run_cell
from unidrop.conformance.backends.numpy import Numpy
from unidrop.fused import kernels

pytestmark = pytest.mark.slow  # each mutant is compiled

FOLDER = Path(kernels.__file__).parent
SOURCES = {file.stem: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.py")}
SOURCES["philox"] = (FOLDER.parent / "philox.py").read_text(encoding="utf-8")


def forget_kernels():
    for cached in (FUSED._compile, FUSED.prepare, adapter._prepare_plain):
        cached.cache_clear()


@pytest.fixture
def mutate(tmp_path, monkeypatch):
    """Return a function that compiles the kernels after a change in one of their files."""

    def replace(name, old, new):
        assert SOURCES[name].count(old) == 1, f"{old!r} must occur once"
        folder = tmp_path / "mutant"
        folder.mkdir()
        for file, source in SOURCES.items():
            source = source.replace(old, new) if file == name else source
            source = source.replace("unidrop.fused.", "mutant.")
            source = source.replace("from unidrop.philox", "from mutant.philox")
            text = "" if file == "__init__" else source
            (folder / f"{file}.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        mutant = importlib.import_module("mutant.kernels")
        monkeypatch.setattr(kernels, "make_kernel", mutant.make_kernel)
        forget_kernels()

    yield replace
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mutant"]:
        del sys.modules[name]
    forget_kernels()


def fails(contract, dtype=None):
    """Return whether NumPy's backend fails a contract, in any mode and in one or every dtype."""
    chosen = [cell for cell in cells(Numpy(), [contract]) if isinstance(cell, Cell)]
    results = [run_cell(cell) for cell in chosen if dtype in (None, cell.dtype)]
    assert results
    return any(result.status == "failed" for result in results)


SECOND_ROUND = "hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0"
MUTANTS = {
    "one round fewer": ("philox", "ROUNDS: Final = 10", "ROUNDS: Final = 9", "mask", None),
    "a lost key word": ("philox", SECOND_ROUND, SECOND_ROUND[:-9] + " , lo0", "mask", None),
    "another multiplier for odd elements": (
        "generator",
        "[1, ODD_MULTIPLIER]",
        "[1, ODD_MULTIPLIER + 2]",
        "mask",
        None,
    ),
    "blocks out of order": (
        "generator",
        "even, odd = [0, 8, 2",
        "even, odd = [2, 8, 0",
        "mask",
        None,
    ),
    "a wrong first product": ("generator", "(i * m for i in", "(i * m + 1 for i in", "mask", None),
    "a product of 32 bits": (
        "generator",
        "product = (a.first * m)",
        "product = ((a.first * m) & MASK32)",
        "mask",
        None,
    ),
    "greater for greater or equal": (
        "llvm",
        'self._compare(">=", other)',
        'self._compare(">", other)',
        "threshold",
        None,
    ),
    "a signed comparison": ("llvm", "icmp_unsigned(", "icmp_signed(", "mask", None),
    "bfloat16 half up": (
        "products",
        "0x7FFF + ((product >> 16) & 1)",
        "0x8000",
        "output",
        "bfloat16",
    ),
    "float16 half up": (
        "products",
        "0xFFF + ((magnitude >> 13) & 1)",
        "0x1000",
        "output",
        "float16",
    ),
    "a product for selection": (
        "pieces",
        "keep.select(product, 0)",
        "product",
        "dropped-is-zero",
        "float32",
    ),
    "a counter of 32 bits in registers": (
        "pieces",
        "low, high, many = block & MASK32, block >> 32,",
        "low, high, many = block & MASK32, block & 0,",
        "windows",
        None,
    ),
    "a counter of 32 bits in the buffer": (
        "pieces",
        "write(blocks, blocks >> 32, i)",
        "write(blocks, blocks & 0, i)",
        "windows",
        None,
    ),
    "a low word that wraps": (
        "pieces",
        "(f.number(1 << 32) -",
        "(f.number(1 << 40) -",
        "windows",
        None,
    ),
    "rows that repeat": ("kernels", "start.set(start.get() + step)", "pass", "windows", None),
    "a wrong transpose": (
        "kernels",
        "f.store(row, tile + pitch * i)",
        "f.store(vectors[0], tile + pitch * i)",
        "layout",
        "float32",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_turns_matrix_red_by_mutant(mutate, mutant):
    name, old, new, contract, dtype = MUTANTS[mutant]
    mutate(name, old, new)
    assert fails(contract, dtype)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_stays_green_with_any_number_of_groups(mutate, groups):
    mutate("pieces", '(4 if has_feature("avx512f") else 2)', str(groups))
    assert not any(fails(name) for name in ("mask", "windows"))


def test_stays_green_with_kernels_of_same_source(mutate):
    mutate("kernels", "SIZE = range(7)", "SIZE = range(7)")
    assert not any(fails(name) for name in ("mask", "threshold", "windows"))
    assert not any(fails(name, "float32") for name in ("layout", "output", "dropped-is-zero"))


def test_turns_matrix_red_by_a_wrong_plain_call(monkeypatch):
    run_plain = adapter._run_plain
    monkeypatch.setattr(adapter, "_run_plain", lambda x, *others: run_plain(-x, *others))
    chosen = [cell for cell in cells(Numpy(), ["output"]) if isinstance(cell, Cell)]
    failed = {cell.mode for cell in chosen if run_cell(cell).status == "failed"}
    assert failed == {FUSED_MODE}
