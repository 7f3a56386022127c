"""The choice of kernels and tiles on a GPU, and whether Triton can compile them."""

import builtins
import itertools
import math
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from unidrop.fused import triton as package
from unidrop.fused.triton.layout import TILE, Flat, Rows, choose_layout


def choose(shape, mask_strides, strides, y_strides=None, size=4, begins=True, far=False):
    return choose_layout(shape, mask_strides, strides, y_strides or strides, size, begins, far)


def test_joins_axes_of_contiguous_arrays():
    assert isinstance(choose((5, 6, 7), (42, 7, 1), (42, 7, 1)), Flat)
    assert isinstance(choose((5, 1, 7), (7, 99, 1), (7, 0, 1)), Flat)
    assert isinstance(choose((2, 3, 5), (15, 5, 1), (5, 10, 1)), Rows)
    assert choose((), (), ()).size == 1


@pytest.mark.parametrize(
    ("size", "parts"), [(1, 1), (2, 1), (4, 2), (8, 4), (16, 4)], ids=lambda number: str(number)
)
def test_divides_blocks_into_parts_of_16_bytes(size, parts):
    assert choose((64,), (1,), (1,), size=size).parts == parts


def test_uses_64_bits_for_large_or_far_arrays_alone():
    assert not choose((1 << 30,), (1,), (1,)).is_wide
    assert choose(((1 << 30) + 8,), (1,), (1,)).is_wide
    assert choose((8,), (1,), (1,), far=True).is_wide
    assert not choose((8, 8), (8, 1), (16, 1)).is_wide
    assert choose((8, 8), (8, 1), (1 << 29, 1)).is_wide
    assert choose((8, 1 << 30), (0, 1), (1 << 30, 1)).is_wide


def test_knows_alignment_of_rows_in_the_mask():
    aligned = choose((16, 24), (48, 1), (24, 1))
    assert aligned.is_aligned
    assert aligned.unit == 8
    assert not choose((16, 24), (48, 1), (24, 1), begins=False).is_aligned
    assert not choose((16, 24), (41, 1), (24, 1)).is_aligned


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((16, 23), (24, 1)), ((16, 24), (25, 1)), ((4, 16, 24), (385, 24, 1)), ((15, 24), (1, 16))],
    ids=str,
)
def test_claims_no_alignment_in_memory_that_is_not_there(shape, strides):
    mask_strides = tuple(48 * math.prod(shape[1:-1][i:]) for i in range(len(shape) - 1))
    assert choose(shape, (*mask_strides, 1), strides).unit == 1


def test_shares_words_of_rows_under_a_broadcast_mask():
    layout = choose((32, 4096), (0, 1), (4096, 1))
    assert layout.is_shared
    assert layout.tile == (8, TILE // 64)
    channels = choose((4, 64, 100), (64, 1, 0), (6400, 100, 1))
    assert (channels.columns.length, channels.rows.length) == (256, 100)
    assert channels.y_unit == "row"


def test_walks_transposed_arrays_along_memory():
    layout = choose((512, 512), (512, 1), (1, 512))
    assert (layout.x_unit, layout.y_unit, layout.unit) == ("row", "row", 8)
    assert layout.tile[0] == 64
    mixed = choose((512, 512), (512, 1), (1, 512), (520, 1))
    assert (mixed.x_unit, mixed.y_unit, mixed.unit) == ("row", "column", 1)


def test_covers_every_element_once():
    """The tiles of a grid, the outer axes and the loops cover all positions of all axes."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape = tuple(int(n) for n in rng.integers(1, 40, rng.integers(1, 8)))
        strides = [int(s) for s in np.cumprod([1, *(n + 1 for n in shape[:0:-1])])[::-1]]
        layout = choose(shape, tuple(strides), tuple(rng.permutation(strides).tolist()))
        if isinstance(layout, Flat):
            assert layout.size == math.prod(shape)
            continue
        axes = (layout.columns, layout.rows, *layout.outer, *layout.loops)
        assert math.prod(axis.length for axis in axes) == math.prod(shape)
        height, width = layout.tile
        assert height * width * 8 <= TILE
        counts = [layout.grid[(layout.turn + i) % 3] for i in range(3)]
        assert counts[0] * width * 8 >= layout.columns.length + (0 if layout.is_aligned else 7)
        assert counts[1] * height >= layout.rows.length
        assert counts[2] == math.prod(axis.length for axis in layout.outer)


def test_claims_only_alignment_that_every_tile_has():
    """A wrong claim makes a GPU load from an address that its instruction does not accept."""
    rng = np.random.default_rng(1)
    claims = 0
    for _ in range(400):
        ndim = int(rng.integers(1, 6))
        shape = tuple(int(n) for n in rng.choice([1, 2, 3, 8, 16, 24, 72], ndim))
        order, gap = rng.permutation(ndim), int(rng.choice([0, 8, 4]))
        strides, stride = [0] * ndim, 1
        for axis in order:
            strides[axis] = stride
            stride = stride * shape[axis] + gap
        mask_strides = [math.prod(shape[i + 1 :]) for i in range(ndim)]
        for axis in range(ndim):
            mask_strides[axis] *= int(rng.integers(4) > 0)
        layout = choose(shape, tuple(mask_strides), tuple(strides), size=int(rng.choice([2, 8])))
        if isinstance(layout, Flat) or layout.unit == 1:
            continue
        claims += 1
        columns, rows = layout.columns, layout.rows
        adjacent = columns if layout.x_unit == "column" else rows
        assert adjacent.x == adjacent.y == 1
        assert adjacent.length % 8 == 0
        others = [
            axis for axis in (columns, rows, *layout.outer, *layout.loops) if axis != adjacent
        ]
        assert all(axis.x % 8 == axis.y % 8 == 0 for axis in others)
        assert layout.x_unit == "column" or layout.tile[0] % 8 == 0
    assert claims > 50


def test_respects_limits_of_a_grid():
    for order in itertools.permutations((3, 70_000, 80_000, 90_000)):
        lengths = (*order, 9)
        strides = [int(s) for s in np.cumprod([1, *(n + 1 for n in lengths[:0:-1])])[::-1]]
        layout = choose(lengths, tuple(strides), tuple(strides))
        assert max(layout.grid[1:]) < 1 << 16
        assert layout.grid[0] < 1 << 31


def test_counts_parts_of_complex_numbers_in_distances():
    """Four rows are 2^31 parts apart from this stride on."""
    stride = (1 << 28) - 16
    assert not choose((4, 16), (16, 1), (stride, 1), size=8).is_wide
    assert choose((4, 16), (16, 1), (stride + 16, 1), size=8).is_wide


# --- Triton itself --------------------------------------------------------------------------------


LAUNCHES = SimpleNamespace(utils=None)


class NoCompiler:
    """A driver of a machine without a C compiler."""

    @property
    def utils(self):
        raise RuntimeError("Failed to find C compiler")


@pytest.fixture
def fresh():
    """Forget whether Triton is there, before a test and after it."""
    package.unavailable.cache_clear()
    yield
    package.unavailable.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_imports_no_triton_after_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert "unless it is imported first" in package.unavailable()
    assert "triton" not in sys.modules
    pretend(monkeypatch, "3.7.1")
    package.unavailable.cache_clear()
    assert package.unavailable() is None


def pretend(monkeypatch, version, driver=LAUNCHES):
    module = ModuleType("triton")
    module.__version__ = version
    module.runtime = SimpleNamespace(driver=SimpleNamespace(active=driver))
    monkeypatch.setitem(sys.modules, "triton", module)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("version", ["3.4.0", "3.10.1", "4.0", "3.5.1+git0"])
@pytest.mark.usefixtures("fresh")
def test_accepts_versions_from_3_4_on(version, monkeypatch):
    pretend(monkeypatch, version)
    assert package.unavailable() is None


@pytest.mark.parametrize("version", ["2.3.1", "3.3.1"])
@pytest.mark.usefixtures("fresh")
def test_names_a_version_that_is_too_old(version, monkeypatch):
    pretend(monkeypatch, version)
    assert package.unavailable() == f"Triton {version} is older than 3.4"


@pytest.mark.usefixtures("fresh")
def test_says_why_triton_cannot_launch(monkeypatch):
    pretend(monkeypatch, "3.7.1", NoCompiler())
    assert package.unavailable() == "Triton can't launch kernels: Failed to find C compiler"


@pytest.mark.usefixtures("fresh")
def test_says_that_triton_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert package.unavailable() == "Triton is not installed"


@pytest.mark.parametrize(
    "error", [ImportError("libtriton is damaged"), ModuleNotFoundError("x", name="numpy2")], ids=str
)
@pytest.mark.usefixtures("fresh")
def test_says_why_triton_cannot_be_imported(monkeypatch, error):
    load = builtins.__import__

    def fail(name, *arguments, **options):
        if name == "triton":
            raise error
        return load(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(builtins, "__import__", fail)
    assert package.unavailable() == f"Triton can't be imported: {error}"


def test_imports_no_triton_before_it_is_needed():
    program = "import sys, unidrop.fused.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
