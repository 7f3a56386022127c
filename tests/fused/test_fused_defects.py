"""Defects planted in the kernels: the matrix must turn red."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
from fused_arrays import FUSED

from unidrop.conformance import Cell, cells, run_cell
from unidrop.conformance.backends.numpy import Numpy
from unidrop.fused import kernels

SOURCE = Path(kernels.__file__).read_text(encoding="utf-8")
CORES_PHILOX = Path(sys.modules["unidrop.philox"].__file__).read_text(encoding="utf-8")
TENTH_ROUND = ("ROUNDS: Final = 10", "ROUNDS: Final = 9")


def get_module(name, source, folder):
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replaced(source, old, new):
    assert source.count(old) == 1, f"{old!r} is to be found once, to plant a defect there"
    return source.replace(old, new)


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Return a function that puts kernels of a changed source in place of the real ones."""

    def put(source):
        mutant = get_module("planted_kernels", source, tmp_path)
        monkeypatch.setattr(kernels, "make_kernel", mutant.make_kernel)
        FUSED._compile.cache_clear()
        FUSED.prepare.cache_clear()

    yield put
    monkeypatch.undo()
    FUSED._compile.cache_clear()
    FUSED.prepare.cache_clear()


def failed(contract, dtype=None):
    chosen = [cell for cell in cells(Numpy(), [contract]) if isinstance(cell, Cell)]
    results = [run_cell(cell) for cell in chosen if dtype in (None, cell.dtype)]
    assert results
    return any(result.status == "failed" for result in results)


DEFECTS = {
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
    "a tile turned wrongly": (
        "row.store(builder.add(tile",
        "columns[i].store(builder.add(tile",
        "layout",
        "float32",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_turns_matrix_red_by_defect_of_kernels(plant, defect):
    old, new, contract, dtype = DEFECTS[defect]
    plant(replaced(SOURCE, old, new))
    assert failed(contract, dtype)


def test_turns_matrix_red_by_one_round_fewer(plant, tmp_path, monkeypatch):
    source = replaced(CORES_PHILOX, *TENTH_ROUND)
    monkeypatch.setitem(
        sys.modules, "planted_philox", get_module("planted_philox", source, tmp_path)
    )
    plant(replaced(SOURCE, "from unidrop.philox import", "from planted_philox import"))
    assert failed("mask")


@pytest.mark.parametrize("blocks", ["32", "_BLOCKS"])
def test_stays_green_with_any_number_of_blocks_at_a_time(plant, blocks):
    chosen = '32 if get_host_cpu_features().get("avx512f") else _BLOCKS'
    plant(replaced(SOURCE, f"_MANY_BLOCKS = {chosen}", f"_MANY_BLOCKS = {blocks}"))
    assert not any(failed(name) for name in ("mask", "windows"))


def test_stays_green_with_kernels_of_same_source(plant):
    plant(SOURCE)
    assert not any(failed(name) for name in ("mask", "threshold", "windows"))
    assert not any(failed(name, "float32") for name in ("layout", "output", "dropped-is-zero"))
